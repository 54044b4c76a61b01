"""Checks of arguments that several functions share, and the error of a computation gone wrong."""

from __future__ import annotations

import math
from numbers import Integral, Real

__all__ = ["NonFiniteError", "check_at_least", "check_not_negative"]


class NonFiniteError(ValueError):
    """NaN or infinity in a loss, a gradient or a product of an operator."""


def check_at_least(minimum: int, **counts: int) -> None:
    """Refuses a count that is no integer or below its minimum, by name.

    Raises:
        TypeError: not an integer; True and False are none.
        ValueError: names the argument, what was wanted and what came.

    Example:
        >>> check_at_least(1, num_steps=0)
        Traceback (most recent call last):
        ValueError: num_steps must be at least 1, got 0
    """
    for name, count in counts.items():
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {count}")


def check_not_negative(**numbers: float) -> None:
    """Refuses what is not a finite number of at least 0, by name.

    Raises:
        TypeError: not a real number.
        ValueError: names the argument, what was wanted and what came.

    Example:
        >>> check_not_negative(weight=-1.0)
        Traceback (most recent call last):
        ValueError: weight must be finite and not negative, got -1.0
    """
    for name, number in numbers.items():
        if not isinstance(number, Real):
            raise TypeError(f"{name} must be a number, got {number!r}")
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {number}")
