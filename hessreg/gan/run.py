"""One training run in its folder: it can be watched, interrupted, killed and continued."""

from __future__ import annotations

import importlib.util
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

import hessreg
from hessreg.gan import pictures
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import CheckpointError, load_state, num_bytes
from hessreg.gan.config import TrainConfig
from hessreg.gan.data import Dataset, subset
from hessreg.gan.distributed import (
    LostProcessError,
    agree,
    current_shard,
    first_decides,
    mark_shared,
    noticing_losses,
    together,
)
from hessreg.gan.event_log import EventLog
from hessreg.gan.metrics import Judge
from hessreg.gan.progress import ProgressReport, make_progress
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.tasks import make_task
from hessreg.gan.trainer import NonFiniteError
from hessreg.gan.walk import latent_walk
from hessreg.regularizers import GaussianKernel

if TYPE_CHECKING:
    from hessreg.gan.fid import FeatureDistances

__all__ = ["Interrupted", "Run", "StorageError", "TrainingError", "fitting"]

_KERNEL_POINTS = 128  # of each kind in the heat map
_WALKS = 8
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
    optional = {"tensorboard": config.tensorboard, "wandb": config.wandb}
    for name in (*_PACKAGES, *(name for name, is_wanted in optional.items() if is_wanted)):
        if importlib.util.find_spec(name) is None:  # importing them all takes seconds
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _feature_distances(
    config: TrainConfig, judge: Judge, dataset: Dataset
) -> FeatureDistances | None:
    if not config.fid.features:
        return None
    from hessreg.gan.fid import FeatureDistances, feature_network

    return FeatureDistances(feature_network(config.fid.features, judge), dataset)


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


class StorageError(RuntimeError):
    """Something could not be written in the middle of a run."""


class TrainingError(RuntimeError):
    """A network, a regulariser or a measurement failed in the middle of a run; its cause is it."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived and the state was saved."""


