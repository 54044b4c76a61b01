"""Checks that every configuration makes of its fields."""

from __future__ import annotations

import math
import reprlib
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args, get_type_hints

__all__ = [
    "check_types",
    "require",
    "require_at_least",
    "require_finite",
    "require_positive",
]


def require(condition: bool, name: str, wanted: str, value: object) -> None:
    """Refuse a value, saying what it must be.

    Raises:
        ValueError: Unless the condition holds.

    Example:
        >>> require(False, "size", "at least 8", 4)
        Traceback (most recent call last):
        ValueError: size must be at least 8, got 4
    """
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {reprlib.repr(value)}")


def require_finite(config: Any, *names: str) -> None:
    """Refuse fields that are not finite, by name.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        require(math.isfinite(getattr(config, name)), name, "finite", getattr(config, name))


def require_at_least(config: Any, minimum: float, *names: str) -> None:
    """Refuse fields that are not finite or below a minimum, by name.

    Raises:
        ValueError: If one is.
    """
    require_finite(config, *names)
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, name, f"at least {minimum:g}", value)


def require_positive(config: Any, *names: str) -> None:
    """Refuse fields that are not finite or not above 0, by name.

    Raises:
        ValueError: If one is not.
    """
    require_finite(config, *names)
    for name in names:
        require(getattr(config, name) > 0, name, "positive", getattr(config, name))


def check_types(config: Any) -> None:
    """Refuse values that are not of the annotated types: YAML and Python give anything."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        wanted = _WANTED.get(hint) or f"one of {', '.join(get_args(hint))}"
        if is_dataclass(hint):
            wanted = "a mapping of names to values"
        require(_fits(value, hint), name, wanted, value)
        if isinstance(value, int):
            require(abs(value) < 2**63, name, "in (-2**63, 2**63)", value)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if choices := get_args(hint):
        return isinstance(value, str) and value in choices
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(
            value, bool
        )
    return isinstance(value, hint)


_WANTED: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    float | str: "a number or text",
    float | None: "a number or null",
    int | None: "an integer or null",
    bool: "true or false",
}
