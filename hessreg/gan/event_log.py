"""TensorBoard events and Weights & Biases logs of a run, where they are wanted."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.config import TrainConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["EventLog"]


class EventLog:
    """Writes rows of metrics as scalars.

    Args:
        path: Folder of the run.
        steps_done: TensorBoard events of later steps, from before an interruption, are hidden.
        config: Says what is wanted.
        enabled: False in all processes but one of several that train together.
    """

    def __init__(
        self, path: Path, steps_done: int, config: TrainConfig, enabled: bool = True
    ) -> None:
        self._writer: SummaryWriter | None = None
        self._wandb: Any = None
        if config.tensorboard and enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path / "tensorboard"), purge_step=steps_done + 1)
        if config.wandb and enabled:
            self._wandb = _start_wandb(path, config)

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
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))

    def add(self, row: Mapping[str, float]) -> None:
        """Write every number of a row at its step."""
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name != "step"}
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def _start_wandb(path: Path, config: TrainConfig) -> Any:
    """A run under the folder's name, and an identifier in the folder by which it is continued.

    Account, server and offline mode are wandb's own settings (``WANDB_MODE`` and its kin).
    """
    file = path / "wandb-id"
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex[:12].encode())
    return importlib.import_module("wandb").init(
        project=config.wandb,
        name=path.name,
        id=file.read_text(),
        resume="allow",
        dir=str(path),
        config=config.to_dict(),
    )
