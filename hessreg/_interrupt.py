"""Ctrl-C and SIGTERM while a command starts: one line and exit code 130, whatever is imported.

An exception would not do: it surfaces wherever Python happens to be, also where modules turn it
into an error of theirs or swallow it. There is nothing to clean up yet, so the process just ends.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

__all__ = ["INTERRUPTED", "end_at_once", "is_command"]

INTERRUPTED = 130  # the exit code


def is_command() -> bool:
    """Whether this process is ``hessreg`` or ``python -m hessreg``, which is being looked up."""
    program = getattr(sys, "argv", [""])[:1] or [""]
    return program == ["-m"] or Path(program[0]).stem == "hessreg"


def end_at_once() -> None:
    """Let the signals end the process; `hessreg.cli.main` has its own way once it is there."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"hessreg: interrupted\n")
    os._exit(INTERRUPTED)
