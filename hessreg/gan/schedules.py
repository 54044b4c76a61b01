"""Learning rates over a run: a factor for every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SHAPES", "Schedule"]

SHAPES = ("constant", "linear", "exponential", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A factor of a learning rate, from 1 at the start to ``end_factor`` at the end of a run.

    Args:
        shape: How it falls: ``"constant"`` (not), ``"linear"``, ``"exponential"`` or ``"cosine"``.
        end_factor: Its value at the end.
        warmup: Steps over which it rises to its place from nothing.

    Example:
        >>> schedule = Schedule("cosine", end_factor=0.2, warmup=10)
        >>> [round(schedule(step, step / 100), 3) for step in (0, 9, 50, 100)]
        [0.1, 0.984, 0.6, 0.2]
    """

    shape: str = "constant"
    end_factor: float = 0.0
    warmup: int = 0

    @property
    def is_constant(self) -> bool:
        """Whether it is 1 at every step."""
        return self.shape == "constant" and not self.warmup

    @property
    def needs_end(self) -> bool:
        """Whether it depends on where the run ends."""
        return self.shape != "constant"

    def __call__(self, step: int, done: float) -> float:
        """Return the factor.

        Args:
            step: Steps made before, for the warm-up.
            done: How much of the run is done, in [0, 1]; beyond, the end.
        """
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * self._fall(min(1.0, max(0.0, done)))

    def _fall(self, done: float) -> float:
        end = self.end_factor
        if self.shape == "linear":
            return 1.0 + (end - 1.0) * done
        if self.shape == "exponential":
            return float(end**done)
        if self.shape == "cosine":
            return end + (1.0 - end) * (1.0 + math.cos(math.pi * done)) / 2.0
        return 1.0
