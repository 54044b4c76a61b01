"""What to train on, and an endless sampler whose position can be saved exactly."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dataset", "ShuffledSampler", "load_digits"]

_TEST_SIZE = 360


@dataclass(frozen=True)
class Dataset:
    """Samples ``[n, ...]`` with integer labels ``[n]``; images are in [-1, 1]."""

    name: str
    train_samples: Tensor
    train_labels: Tensor
    test_samples: Tensor
    test_labels: Tensor


def load_digits() -> Dataset:
    """Return the 1797 handwritten 8 x 8 digits that come with scikit-learn, on the CPU.

    They are always split into the same 1437 training and 360 test images ``[n, 1, 8, 8]``.
    Nothing is downloaded.
    """
    spec = importlib.util.find_spec("sklearn")  # importing it takes a second
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="scikit-learn")
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    images, labels = table[:, :-1].view(-1, 1, 8, 8).div(8.0).sub(1.0), table[:, -1].long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:_TEST_SIZE], order[_TEST_SIZE:]
    return Dataset("digits", images[train], labels[train], images[test], labels[test])


class ShuffledSampler:
    """Endless mini-batches: every sample once in each pass, in a new random order every time.

    A batch that reaches the end of a pass is completed from the next one, so all batches have
    the same size.

    Args:
        size: Number of samples to choose from.
        batch_size: Number of indices in a batch, at most ``size``.
        seed: Seed of the order.

    Example:
        >>> sampler = ShuffledSampler(size=4, batch_size=2, seed=0)
        >>> sorted(torch.cat([next(sampler), next(sampler)]).tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= size:
            raise ValueError(
                f"batch_size must be in [1, {size}] for {size} samples, got {batch_size}"
            )
        self.size = size
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> ShuffledSampler:
        """Return itself: there is one stream of batches."""
        return self

    def __next__(self) -> Tensor:
        """Return the next batch of indices, shape ``[batch_size]``."""
        return self.take(self.batch_size)

    def take(self, count: int) -> Tensor:
        """Return the next ``count`` indices, at most as many as there are samples."""
        if len(self._queue) < count:
            order = torch.randperm(self.size, generator=self._generator)
            self._queue = torch.cat([self._queue, order])
        batch, self._queue = self._queue.split([count, len(self._queue) - count])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position in the stream."""
        return {"queue": self._queue.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned.

        Raises:
            ValueError: If the queue is not made of indices of samples.
        """
        queue = state["queue"]
        if not isinstance(queue, Tensor) or queue.dtype != torch.int64 or queue.dim() != 1:
            raise ValueError("the sampler's queue is not a list of indices")
        if len(queue) and not 0 <= int(queue.min()) <= int(queue.max()) < self.size:
            raise ValueError(f"the sampler's queue has indices outside [0, {self.size})")
        self._queue = queue.clone()
        self._generator.set_state(state["generator"])
