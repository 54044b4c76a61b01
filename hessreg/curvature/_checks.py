"""What functions of operators share: checks of arguments, and the error of what went wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, cast

import torch

if TYPE_CHECKING:
    from hessreg.curvature.operators import LinearOperator

__all__ = [
    "NonFiniteError",
    "check_at_least",
    "check_not_negative",
    "full_precision",
    "of_operator",
]

P = ParamSpec("P")
R = TypeVar("R")


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


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast: where that is on, it is for the loss.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.eye(2) @ torch.eye(2)).dtype
        torch.float32
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def of_operator(
    function: Callable[Concatenate[LinearOperator, P], R],
) -> Callable[Concatenate[LinearOperator, P], R]:
    """Refuses a first argument that is no operator, and keeps autocast out of the function.

    Raises:
        TypeError: no operator.

    Example:
        >>> of_operator(lambda op: op.shape)(torch.eye(2))
        Traceback (most recent call last):
        TypeError: op must be an operator with matvec, got a Tensor: pass DenseOperator(A)
    """

    @functools.wraps(function)
    def checked(op: LinearOperator, *args: P.args, **kwargs: P.kwargs) -> R:
        if not hasattr(op, "matvec"):
            hint = ": pass DenseOperator(A)" if isinstance(op, torch.Tensor) else ""
            kind = type(op).__name__
            raise TypeError(f"op must be an operator with matvec, got a {kind}{hint}")
        with full_precision(op.device):
            return function(op, *args, **kwargs)

    return cast("Callable[Concatenate[LinearOperator, P], R]", checked)
