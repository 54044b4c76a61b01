"""Means of what is measured in every step, until they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["RunningMeans"]


class RunningMeans:
    """Sums of scalars by name, and how many there are; tensors are not waited for before `read`.

    Example:
        >>> means = RunningMeans()
        >>> means.add("_d", {"loss": 1.0}), means.add("_d", {"loss": torch.tensor(2.0)})
        (None, None)
        >>> means.read()
        {'loss_d': 1.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, suffix: str, scalars: Mapping[str, Tensor | float]) -> None:
        """Take note of some values, without graphs; their names get the suffix."""
        for title, value in scalars.items():
            name = title + suffix
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Return the means since the last call."""
        values = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the counts."""
        sums = {
            name: total if isinstance(total, Tensor) else torch.tensor(total, dtype=torch.float64)
            for name, total in self._sums.items()
        }
        return {"sums": sums, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: If the sums are not scalar tensors, or the counts not theirs.
        """
        sums, counts = state["sums"], state["counts"]
        for name, count in counts.items():
            check_integer(f"the count of {name}", count, 1)
        if counts.keys() != sums.keys():
            raise ValueError("the sums are not those that are counted")
        for name, total in sums.items():
            if not isinstance(total, Tensor) or total.dim():
                raise ValueError(f"the sum of {name} is not a scalar tensor")
        self._sums = {name: total.to(device) for name, total in sums.items()}
        self._counts = dict(counts)


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuse what is no count.

    Raises:
        ValueError: If it is not an integer from ``least`` on that torch can hold.
    """
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r:.40}")
