"""The generator to sample from: a moving average of the one in training."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]

_Network = TypeVar("_Network", bound=nn.Module)


class MovingAverage(Generic[_Network]):
    """A copy of a network with the exponential moving average of its parameters.

    Attributes:
        network: The copy; its buffers are those of the last update.

    Args:
        source: What is copied.
        decay: Weight of the average against the new parameters, in the long run.

    Example:
        >>> source = nn.Linear(1, 1)
        >>> average = MovingAverage(source, decay=0.9)
        >>> average.update(step=0)
        >>> torch.equal(average.network.weight, source.weight)
        True
    """

    def __init__(self, source: _Network, decay: float) -> None:
        self.network = copy.deepcopy(source).requires_grad_(False)
        self._decay = decay
        self._averages: list[Tensor] = list(self.network.parameters())
        self._parameters: list[Tensor] = list(source.parameters())
        self._buffers = list(zip(self.network.buffers(), source.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after a step; ``step`` is the number of those before."""
        # A short memory at the start forgets the initial weights.
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parameters, 1.0 - decay)
        for copied, buffer in self._buffers:
            copied.copy_(buffer)
