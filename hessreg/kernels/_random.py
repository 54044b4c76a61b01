"""Where random numbers are drawn."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["drawing_device"]


def drawing_device(generator: Any, device: torch.device) -> torch.device:
    """The device of the generator, or ``device`` where there is none.

    Raises:
        TypeError: not a generator.
    """
    if generator is None:
        return device
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator)}")
    return generator.device
