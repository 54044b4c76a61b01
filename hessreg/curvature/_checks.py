"""Checks of arguments that several functions share."""

from __future__ import annotations

__all__ = ["check_at_least"]


def check_at_least(minimum: int, **counts: float) -> None:
    """Refuses a count below its minimum, by name.

    Raises:
        ValueError: names the argument, what was wanted and what came.

    Example:
        >>> check_at_least(1, num_steps=0)
        Traceback (most recent call last):
        ValueError: num_steps must be at least 1, got 0
    """
    for name, count in counts.items():
        if not count >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {count}")
