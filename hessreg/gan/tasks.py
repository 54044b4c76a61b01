"""The data sets one can train on, each with its metrics and its pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from hessreg.gan import pictures
from hessreg.gan.config import DEFAULTS, TrainConfig
from hessreg.gan.data import Dataset, load_digits
from hessreg.gan.metrics import ImageJudge, Judge
from hessreg.gan.mixtures import (
    Mixture,
    MixtureJudge,
    grid_mixture,
    load_mixture,
    ring_mixture,
)

__all__ = ["Task", "load_dataset", "make_task"]


@dataclass(frozen=True)
class Task:
    """What belongs to a data set; the networks follow from the shape of its samples.

    Attributes:
        load: Returns the data set.
        judge: Returns the metrics of samples of it.
        draw: Writes a picture of samples ``[n, ...]`` to a PNG file.
        shown: What the picture shows.
        draw_walk: Writes a picture of ways through the samples, ``[rows, walk_steps, ...]``.
        walk_steps: Samples on each way.
    """

    load: Callable[[], Dataset]
    judge: Callable[[Dataset], Judge]
    draw: Callable[[Path, Tensor], None]
    shown: str
    draw_walk: Callable[[Path, Tensor], None]
    walk_steps: int


def make_task(config: TrainConfig) -> Task:
    """Return what belongs to the data set of a configuration, with its options."""
    if config.dataset == "digits":
        draw = pictures.save_grid, "64 images", pictures.save_strips, 8
        return Task(load_digits, ImageJudge, *draw)
    if config.dataset == "ring":
        return _mixture_task(ring_mixture(**vars(config.ring)))
    return _mixture_task(grid_mixture(**vars(config.grid)))


def _mixture_task(mixture: Mixture) -> Task:
    return Task(
        partial(load_mixture, mixture),
        partial(MixtureJudge, mixture=mixture),
        partial(pictures.save_points, mixture=mixture),
        "2000 points",
        partial(pictures.save_paths, mixture=mixture),
        64,
    )


def load_dataset(name: str) -> Dataset:
    """Load a data set by name, with its options as they are by default.

    Args:
        name: ``"digits"``, ``"ring"`` or ``"grid"``; see `load_digits` and `load_mixture`.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: If there is no such data set.
    """
    if name not in DEFAULTS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DEFAULTS)}")
    return make_task(DEFAULTS[name]).load()
