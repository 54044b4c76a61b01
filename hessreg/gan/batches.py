"""What a trainer draws: real samples, noise for as many others, and the classes of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessreg.distributed import Shard
from hessreg.gan.data import Samples, ShuffledSampler
from hessreg.gan.networks import Generator

__all__ = ["Batch", "Batches", "Rows"]


class Batch(NamedTuple):
    """Real samples of this process, and the classes of those of all processes, if there are."""

    real: Tensor
    labels: Tensor | None


class Rows(NamedTuple):
    """A batch, or a part of one: real samples, noise, and the classes of both, if there are."""

    real: Tensor
    noise: Tensor
    labels: Tensor | None
    share: float = 1.0


class Batches:
    """Draws batches; the order of the samples and the noise come from one seed.

    Args:
        data: Real samples.
        labels: Their classes ``[count]``, if there are.
        sampler: Which samples are next.
        generator: Says what noise it takes.
        seed: Of the noise.
        parts: A batch is used in so many one after the other.
        shard: This process's share of each part.
    """

    def __init__(
        self,
        data: Samples,
        labels: Tensor | None,
        sampler: ShuffledSampler,
        generator: Generator,
        *,
        seed: int,
        parts: int,
        shard: Shard,
    ) -> None:
        self.data, self.labels, self.sampler = data, labels, sampler
        self._generator, self._parts, self._shard = generator, parts, shard
        self._dtype = next(generator.parameters()).dtype
        self.noise = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Batch:
        """Return the next ``count`` real samples."""
        indices = self.sampler.take(count)
        real = self.data[self._share(indices)].to(self._dtype)
        return Batch(real, None if self.labels is None else self.labels[indices])

    def rows(self, batch: Batch) -> Iterator[Rows]:
        """Draw noise for what is generated beside a batch, and return its parts."""
        real, labels = batch
        # All processes draw that of all, and on the CPU: it is the same everywhere.
        count = real.shape[0] * self._shard.size
        noise = self._share(self._generator.draw_latent(count, self.noise, labels))
        labels = None if labels is None else self._share(labels)
        whole = Rows(real, noise.to(self.data.device, self._dtype), labels)
        return iter([whole]) if self._parts == 1 else self._split(whole)

    def _split(self, whole: Rows) -> Iterator[Rows]:
        for rows in torch.arange(whole.real.shape[0]).tensor_split(self._parts):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            labels = None if whole.labels is None else whole.labels[part]
            share = len(rows) / whole.real.shape[0]
            yield Rows(whole.real[part], whole.noise[part], labels, share)

    def normal_like(self, samples: Tensor) -> Tensor:
        """Return normal numbers for the samples of a part, the same on every device."""
        count, *shape = samples.shape
        noise = torch.randn(count * self._shard.size, *shape, generator=self.noise)
        return self._shard.take(noise).to(samples)

    def _share(self, rows: Tensor) -> Tensor:
        return self._shard.take(rows, self._parts)

    def state_dict(self) -> dict[str, Any]:
        """Return where the order and the noise are."""
        return {"sampler": self.sampler.state_dict(), "noise": self.noise.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.sampler.load_state_dict(state["sampler"])
        self.noise.set_state(state["noise"])
