"""Batches that several processes share, so that what they compute is what one would.

Every process has as many rows of every batch, computes the mean of a loss over them and
differentiates that; the mean of the processes' gradients is then the gradient of the mean over the
whole batch. What mixes rows, such as MMD^2 or batch normalisation, goes through `Shard.gather` and
`Shard.mean`. Their derivatives are such operations again, so that all of it holds for derivatives
of every order, which `DistributedDataParallel` and `SyncBatchNorm` do not offer. All processes must
differentiate the same things in the same order.
"""

from __future__ import annotations

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

    def check_divides(self, name: str, rows: int) -> None:
        """Refuse rows that are not as many for every process.

        Raises:
            ValueError: If they are not.
        """
        if rows % self.size:
            raise ValueError(f"{name} must be a multiple of the {self.size} processes, got {rows}")

    def take(self, batch: Tensor) -> Tensor:
        """Return the rows of a whole batch ``[n, ...]`` that this process has."""
        return batch

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


WHOLE = Shard()


class ProcessShard(Shard):
    """One of equal shares, in the order of the processes' ranks.

    Args:
        group: The processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessShard:
        """Itself: networks that hold it can be copied, a group of processes cannot."""
        return self

    def take(self, batch: Tensor) -> Tensor:
        """Return a contiguous part of the batch.

        Raises:
            ValueError: If the rows are not as many for every process.
        """
        self.check_divides("batch_size", len(batch))
        count = len(batch) // self.size
        return batch[self.rank * count : (self.rank + 1) * count]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, one after the other."""
        before, after = self.rank, self.size - self.rank - 1
        zeros = torch.zeros_like(rows)
        return self._sum(torch.cat([zeros] * before + [rows] + [zeros] * after))

    def mean(self, value: Tensor) -> Tensor:
        """Return the sum over the processes by their number."""
        return self._sum(value) / self.size

    def means(self, *scalars: Tensor) -> tuple[Tensor, ...]:
        """Return the means after one all-reduce."""
        return self.mean(torch.stack(scalars).detach()).unbind()

    def std(self, rows: Tensor) -> Tensor:
        """Return it from two means over the processes."""
        mean = self.mean(rows.mean())
        return self.mean((rows - mean).square().mean()).sqrt()

    def _sum(self, value: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(value, self.group)
        return total


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes.

    Its derivative is the sum of the cotangents: each process gets the derivative of the sum of all
    processes' results by its own tensor.
    """

    @staticmethod
    def forward(value: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(cotangent, ctx.group), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], value: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Any]:
        return _Sum.apply(value, group), in_dims[0]
