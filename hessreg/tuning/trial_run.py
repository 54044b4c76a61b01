"""One trial: a run in a folder and a process of its own, which may die and be started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.config import TrainConfig

__all__ = ["TrialRun"]

_ENDS: dict[int, Literal["finished", "failed", "refused"]] = {
    0: "finished",
    1: "failed",
    2: "refused",
}
_NOT_STARTED = -1000  # no exit code
_RESTARTS = 2  # of a process that was killed
_POLL = 0.1  # seconds


class TrialRun:
    """Trains a configuration in ``path``, with ``path.yaml`` and ``path.log`` beside it.

    Args:
        path: The run folder.
        seen: Step up to which evaluations are known already.
    """

    def __init__(self, path: Path, seen: int = 0) -> None:
        self.path = path
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._seen = seen

    @property
    def is_prepared(self) -> bool:
        """Whether it is written down what is to be trained."""
        return self.path.with_suffix(".yaml").exists()

    @property
    def is_finished(self) -> bool:
        """Whether it got to its end."""
        return (self.path / "result.json").exists()

    def prepare(self, config: TrainConfig) -> None:
        """Write down what is to be trained."""
        import yaml

        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(json.loads(json.dumps(config.to_dict())), sort_keys=False)
        write_atomically(self.path.with_suffix(".yaml"), text.encode())

    def poll(self) -> Literal["running", "finished", "failed", "refused", "killed"]:
        """Start the process, or start it again if it was killed, and say where it is."""
        code = self._process.poll() if self._process else _NOT_STARTED
        if code is None:
            return "running"
        if code in _ENDS:
            return _ENDS[code]
        if code != _NOT_STARTED:
            if self.restarts == _RESTARTS:
                return "killed"
            self.restarts += 1
        return self._start()

    def _start(self) -> Literal["running", "finished"]:
        """Train in the background, from the last checkpoint if there is one."""
        with self.path.with_suffix(".lock").open("ab") as lock:
            if not _take(lock.fileno()):  # a process that outlived the search it was started by
                return "running"
            if self.is_finished:
                return "finished"
            lock.truncate(0)
            with self.path.with_suffix(".log").open("ab") as log:
                # In a session of its own: Ctrl-C is for the search, which then stops its trials.
                self._process = subprocess.Popen(  # noqa: S603
                    self._command(),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=() if sys.platform == "win32" else [lock.fileno()],
                )
            lock.write(str(self._process.pid).encode())
        return "running"

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "hessreg"]
        if any(self.path.glob("checkpoints/step-*.safetensors")):
            return [*command, "resume", str(self.path), "--plain"]
        shutil.rmtree(self.path, ignore_errors=True)  # killed before the first checkpoint
        config = self.path.with_suffix(".yaml")
        dataset = _dataset(config)
        return [*command, "train", dataset, f"--config={config}", f"--out={self.path}", "--plain"]

    def stop(self) -> None:
        """End the process, also one that outlived its search; its state is saved."""
        if self._process is None:
            self._stop_orphan()
        elif self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _stop_orphan(self) -> None:
        """End whoever has the lock; without it the number may be that of any other process."""
        file = self.path.with_suffix(".lock")
        number = file.read_text(encoding="ascii") if file.exists() else ""
        if not number:
            return
        with file.open("ab") as lock:
            if not _take(lock.fileno()):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(number), signal.SIGTERM)
            while not _take(lock.fileno()):
                time.sleep(_POLL)

    def evaluations(self, name: str) -> list[tuple[int, float]]:
        """Return steps and values of a metric that were logged since the last call."""
        file = self.path / "metrics.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        rows = [json.loads(line) for line in lines]
        fresh = [row for row in rows if row["step"] > self._seen and name in row]
        if fresh:
            self._seen = fresh[-1]["step"]
        return [(row["step"], row[name]) for row in fresh]

    def result(self) -> dict[str, Any]:
        """Return what the finished run found."""
        return json.loads((self.path / "result.json").read_text(encoding="utf-8"))

    def reason(self) -> str:
        """Return the last line that the process wrote: why it failed."""
        file = self.path.with_suffix(".log")
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no reason given")


def _take(lock: int) -> bool:
    """Whether no other process has the lock; it is passed on to what this one starts."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _dataset(config: Path) -> str:
    import yaml

    return yaml.safe_load(config.read_text(encoding="utf-8"))["dataset"]
