"""Eight narrow Gaussians on a circle: the smallest data set on which a GAN loses modes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hessreg.gan.data import Dataset
from hessreg.gan.metrics import classes_covered
from hessreg.kernels import mmd2

__all__ = ["CENTRES", "RING_STD", "RingJudge", "load_ring"]

_MODES = 8
_ANGLES = torch.arange(_MODES) * (2.0 * math.pi / _MODES)
CENTRES = 2.0 * torch.stack([_ANGLES.cos(), _ANGLES.sin()], 1)  # [8, 2]
RING_STD = 0.02
_NEAR = 3.0  # standard deviations: holds 98.9 % of a Gaussian in the plane
_POINTS, _TEST_SIZE = 50_000, 10_000
_MMD_POINTS = 2000  # the cost grows with the square
_MMD_SIGMAS = (0.05, 0.2, 1.0)  # from the width of a mode to the distance of two


def load_ring() -> Dataset:
    """Return 50,000 points ``[n, 2]`` of eight Gaussians on a circle of radius 2, on the CPU.

    Their standard deviation is 0.02, the label is the mode, and every call returns the same 40,000
    training and 10,000 test points.
    """
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(_MODES, (_POINTS,), generator=random)
    points = CENTRES[labels] + RING_STD * torch.randn(_POINTS, 2, generator=random)
    sizes = [_TEST_SIZE, _POINTS - _TEST_SIZE]
    (test, train), (test_labels, train_labels) = points.split(sizes), labels.split(sizes)
    return Dataset("ring", train, train_labels, test, test_labels)


class RingJudge:
    """Says how many of the modes are drawn, and how well.

    - ``modes``: modes that get at least a fifth of their fair share in samples of high quality.
    - ``quality``: share of samples of high quality: within 3 standard deviations of a centre
      (98.9 % of the data are).
    - ``tv``: total variation distance of the shares of the modes from equal ones, each sample
      counted for its nearest mode.
    - ``mmd``: maximum mean discrepancy to test points (root of the unbiased estimate, or 0), in a
      mixture of Gaussian kernels of 0.05, 0.2 and 1.

    Args:
        dataset: The ring.
    """

    columns: Mapping[str, tuple[str, str]] = {
        "modes": ("modes", "d"),
        "quality": ("quality", ".1%"),
        "tv": ("TV", ".3f"),
        "mmd": ("MMD", ".4f"),
    }
    headline = "mmd"
    num_samples = 10_000

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def classify(self, samples: Tensor) -> Tensor:
        """Return the nearest mode, ``[n]``, of points ``[n, 2]``."""
        return self._nearest(samples)[1]

    def evaluate(self, samples: Tensor) -> dict[str, float]:
        """Return every metric of points ``[n, 2]``."""
        distance, mode = self._nearest(samples)
        good = distance < _NEAR * RING_STD
        shares = torch.bincount(mode, minlength=_MODES).double() / len(mode)
        real, drawn = self.dataset.test_samples[:_MMD_POINTS], samples[:_MMD_POINTS]
        discrepancy = mmd2(real, drawn.to(real), _MMD_SIGMAS)
        return {
            "modes": classes_covered(mode[good], _MODES, len(mode)),
            "quality": float(good.double().mean()),
            "tv": float((shares - 1.0 / _MODES).abs().sum() / 2.0),
            "mmd": float(discrepancy.clamp_min(0.0).sqrt()),
        }

    def reference_rows(self) -> dict[str, dict[str, float]]:
        """Return the metrics of training points, of the same blurred, and of fewer modes."""
        points, labels = self.dataset.train_samples, self.dataset.train_labels
        noise = torch.Generator().manual_seed(0)
        blurred = points + RING_STD * torch.randn(points.shape, generator=noise)
        rows = {
            "training points": points,
            "training points + noise": blurred,
            "seven modes": points[labels < _MODES - 1],
            "one mode": points[labels == 0],
        }
        return {name: self.evaluate(row[: self.num_samples]) for name, row in rows.items()}

    def describe(self, values: Mapping[str, float]) -> str:
        """Return modes, quality and distances in words."""
        scale = self.evaluate(self.dataset.train_samples[: self.num_samples])
        return (
            f"{values['modes']} of {_MODES} modes, {100 * values['quality']:.1f} % of the samples"
            f" within 3 standard deviations of one (of the data {100 * scale['quality']:.1f} %),"
            f" TV {values['tv']:.3f}, MMD {values['mmd']:.4f} ({scale['mmd']:.4f})"
        )

    def _nearest(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        nearest = torch.cdist(samples.to("cpu", torch.float32), CENTRES).min(1)
        return nearest.values, nearest.indices
