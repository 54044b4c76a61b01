"""InfoGAN: a code in the noise that the discriminator's features must give away."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn.functional import cross_entropy

from hessreg.regularizers import BaseRegularizer, StepContext

__all__ = ["InfoGAN"]


@runtime_checkable
class _TellsCodes(Protocol):
    def codes(self, samples: Tensor) -> Tensor: ...


class InfoGAN(BaseRegularizer):
    """Cross entropy of the codes in the noise and what the discriminator tells from samples.

    It is added to both losses, so that codes come to mean something, and bounds their mutual
    information with the samples from below (Chen and others, 2016). The generator takes the codes
    as the last components of its noise, and the discriminator has a method `codes`: see
    `hessreg.gan.Generator` and `hessreg.gan.Discriminator` with ``num_codes``.

    Args:
        num_codes: Number of codes, at least 2.
        weight: Of the cross entropy.

    Raises:
        ValueError: If there are too few codes.

    Example:
        >>> import torch
        >>> from hessreg.gan import Discriminator, Generator, Trainer
        >>> networks = Generator(num_codes=4), Discriminator(num_codes=4)
        >>> trainer = Trainer(*networks, torch.rand(64, 1, 8, 8), [InfoGAN(4)])
        >>> trainer.step()
        >>> sorted(trainer.metrics())[:3]
        ['code_accuracy', 'grad_norm_d', 'grad_norm_g']
    """

    def __init__(self, num_codes: int, weight: float = 1.0) -> None:
        if num_codes < 2:
            raise ValueError(f"num_codes must be at least 2, got {num_codes}")
        self.num_codes, self.weight = num_codes, weight
        self._accuracy: Tensor | None = None

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """Return the term of the network whose phase it is.

        Raises:
            ValueError: If the context lacks noise or samples, or the discriminator ``codes``.
        """
        if ctx.noise is None or ctx.fake is None:
            raise ValueError("InfoGAN needs ctx.noise and ctx.fake, got None")
        codes = ctx.noise[:, -self.num_codes :].argmax(1)
        if not isinstance(ctx.discriminator, _TellsCodes):
            raise ValueError("InfoGAN needs a discriminator with a method codes, got none")
        logits = ctx.discriminator.codes(ctx.fake)
        self._accuracy = (logits.detach().argmax(1) == codes).double().mean()
        term = self.weight * cross_entropy(logits, codes)
        return (term, None) if ctx.generator_loss is not None else (None, term)

    def metrics(self) -> dict[str, float]:
        """Return the share of codes that the discriminator told right in the last phase."""
        return {} if self._accuracy is None else {"code_accuracy": float(self._accuracy)}
