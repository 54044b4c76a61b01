"""What the user names as ``module:factory``: finding it, and calling what may raise anything."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hessreg.curvature import NonFiniteError

__all__ = ["FactoryError", "call_safely", "find_callable", "is_factory_name"]

_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


class FactoryError(ValueError):
    """There is no such factory, or it fails."""


def is_factory_name(name: str) -> bool:
    """Return whether a name has the form ``module:factory``.

    Example:
        >>> is_factory_name("package.module:Class.method"), is_factory_name("runs/first")
        (True, False)
    """
    return re.fullmatch(f"{_NAME}:{_NAME}", name) is not None


def find_callable(name: str) -> Callable[..., Any]:
    """Import ``module:factory``, with the current folder among those of modules.

    Raises:
        FactoryError: If there is none, or it cannot be called.
    """
    module, _, names = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found = call_safely(lambda: importlib.import_module(module), f"cannot import {module}")
    for part in names.split("."):
        if not hasattr(found, part):
            raise FactoryError(f"{name}: {module} has no {names}")
        found = getattr(found, part)
    if not callable(found):
        raise FactoryError(f"{name} must be callable, got {type(found).__name__}")
    return found


def call_safely(function: Callable[[], Any], name: str) -> Any:
    """Call what is not ours: it may raise anything.

    Raises:
        FactoryError: Names what was called, and what it raised.
        NonFiniteError: If it raised one.
    """
    try:
        return function()
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}") from None
    except Exception as error:
        raise FactoryError(f"{name}: {type(error).__name__}: {error}") from None
