"""The folder of a run: configuration, metrics, checkpoints and pictures.

Everything but the TensorBoard events is written to a temporary file and renamed, or appended in
whole lines that a resumed run cuts back to its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
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
from hessreg.gan.distributed import current_shard, first_decides

__all__ = ["RunFolder", "RunFolderError", "new_folder"]

_KEEP = 2
_LEFTOVER = ".*.tmp"
_PICTURES = 4 << 20  # bytes for pictures, metrics and events


class RunFolderError(ValueError):
    """A run folder cannot be created or read."""


class RunFolder:
    """Paths and files of one run.

    ``config.yaml``, ``metrics.jsonl``, ``result.json``, ``samples.png``, ``best.png``,
    ``interpolation.png``, ``curves.png``, ``kernel.png`` (of a Gaussian kernel), ``spectra.jsonl``
    and ``spectral_density.png`` (with ``spectrum_every``), ``tensorboard/`` and in ``checkpoints/``
    the last two ``step-*.safetensors`` and ``best.safetensors``.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best.safetensors"
        self.metrics_file = path / "metrics.jsonl"
        self.spectra_file = path / "spectra.jsonl"
        self._existed = False
        self._unlock: weakref.finalize[..., RunFolder] | None = None

    def create(self, config: TrainConfig) -> None:
        """Make the folder, which must be new or empty, lock it and write the configuration.

        What a process that was killed here left before the configuration counts as empty.

        Raises:
            RunFolderError: If the folder has content already or cannot be written. Nothing is left
                of a folder that was made.
        """
        self._enter()
        try:
            self.checkpoints.mkdir(exist_ok=True)
            self._remove_leftovers()
            self.write_config(config)
        except BaseException:
            self.discard()
            raise

    def _enter(self) -> None:
        """Make the folder and lock it; of several processes one gets in and the others fail."""
        try:
            self._check_empty()  # first, or a folder with content would get a lock
            self._existed = not _is_made(self.path)
            self.lock()
        except OSError as error:
            raise RunFolderError(f"cannot write to {self.path}: {error.strerror}") from None
        try:
            self._check_empty()  # again: another process may have been here before the lock
        except BaseException:
            self.unlock()
            raise

    def _check_empty(self) -> None:
        if self.path.exists() and not all(map(_is_first, self.path.iterdir())):
            raise RunFolderError(
                f"{self.path} is not empty: choose another folder, or continue its run with:"
                f" hessreg resume {self.path}"
            )

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
        """Remove what `create` made, before others may come in."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.unlock()
        if self._existed:
            self.path.mkdir(exist_ok=True)

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
            is_there = os.path.samestat(os.fstat(handle), file.stat())
        except OSError:
            is_there = False
        if not is_there:  # locked by another process, or removed by one that had the lock
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
        _append(self.metrics_file, row)

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the rows of ``metrics.jsonl``; a torn last line is left out.

        Raises:
            RunFolderError: If a line is damaged.
        """
        return _read(self.metrics_file, _is_metrics, "a metrics row")

    def append_spectrum(self, row: dict[str, Any]) -> None:
        """Append one line to ``spectra.jsonl``, likewise."""
        _append(self.spectra_file, row)

    def read_spectra(self) -> list[dict[str, Any]]:
        """Return the rows of ``spectra.jsonl``; a torn last line is left out.

        Raises:
            RunFolderError: If a line is damaged.
        """
        return _read(self.spectra_file, _is_spectrum, "a spectral density")

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows and spectra after ``step``: the resumed run writes them again."""
        _truncate(self.metrics_file, self.read_metrics(), step)
        if self.spectra_file.exists():
            _truncate(self.spectra_file, self.read_spectra(), step)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result.json``."""
        write_atomically(self.path / "result.json", json.dumps(result, indent=2).encode())

    def read_result(self) -> dict[str, Any]:
        """Return what `write_result` wrote."""
        return json.loads((self.path / "result.json").read_text(encoding="utf-8"))

    def remove_result(self) -> None:
        """Remove ``result.json``: the run goes on."""
        (self.path / "result.json").unlink(missing_ok=True)

    def _checkpoint_files(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.safetensors"))


@contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """Make a folder in ``runs/`` named after the time, which is removed if it stays empty.

    Args:
        name: Comes before the time; of several that begin in one second, the later ones have
            ``-2``, ``-3``, ... behind it.

    Raises:
        RunFolderError: If it cannot be made.
    """
    path = first_decides(current_shard(), partial(_make_new, name))
    try:
        yield path
    finally:
        with suppress(OSError):  # if it has content
            os.removedirs(path)


def _make_new(name: str) -> Path:
    first = time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    try:
        return next(path for path in map(Path, names) if _is_made(path))
    except OSError as error:
        raise RunFolderError(f"cannot write to {first}: {error.strerror}") from None


def _is_first(path: Path) -> bool:
    """Whether a file may be in a folder before its configuration."""
    if path.name == "checkpoints" and path.is_dir():
        return all(file.match(_LEFTOVER) for file in path.iterdir())
    return path.name == ".lock" or path.match(_LEFTOVER)


def _is_made(path: Path) -> bool:
    """Make a folder, unless it is there."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    return next((each for each in (path, *path.absolute().parents) if each.exists()), Path())


def _append(file: Path, row: dict[str, Any]) -> None:
    with naming(file), file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(row) + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def _truncate(file: Path, rows: list[dict[str, Any]], step: int) -> None:
    kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
    write_atomically(file, "".join(kept).encode())


def _read(file: Path, fits: Callable[[Any], bool], what: str) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [_row(file, number, line, fits, what) for number, line in enumerate(lines, 1)]


def _row(
    file: Path, number: int, line: bytes, fits: Callable[[Any], bool], what: str
) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if fits(row):
            return row
    except (ValueError, AttributeError, RecursionError):
        pass
    raise RunFolderError(f"{file} is damaged: line {number} is not {what}")


def _is_metrics(row: Any) -> bool:
    return row.keys() >= {"step", "cpu_seconds"} and {*map(type, row.values())} <= {int, float}


def _is_spectrum(row: Any) -> bool:
    names = {"step": int, "network": str, "n": int, "bandwidth": float, "cpu_seconds": float}
    curves = [row.get("grid"), row.get("density")]
    are_curves = all(isinstance(c, list) and {*map(type, c)} <= {int, float} for c in curves)
    fits = all(type(row.get(name)) is kind for name, kind in names.items())
    return fits and are_curves and len(curves[0]) == len(curves[1])
