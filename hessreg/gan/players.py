"""What a step of the trainer is made of, and one network in training with its optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from hessreg.distributed import Shard
from hessreg.gan.checks import check_types, require, require_at_least
from hessreg.gan.correction import HessianCorrectedGradients
from hessreg.gan.optimizers import make_optimizer
from hessreg.gan.options import GrowthConfig, InstanceNoiseConfig, PlayerConfig
from hessreg.gan.orthogonal import Orthogonal
from hessreg.gan.precision import LossScale
from hessreg.optim import OrthogonalGradients
from hessreg.regularizers import HSN1R, Gradients, Regularizer

__all__ = ["Player", "Procedure", "weighted"]


@dataclass(frozen=True)
class Procedure:
    """How a `Trainer` makes steps, beside what each network has for itself.

    Args:
        discriminator_steps: Steps of the discriminator, on a batch each, for one of the generator.
        accumulate: Parts of a batch that are differentiated one after the other; the gradient is
            the mean of theirs.
        precision: ``"float32"`` (or that of the networks), ``"float64"``, or ``"bf16"`` and
            ``"fp16"``, in which networks are then evaluated where torch's autocast does.
        schedule_steps: Where schedules of learning rates end; 0: `Trainer.step` is told how much
            is done.
        growth: Batches that grow.
        instance_noise: Noise on all that the discriminator sees.
    """

    discriminator_steps: int = 1
    accumulate: int = 1
    precision: Literal["float32", "float64", "bf16", "fp16"] = "float32"
    schedule_steps: int = 0
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    instance_noise: InstanceNoiseConfig = field(default_factory=InstanceNoiseConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 1, "discriminator_steps", "accumulate")
        require_at_least(self, 0, "schedule_steps")

    def check(
        self,
        batch_sizes: Mapping[str, int],
        count: int,
        regularizers: Sequence[Regularizer],
        orthogonal: Orthogonal | None,
        shard: Shard,
    ) -> None:
        """Refuse what does not go with the rest of a trainer.

        Args:
            batch_sizes: Of the first batches, by the option that says so.
            count: Of all samples.
            regularizers: The trainer's.
            orthogonal: The trainer's.
            shard: The trainer's.

        Raises:
            ValueError: If something does not.
        """
        for name, size in batch_sizes.items():
            self._check_batch(name, size, count, shard)
        for each in regularizers if self.accumulate > 1 else ():
            wanted = f"1 with {type(each).__name__}, which takes the Hessian on a whole batch"
            is_whole = isinstance(each, HSN1R | HessianCorrectedGradients)
            require(not is_whole, "accumulate", wanted, self.accumulate)
        for each in regularizers:
            if isinstance(each, HessianCorrectedGradients):
                shard.check_divides("hsc.rows", each.rows)
        if orthogonal is not None and orthogonal.mode == "previous":
            wanted = "1 with orthogonal previous, which steps both networks at once"
            steps = self.discriminator_steps
            require(steps == 1, "discriminator_steps", wanted, steps)
            wanted = "another than fp16 with orthogonal previous, which may leave out one network"
            require(self.precision != "fp16", "precision", wanted, self.precision)

    def _check_batch(self, name: str, size: int, count: int, shard: Shard) -> None:
        require(1 <= size <= count, name, f"in [1, {count}] for {count} samples", size)
        shard.check_divides(name, size, self.accumulate)
        rows = size // shard.size
        wanted = f"at most the {rows} rows of a batch"
        require(self.accumulate <= rows, "accumulate", wanted, self.accumulate)
        if self.growth.factor > 1:
            maximum = self.growth.maximum
            wanted = f"in [{size}, {count}], from the first batch to all samples"
            require(size <= maximum <= count, "growth.maximum", wanted, maximum)
            shard.check_divides("growth.maximum", maximum, self.accumulate)


def weighted(values: Sequence[Tensor], factor: float) -> list[Tensor]:
    """Return values times a factor, and as they are if it is 1."""
    return list(values) if factor == 1.0 else [factor * value for value in values]


class Player:
    """A network in training.

    Args:
        name: What its options are called: ``"g"`` or ``"d"``.
        network: The generator or the discriminator.
        config: How it is trained.
        optimizer: What steps it, in place of the configured optimiser.
        has_scale: Whether its loss has a scale, as half precision needs.

    Attributes:
        wrapper: What projects its gradients, if anything does.
        suffix: Of its metrics' names.

    Raises:
        ValueError: If an option is bad, or the configured optimiser cannot be made.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        config: PlayerConfig,
        optimizer: Optimizer | None = None,
        has_scale: bool = False,
    ) -> None:
        config.check(name)
        self.network = network
        self.parameters = list(network.parameters())  # to go through the modules takes long
        self._name, self.suffix = name, f"_{name}"
        self.config = config
        self.optimizer = optimizer or _make_optimizer(name, network, config)
        self.scale = LossScale() if has_scale else None
        self.wrapper: OrthogonalGradients | None = None
        self.schedule = config.rate_schedule()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def batch_option(self) -> str:
        """What says how many samples its batch has."""
        return f"{self._name}.batch_size" if self.config.batch_size else "batch_size"

    def set_rate(self, step: int, done: float | None) -> None:
        """Give the optimiser its rates; ``done`` is the share of the run before this step.

        Raises:
            ValueError: If it is not known, but needed.
        """
        if self.schedule.is_constant:
            return
        if done is None and self.schedule.needs_end:
            raise ValueError(
                f"{self._name}.schedule {self.schedule.shape} needs an end: set schedule_steps, or"
                " tell step() what share of the run is done"
            )
        factor = self.schedule(step, done or 0.0)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def forget_gradients(self) -> None:
        """Leave every parameter without a gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    def metrics(self) -> dict[str, float]:
        """Return the rate and the scale of the loss of the last step, where they change."""
        values = {} if self.scale is None else {"loss_scale": self.scale.value}
        if not self.schedule.is_constant:
            values["lr"] = float(self.optimizer.param_groups[0]["lr"])
        return values

    def scaled(self, losses: Sequence[Tensor], share: float) -> list[Tensor]:
        """Return the losses of a part of a batch, for a gradient that is summed over the parts."""
        return weighted(losses, share * (1.0 if self.scale is None else self.scale.value))

    def unscaled(self, grads: Gradients) -> Gradients:
        """Return the gradients without the scale of the losses."""
        if self.scale is None:
            return grads
        return [None if g is None else g / self.scale.value for g in grads]

    def accepts(self, norm: float) -> bool:
        """Return whether gradients of this norm are stepped along."""
        return self.scale is None or self.scale.accepts(math.isfinite(norm))

    def regularized(self, parameters: Sequence[Tensor], grads: Gradients) -> Gradients:
        """Return the gradients with that of the weighted sum of absolute parameters."""
        weight = self.config.l1
        if not weight:
            return grads
        pairs = zip(parameters, grads, strict=True)
        return [None if g is None else g + weight * p.detach().sign() for p, g in pairs]

    def clipped(self, grads: Gradients, norm: float) -> Gradients:
        """Return gradients of at most the greatest norm; ``norm`` is what they have."""
        greatest = self.config.clip
        if not greatest or norm <= greatest:
            return grads
        return [None if g is None else g * (greatest / norm) for g in grads]


def _make_optimizer(name: str, network: nn.Module, config: PlayerConfig) -> Optimizer:
    try:
        return make_optimizer(
            config.optimizer,
            network.parameters(),
            config.optimizer_options(),
            config.chosen_options(),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}.{error}") from None
