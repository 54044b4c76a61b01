"""What a running training shows: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = [
    "BarProgress",
    "PlainProgress",
    "ProgressReport",
    "SilentProgress",
    "make_progress",
    "say",
]

_SHORT = {
    "loss": "loss",
    "content": "content",
    "style": "style",
    "loss_g": "loss_g",
    "loss_d": "loss_d",
    "hessian_norm_g": "|H_G|",
    "hessian_norm_d": "|H_D|",
    "mmd2": "MMD^2",
    "hessian_penalty": "HP",
    "sigma": "sigma",
    "angle_g": "angle_g",
    "angle_d": "angle_d",
    "angle": "angle",
    "hsc_condition_g": "cond(H_G)",
    "hsc_condition_d": "cond(H_D)",
    "fdd": "FDD",
    "modes": "modes",
    "quality": "quality",
}


class ProgressReport(Protocol):
    """Receives a row of metrics from time to time; entered before and left after training."""

    def __enter__(self) -> ProgressReport:
        """Start to show."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop to show."""
        ...

    def update(self, row: Mapping[str, float], fraction: float) -> None:
        """Show a row of ``metrics.jsonl``; ``fraction`` of the run is done."""
        ...


def make_progress(title: str, plain: bool = False) -> ProgressReport:
    """Return a bar if standard output is a terminal and ``plain`` is false, else plain lines."""
    return PlainProgress(title) if plain or not sys.stdout.isatty() else BarProgress(title)


def say(line: str) -> None:
    """Print a line; once nobody reads standard output (``| head``), all goes to nowhere."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _numbers(row: Mapping[str, float]) -> str:
    seconds = row.get("seconds", row["cpu_seconds"])
    rate = row["step"] / max(seconds, 1e-9)
    shown = [f"{name} {row[key]:.3g}" for key, name in _SHORT.items() if key in row]
    pace = f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
    head = f"step {row['step']:.0f}  {seconds:.1f} s  {pace} steps/s"
    return "  ".join([head, *shown])


class SilentProgress:
    """Shows nothing."""

    def __enter__(self) -> SilentProgress:
        """Nothing to start."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to stop."""

    def update(self, row: Mapping[str, float], fraction: float) -> None:
        """Nothing to show."""


class PlainProgress:
    """Prints a line every few seconds.

    Args:
        title: Start of each line.
        interval: Seconds between lines.
    """

    def __init__(self, title: str, interval: float = 3.0) -> None:
        self.title = title
        self.interval = interval
        self._last = time.monotonic()

    def __enter__(self) -> PlainProgress:
        """Nothing to start."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to stop."""

    def update(self, row: Mapping[str, float], fraction: float) -> None:
        """Print the row if the last line is long enough ago."""
        if time.monotonic() - self._last >= self.interval:
            self._last = time.monotonic()
            say(f"{self.title}  {100 * fraction:3.0f} %  {_numbers(row)}")


class BarProgress:
    """Shows a bar with rate, losses and norms.

    Args:
        title: Text before the bar.
    """

    def __init__(self, title: str) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn()
        self._progress: Progress = Progress(*columns, TextColumn("{task.fields[numbers]}"))
        self._task: TaskID = self._progress.add_task(title, total=1.0, numbers="")

    def __enter__(self) -> BarProgress:
        """Draw the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the bar as it is."""
        self._progress.stop()

    def update(self, row: Mapping[str, float], fraction: float) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=fraction, numbers=_numbers(row))
