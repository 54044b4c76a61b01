"""TensorBoard events of a run, if they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["EventLog"]


class EventLog:
    """Writes rows of metrics as scalars.

    Args:
        path: Folder of the event files.
        steps_done: Events of later steps, from before an interruption, are hidden.
        enabled: Write nothing if false.
    """

    def __init__(self, path: Path, steps_done: int, enabled: bool) -> None:
        self._writer: SummaryWriter | None = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path), purge_step=steps_done + 1)

    def __enter__(self) -> EventLog:
        """Nothing to start."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Mapping[str, float]) -> None:
        """Write every number of a row at its step."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(row["step"]))