class Run:
    """A training run. Use `create` or `resume`, then `train`.

    Several processes train together if there is a default group of `torch.distributed`: all of them
    make the same calls, and process 0 alone reads and writes the folder.

    Args:
        folder: Where everything is written.
        config: What to train.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        _check_packages(config)
        torch.set_num_threads(config.threads)
        self.shard = current_shard()
        self.folder = folder
        self.config = config
        self.task = make_task(config)
        self.dataset = self.task.load()
        self.trainer = build_trainer(config, self.dataset, self.shard)
        self.judge = self.task.judge(self.dataset)
        self.distances = _feature_distances(config, self.judge, self.dataset)
        self.cpu_seconds = 0.0
        self.best: dict[str, Any] = {}  # the step and the judge's value of the best evaluation
        self._evaluated: tuple[int, dict[str, float]] = -1, {}  # the last step that was, and how

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> Run:
        """Start a run in a new folder.

        Raises:
            RunFolderError: If the folder has content or cannot be written, or the disk is full.
            ValueError: If the device is missing or the batch is larger than the data set.
        """
        with together(current_shard()):
            run = cls(RunFolder(path), config)
        with run._in_first() as is_first:
            if is_first:
                run._create_folder()
        return run

    def _create_folder(self) -> None:
        self.folder.check_space(self._checkpoint_bytes())
        self.folder.create(self.config)
        try:
            self._write_checkpoint()
        except BaseException:
            self.folder.discard()
            raise

    @contextmanager
    def _in_first(self) -> Iterator[bool]:
        """Whether this is process 0, which does alone what is inside; all fail if it does."""
        with together(self.shard), self.shard.alone():
            yield self.shard.rank == 0

    @classmethod
    def resume(cls, path: Path, steps: int = 0, seconds: float = 0.0) -> Run:
        """Continue the run in a folder from its newest checkpoint.

        A run that was killed before its first one starts anew.

        Args:
            path: The folder.
            steps: New limit of steps.
            seconds: New limit of CPU time. With neither the old limits stay.

        Raises:
            ValueError: If a limit is negative, or below what is already done.
            RunFolderError: If this is not a run folder, or another process uses it.
            CheckpointError: If there is no readable checkpoint that fits the configuration.
        """
        folder, shard = RunFolder(path), current_shard()
        config = first_decides(shard, folder.read_config)
        if steps or seconds:
            config = replace(config, steps=steps, seconds=seconds)
        first_decides(shard, folder.lock)
        try:
            with together(shard):
                run = cls(folder, config)
            run._load()
            if steps or seconds:
                run._check_limits()
            first_decides(shard, partial(folder.write_config, config))
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
            StorageError: If something cannot be written, as on a full disk; names the last good
                checkpoint.
            NonFiniteError: If something was not finite; names the last good checkpoint.
            LostProcessError: If one of several processes is gone.
            TrainingError: If anything else fails; names the step, the cause and the last good
                checkpoint.
            RunFolderError: If another process uses the folder.
        """
        first_decides(self.shard, self.folder.lock)
        advice = f"continue with: hessreg resume {self.folder.path}"
        try:
            with noticing_losses(self.shard, advice):
                return self._train(progress)
        except OSError as error:
            if self.shard.rank:
                raise
            last = self.folder.last_checkpoint()
            raise StorageError(f"{error}; the last good checkpoint is {last}; {advice}") from None
        except (ImportError, LostProcessError, NonFiniteError):
            raise
        except Exception as error:  # networks and optimisers that are not ours may raise anything
            raise self._failure(error, advice) from error
        finally:
            self.close()

    def _failure(self, error: Exception, advice: str) -> TrainingError:
        what = f"after step {self.trainer.steps_done}: {type(error).__name__}: {error}"
        if self.shard.rank:
            return TrainingError(what)
        last = self.folder.last_checkpoint()
        return TrainingError(f"{what}; the last good checkpoint is {last}; {advice}")

    def _train(self, progress: ProgressReport | None) -> str:
        path, events_from = self.folder.path, self.trainer.steps_done
        is_first = self.shard.rank == 0
        if is_first and not self._finished():
            self.folder.remove_result()  # of a run that was finished and goes on
        with (
            progress or make_progress(self.config.title, plain=not is_first) as report,
            EventLog(path, events_from, self.config, is_first) as events,
            StopSignals(self.shard.size > 1) as signals,
        ):
            while not self._finished() and not signals.stop:
                self._step(signals)
                self._record(report, events)
                if self.trainer.steps_done % self.config.save_every == 0:
                    self._save()
            self._save()
        if not self._finished():
            stopped = f"stopped at step {self.trainer.steps_done}"
            message = f"{stopped}; continue with: hessreg resume {path}"
            raise mark_shared(Interrupted(message))
        with self._in_first() as is_first:
            return self._finish() if is_first else ""

    @property
    def result(self) -> dict[str, Any]:
        """What ``result.json`` holds: the metrics of the finished run.

        Raises:
            FileNotFoundError: If the run did not finish.
        """
        return self.folder.read_result()

    def sample(self, count: int, seed: int = 1) -> torch.Tensor:
        """Return samples ``[count, ...]`` of the averaged generator on the CPU."""
        return self.trainer.ema.sample(count, torch.Generator().manual_seed(seed)).cpu()

    def _finished(self) -> bool:
        return self._fraction() >= 1.0

    def _fraction(self) -> float:
        limits = (
            (self.trainer.steps_done, self.config.steps),
            (self.cpu_seconds, self.config.seconds),
        )
        return min(1.0, max(done / limit for done, limit in limits if limit))

    def _step(self, signals: StopSignals) -> None:
        start = time.process_time()
        with self._naming_the_checkpoint():
            self.trainer.step(self._fraction())
        self.cpu_seconds += time.process_time() - start
        if self.shard.size > 1:
            self.cpu_seconds, signals.stop = agree(self.shard, self.cpu_seconds, signals.received)

    @contextmanager
    def _naming_the_checkpoint(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            if self.shard.rank:
                raise mark_shared(error) from None
            last = self.folder.last_checkpoint()
            named = NonFiniteError(f"{error}; the last good checkpoint is {last}")
            raise mark_shared(named) from None

    def _record(self, report: ProgressReport, events: EventLog) -> None:
        step = self.trainer.steps_done
        evaluate = step % self.config.eval_every == 0 or self._finished()
        every = self.config.spectrum_every
        measure = every > 0 and (step % every == 0 or self._finished())
        if not evaluate and not measure and step % self.config.log_every:
            return
        row = {"step": step, "cpu_seconds": round(self.cpu_seconds, 3)} | self.trainer.metrics()
        with self._in_first() as is_first:
            if is_first:
                self._write_row(row, measure, evaluate, events)
                report.update(row, self._fraction())

    def _write_row(
        self, row: dict[str, float], measure: bool, evaluate: bool, events: EventLog
    ) -> None:
        if measure:
            row |= self._measure_spectra()
        if evaluate:
            row |= self._evaluate()
            self._keep_best(row[self.judge.headline])
        self.folder.append_metrics(row)
        events.add(row)

    def _samples(self, labels: torch.Tensor | None = None) -> torch.Tensor:
        count = self.judge.num_samples
        generator = torch.Generator().manual_seed(self.config.seed)
        samples = self.trainer.ema.sample(count, generator, labels).cpu().float()
        if not samples.isfinite().all():
            step = self.trainer.steps_done
            raise NonFiniteError(f"step {step}: generated samples are not finite")
        return samples

    def _evaluate(self) -> dict[str, float]:
        """Judge and draw the averaged generator, once after each step."""
        step = self.trainer.steps_done
        if self._evaluated[0] != step:
            self._evaluated = step, self._judged()
        return self._evaluated[1]

    def _judged(self) -> dict[str, float]:
        with self._naming_the_checkpoint():
            samples = shown = self._samples()
            if self.trainer.labels is not None:  # pictures have each class in turn
                random = torch.Generator().manual_seed(self.config.seed)
                samples = self._samples(self.dataset.draw_labels(self.judge.num_samples, random))
        self.task.draw(self.folder.path / "samples.png", shown)
        self.task.draw_walk(self.folder.path / "interpolation.png", self._walk())
        extra = {} if self.distances is None else self.distances.evaluate(samples)
        return self.judge.evaluate(samples) | extra

    def _walk(self) -> torch.Tensor:
        """Samples on ways through the noise, always the same ways."""
        random = torch.Generator().manual_seed(self.config.seed)
        steps = self.task.walk_steps
        return latent_walk(self.trainer.ema, _WALKS, steps, random).cpu().float()

    def _measure_spectra(self) -> dict[str, float]:
        # Imported here: it takes runs, too.
        from hessreg.gan.spectral_log import measure_spectra

        return measure_spectra(self.folder, self.config, self.trainer)

    def _keep_best(self, value: float) -> None:
        """Keep the state, and the picture, that the judge found better than all before."""
        if value < self.best.get("value", math.inf):
            self.best = {"step": self.trainer.steps_done, "value": value}
            self.folder.save_best(self._state())

    def _save(self) -> None:
        with self._in_first() as is_first:
            if is_first:
                self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        self.folder.save_checkpoint(self.trainer.steps_done, self._state())

    def _state(self) -> dict[str, Any]:
        with self._naming_the_checkpoint():
            self.trainer.check_weights()
        state = {"trainer": self.trainer.state_dict(), "cpu_seconds": self.cpu_seconds}
        return {**state, "best": self.best}

    def _checkpoint_bytes(self) -> int:
        """Of a checkpoint, with two moments for every parameter."""
        trainer = self.trainer
        state = trainer.state_dict()
        moments = num_bytes(
            [list(n.parameters()) for n in (trainer.generator, trainer.discriminator)]
        )
        queue = 8 * len(trainer.data)  # of indices of samples
        return num_bytes({**state, "optimizers": []}) + 2 * moments + queue

    def _load(self) -> None:
        path, state = first_decides(self.shard, self._read_checkpoint)
        with together(self.shard), fitting(path):
            self.cpu_seconds = float(state["cpu_seconds"])
            if not 0 <= self.cpu_seconds < math.inf:
                raise ValueError(f"cpu_seconds is {self.cpu_seconds}")
            self.best = dict(state["best"])
            _check_best(self.best)
            self.trainer.load_state_dict(state["trainer"])
        self.best = first_decides(self.shard, self._later_best)
        first_decides(self.shard, partial(self.folder.truncate_metrics, self.trainer.steps_done))

    def _later_best(self) -> dict[str, Any]:
        """The best evaluation, which a process that was killed may have made after its checkpoint.

        The evaluation of a later step is one of this run, too, and its state is in the file.
        """
        if not self.folder.best.exists():
            return self.best
        with fitting(self.folder.best):
            found = dict(load_state(self.folder.best)["best"])
            _check_best(found)
            is_later = found and found["step"] > self.trainer.steps_done
        return found if is_later else self.best

    def _read_checkpoint(self) -> tuple[Path, dict[str, Any]]:
        self.folder.check_space(self._checkpoint_bytes())
        if self.folder.was_never_saved():
            self._write_checkpoint()
        state = self.folder.load_checkpoint()
        return self.folder.last_checkpoint(), state

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
            "best": self._best_result(),
            **self._spectrum_cost(),
            "device": str(self.trainer.data.device),
            "threads": self.config.threads,
            "hessreg": hessreg.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        pictures_beside = self._draw()
        self.folder.write_result(result)  # last: with it the run counts as finished
        return (
            f"{self.folder.path / 'samples.png'}: {self.task.shown} by {self.config.title}"
            f" after {result['steps']} steps, {self.cpu_seconds:.0f} CPU-s;"
            f" {self.judge.describe(values)}; {pictures_beside} beside it"
        )

    def _best_result(self) -> dict[str, Any]:
        """The best evaluation, whose checkpoint and samples are kept."""
        if not self.best:
            return {}
        checkpoint = self.folder.best.relative_to(self.folder.path).as_posix()
        best = {"step": self.best["step"], self.judge.headline: self.best["value"]}
        return {**best, "checkpoint": checkpoint, "samples": "best.png"}

    def _spectrum_cost(self) -> dict[str, float]:
        """CPU time of the spectral densities, which is not among that of training."""
        spectra = self.folder.read_spectra()
        seconds = round(sum(row["cpu_seconds"] for row in spectra), 2)
        return {"spectrum_seconds": seconds} if spectra else {}

    def _draw(self) -> str:
        """Write the pictures that need a finished run, and return their names."""
        path, rows = self.folder.path, self.folder.read_metrics()
        names = ["interpolation.png", "curves.png"]
        headline = self.judge.headline, self.judge.columns[self.judge.headline][0]
        pictures.save_curves(path / "curves.png", {self.config.title: rows}, headline)
        kernels = [r for r in self.trainer.regularizers if isinstance(r, GaussianKernel)]
        for regularizer in kernels:
            self._draw_kernel(regularizer)
            names.append("kernel.png")
        if spectra := self.folder.read_spectra():
            pictures.save_densities(path / "spectral_density.png", spectra)
            names.append("spectral_density.png")
        return " and ".join([", ".join(names[:-1]), names[-1]])

    @torch.no_grad()
    def _draw_kernel(self, regularizer: GaussianKernel) -> None:
        fake = self._samples()[:_KERNEL_POINTS]
        rows = torch.arange(min(_KERNEL_POINTS, len(self.dataset.test_samples)))
        shown = [
            (subset(self.dataset.test_samples, rows), self.dataset.test_labels[rows], None),
            (fake, self.judge.classify(fake), torch.arange(len(fake)) % self.dataset.num_classes),
        ]
        first, second = (
            (self._embed(regularizer, each, named if wanted is None else wanted), named)
            for each, named, wanted in shown
        )
        sigma = regularizer.bandwidth(second[0], first[0])
        pictures.save_kernel(self.folder.path / "kernel.png", first, second, sigma)

    def _embed(
        self, regularizer: GaussianKernel, samples: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        judging = self.trainer.judging(classes)
        moved = samples.to(self.trainer.data.device, self.trainer.dtype)
        return regularizer.embed(moved, judging).cpu()


def _check_best(best: dict[str, Any]) -> None:
    if best and not (math.isfinite(best["value"]) and best["step"] >= 0):
        raise ValueError(f"the best evaluation is {best}")


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts as usual.

    Args:
        several: Whether processes have to agree first before they `stop`. The second signal may be
            torchrun's, which has got the first one too, and counts for nothing.
    """

    def __init__(self, several: bool = False) -> None:
        self.received = self.stop = False
        self._several = several
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
        if not self._several:
            self.stop = True
            signal.signal(number, self._previous[number])
