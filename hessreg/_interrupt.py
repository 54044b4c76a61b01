"""Ctrl-C and SIGTERM: one line and exit code 130, whatever is imported while a command starts.

There an exception would not do: it surfaces wherever Python happens to be, also where modules turn
it into an error of theirs or swallow it. There is nothing to clean up yet, so the process just
ends. Once the command runs, `Interrupts` raises KeyboardInterrupt, but not within an import.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["INTERRUPTED", "Interrupts", "end_at_once", "is_command"]

INTERRUPTED = 130  # the exit code
_PATIENCE = 5.0  # seconds that an import may take after the signal
_PAUSE = 0.02


def is_command() -> bool:
    """Whether this process is ``hessreg`` or ``python -m hessreg``, which is being looked up."""
    program = getattr(sys, "argv", [""])[:1] or [""]
    return program == ["-m"] or Path(program[0]).stem == "hessreg"


def end_at_once() -> None:
    """Let the signals end the process; `Interrupts` take over once a command runs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"hessreg: interrupted\n")
    os._exit(INTERRUPTED)


class Interrupts:
    """SIGTERM ends a command in the way Ctrl-C does: by a KeyboardInterrupt in the main thread."""

    def __init__(self) -> None:
        self.received = False
        self._first = math.inf
        self._previous: dict[int, Any] = {}
        self._report = sys.unraisablehook

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            sys.unraisablehook = self._raise_again
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._report

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._first = min(self._first, time.monotonic())
        if _is_import(frame) and time.monotonic() < self._first + _PATIENCE:
            again = threading.Timer(_PAUSE, _send, [threading.get_ident(), number])
            again.daemon = True
            again.start()
            return
        self.received = True
        raise KeyboardInterrupt

    def _raise_again(self, unraisable: Any) -> None:
        """Where an exception cannot rise, as in a destructor, it would only be printed."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        elif not (self.received and isinstance(unraisable.exc_value, ResourceWarning)):
            self._report(unraisable)


def _send(thread: int, number: int) -> None:
    """Wake the thread, too, whatever it waits for."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(thread, number)


def _is_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
