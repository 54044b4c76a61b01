"""The data sets one can train on, each with its metrics and its pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hessreg.gan import pictures
from hessreg.gan.data import Dataset, load_digits
from hessreg.gan.metrics import ImageJudge, Judge
from hessreg.gan.ring import RingJudge, load_ring

__all__ = ["TASKS", "Task", "load_dataset"]


@dataclass(frozen=True)
class Task:
    """What belongs to a data set; the networks follow from the shape of its samples.

    Attributes:
        load: Returns the data set.
        judge: Returns the metrics of samples of it.
        draw: Writes a picture of samples ``[n, ...]`` to a PNG file.
        shown: What the picture shows.
    """

    load: Callable[[], Dataset]
    judge: Callable[[Dataset], Judge]
    draw: Callable[[Path, Tensor], None]
    shown: str


TASKS = {
    "digits": Task(load_digits, ImageJudge, pictures.save_grid, "64 images"),
    "ring": Task(load_ring, RingJudge, pictures.save_ring, "2000 points"),
}


def load_dataset(name: str) -> Dataset:
    """Load a data set by name.

    Args:
        name: ``"digits"`` or ``"ring"``; see `load_digits` and `load_ring`.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: If there is no such data set.
    """
    if name not in TASKS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name].load()
