"""The folder of a run: configuration, metrics, checkpoints and pictures.

Everything but the TensorBoard events is written to a temporary file and renamed, or appended in
whole lines that a resumed run cuts back to its checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

from hessreg.gan.checkpoint import (
    CheckpointError,
    load_state,
    naming,
    save_state,
    write_atomically,
)
from hessreg.gan.config import TrainConfig

__all__ = ["RunFolder", "RunFolderError"]

_KEEP = 2
_LEFTOVER = ".*.tmp"
_PICTURES = 4 << 20  # bytes for pictures, metrics and events


class RunFolderError(ValueError):
    """A run folder cannot be created or read."""


class RunFolder:
    """Paths and files of one run.

    ``config.yaml``, ``metrics.jsonl``, ``result.json``, ``samples.png``, ``best.png``,
    ``curves.png``, ``kernel.png`` (of a Gaussian kernel), ``tensorboard/`` and in ``checkpoints/``
    the last two ``step-*.safetensors`` and ``best.safetensors``.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best.safetensors"
        self.metrics_file = path / "metrics.jsonl"
        self._existed = False
        self._unlock: weakref.finalize[..., RunFolder] | None = None

    def create(self, config: TrainConfig) -> None:
        """Make the folder, which must be new or empty, lock it and write the configuration.

        What a process that was killed here left before the configuration counts as empty.

        Raises:
            RunFolderError: If the folder has content already or cannot be written. Nothing is left
                of a folder that was made.
        """
        try:
            if self.path.exists() and not all(map(_is_first, self.path.iterdir())):
                raise RunFolderError(
                    f"{self.path} is not empty: choose another folder, or continue its run with:"
                    f" hessreg resume {self.path}"
                )
            self._existed = self.path.exists()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot write to {self.path}: {error.strerror}") from None
        try:
            self.lock()
            self._remove_leftovers()
            self.write_config(config)
        except BaseException:
            self.discard()
            raise

    def check_space(self, num_bytes: int) -> None:
        """Refuse to start what the disk cannot hold.

        Args:
            num_bytes: Size of a checkpoint: so many for the kept ones, the best and a new one.

        Raises:
            RunFolderError: If there is less.
        """
        there = sum(file.stat().st_size for file in self.checkpoints.glob("*.safetensors"))
        wanted = max(num_bytes, (_KEEP + 2) * num_bytes - there) + _PICTURES
        available = shutil.disk_usage(_existing(self.path)).free
        if available < wanted:
            raise RunFolderError(
                f"the disk of {self.path} is full: {wanted} bytes wanted for checkpoints and"
                f" pictures, {available} available"
            )

    def discard(self) -> None:
        """Remove what `create` made."""
        self.unlock()
        shutil.rmtree(self.path, ignore_errors=True)
        if self._existed:
            self.path.mkdir()

    def lock(self) -> None:
        """Keep other processes out until `unlock`, or the end of this object or process.

        Raises:
            RunFolderError: If another process has the lock.
        """
        if sys.platform == "win32" or self._unlock is not None:
            return
        import fcntl

        file = self.path / ".lock"
        with naming(file):
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise RunFolderError(f"{self.path} is in use by another process") from None
        self._unlock = weakref.finalize(self, os.close, handle)

    def unlock(self) -> None:
        """Let other processes in."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def write_config(self, config: TrainConfig) -> None:
        """Write ``config.yaml``."""
        import yaml

        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        write_atomically(self.path / "config.yaml", text.encode())

    def read_config(self) -> TrainConfig:
        """Read ``config.yaml``.

        Raises:
            RunFolderError: If it is missing or damaged.
        """
        import yaml

        file = self.path / "config.yaml"
        try:
            return TrainConfig.from_dict(yaml.safe_load(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise RunFolderError(
                f"{self.path} is not a run folder: no readable config.yaml ({error.strerror})"
            ) from None
        except (ValueError, TypeError, OverflowError, RecursionError, yaml.YAMLError) as error:
            raise RunFolderError(f"{file} is damaged: {' '.join(str(error).split())}") from None

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint and remove all but the last two."""
        save_state(self.checkpoints / f"step-{step:09d}.safetensors", state)
        for old in self._checkpoint_files()[:-_KEEP]:
            old.unlink()

    def save_best(self, state: dict[str, Any]) -> None:
        """Write the best state, which later ones do not push out, and keep its picture."""
        save_state(self.best, state)
        write_atomically(self.path / "best.png", (self.path / "samples.png").read_bytes())

    def was_never_saved(self) -> bool:
        """Whether the process that made the folder was killed before the first checkpoint."""
        return not (self._checkpoint_files() or self.best.exists() or self.metrics_file.exists())

    def last_checkpoint(self) -> Path:
        """Return the newest checkpoint.

        Raises:
            CheckpointError: If there is none.
        """
        files = self._checkpoint_files()
        if not files:
            raise CheckpointError(f"no checkpoint in {self.checkpoints}")
        return files[-1]

    def load_checkpoint(self) -> dict[str, Any]:
        """Read the newest checkpoint and remove what a killed process left half written.

        Raises:
            CheckpointError: If there is none or it is damaged; names the one before it.
        """
        last = self.last_checkpoint()
        try:
            state = load_state(last)
        except CheckpointError as error:
            older = self._checkpoint_files()[:-1]
            hint = f"; delete it to continue from {older[-1]}" if older else ""
            raise CheckpointError(f"{error}{hint}") from None
        self._remove_leftovers()
        return state

    def _remove_leftovers(self) -> None:
        for leftover in (*self.path.glob(_LEFTOVER), *self.checkpoints.glob(_LEFTOVER)):
            leftover.unlink()

    def append_metrics(self, row: dict[str, float]) -> None:
        """Append one line to ``metrics.jsonl``, so that no later checkpoint can outlive it."""
        with naming(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the rows of ``metrics.jsonl``; a torn last line is left out.

        Raises:
            RunFolderError: If a line is damaged.
        """
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_bytes().split(b"\n")[:-1]
        return [self._metrics_row(number, line) for number, line in enumerate(lines, 1)]

    def _metrics_row(self, number: int, line: bytes) -> dict[str, float]:
        try:
            row = json.loads(line)
            if row.keys() >= {"step", "cpu_seconds"} and {*map(type, row.values())} <= {int, float}:
                return row
        except (ValueError, AttributeError, RecursionError):
            pass
        raise RunFolderError(f"{self.metrics_file} is damaged: line {number} is not a metrics row")

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after ``step``: the resumed run writes them again."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_atomically(
            self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows).encode()
        )

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result.json``."""
        write_atomically(self.path / "result.json", json.dumps(result, indent=2).encode())

    def read_result(self) -> dict[str, Any]:
        """Return what `write_result` wrote."""
        return json.loads((self.path / "result.json").read_text(encoding="utf-8"))

    def _checkpoint_files(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.safetensors"))


def _is_first(path: Path) -> bool:
    """Whether a file may be in a folder before its configuration."""
    return path.name in (".lock", "checkpoints") or path.match(_LEFTOVER)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    return next((each for each in (path, *path.absolute().parents) if each.exists()), Path())
