"""Which gradients the trainer projects against which: its use of `OrthogonalGradients`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hessreg.optim import OrthogonalGradients

__all__ = ["Orthogonal"]


@dataclass(frozen=True)
class Orthogonal:
    """Options of orthogonal gradients in a `Trainer`.

    Args:
        mode: ``"terms"``: of each network, the gradients of its loss terms; ``"previous"``: the
            joint gradient of both networks, taken before either has stepped, against the last one;
            ``"game"``: the generator's gradient against that of the discriminator's loss;
            ``"weights"``: of each network, the gradient against the weights.
        pair: The terms: the adversarial loss and what the regularisers add; with ``"real_fake"``
            the discriminator's adversarial loss is itself two, on real and on generated samples.
        strength: As for `OrthogonalGradients`; not for ``"terms"``.
        scope: As for `OrthogonalGradients`.
    """

    mode: Literal["terms", "previous", "game", "weights"] = "terms"
    pair: Literal["adversarial_regularizer", "real_fake"] = "adversarial_regularizer"
    strength: float | None = None
    scope: Literal["global", "tensor", "row"] | None = None

    def wrap(
        self,
        generator: torch.optim.Optimizer,
        discriminator: torch.optim.Optimizer,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[OrthogonalGradients | None, OrthogonalGradients | None]:
        """Return what steps the generator and the discriminator: one object for both at once."""
        if self.mode == "previous":
            both = self._wrapped(group, generator, discriminator)
            return both, both
        first = self._wrapped(group, generator)
        return first, None if self.mode == "game" else self._wrapped(group, discriminator)

    def _wrapped(
        self, group: dist.ProcessGroup | None, *optimizers: torch.optim.Optimizer
    ) -> OrthogonalGradients:
        return OrthogonalGradients(
            *optimizers,
            mode=self.mode,
            strength=self.strength,
            scope=self.scope,
            process_group=group,
        )

    def losses(
        self, loss: Tensor, parts: Sequence[Tensor], penalty: Tensor, rival: Tensor | None
    ) -> list[Tensor]:
        """Return the losses of a network to differentiate: one, or those to project.

        Args:
            loss: The network's adversarial loss.
            parts: What it is the sum of.
            penalty: What the regularisers add; it has no graph if they add nothing.
            rival: The other network's loss, where it depends on this one.
        """
        if self.mode == "terms":
            terms = list(parts) if self.pair == "real_fake" else [loss]
            return [*terms, penalty] if penalty.requires_grad else terms
        if self.mode == "game" and rival is not None:
            return [loss + penalty, rival]
        return [loss + penalty]
