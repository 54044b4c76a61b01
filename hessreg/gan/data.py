"""What to train on, and an endless sampler whose position can be saved exactly."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Dataset",
    "ItemSamples",
    "Samples",
    "ScaledSamples",
    "ShuffledSampler",
    "load_digits",
    "split_at_random",
    "subset",
]

_TEST_SIZE = 360
_LARGEST_TEST = 10_000
_RESIDENT = 2**30  # bytes that may be copied to the device


class Samples(Protocol):
    """What batches are drawn from: a tensor ``[n, ...]``, or what behaves like one."""

    @property
    def shape(self) -> torch.Size:
        """Of all samples, ``[n, ...]``."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        ...

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the samples at indices ``[m]``, ``[m, ...]``."""
        ...

    def to(self, device: torch.device) -> Samples:
        """Return the same samples with batches on another device."""
        ...


class ScaledSamples:
    """Samples that stay as they were read, 8-bit or memory-mapped; every batch is scaled anew.

    Args:
        values: Tensor ``[n, ...]`` of any type.
        scale: What values are multiplied by; a number, or as the values of a sample, in whose type
            it is then computed.
        shift: What is then added, likewise.
        rows: Which of the values are meant, ``[m]``; by default all.
        device: Where batches are.

    Example:
        >>> pixels = ScaledSamples(torch.tensor([[0], [255]], dtype=torch.uint8), 2 / 255, -1.0)
        >>> pixels[torch.tensor([1, 0])].tolist()
        [[1.0], [-1.0]]
    """

    def __init__(
        self,
        values: Tensor,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        rows: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.values, self.scale, self.shift, self.rows = values, scale, shift, rows
        self.device = device or torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        """Of all samples, ``[n, ...]``."""
        return torch.Size([len(self), *self.values.shape[1:]])

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self.values if self.rows is None else self.rows)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the samples at indices ``[m]``, scaled, in float32."""
        rows = indices if self.rows is None else self.rows[indices]
        batch = self.values[rows.to(self.values.device)]
        exact = self.scale.dtype if isinstance(self.scale, Tensor) else torch.float32
        return (batch.to(self.device, exact) * self.scale + self.shift).float()

    def to(self, device: torch.device) -> ScaledSamples:
        """Return the same samples with batches on a device, and up to 1 GiB of values, too."""
        fits = self.values.nbytes <= _RESIDENT
        moved = self.values.to(device) if fits else self.values
        scale, shift = (
            each.to(device) if isinstance(each, Tensor) else each
            for each in (self.scale, self.shift)
        )
        return ScaledSamples(moved, scale, shift, self.rows, device)

    def only(self, rows: Tensor) -> ScaledSamples:
        """Return some of the samples, without a copy."""
        chosen = rows if self.rows is None else self.rows[rows]
        return ScaledSamples(self.values, self.scale, self.shift, chosen, self.device)


