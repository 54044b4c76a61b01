"""Numbers in which the networks are evaluated, and the scale of losses in half precision."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["PRECISIONS", "LossScale", "autocast"]

PRECISIONS = ("float32", "float64", "bf16", "fp16")
_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which torch evaluates networks in ``"bf16"`` or ``"fp16"``."""
    if precision not in _REDUCED:
        return nullcontext()
    return torch.autocast(device.type, _REDUCED[precision])


class LossScale:
    """A factor of the loss that keeps small gradients representable in half precision.

    It follows the rule of `torch.amp.GradScaler`, which itself works on ``.grad`` and so comes too
    late here: regularisers take gradients as they are. A step whose gradients are not finite is
    left out and halves the factor; after 2000 others in a row it is doubled.

    Example:
        >>> scale = LossScale()
        >>> scale.accepts(is_finite=False), scale.value
        (False, 32768.0)
    """

    _INTERVAL = 2000

    def __init__(self) -> None:
        self.value = 2.0**16
        self._good = 0

    def accepts(self, is_finite: bool) -> bool:
        """Adapt, and return whether a step is to be made; at a factor of 1 it always is."""
        if not is_finite and self.value > 1.0:
            self.value, self._good = self.value / 2, 0
            return False
        self._good += 1
        if self._good == self._INTERVAL:
            self.value, self._good = self.value * 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the factor and how many steps in a row were good."""
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: If the factor is no power of 2 from 1 on, or the count is not possible.
        """
        value, good = state["value"], state["good"]
        is_scale = isinstance(value, float) and value >= 1 and math.frexp(value)[0] == 0.5
        if not is_scale or type(good) is not int or not 0 <= good < self._INTERVAL:
            raise ValueError(f"the loss scale {value!r:.40} after {good!r:.40} steps is none")
        self.value, self._good = value, good
