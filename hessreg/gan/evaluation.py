"""What the averaged generator of a run draws from fresh noise, and how good that is."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.config import TrainConfig
from hessreg.gan.curvature_targets import load_run
from hessreg.gan.data import Dataset, subset
from hessreg.gan.fid import COLUMNS, FeatureDistances, feature_network
from hessreg.gan.metrics import Judge
from hessreg.gan.networks import Generator
from hessreg.gan.run_folder import RunFolderError
from hessreg.gan.tasks import Task, make_task
from hessreg.kernels import median_bandwidth, mmd2_test

__all__ = ["TrainedGenerator", "write_samples"]

_TEST_POINTS = 500  # of each kind: the test takes the kernel of all pairs
_BATCH = 512


@dataclass(frozen=True)
class TrainedGenerator:
    """The averaged generator of a run.

    Attributes:
        config: What was trained.
        generator: The network.
        task: Metrics and pictures.
        dataset: What it was trained on.
        steps: How long.
    """

    config: TrainConfig
    generator: Generator
    task: Task
    dataset: Dataset
    steps: int

    @classmethod
    def load(cls, path: Path) -> TrainedGenerator:
        """Read a run folder's newest checkpoint, or one of its checkpoints; nothing is changed.

        Raises:
            RunFolderError: If the folder is none of a run, or its configuration is damaged.
            CheckpointError: If there is no readable checkpoint that fits the configuration.
            ValueError: If the device is missing.
        """
        if not path.exists():
            raise RunFolderError(f"there is no run at {path}")
        run = load_run(path, rows=1, seed=0, evaluate=True)
        task = make_task(run.config)
        return cls(run.config, run.trainer.ema, task, task.load(), run.trainer.steps_done)

    @cached_property
    def judge(self) -> Judge:
        """Of the data set."""
        return self.task.judge(self.dataset)

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"{self.config.dataset}, {self.config.title}, after {self.steps} steps"

    def sample(self, count: int, seed: int, labels: Tensor | None = None) -> Tensor:
        """Return samples ``[count, ...]`` on the CPU.

        Args:
            count: Number of samples.
            seed: Of the noise.
            labels: Classes ``[count]``; by default each in turn. Without classes, codes are taken
                in turn.

        Raises:
            ValueError: If some are not finite.
        """
        random = torch.Generator().manual_seed(seed)
        if labels is None:
            labels = torch.arange(count) % max(1, self.generator.num_classes)
        codes = torch.arange(count) % max(1, self.generator.num_codes)
        parts = [
            self.generator.sample(len(rows), random, labels[rows], codes[rows])
            for rows in torch.arange(count).split(_BATCH)
        ]
        samples = torch.cat(parts).cpu().float()
        if not samples.isfinite().all():
            raise ValueError("generated samples are not finite")
        return samples

    def evaluate(self, seed: int, permutations: int, features: str) -> dict[str, Any]:
        """Return the judge's metrics and a two-sample test on samples from fresh noise.

        Args:
            seed: Of noise and permutations.
            permutations: Of the test; 0 for none.
            features: For FID and KID, as `hessreg.gan.fid.feature_network` takes them; empty for
                neither.

        Returns:
            The judge's metrics; ``mmd2`` (unbiased, at the median distance ``sigma``) of at most
            500 samples to as many test samples, with the ``p_value`` of the hypothesis that both
            have one distribution; ``fid`` and ``kid``.
        """
        judge = self.judge
        labels = None
        if self.config.conditional != "none":
            random = torch.Generator().manual_seed(seed)
            labels = self.dataset.draw_labels(judge.num_samples, random)
        samples = self.sample(judge.num_samples, seed, labels)
        values: dict[str, Any] = judge.evaluate(samples)
        if permutations:
            values |= self._test(samples, permutations, seed)
        if features:
            network = feature_network(features, judge)
            values |= FeatureDistances(network, self.dataset).evaluate(samples)
        return values

    def _test(self, samples: Tensor, permutations: int, seed: int) -> dict[str, float]:
        rows = torch.arange(min(_TEST_POINTS, len(self.dataset.test_samples)))
        real = subset(self.dataset.test_samples, rows).flatten(1).double()
        fake = samples[: len(real)].flatten(1).double()
        sigma = median_bandwidth(real, fake)
        random = torch.Generator().manual_seed(seed)
        test = mmd2_test(real, fake, sigma, permutations, random)
        found = {"mmd2": test.statistic, "sigma": sigma, "p_value": test.p_value}
        return {name: value.item() for name, value in found.items()}

    def describe(self, values: Mapping[str, Any]) -> str:
        """Return what `evaluate` found, a line for each metric."""
        known = {**self.judge.columns, **COLUMNS}
        shown = {heading: f"{values[k]:{f}}" for k, (heading, f) in known.items() if k in values}
        if "p_value" in values:
            shown["MMD^2"] = f"{values['mmd2']:.4g} (unbiased, sigma {values['sigma']:.4g})"
            shown["p-value"] = f"{values['p_value']:.4g}"
        width = max(map(len, shown))
        lines = [f"{heading:{width}}  {text}" for heading, text in shown.items()]
        return "\n".join([self.title, *lines])


def write_samples(trained: TrainedGenerator, count: int, seed: int, out: Path) -> None:
    """Write samples to a file.

    Args:
        trained: The generator.
        count: Number of samples.
        seed: Of the noise.
        out: A picture (``.png``) or an array ``[count, ...]`` (``.npy``).

    Raises:
        ValueError: If the count is below 1, or the file is none of these.
    """
    if count < 1:
        raise ValueError(f"n must be at least 1, got {count}")
    write = _WRITERS.get(out.suffix)
    if write is None:
        raise ValueError(f"out must end in {' or '.join(_WRITERS)}, got {str(out)!r}")
    samples = trained.sample(count, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(trained, out, samples)


def _write_array(trained: TrainedGenerator, out: Path, samples: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, samples.numpy())
    write_atomically(out, buffer.getvalue())


_WRITERS: dict[str, Callable[[TrainedGenerator, Path, Tensor], None]] = {
    ".png": lambda trained, out, samples: trained.task.draw(out, samples),
    ".npy": _write_array,
}
