"""Adversarial losses on logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["discriminator_loss", "discriminator_losses", "generator_loss"]


def discriminator_losses(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parts of `discriminator_loss`: on real and on generated images."""
    return softplus(-real_logits).mean(), softplus(fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return ``mean(-log s(real)) + mean(-log(1 - s(fake)))`` with s the logistic function.

    Args:
        real_logits: Logits of real images, ``[n]``.
        fake_logits: Logits of generated images, ``[m]``.

    Returns:
        A scalar.
    """
    on_real, on_fake = discriminator_losses(real_logits, fake_logits)
    return on_real + on_fake


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the non-saturating loss ``mean(-log s(fake))`` of logits ``[n]``."""
    return softplus(-fake_logits).mean()
