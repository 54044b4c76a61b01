"""What ends a command with one line: bad input, or a failure of what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hessreg.curvature import NonFiniteError

__all__ = ["FailedError", "InputError", "bad_input", "failing"]


class InputError(Exception):
    """What the user gave cannot be used."""


class FailedError(Exception):
    """The command could not do what it was told to, although the input was good."""


@contextmanager
def bad_input(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """What is wrong here is wrong with the input.

    Raises:
        InputError: In place of an error of this kind.
    """
    try:
        yield
    except NonFiniteError:
        raise
    except kind as error:
        raise InputError(str(error)) from None


@contextmanager
def failing(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are failures of the command.

    Raises:
        FailedError: In place of an error of these kinds.
    """
    try:
        yield
    except kinds as error:
        raise FailedError(str(error)) from error
