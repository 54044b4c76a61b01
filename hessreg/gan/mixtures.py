"""Narrow Gaussians in the plane: the smallest data sets on which a GAN loses modes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hessreg.gan.data import Dataset
from hessreg.gan.metrics import classes_covered
from hessreg.kernels import mmd2

__all__ = ["RING", "Mixture", "MixtureJudge", "grid_mixture", "load_mixture", "ring_mixture"]

_NEAR = 3.0  # standard deviations: holds 98.9 % of a Gaussian in the plane
_POINTS, _TEST_SIZE = 50_000, 10_000
_RADIUS = 2.0  # root mean square distance of the centres from 0, as networks see them
_FARTHEST = 1.6  # of neighbours: penalties would not let a discriminator reach from one to the next


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one width and equal shares in the plane, around 0.

    Networks see them scaled, so that training does not depend on the unit: their centres are at a
    root mean square distance of 2 from 0, or nearer if neighbours would be more than 1.6 apart.

    Attributes:
        name: Of the data set.
        centres: ``[modes, 2]``, scaled.
        std: Standard deviation of each, scaled.
        unit: What the scaled 1 is in the mixture's own unit.
    """

    name: str
    centres: Tensor
    std: float
    unit: float

    @classmethod
    def scaled(cls, name: str, centres: Tensor, std: float) -> Mixture:
        """Make a mixture from centres and a width in its own unit."""
        size = centres.square().sum(1).mean().sqrt().item()
        gaps = torch.nn.functional.pdist(centres)
        spacing = gaps.min().item() if len(gaps) else 0.0
        unit = max(size / _RADIUS, spacing / _FARTHEST) or 1.0
        return cls(name, centres / unit, std / unit, unit)


def ring_mixture(
    modes: int = 8, radius: float = 2.0, std: float = 0.02, rotation: float = 0.0
) -> Mixture:
    """Return Gaussians at equal distances on a circle.

    Args:
        modes: Their number.
        radius: Of the circle.
        std: Standard deviation of each.
        rotation: Angle of the first, in degrees.

    Example:
        >>> mixture = ring_mixture(radius=10.0)
        >>> round(mixture.unit, 6), (mixture.unit * mixture.centres[0]).round().tolist()
        (5.0, [10.0, 0.0])
    """
    angles = torch.arange(modes) * (2.0 * math.pi / modes) + math.radians(rotation)
    return Mixture.scaled("ring", radius * torch.stack([angles.cos(), angles.sin()], 1), std)


def grid_mixture(side: int = 5, spacing: float = 2.0, std: float = 0.05) -> Mixture:
    """Return Gaussians on a square grid.

    Args:
        side: As many in each row and column.
        spacing: Distance of neighbours.
        std: Standard deviation of each.

    Example:
        >>> grid_mixture().centres.shape
        torch.Size([25, 2])
    """
    steps = spacing * (torch.arange(side) - (side - 1) / 2)
    return Mixture.scaled("grid", torch.cartesian_prod(steps, steps), std)


RING = ring_mixture()


def load_mixture(mixture: Mixture = RING) -> Dataset:
    """Return 50,000 points ``[n, 2]`` of a mixture on the CPU, scaled.

    The label is the mode, and every call returns the same 40,000 training and 10,000 test points.
    """
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(len(mixture.centres), (_POINTS,), generator=random)
    noise = torch.randn(_POINTS, 2, generator=random)
    points = mixture.centres[labels] + mixture.std * noise
    sizes = [_TEST_SIZE, _POINTS - _TEST_SIZE]
    (test, train), (test_labels, train_labels) = points.split(sizes), labels.split(sizes)
    return Dataset(mixture.name, train, train_labels, test, test_labels)


class MixtureJudge:
    """Says how many of the modes are drawn, and how well.

    - ``modes``: modes that get at least a fifth of their fair share in samples of high quality.
    - ``quality``: share of samples of high quality: within 3 standard deviations of a centre
      (98.9 % of the data are).
    - ``tv``: total variation distance of the shares of the modes from equal ones, each sample
      counted for its nearest mode.
    - ``mmd``: maximum mean discrepancy to test points (root of the unbiased estimate, or 0), in a
      mixture of Gaussian kernels of 2.5 and 10 standard deviations and 1.

    Args:
        dataset: Points of the mixture.
        mixture: Where they are from.
    """

    columns: Mapping[str, tuple[str, str]] = {
        "modes": ("modes", "d"),
        "quality": ("quality", ".1%"),
        "tv": ("TV", ".3f"),
        "mmd": ("MMD", ".4f"),
    }
    headline = "mmd"
    num_samples = 10_000

    def __init__(self, dataset: Dataset, mixture: Mixture = RING) -> None:
        self.mixture = mixture
        self._train, self._test = dataset.tensors()
        self._labels = dataset.train_labels
        self._modes = len(mixture.centres)
        self._sigmas = (2.5 * mixture.std, 10 * mixture.std, 1.0)

    def classify(self, samples: Tensor) -> Tensor:
        """Return the nearest mode, ``[n]``, of points ``[n, 2]``."""
        return self._nearest(samples)[1]

    def evaluate(self, samples: Tensor) -> dict[str, float]:
        """Return every metric of points ``[n, 2]``."""
        distance, mode = self._nearest(samples)
        good = distance < _NEAR * self.mixture.std
        shares = torch.bincount(mode, minlength=self._modes).double() / len(mode)
        drawn = samples[: self.num_samples].to(self._test)
        discrepancy = mmd2(self._test, drawn, self._sigmas)
        return {
            "modes": classes_covered(mode[good], self._modes, len(mode)),
            "quality": float(good.double().mean()),
            "tv": float((shares - 1.0 / self._modes).abs().sum() / 2.0),
            "mmd": float(discrepancy.clamp_min(0.0).sqrt()),
        }

    def reference_rows(self) -> dict[str, dict[str, float]]:
        """Return the metrics of training points, of the same blurred, and of fewer modes."""
        points, labels = self._train, self._labels
        noise = torch.Generator().manual_seed(0)
        blurred = points + self.mixture.std * torch.randn(points.shape, generator=noise)
        rows = {"training points": points, "training points + noise": blurred}
        if self._modes > 1:
            rows["all modes but one"] = points[labels < self._modes - 1]
            rows["one mode"] = points[labels == 0]
        return {name: self.evaluate(row[: self.num_samples]) for name, row in rows.items()}

    def describe(self, values: Mapping[str, float]) -> str:
        """Return modes, quality and distances in words."""
        scale = self.evaluate(self._train[: self.num_samples])
        return (
            f"{values['modes']} of {self._modes} modes, {100 * values['quality']:.1f} % of the"
            " samples within 3 standard deviations of one (of the data"
            f" {100 * scale['quality']:.1f} %),"
            f" TV {values['tv']:.3f}, MMD {values['mmd']:.4f} ({scale['mmd']:.4f})"
        )

    def _nearest(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        nearest = torch.cdist(samples.to("cpu", torch.float32), self.mixture.centres).min(1)
        return nearest.values, nearest.indices
