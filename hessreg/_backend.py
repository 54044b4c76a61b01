"""Which implementation of the operators runs: compiled CPU or CUDA kernels, or the reference."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_BACKENDS = ("auto", "reference", "cpu", "cuda")
_libraries: dict[str, str] = {}  # name -> "loaded", or why it is not
_builds: dict[str, dict[str, Any]] = {}  # name -> the options it was built with


def _wish() -> str:
    wish = os.environ.get("HESSREG_BACKEND") or "auto"
    if wish not in _BACKENDS:
        raise ValueError(f"HESSREG_BACKEND must be one of {', '.join(_BACKENDS)}, got {wish!r}")
    return wish


def _load(name: str) -> None:
    try:
        module = importlib.import_module(f"hessreg.{name}")
    except ImportError as error:
        _libraries[name] = str(error)
    else:
        _libraries[name] = "loaded"
        _builds[name] = {**json.loads(module.build_options), "isa": module.isa}


def _load_libraries(wish: str) -> None:
    if wish == "reference":
        return
    _load("_C")
    if wish == "cuda" or (wish == "auto" and torch.version.cuda is not None):
        _load("_cuda")
    needed = {"auto": None, "cpu": "_C", "cuda": "_cuda"}[wish]
    if needed and _libraries[needed] != "loaded":
        raise ImportError(f"HESSREG_BACKEND={wish}, but hessreg.{needed}: {_libraries[needed]}")
    if not compiled():
        _warn_of_reference("_C")


@functools.cache
def _warn_of_reference(library: str) -> None:
    warnings.warn(
        "hessreg falls back to its slower reference implementation in torch: "
        f"hessreg.{library}: {_libraries.get(library, 'not loaded')}",
        RuntimeWarning,
        stacklevel=3,
    )


def compiled() -> bool:
    """Whether the operators are registered with torch, so that they can be given derivatives."""
    return _libraries.get("_C") == "loaded"


_load_libraries(_wish())
_is_compiled = compiled()
_in_reference: list[object] = []  # one entry for each ``backend("reference")`` that is open


def runs_compiled(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors on a device now."""
    if _in_reference or not _is_compiled:
        return False
    if device == _CPU:  # the name of a device's type is written anew at every look
        return True
    if device.type == "cuda" and _libraries.get("_cuda") != "loaded":
        _warn_of_reference("_cuda")
        return False
    return device.type in ("cuda", "cpu", "meta")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend for the length of a ``with`` block, as ``HESSREG_BACKEND`` does for a run.

    It holds for the whole process: the backward pass may run in other threads.

    Args:
        name: ``"reference"`` (plain torch), or ``"auto"``, which changes nothing.

    Raises:
        ValueError: for any other name.

    Example:
        >>> import hessreg, torch
        >>> g, v = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
        >>> with hessreg.backend("reference"):
        ...     hessreg.project_orthogonal(g, v)
        tensor([0., 1.])
    """
    if name not in ("auto", "reference"):
        raise ValueError(f"name must be 'auto' or 'reference', got {name!r}")
    if name == "auto":
        yield
        return
    token = object()
    _in_reference.append(token)
    try:
        yield
    finally:
        _in_reference.remove(token)


def build_info() -> dict[str, Any]:
    """What was built, what was loaded and what runs.

    Returns:
        A dictionary for people and bug reports: ``version``, ``python``, ``torch``, ``platform``,
        ``backend`` (``"cpu"``, ``"cpu+cuda"`` or ``"reference"``), ``libraries`` (each ``"loaded"``
        or the reason why not) and ``build`` (the options of the CPU library's build, and ``isa``,
        the instruction set of the kernels it chose).

    Example:
        >>> import hessreg
        >>> sorted(hessreg.build_info())
        ['backend', 'build', 'libraries', 'platform', 'python', 'torch', 'version']
    """
    from hessreg import __version__

    loaded = [name for name in ("_C", "_cuda") if _libraries.get(name) == "loaded"]
    names = {"_C": "cpu", "_cuda": "cuda"}
    running = [] if _in_reference else [names[name] for name in loaded]
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "backend": "+".join(running) or "reference",
        "libraries": dict(_libraries),
        "build": dict(_builds.get("_C", {})),
    }