class ItemSamples:
    """Samples of a map-style dataset of torch, fetched one by one when a batch needs them.

    Args:
        items: The dataset; an item is a tensor, or a tuple or list that begins with one.
        value_range: What pixels are between, for items in floating point of three dimensions; they
            are scaled to [-1, 1]. 8-bit pixels are between 0 and 255, and points are left alone.
        rows: Which of the items are meant, ``[m]``; by default all.
        device: Where batches are.
    """

    def __init__(
        self,
        items: Any,
        value_range: tuple[float, float] = (-1.0, 1.0),
        rows: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.items, self.value_range, self.rows = items, value_range, rows
        self.device = device or torch.device("cpu")
        self._item_shape = self._item(0).shape

    @property
    def shape(self) -> torch.Size:
        """Of all samples, ``[n, ...]``."""
        return torch.Size([len(self), *self._item_shape])

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self.items if self.rows is None else self.rows)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the samples at indices ``[m]``, scaled, in float32."""
        return torch.stack([self._item(int(index)) for index in indices]).to(self.device)

    def to(self, device: torch.device) -> ItemSamples:
        """Return the same samples with batches on a device."""
        return ItemSamples(self.items, self.value_range, self.rows, device)

    def only(self, rows: Tensor) -> ItemSamples:
        """Return some of the samples."""
        chosen = rows if self.rows is None else self.rows[rows]
        return ItemSamples(self.items, self.value_range, chosen, self.device)

    def _item(self, index: int) -> Tensor:
        item = self.items[index if self.rows is None else int(self.rows[index])]
        sample = item[0] if isinstance(item, tuple | list) else item
        if not isinstance(sample, Tensor) or sample.is_complex():
            kind = type(sample).__name__
            raise TypeError(
                f"item {index} must be a tensor of real numbers, or start with one, got {kind}"
            )
        low, high = (0.0, 255.0) if sample.dtype == torch.uint8 else self.value_range
        if sample.dim() != 3:
            return sample.float()
        return (sample.float() - low) * (2.0 / (high - low)) - 1.0


@dataclass(frozen=True)
class Dataset:
    """Samples ``[n, ...]`` with integer labels ``[n]`` from 0 on; images are in [-1, 1].

    Data without classes have the label 0.
    """

    name: str
    train_samples: Samples
    train_labels: Tensor
    test_samples: Samples
    test_labels: Tensor

    def draw_labels(self, count: int, random: torch.Generator) -> Tensor:
        """Return classes ``[count]`` in the shares that they have of the training samples."""
        return self.train_labels[torch.randint(len(self.train_labels), (count,), generator=random)]

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 if there are no labels."""
        return 1 + max(int(labels.max()) for labels in (self.train_labels, self.test_labels))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return training and test samples as plain tensors, in memory."""
        train, test = (
            each if isinstance(each, Tensor) else subset(each, torch.arange(len(each)))
            for each in (self.train_samples, self.test_samples)
        )
        return train, test

    def preloaded(self, train: int, test: int) -> Dataset:
        """Return at most so many of the samples, chosen by a fixed seed, as plain tensors."""
        chosen = _sample_rows(len(self.train_samples), train)
        judged = _sample_rows(len(self.test_samples), test)
        return replace(
            self,
            train_samples=subset(self.train_samples, chosen),
            train_labels=self.train_labels[chosen],
            test_samples=subset(self.test_samples, judged),
            test_labels=self.test_labels[judged],
        )

    @classmethod
    def from_torch(
        cls,
        train: Any,
        test: Any = None,
        *,
        name: str = "torch",
        labels: Sequence[int] | Tensor | None = None,
        test_labels: Sequence[int] | Tensor | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> Dataset:
        """Wrap any map-style dataset of torch: something with a length and items.

        Items are fetched when a batch needs them, so they may be read from files, or transformed
        at random (which a resumed run repeats only if the randomness is torch's own).

        Args:
            train: Its items are tensors, or tuples of a tensor and maybe an integer label.
            test: Likewise; without it, a sixth of ``train`` (`split_at_random`).
            name: For headings.
            labels: Of ``train``. By default its ``targets``, or what its items have second, for
                which each item is fetched once.
            test_labels: Of ``test``, likewise.
            value_range: What pixels in floating point are between; see `ItemSamples`.

        Raises:
            TypeError: If items are not tensors.
            ValueError: If there are too few, or the labels do not fit.

        Example:
            >>> points = torch.utils.data.TensorDataset(torch.randn(60, 2))
            >>> data = Dataset.from_torch(points)
            >>> len(data.train_samples), len(data.test_samples), data.num_classes
            (50, 10, 1)
        """
        _check_count(len(train), 2, "train")
        samples, known = ItemSamples(train, value_range), _labels_of(train, labels)
        if test is None:
            return split_at_random(name, samples, known)
        _check_count(len(test), 2, "test")
        judged = ItemSamples(test, value_range)
        if judged.shape[1:] != samples.shape[1:]:
            wanted, got = tuple(samples.shape[1:]), tuple(judged.shape[1:])
            raise ValueError(f"test must have samples of shape {wanted}, got {got}")
        return cls(name, samples, known, judged, _labels_of(test, test_labels))


def _check_count(count: int, least: int, name: str) -> None:
    if count < least:
        raise ValueError(f"{name} must have at least {least} samples, got {count}")


def _labels_of(items: Any, labels: Sequence[int] | Tensor | None) -> Tensor:
    """Labels that are given, known to the dataset, or part of its items; else zeros."""
    if labels is None:
        labels = getattr(items, "targets", None)
    if labels is None and isinstance(items[0], tuple | list) and len(items[0]) > 1:
        labels = [int(items[index][1]) for index in range(len(items))]
    if labels is None:
        return torch.zeros(len(items), dtype=torch.int64)
    known = torch.as_tensor(labels)
    if known.shape != (len(items),) or known.is_floating_point() or int(known.min()) < 0:
        raise ValueError(
            f"labels must be {len(items)} integers of at least 0, got"
            f" {tuple(known.shape)} of {known.dtype}"
        )
    return known.to(torch.int64)


def split_at_random(
    name: str,
    samples: ScaledSamples | ItemSamples,
    labels: Tensor,
) -> Dataset:
    """Put a sixth of the samples aside as test set, at most 10,000, always the same ones.

    Args:
        name: Of the data set.
        samples: ``[n, ...]``.
        labels: ``[n]``.
    """
    count = len(samples)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([min(max(1, count // 6), _LARGEST_TEST)])
    return Dataset(name, samples.only(train), labels[train], samples.only(test), labels[test])


def _sample_rows(count: int, wanted: int) -> Tensor:
    if count <= wanted:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]


def subset(samples: Samples, rows: Tensor) -> Tensor:
    """Return some samples as a plain tensor on the CPU."""
    return torch.cat([samples[part].cpu() for part in rows.split(1024)])


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
        batch, self._queue = self._queue[:count], self._queue[count:]
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
