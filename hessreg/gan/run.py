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
from hessreg.gan.checkpoint import CheckpointError
from hessreg.gan.config import TrainConfig
from hessreg.gan.data import Dataset, load_dataset
from hessreg.gan.event_log import EventLog
from hessreg.gan.metrics import Judge
from hessreg.gan.networks import Discriminator, Generator
from hessreg.gan.progress import ProgressReport, make_progress
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.trainer import NonFiniteError, Trainer
from hessreg.regularizers import HSN1R, R1, Regularizer

__all__ = ["Interrupted", "Run", "build_trainer", "resolve_device"]

_SHOWN_SAMPLES = 64
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


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived and the state was saved."""


def resolve_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available: torch finds no GPU")
    return torch.device(name)


def build_trainer(config: TrainConfig, dataset: Dataset) -> Trainer:
    """Return a trainer with new networks; seeds torch's global random state."""
    torch.manual_seed(config.seed)
    generator = Generator(config.architecture, config.latent_dim, config.width, config.activation)
    discriminator = Discriminator(config.architecture, config.width, config.activation)
    return Trainer(
        generator,
        discriminator,
        dataset.train_images.to(resolve_device(config.device)),
        _build_regularizers(config),
        batch_size=config.batch_size,
        learning_rates=(config.generator_lr, config.discriminator_lr),
        ema_decay=config.ema_decay,
        seed=config.seed,
    )


def _build_regularizers(config: TrainConfig) -> list[Regularizer]:
    regularizers: list[Regularizer] = []
    if "hsn1r" in config.method.split("+"):
        regularizers.append(HSN1R(**vars(config.hsn1r), seed=config.seed))
    if "r1" in config.method.split("+"):
        regularizers.append(R1(**vars(config.r1)))
    return regularizers


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
        self.dataset = load_dataset(config.dataset)
        self.trainer = build_trainer(config, self.dataset)
        self.judge = Judge(self.dataset)
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
            ValueError: If a limit is negative.
            RunFolderError: If this is not a run folder, or another process uses it.
            CheckpointError: If there is no readable checkpoint that fits the configuration.
        """
        folder = RunFolder(path)
        config = folder.read_config()
        if steps or seconds:
            config = replace(config, steps=steps, seconds=seconds)
        folder.lock()
        run = cls(folder, config)
        run._load()
        folder.write_config(config)
        return run

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
            progress or make_progress(self.config.method) as report,
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
            self.trainer.step()
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
        count = len(self.dataset.train_images)
        return self.trainer.ema.sample(count, torch.Generator().manual_seed(self.config.seed)).cpu()

    def _evaluate(self) -> dict[str, float]:
        samples = self._samples()
        pictures.save_grid(self.folder.path / "samples.png", samples[:_SHOWN_SAMPLES])
        return self.judge.evaluate(samples)

    def _save(self) -> None:
        with self._naming_the_checkpoint():
            self.trainer.check_weights()
        state = {"trainer": self.trainer.state_dict(), "cpu_seconds": self.cpu_seconds}
        self.folder.save_checkpoint(self.trainer.steps_done, state)

    def _load(self) -> None:
        state = self.folder.load_checkpoint()
        try:
            self.cpu_seconds = float(state["cpu_seconds"])
            if not 0 <= self.cpu_seconds < math.inf:
                raise ValueError(f"cpu_seconds is {self.cpu_seconds}")
            self.trainer.load_state_dict(state["trainer"])
        except _NOT_A_STATE as error:
            reason = " ".join(str(error).split())
            last = self.folder.last_checkpoint()
            raise CheckpointError(f"{last} does not fit the configuration: {reason}") from None
        self.folder.truncate_metrics(self.trainer.steps_done)

    def _finish(self) -> str:
        values = self._evaluate()
        result = {
            "method": self.config.method,
            "seed": self.config.seed,
            "steps": self.trainer.steps_done,
            "cpu_seconds": round(self.cpu_seconds, 2),
            **values,
            "device": str(self.trainer.images.device),
            "threads": self.config.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        self.folder.write_result(result)
        rows = self.folder.read_metrics()
        pictures.save_curves(self.folder.path / "curves.png", {self.config.method: rows})
        scale = self.judge.evaluate(self.dataset.train_images)["fdd"]
        return (
            f"{self.folder.path / 'samples.png'}: {_SHOWN_SAMPLES} images by {self.config.method}"
            f" after {result['steps']} steps, {self.cpu_seconds:.0f} CPU-s; FDD {values['fdd']:.1f}"
            f" (real training images {scale:.1f}), {values['classes']} of {self.judge.num_classes}"
            f" classes, copies {100 * values['copies']:.1f} %; curves.png beside it"
        )


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
