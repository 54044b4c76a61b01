"""One training run in its folder: it can be watched, interrupted, killed and continued."""

from __future__ import annotations

import importlib
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from hessreg.gan import pictures
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import CheckpointError
from hessreg.gan.config import TrainConfig
from hessreg.gan.event_log import EventLog
from hessreg.gan.progress import ProgressReport, make_progress
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.tasks import make_task
from hessreg.gan.trainer import NonFiniteError
from hessreg.regularizers import (
    GaussianKernel,
)

__all__ = ["Interrupted", "Run", "fitting"]

_KERNEL_POINTS = 128  # of each kind in the heat map
_PACKAGES = "matplotlib", "PIL", "safetensors", "sklearn", "yaml"
_NOT_A_STATE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _check_packages(config: TrainConfig) -> None:
    """Fail before anything is made or trained, not when the package is first used."""
    for name in (*_PACKAGES, *(["tensorboard"] if config.tensorboard else [])):
        importlib.import_module(name)


@contextmanager
def fitting(checkpoint: Path) -> Iterator[None]:
    """Let whatever refuses a state that was read say that it does not fit.

    Raises:
        CheckpointError: If something does.
    """
    try:
        yield
    except _NOT_A_STATE as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint} does not fit the configuration: {reason}") from None


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived and the state was saved."""


class Run:
    """A training run. Use `create` or `resume`, then `train`.

    Args:
        folder: Where everything is written.
        config: What to train.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        _check_packages(config)
        torch.set_num_threads(config.threads)
        self.folder = folder
        self.config = config
        self.task = make_task(config)
        self.dataset = self.task.load()
        self.trainer = build_trainer(config, self.dataset)
        self.judge = self.task.judge(self.dataset)
        self.cpu_seconds = 0.0

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> Run:
        """Start a run in a new folder.

        Raises:
            RunFolderError: If the folder has content or cannot be written.
            ValueError: If the device is missing or the batch is larger than the data set.
        """
        run = cls(RunFolder(path), config)
        run.folder.create(config)
        try:
            run._save()
        except BaseException:
            run.folder.discard()
            raise
        return run

    @classmethod
    def resume(cls, path: Path, steps: int = 0, seconds: float = 0.0) -> Run:
        """Continue the run in a folder from its newest checkpoint.

        Args:
            path: The folder.
            steps: New limit of steps.
            seconds: New limit of CPU time. With neither the old limits stay.

        Raises:
            ValueError: If a limit is negative, or below what is already done.
            RunFolderError: If this is not a run folder, or another process uses it.
            CheckpointError: If there is no readable checkpoint that fits the configuration.
        """
        folder = RunFolder(path)
        config = folder.read_config()
        if steps or seconds:
            config = replace(config, steps=steps, seconds=seconds)
        folder.lock()
        try:
            run = cls(folder, config)
            run._load()
            if steps or seconds:
                run._check_limits()
            folder.write_config(config)
        except BaseException:
            folder.unlock()
            raise
        return run

    def _check_limits(self) -> None:
        """Refuse limits that are already exceeded."""
        for name, done in (("steps", self.trainer.steps_done), ("seconds", self.cpu_seconds)):
            limit = getattr(self.config, name)
            if 0 < limit < done:
                raise ValueError(
                    f"{name} must be at least the {done:.10g} already done, got {limit}"
                )

    def close(self) -> None:
        """Let other processes use the folder; `train` does so at its end."""
        self.folder.unlock()

    def train(self, progress: ProgressReport | None = None) -> str:
        """Train up to the limit and write metrics, checkpoints, pictures and ``result.json``.

        Args:
            progress: What to show meanwhile; by default a bar or plain lines.

        Returns:
            A line that says where the pictures are and what they show.

        Raises:
            Interrupted: If SIGINT or SIGTERM arrived; the state of the last step is saved.
            NonFiniteError: If something was not finite; names the last good checkpoint.
            RunFolderError: If another process uses the folder.
        """
        self.folder.lock()
        try:
            return self._train(progress)
        finally:
            self.close()

    def _train(self, progress: ProgressReport | None) -> str:
        path, events_from = self.folder.path, self.trainer.steps_done
        with (
            progress or make_progress(self.config.title) as report,
            EventLog(path / "tensorboard", events_from, self.config.tensorboard) as events,
            StopSignals() as signals,
        ):
            while not self._finished() and not signals.received:
                self._step()
                self._record(report, events)
                if self.trainer.steps_done % self.config.save_every == 0:
                    self._save()
            self._save()
        if not self._finished():
            stopped = f"stopped at step {self.trainer.steps_done}"
            raise Interrupted(f"{stopped}; continue with: hessreg resume {path}")
        return self._finish()

    def _finished(self) -> bool:
        return self._fraction() >= 1.0

    def _fraction(self) -> float:
        limits = (
            (self.trainer.steps_done, self.config.steps),
            (self.cpu_seconds, self.config.seconds),
        )
        return min(1.0, max(done / limit for done, limit in limits if limit))

    def _step(self) -> None:
        start = time.process_time()
        with self._naming_the_checkpoint():
            self.trainer.step(self._fraction())
        self.cpu_seconds += time.process_time() - start

    @contextmanager
    def _naming_the_checkpoint(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            last = self.folder.last_checkpoint()
            raise NonFiniteError(f"{error}; the last good checkpoint is {last}") from None

    def _record(self, report: ProgressReport, events: EventLog) -> None:
        step = self.trainer.steps_done
        evaluate = step % self.config.eval_every == 0 or self._finished()
        if not evaluate and step % self.config.log_every:
            return
        row = {"step": step, "cpu_seconds": round(self.cpu_seconds, 3)} | self.trainer.metrics()
        if evaluate:
            row |= self._evaluate()
        self.folder.append_metrics(row)
        events.add(row)
        report.update(row, self._fraction())

    def _samples(self) -> torch.Tensor:
        count = self.judge.num_samples
        generator = torch.Generator().manual_seed(self.config.seed)
        samples = self.trainer.ema.sample(count, generator).cpu().float()
        if not samples.isfinite().all():
            step = self.trainer.steps_done
            raise NonFiniteError(f"step {step}: generated samples are not finite")
        return samples

    def _evaluate(self) -> dict[str, float]:
        with self._naming_the_checkpoint():
            samples = self._samples()
        self.task.draw(self.folder.path / "samples.png", samples)
        return self.judge.evaluate(samples)

    def _save(self) -> None:
        with self._naming_the_checkpoint():
            self.trainer.check_weights()
        state = {"trainer": self.trainer.state_dict(), "cpu_seconds": self.cpu_seconds}
        self.folder.save_checkpoint(self.trainer.steps_done, state)

    def _load(self) -> None:
        state = self.folder.load_checkpoint()
        with fitting(self.folder.last_checkpoint()):
            self.cpu_seconds = float(state["cpu_seconds"])
            if not 0 <= self.cpu_seconds < math.inf:
                raise ValueError(f"cpu_seconds is {self.cpu_seconds}")
            self.trainer.load_state_dict(state["trainer"])
        self.folder.truncate_metrics(self.trainer.steps_done)

    def _finish(self) -> str:
        values = self._evaluate()
        result = {
            "loss": self.config.loss,
            "regularizer": self.config.regularizer,
            "orthogonal": self.config.orthogonal,
            "correction": self.config.correction,
            "seed": self.config.seed,
            "steps": self.trainer.steps_done,
            "cpu_seconds": round(self.cpu_seconds, 2),
            **values,
            "device": str(self.trainer.data.device),
            "threads": self.config.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        self.folder.write_result(result)
        pictures_beside = self._draw()
        return (
            f"{self.folder.path / 'samples.png'}: {self.task.shown} by {self.config.title}"
            f" after {result['steps']} steps, {self.cpu_seconds:.0f} CPU-s;"
            f" {self.judge.describe(values)}; {pictures_beside} beside it"
        )

    def _draw(self) -> str:
        """Write the pictures that need a finished run, and return their names."""
        path, rows = self.folder.path, self.folder.read_metrics()
        headline = self.judge.headline, self.judge.columns[self.judge.headline][0]
        pictures.save_curves(path / "curves.png", {self.config.title: rows}, headline)
        kernels = [r for r in self.trainer.regularizers if isinstance(r, GaussianKernel)]
        for regularizer in kernels:
            self._draw_kernel(regularizer)
        return "curves.png and kernel.png" if kernels else "curves.png"

    @torch.no_grad()
    def _draw_kernel(self, regularizer: GaussianKernel) -> None:
        fake, device = self._samples()[:_KERNEL_POINTS], self.trainer.data.device
        real, labels = self.dataset.test_samples, self.dataset.test_labels
        shown = [
            (real[:_KERNEL_POINTS], labels[:_KERNEL_POINTS]),
            (fake, self.judge.classify(fake)),
        ]
        first, second = (
            (
                regularizer.embed(
                    s.to(device, self.trainer.dtype), self.trainer.discriminator
                ).cpu(),
                named,
            )
            for s, named in shown
        )
        sigma = regularizer.bandwidth(second[0], first[0])
        pictures.save_kernel(self.folder.path / "kernel.png", first, second, sigma)


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts as usual."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers (only the main thread may)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._previous[number])
