"""Corrected gradients for the trainer, by the Hessian of each network's own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessreg.curvature import HessianOperator, NonFiniteError
from hessreg.curvature.parameters import FlatParameters
from hessreg.gan.distributed import gathered
from hessreg.gan.losses import AdversarialLoss, NonSaturating
from hessreg.gan.networks import Conditioned
from hessreg.optim import HessianPreconditioner
from hessreg.regularizers import BaseRegularizer, Gradients, StepContext

__all__ = ["HessianCorrectedGradients"]

_NETWORKS = ("generator", "discriminator")


class HessianCorrectedGradients(BaseRegularizer):
    """Hessian Singularity Correction as a hook of the trainer: changes gradients, adds no loss.

    The gradient of a network, with whatever regularisers and projections made of it, is multiplied
    by the corrected inverse of the Hessian of the network's adversarial loss, on the batch of that
    step. Regularisers' terms have no part in that Hessian. The step is that of the Hessian
    restricted to a small Krylov space, however little that says of the rest.

    Args:
        network: Whose gradients to correct.
        rows: Of the batch, for the Hessian; 0 for all. Several processes must divide them.
        loss: What the networks play for; the non-saturating loss by default.
        **options: Of `HessianPreconditioner`.
    """

    def __init__(
        self,
        network: Literal["generator", "discriminator", "both"] = "both",
        rows: int = 0,
        loss: AdversarialLoss | None = None,
        **options: Any,
    ) -> None:
        chosen = _NETWORKS if network == "both" else (network,)
        self._adversarial = loss or NonSaturating()
        self.rows = rows
        self._preconditioners = {
            name: HessianPreconditioner(
                label=f"the {name}'s gradient", max_residual=math.inf, **options
            )
            for name in chosen
        }

    def precondition(self, network: nn.Module, grads: Gradients, ctx: StepContext) -> Gradients:
        """Return the corrected gradients; those that are not finite as they are.

        Raises:
            ValueError: If the context lacks the batch.
        """
        name = _NETWORKS[0 if network is ctx.generator else 1]
        preconditioner = self._preconditioners.get(name)
        if preconditioner is None or not grads:
            return grads
        parameters = [p for p in network.parameters() if p.requires_grad]
        flat = FlatParameters(parameters)
        pairs = zip(parameters, grads, strict=True)
        gradient = flat.flatten([torch.zeros_like(p) if g is None else g for p, g in pairs])
        loss = self._loss(name, ctx)
        try:
            step = preconditioner.correct(
                gradient, lambda: HessianOperator(loss, parameters, process_group=ctx.shard.group)
            )
        except NonFiniteError:
            return grads  # the trainer says which it is
        parts = zip(flat.split(step), grads, strict=True)
        return [None if g is None else part for part, g in parts]

    def metrics(self) -> dict[str, float]:
        """Return the metrics of both preconditioners: ``hsc_condition_g``, ``hsc_turn_d``, ..."""
        return {
            f"hsc_{metric}_{name[0]}": value
            for name, preconditioner in self._preconditioners.items()
            for metric, value in preconditioner.metrics().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both preconditioners."""
        return {name: each.state_dict() for name, each in self._preconditioners.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: If the state is of other networks, or none.
        """
        if set(state) != set(self._preconditioners):
            wanted, got = sorted(self._preconditioners), sorted(state)
            raise ValueError(f"state must be of {', '.join(wanted)}, got {', '.join(got)}")
        for name, preconditioner in self._preconditioners.items():
            preconditioner.load_state_dict(state[name])

    def _loss(self, name: str, ctx: StepContext) -> Callable[[], Tensor]:
        adversarial, judging = gathered(self._adversarial, ctx.shard), self._judging(ctx)
        needs_real = name == "discriminator" or adversarial.compares
        real = self._sampled("real", ctx) if needs_real else torch.empty(0)
        if name == "discriminator":
            fake = self._sampled("fake", ctx)
            return partial(adversarial.of_discriminator, judging, real, fake)
        noise = self._sampled("noise", ctx)
        return lambda: adversarial.of_generator(judging, real, ctx.generator(noise))

    def _judging(self, ctx: StepContext) -> nn.Module:
        """The discriminator, told the classes of the rows that are taken."""
        if not isinstance(ctx.discriminator, Conditioned):
            return ctx.discriminator
        labels = self._taken(ctx.discriminator.labels, ctx)
        return Conditioned(ctx.discriminator.discriminator, labels)

    def _sampled(self, name: str, ctx: StepContext) -> Tensor:
        batch: Tensor | None = getattr(ctx, name)
        if batch is None:
            raise ValueError(f"the Hessian correction needs a batch in ctx.{name}, got None")
        return self._taken(batch.detach(), ctx)

    def _taken(self, batch: Tensor, ctx: StepContext) -> Tensor:
        """This process's share of the first rows of the whole batch."""
        if not self.rows:
            return batch
        return ctx.shard.take(ctx.shard.gather(batch)[: self.rows])
