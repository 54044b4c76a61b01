"""Which implementation of the operators runs: compiled CPU or CUDA kernels, or the reference."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

_BACKENDS = ("auto", "reference", "cpu", "cuda")
_libraries: dict[str, str] = {}  # name -> "loaded", or why it is not


def _load(name: str) -> None:
    try:
        module = importlib.import_module(f"hessreg.{name}")
    except ImportError as error:
        _libraries[name] = str(error)
    else:
        _libraries[name] = "loaded"
        _options.update(json.loads(module.build_options))


def _wish() -> str:
    wish = os.environ.get("HESSREG_BACKEND", "auto")
    if wish not in _BACKENDS:
        raise ValueError(f"HESSREG_BACKEND must be one of {', '.join(_BACKENDS)}, got {wish!r}")
    return wish


def _warn_of_fallback(wish: str) -> None:
    reasons = [f"hessreg.{name}: {why}" for name, why in _libraries.items() if why != "loaded"]
    if wish in ("cpu", "cuda") and reasons:
        raise ImportError(f"HESSREG_BACKEND={wish}, but {'; '.join(reasons)}")
    if wish == "auto" and reasons:
        warnings.warn(
            "hessreg falls back to its slower reference implementation in torch: "
            + "; ".join(reasons),
            RuntimeWarning,
            stacklevel=2,
        )


_options: dict[str, Any] = {}
_chosen = _wish()
if _chosen != "reference":
    _load("_C")
    if torch.version.cuda is not None and _chosen != "cpu":
        _load("_cuda")
    _warn_of_fallback(_chosen)


def compiled() -> bool:
    """Whether the operators are registered with torch, so that they can be given derivatives."""
    return _libraries.get("_C") == "loaded"


def runs_compiled(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors on a device now."""
    if _chosen == "reference" or not compiled():
        return False
    if device.type == "cuda":
        return _libraries.get("_cuda") == "loaded"
    return device.type in ("cpu", "meta")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend for the length of a ``with`` block, as ``HESSREG_BACKEND`` does for a run.

    Args:
        name: ``"auto"`` (compiled kernels where there are any) or ``"reference"`` (plain torch).

    Raises:
        ValueError: for any other name.

    Example:
        >>> import hessreg, torch
        >>> g, v = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
        >>> with hessreg.backend("reference"):
        ...     hessreg.project_orthogonal(g, v)
        tensor([0., 1.])
    """
    global _chosen
    if name not in ("auto", "reference"):
        raise ValueError(f"name must be 'auto' or 'reference', got {name!r}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def build_info() -> dict[str, Any]:
    """What was built, what was loaded and what runs.

    Returns:
        A dictionary for people and bug reports: ``version``, ``python``, ``torch``, ``platform``,
        ``backend`` (``"cpu"``, ``"cpu+cuda"`` or ``"reference"``), ``libraries`` (each ``"loaded"``
        or the reason why not) and ``build`` (the options the libraries were built with).

    Example:
        >>> import hessreg
        >>> sorted(hessreg.build_info())
        ['backend', 'build', 'libraries', 'platform', 'python', 'torch', 'version']
    """
    from hessreg import __version__

    loaded = [name for name in ("_C", "_cuda") if _libraries.get(name) == "loaded"]
    names = {"_C": "cpu", "_cuda": "cuda"}
    running = [] if _chosen == "reference" else [names[name] for name in loaded]
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "backend": "+".join(running) or "reference",
        "libraries": dict(_libraries),
        "build": dict(_options),
    }
