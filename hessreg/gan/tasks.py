"""The data sets one can train on, each with its metrics and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from hessreg.gan import pictures
from hessreg.gan.config import DEFAULTS, TrainConfig
from hessreg.gan.data import Dataset, load_digits
from hessreg.gan.file_datasets import load_arrays, load_images, load_mnist
from hessreg.gan.metrics import ImageJudge, Judge, PrincipalJudge
from hessreg.gan.mixtures import (
    Mixture,
    MixtureJudge,
    grid_mixture,
    load_mixture,
    ring_mixture,
)

__all__ = ["Task", "dataset_task", "load_dataset", "make_task"]

_JUDGED, _JUDGED_TEST = 10_000, 2000  # samples that metrics take from large data sets
_COLUMNS, _MOST_COLUMNS = 8, 16  # of a picture
_JUDGED_VALUES = 2**26  # numbers in them


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
    walk_steps: int = 8


def make_task(config: TrainConfig) -> Task:
    """Return what belongs to the data set of a configuration, with its options."""

    def of_files(load: Callable[..., Dataset], options: object = None) -> Callable[[], Task]:
        given = {} if options is None else vars(options)
        return lambda: dataset_task(partial(load, config.data, **given), config)

    tasks: dict[str, Callable[[], Task]] = {
        "digits": lambda: _digits_task(config),
        "ring": lambda: _mixture_task(ring_mixture(**vars(config.ring))),
        "grid": lambda: _mixture_task(grid_mixture(**vars(config.grid))),
        "mnist": of_files(load_mnist),
        "images": of_files(load_images, config.images),
        "arrays": of_files(load_arrays, config.arrays),
    }
    return tasks[config.dataset]()


def _digits_task(config: TrainConfig) -> Task:
    draw = partial(pictures.save_grid, columns=_columns(config, load_digits))
    return Task(load_digits, ImageJudge, draw, "images", pictures.save_strips)


def _columns(config: TrainConfig, load: Callable[[], Dataset]) -> int:
    """Of a picture of images: one for each class or code, if there are not too many."""
    count = config.infogan.codes
    if config.conditional != "none":
        count = load().num_classes
    return count if 2 <= count <= _MOST_COLUMNS else _COLUMNS


def dataset_task(load: Callable[[], Dataset], config: TrainConfig) -> Task:
    """Return what belongs to a data set of images or points of which nothing else is known.

    Args:
        load: Returns it; called once.
        config: How the networks are trained.
    """
    load = cache(load)

    def judge(dataset: Dataset) -> Judge:
        fitting = _JUDGED_VALUES // math.prod(dataset.train_samples.shape[1:])
        seen = dataset.preloaded(min(_JUDGED, fitting), min(_JUDGED_TEST, fitting))
        is_labelled = dataset.num_classes > 1 and len(dataset.train_samples.shape) == 4
        return ImageJudge(seen) if is_labelled else PrincipalJudge(seen)

    def draw(path: Path, samples: Tensor) -> None:
        if samples.dim() == 4:
            pictures.save_grid(path, samples, _columns(config, load))
        else:
            pictures.save_scatter(path, samples, load())

    def draw_walk(path: Path, walks: Tensor) -> None:
        if walks.dim() == 5:
            pictures.save_strips(path, walks)
        else:
            pictures.save_scatter(path, walks.flatten(0, 1), load())

    return Task(load, judge, draw, "samples", draw_walk)


def _mixture_task(mixture: Mixture) -> Task:
    return Task(
        partial(load_mixture, mixture),
        partial(MixtureJudge, mixture=mixture),
        partial(pictures.save_points, mixture=mixture),
        "2000 points",
        partial(pictures.save_paths, mixture=mixture),
        64,
    )


def load_dataset(name: str, data: str = "") -> Dataset:
    """Load a data set by name, with its options as they are by default.

    Args:
        name: ``"digits"``, ``"ring"``, ``"grid"``, ``"mnist"``, ``"images"`` or ``"arrays"``; see
            `load_digits`, `load_mixture`, `load_mnist`, `load_images` and `load_arrays`.
        data: File or folder of the last three.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: If there is no such data set, or it cannot be read.
    """
    if name not in DEFAULTS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DEFAULTS)}")
    return make_task(replace(DEFAULTS[name], data=data)).load()
