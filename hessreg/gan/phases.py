"""What each network minimises on a part of a batch: its loss, and what regularisers add."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessreg.curvature import NonFiniteError as NonFiniteCurvatureError
from hessreg.curvature import third_order_safe
from hessreg.distributed import Shard
from hessreg.gan.batches import Batches, Rows
from hessreg.gan.losses import AdversarialLoss
from hessreg.gan.networks import Conditioned, Generator
from hessreg.gan.options import InstanceNoiseConfig
from hessreg.gan.precision import autocast
from hessreg.regularizers import R1, Regularizer, StepContext

__all__ = ["SIDES", "Game", "NonFiniteError", "Phase", "non_finite"]

SIDES = "generator", "discriminator"


class NonFiniteError(ArithmeticError):
    """A loss, a penalty or a gradient became infinite or NaN; the weights were left alone."""


def non_finite(step: int, side: int, what: str) -> NonFiniteError:
    """Return the error of a network in the step after so many."""
    return NonFiniteError(f"step {step + 1}: {SIDES[side]} {what}")


@dataclass
class Phase:
    """A network's loss on a part of a batch, and what belongs to it.

    Attributes:
        loss: With its graph.
        parts: What it is the sum of.
        penalty: What regularisers add.
        context: For regularisers.
        rival: The other network's loss, if it is needed.
    """

    loss: Tensor
    parts: Sequence[Tensor]
    penalty: Tensor
    context: StepContext
    rival: Tensor | None = None


class Game:
    """Evaluates both networks for their losses.

    Args:
        generator: Makes samples of noise.
        discriminator: Judges samples.
        loss: What they play for.
        regularizers: Each may add to the losses.
        batches: Draw the noise on samples.
        precision: Numbers in which networks are evaluated.
        instance_noise: Noise on all that the discriminator sees.
        has_rival: Whether the discriminator's loss is needed beside the generator's.
        shard: For regularisers.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: nn.Module,
        loss: AdversarialLoss,
        regularizers: Sequence[Regularizer],
        batches: Batches,
        *,
        precision: str,
        instance_noise: InstanceNoiseConfig,
        has_rival: bool,
        shard: Shard,
    ) -> None:
        self.generator, self.discriminator, self.loss = generator, discriminator, loss
        self._regularizers, self._batches, self._shard = regularizers, batches, shard
        self._precision, self._instance_noise = precision, instance_noise
        self._has_rival = has_rival
        model = next(generator.parameters())
        self._dtype, self._device = model.dtype, model.device
        self._nothing = torch.zeros((), dtype=self._dtype, device=self._device)
        # R1 takes the slopes of the very outputs of the loss, unless their precision is reduced.
        is_exact = precision in ("float32", "float64")
        self._has_slopes = is_exact and any(isinstance(each, R1) for each in regularizers)

    def judging(self, labels: Tensor | None) -> nn.Module:
        """Return the discriminator of samples of these classes ``[n]``, if there are."""
        if labels is None:
            return self.discriminator
        return Conditioned(self.discriminator, labels.to(self._device))

    def phase(self, side: int, step: int, rows: Rows) -> Phase:
        """Return the loss of a network with its graph: 0 the generator's, 1 the discriminator's.

        Raises:
            NonFiniteError: If a regulariser finds something that is not finite.
        """
        judging = self.judging(rows.labels)
        return (self._generator_phase, self._discriminator_phase)[side](step, rows, judging)

    def _discriminator_phase(self, step: int, rows: Rows, judging: nn.Module) -> Phase:
        with torch.no_grad(), self._forward(step):
            fake = self._exact(self.generator(rows.noise))
        real, fake = self._blurred(rows.real, step), self._blurred(fake, step)
        if self._has_slopes:
            real, fake = (samples.detach().requires_grad_() for samples in (real, fake))
        with self._forward(step):
            outputs = judging(real), judging(fake)
        losses = self.loss.discriminator(*map(self._exact, outputs))
        loss = sum(losses[1:], losses[0])
        batch = real, fake, rows.noise
        context = StepContext(step, self.generator, judging, None, loss, *batch, self._shard)
        context.outputs = outputs if self._has_slopes else None
        return Phase(loss, losses, self._penalty(1, loss, context), context)

    def _generator_phase(self, step: int, rows: Rows, judging: nn.Module) -> Phase:
        with self._forward(step):
            fake = self._exact(self.generator(rows.noise))
            real = self._blurred(rows.real, step) if self.loss.compares else rows.real
            seen = real, self._blurred(fake, step)
            outputs = self.loss.outputs_for_generator(judging, *seen)
        judged, compared = map(self._exact, outputs)
        loss = self.loss.generator(judged, compared)
        # The rival's part on real samples does not matter.
        rival = self.loss.discriminator(compared, judged)[-1] if self._has_rival else None
        batch = rows.real, fake, rows.noise
        context = StepContext(step, self.generator, judging, loss, None, *batch, self._shard)
        return Phase(loss, [loss], self._penalty(0, loss, context), context, rival)

    def _penalty(self, side: int, loss: Tensor, context: StepContext) -> Tensor:
        try:
            terms = [regularizer.loss_terms(context)[side] for regularizer in self._regularizers]
        except NonFiniteCurvatureError as error:
            is_finite = bool(self._shard.mean(loss.detach()).isfinite())
            what = f"penalty: {error}" if is_finite else "loss is not finite"
            raise non_finite(context.step, side, what) from None
        found = [term for term in terms if term is not None]
        return sum(found[1:], found[0]) if found else self._nothing

    def _forward(self, step: int) -> AbstractContextManager[object]:
        """Exact third derivatives where a regulariser needs them; else the chosen precision."""
        if any(each.needs_third_order(step) for each in self._regularizers):
            return third_order_safe(self.generator, self.discriminator)
        return autocast(self._precision, self._device)

    def _exact(self, values: Tensor) -> Tensor:
        return values.to(self._dtype)

    def _blurred(self, samples: Tensor, step: int) -> Tensor:
        """What the discriminator sees of samples: with noise, for a while."""
        std = self._instance_noise.at(step)
        return samples + std * self._batches.normal_like(samples) if std else samples
