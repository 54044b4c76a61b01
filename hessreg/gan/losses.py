"""Adversarial losses on logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["discriminator_loss", "generator_loss"]


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return ``mean(-log s(real)) + mean(-log(1 - s(fake)))`` with s the logistic function.

    Args:
        real_logits: Logits of real images, ``[n]``.
        fake_logits: Logits of generated images, ``[m]``.

    Returns:
        A scalar.
    """
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the non-saturating loss ``mean(-log s(fake))`` of logits ``[n]``."""
    return softplus(-fake_logits).mean()
