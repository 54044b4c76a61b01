"""Batches that several processes share, so that what they compute is what one would.

Every process has as many rows of every batch, computes the mean of a loss over them and
differentiates that; the mean of the processes' gradients is then the gradient of the mean over the
whole batch. What mixes rows, such as MMD^2 or batch normalisation, goes through `Shard.gather` and
`Shard.mean`. Their derivatives are such operations again, so that all of it holds for derivatives
of every order, which `DistributedDataParallel` and `SyncBatchNorm` do not offer. All processes must
differentiate the same things in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["WHOLE", "ProcessShard", "Shard"]


class Shard:
    """The rows of a batch that this process has: all of them, without other processes.

    Attributes:
        rank: Which of the processes this is, from 0.
        size: Their number.
        group: The processes, None for a single one.

    Example:
        >>> WHOLE.take(torch.arange(4))
        tensor([0, 1, 2, 3])
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def check_divides(self, name: str, rows: int, parts: int = 1) -> None:
        """Refuse rows that are not as many for every process in every part.

        Raises:
            ValueError: If they are not.
        """
        if self.size > 1 and rows % (parts * self.size):
            each = f", {parts} parts in each" if parts > 1 else ""
            wanted = f"a multiple of the {self.size} processes{each}"
            raise ValueError(f"{name} must be {wanted}, got {rows}")

    def take(self, batch: Tensor, parts: int = 1) -> Tensor:
        """Return the rows of a whole batch ``[n, ...]`` that this process has.

        Args:
            batch: The rows of all processes.
            parts: The batch is used in so many parts one after the other, each of them shared.
        """
        return batch

    def spread(self, rows: Tensor) -> Tensor:
        """Return the whole batch with this process's rows, and zeros for those of the others."""
        return rows

    def gather(self, rows: Tensor) -> Tensor:
        """Return the whole batch of which these are this process's rows, differentiable in them."""
        return rows

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes, differentiable in this process's."""
        return value

    def means(self, *scalars: Tensor) -> tuple[Tensor, ...]:
        """Return the means of several scalars at once, without graphs."""
        return scalars

    def std(self, rows: Tensor) -> Tensor:
        """Return the standard deviation (by n) of all numbers in the whole batch."""
        return rows.std(correction=0)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the rows of this process are the whole batch: the others do something else."""
        yield


WHOLE = Shard()


class ProcessShard(Shard):
    """One of equal shares, in the order of the processes' ranks.

    Args:
        group: The processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._is_alone = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessShard:
        """Itself: networks that hold it can be copied, a group of processes cannot."""
        return self

    def take(self, batch: Tensor, parts: int = 1) -> Tensor:
        """Return contiguous rows of every part.

        Raises:
            ValueError: If the rows are not as many for every process.
        """
        self.check_divides("batch_size", len(batch), parts)
        shares = batch.reshape(parts, self.size, -1, *batch.shape[1:])
        return shares[:, self.rank].flatten(0, 1)

    def spread(self, rows: Tensor) -> Tensor:
        """Return the rows between zeros for those of the processes before and after."""
        before, after = self.rank, self.size - self.rank - 1
        zeros = torch.zeros_like(rows)
        return torch.cat([zeros] * before + [rows] + [zeros] * after)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, one after the other."""
        return rows if self._is_alone else self._sum(self.spread(rows))

    def mean(self, value: Tensor) -> Tensor:
        """Return the sum over the processes by their number."""
        return value if self._is_alone else self._sum(value) / self.size

    def means(self, *scalars: Tensor) -> tuple[Tensor, ...]:
        """Return the means after one all-reduce."""
        return self.mean(torch.stack(scalars).detach()).unbind()

    def std(self, rows: Tensor) -> Tensor:
        """Return it from two means over the processes."""
        mean = self.mean(rows.mean())
        return self.mean((rows - mean).square().mean()).sqrt()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Move nothing inside."""
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def _sum(self, value: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(value, self.group)
        return total


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes.

    Its derivative is the sum of the cotangents: each process gets the derivative of the sum of all
    processes' results by its own tensor.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(cotangent, ctx.group), None
