"""The user's own parts of a run: ``module:factory``, a callable in a module."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["find_factory", "is_factory"]


def is_factory(target: str) -> bool:
    """Return whether a text has the form ``module:factory``, dots allowed in both.

    Example:
        >>> is_factory("package.module:build"), is_factory("adam")
        (True, False)
    """
    name = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
    return re.fullmatch(f"{name}:{name}", target) is not None


def find_factory(target: str) -> Callable[..., Any]:
    """Import what ``module:factory`` names, with the current folder among those of modules.

    Raises:
        ValueError: If the module cannot be imported, or has no such callable.

    Example:
        >>> find_factory("math:sqrt")(4.0)
        2.0
    """
    module, _, names = target.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found = _import(module)
    for name in names.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{target}: {module} has no {names}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{target} must be callable, got {type(found).__name__}")
    return found


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # it is not ours, and may raise anything
        raise ValueError(f"cannot import {module}: {type(error).__name__}: {error}") from None
