"""The training loop: alternating steps of two networks, with regularisers plugged in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessreg.curvature import NonFiniteError as NonFiniteCurvatureError
from hessreg.curvature import third_order_safe
from hessreg.distributed import WHOLE, Shard
from hessreg.gan.data import ShuffledSampler
from hessreg.gan.distributed import gathered, synchronize_norms
from hessreg.gan.losses import AdversarialLoss, NonSaturating
from hessreg.gan.networks import Generator
from hessreg.gan.optimizers import optimizer_state, state_loader
from hessreg.gan.options import PlayerConfig
from hessreg.gan.orthogonal import Orthogonal
from hessreg.gan.players import Player, Procedure, weighted
from hessreg.gan.precision import LossScale, autocast
from hessreg.gan.running_means import RunningMeans, check_integer
from hessreg.optim import OrthogonalGradients
from hessreg.optim._vectors import Vector, add, average, laid_out_like
from hessreg.regularizers import Gradients, Regularizer, StepContext

__all__ = ["NonFiniteError", "Trainer"]

_NAMES = "generator", "discriminator"


class NonFiniteError(ArithmeticError):
    """A loss, a penalty or a gradient became infinite or NaN; the weights were left alone."""


@dataclass
class _Phase:
    """A network's loss on a batch or on a part of one, and what belongs to it.

    Attributes:
        loss: With its graph, while it has not been differentiated.
        parts: What it is the sum of.
        penalty: What regularisers add.
        context: For regularisers.
        rival: The other network's loss, if it is needed.
        share: Of the batch.
    """

    loss: Tensor
    parts: Sequence[Tensor]
    penalty: Tensor
    context: StepContext
    rival: Tensor | None = None
    share: float = 1.0


class Trainer:
    """Alternates one discriminator and one generator step on an adversarial loss.

    Everything random comes from ``seed`` and everything that a step depends on is in
    `state_dict`, so training continued from a saved state is the same training, bit for bit on
    a CPU.

    Args:
        generator: Maps noise ``[n, latent_dim]`` to samples ``[n, ...]``.
        discriminator: Maps samples ``[n, ...]`` to logits ``[n]``, or as many outputs as the loss
            takes.
        data: Real samples ``[count, ...]``, on the device to train on.
        regularizers: Each may add loss terms and change gradients.
        batch_size: Samples in a batch of a network that has no size of its own.
        g: How the generator is trained; with Adam by default.
        d: How the discriminator is.
        optimizers: The generator's and the discriminator's, in place of those of ``g`` and ``d``.
        procedure: What else steps are made of.
        ema_decay: Decay of the averaged generator `ema`, which is the one to sample from.
        seed: Seed of the noise and of the order of the data.
        loss: What the networks play for; the non-saturating loss by default.
        orthogonal: Which gradients to project before the steps. Its mode ``"previous"`` steps both
            networks at once, from gradients at the same weights.
        shard: This process's share of every batch, where several train together; all of them call
            the same methods.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: nn.Module,
        data: Tensor,
        regularizers: Sequence[Regularizer] = (),
        *,
        batch_size: int = 64,
        g: PlayerConfig | None = None,
        d: PlayerConfig | None = None,
        optimizers: tuple[Optimizer, Optimizer] | None = None,
        procedure: Procedure | None = None,
        ema_decay: float = 0.999,
        seed: int = 0,
        loss: AdversarialLoss | None = None,
        orthogonal: Orthogonal | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        self.procedure = procedure or Procedure()
        self.shard = shard
        wanted = torch.float64 if self.procedure.precision == "float64" else None
        self.generator = generator.to(data.device, wanted)
        self.discriminator = discriminator.to(data.device, wanted)
        self.dtype = next(generator.parameters()).dtype
        for network in (self.generator, self.discriminator):
            synchronize_norms(network, shard)
        self.ema = copy.deepcopy(self.generator).requires_grad_(False)
        self.ema_decay = ema_decay
        networks = self.ema, self.generator
        self._averages = list(zip(*(each.parameters() for each in networks), strict=True))
        self._copies = list(zip(*(each.buffers() for each in networks), strict=True))
        self.data = data
        self.regularizers = tuple(regularizers)
        is_half = self.procedure.precision == "fp16"
        self.players = [
            Player(name, network, config or PlayerConfig(), optimizer, is_half)
            for name, network, config, optimizer in zip(
                "gd",
                (self.generator, self.discriminator),
                (g, d),
                optimizers or (None, None),
                strict=True,
            )
        ]
        self.batch_sizes = [player.config.batch_size or batch_size for player in self.players]
        self.procedure.check(self.batch_sizes, len(data), self.regularizers, orthogonal, shard)
        self.loss = gathered(loss or NonSaturating(), shard)
        self.orthogonal = orthogonal
        self._projecting: dict[nn.Module, OrthogonalGradients] = {}
        if orthogonal is not None:
            pair = self.players[0].optimizer, self.players[1].optimizer
            wrappers = orthogonal.wrap(*pair, group=shard.group)
            pairs = zip(self.optimizers, wrappers, strict=True)
            self._projecting = {network: each for network, each in pairs if each is not None}
        self.sampler = ShuffledSampler(len(data), self.batch_sizes[1], seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.steps_done = 0
        self._means = RunningMeans()

    @property
    def optimizers(self) -> dict[nn.Module, Optimizer]:
        """The optimiser of each network."""
        return {player.network: player.optimizer for player in self.players}

    def step(self, done: float | None = None) -> None:
        """Train the generator once, and the discriminator as many times as it is to be.

        Args:
            done: The share of the run that is done, for schedules of learning rates where
                `Procedure` does not say at how many steps they end.

        Raises:
            NonFiniteError: If a loss, penalty or gradient is not finite.
            ValueError: If a schedule has no end to go by.
        """
        if self.procedure.schedule_steps:
            done = self.steps_done / self.procedure.schedule_steps
        for player in self.players:
            player.set_rate(self.steps_done, done)
        growth = self.procedure.growth
        for_g, for_d = (growth.size(size, self.steps_done) for size in self.batch_sizes)
        for _ in range(self.procedure.discriminator_steps):
            real = self._draw_real(for_d)
            self._discriminator_step(real)
        self._generator_step(real if for_g == for_d else self._draw_real(for_g))
        self._update_ema()
        self.steps_done += 1

    def metrics(self) -> dict[str, float]:
        """Return means of losses, penalties, gradient norms and angles, and regularisers' metrics.

        The means are over the steps since the last call, those of angles (`OrthogonalGradients`)
        over the steps that had something to project. Learning rates are among the metrics where
        they change.
        """
        values = self._means.read()
        for player, name in zip(self.players, _NAMES, strict=True):
            values |= {f"{key}_{name[0]}": value for key, value in player.metrics().items()}
        for regularizer in self.regularizers:
            own = regularizer.metrics()
            means = self.shard.mean(torch.tensor([*own.values()], dtype=torch.float64))
            values.update(zip(own, means.tolist(), strict=True))
        return values

    def check_weights(self) -> None:
        """Refuse weights that are not finite: a step on huge but finite gradients makes such.

        Raises:
            NonFiniteError: If there are any.
        """
        for network, title in zip(self.optimizers, _NAMES, strict=True):
            for name, parameter in network.named_parameters():
                if not parameter.isfinite().all():
                    raise NonFiniteError(f"step {self.steps_done}: {title} {name} is not finite")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, as nested tensors and plain values."""
        state = {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer_state(player.optimizer) for player in self.players],
            "regularizers": [regularizer.state_dict() for regularizer in self.regularizers],
            "orthogonal": [_own_state(wrapper) for wrapper in self._wrappers()],
            "sampler": self.sampler.state_dict(),
            "noise": self.noise.get_state(),
            "global_random": torch.get_rng_state(),
            "steps_done": self.steps_done,
            "loss_scales": [scale.state_dict() for scale in self._scales()],
            **self._means.state_dict(),
        }
        if self.data.is_cuda:
            state["cuda_random"] = torch.cuda.get_rng_state(self.data.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, also after a round trip through a file.

        Raises:
            ValueError: If counters, sums or optimisers' states are not what `state_dict` returns.
                What networks, random states and regularisers refuse has types of their own.
        """
        check_integer("steps_done", state["steps_done"], 0)
        pairs = zip(self.players, state["optimizers"], strict=True)
        loaders = [state_loader(player.optimizer, own) for player, own in pairs]
        self._means.load_state_dict(state, self.data.device)
        for name in ("generator", "discriminator", "ema"):
            getattr(self, name).load_state_dict(state[name])
        for load in loaders:
            load()
        for scale, own in zip(self._scales(), state["loss_scales"], strict=True):
            scale.load_state_dict(own)
        for regularizer, own in zip(self.regularizers, state["regularizers"], strict=True):
            regularizer.load_state_dict(own)
        for wrapper, own in zip(self._wrappers(), state["orthogonal"], strict=True):
            states = [optimizer.state_dict() for optimizer in wrapper.optimizers]
            wrapper.load_state_dict({**own, "optimizers": states})
        self.sampler.load_state_dict(state["sampler"])
        self.noise.set_state(state["noise"])
        torch.set_rng_state(state["global_random"])
        if self.data.is_cuda and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"], self.data.device)
        self.steps_done = state["steps_done"]

    def _scales(self) -> list[LossScale]:
        return [player.scale for player in self.players if player.scale is not None]

    def _discriminator_step(self, real: Tensor) -> None:
        self._apply(self.discriminator, self._phases(self._discriminator_phase, real))

    def _discriminator_phase(self, real: Tensor, noise: Tensor) -> _Phase:
        with torch.no_grad(), self._forward():
            fake = self._exact(self.generator(noise))
        real, fake = self._blurred(real), self._blurred(fake)
        with self._forward():
            outputs = self.discriminator(real), self.discriminator(fake)
        losses = self.loss.discriminator(*map(self._exact, outputs))
        loss = sum(losses[1:], losses[0])
        context = self._context(None, loss, real, fake, noise)
        return _Phase(loss, losses, self._penalty(1, loss, context), context)

    def _generator_step(self, real: Tensor) -> None:
        self._apply(self.generator, self._phases(self._generator_phase, real))

    def _generator_phase(self, real: Tensor, noise: Tensor) -> _Phase:
        with self._forward():
            fake = self._exact(self.generator(noise))
            seen = self._blurred(real) if self.loss.compares else real, self._blurred(fake)
            outputs = self.loss.outputs_for_generator(self.discriminator, *seen)
        judged, compared = map(self._exact, outputs)
        loss = self.loss.generator(judged, compared)
        rival = None
        if self.orthogonal is not None and self.orthogonal.mode == "game":
            # Its part on real samples does not matter.
            rival = self.loss.discriminator(compared, judged)[-1]
        context = self._context(loss, None, real, fake, noise)
        return _Phase(loss, [loss], self._penalty(0, loss, context), context, rival)

    def _phases(self, make: Callable[[Tensor, Tensor], _Phase], real: Tensor) -> Iterator[_Phase]:
        """Make the parts of a batch one after the other: only one has a graph at a time."""
        noise, count = self._draw_noise(len(real)), self.procedure.accumulate
        for rows in zip(real.tensor_split(count), noise.tensor_split(count), strict=True):
            phase = make(*rows)
            phase.share = len(rows[0]) / len(real)
            yield phase

    def _apply(self, network: nn.Module, phases: Iterator[_Phase]) -> None:
        """Differentiate the loss and the regularisers' terms, and step the network's optimiser."""
        side = 0 if network is self.generator else 1
        player = self.players[side]
        parameters = [p for p in player.parameters if p.requires_grad]
        grads, phase, num_losses = self._differentiate(side, parameters, phases)
        for regularizer in self.regularizers:
            g_grads, d_grads = (grads, None) if side == 0 else (None, grads)
            grads = regularizer.transform_grads(g_grads, d_grads, phase.context)[side] or grads
            grads = regularizer.precondition(network, grads, phase.context)
        grads = player.regularized(parameters, grads)
        loss, penalty = self.shard.means(phase.loss, phase.penalty)
        norm = nn.utils.get_total_norm([grad for grad in grads if grad is not None])
        if not player.accepts(norm):
            return
        self._check(side, loss=loss, penalty=penalty, grad_norm=norm, grads=grads)
        self._measure(f"_{_NAMES[side][0]}", loss=loss, penalty=penalty, grad_norm=norm)
        player.forget_gradients()  # those that are frozen or unused stay without a gradient
        for parameter, grad in zip(parameters, player.clipped(grads, norm), strict=True):
            parameter.grad = None if grad is None else laid_out_like(parameter, grad)
        self._step(side, network, num_losses)

    def _differentiate(
        self, side: int, parameters: Sequence[Tensor], phases: Iterator[_Phase]
    ) -> tuple[Gradients, _Phase, int]:
        """The gradient of the only loss, or the projected one of several, over a batch's parts.

        Returns:
            The gradient, the last part with the batch's loss and penalty, and how many losses.
        """
        player, count = self.players[side], self.procedure.accumulate
        found: list[Vector] = []
        means: list[Tensor] = []
        for number, phase in enumerate(phases, 1):
            losses = player.scaled(self._losses(phase), phase.share)
            if len(losses) == 1:
                grads = torch.autograd.grad(losses[0], parameters, allow_unused=True)
                found = add(found, [list(grads)])
            else:
                if number == 1:
                    player.forget_gradients()
                self._projecting[player.network].backward(losses, accumulate=number < count)
            values = weighted([phase.loss.detach(), phase.penalty.detach()], phase.share)
            means = [a + b for a, b in zip(means, values, strict=True)] if means else values
        (phase.loss, phase.penalty), group = means, self.shard.group
        if len(losses) > 1:
            found = [[parameter.grad for parameter in parameters]]
        elif group is not None:
            found = average(found, parameters, group)
        return player.unscaled(found[0]), phase, len(losses)

    def _losses(self, phase: _Phase) -> list[Tensor]:
        """What to differentiate: the loss and the penalty, together or apart."""
        if self.orthogonal is None:
            return [phase.loss + phase.penalty]
        return self.orthogonal.losses(phase.loss, phase.parts, phase.penalty, phase.rival)

    def _step(self, side: int, network: nn.Module, num_losses: int) -> None:
        """Step a network's optimiser; what projects for both steps both, after the generator."""
        wrapper = self._projecting.get(network)
        if wrapper is None or (wrapper.mode == "terms" and num_losses == 1):
            self.players[side].optimizer.step()
            return
        together = len(wrapper.optimizers) > 1
        if together and network is self.discriminator:
            return
        wrapper.step()
        self._measure("" if together else f"_{_NAMES[side][0]}", **wrapper.angles)

    def _wrappers(self) -> list[OrthogonalGradients]:
        return list(dict.fromkeys(self._projecting.values()))

    def _penalty(self, side: int, loss: Tensor, context: StepContext) -> Tensor:
        try:
            terms = [regularizer.loss_terms(context)[side] for regularizer in self.regularizers]
        except NonFiniteCurvatureError as error:
            self._check(side, loss=self.shard.mean(loss.detach()))
            raise self._failure(side, f"penalty: {error}") from None
        return sum((term for term in terms if term is not None), torch.zeros_like(loss))

    def _check(self, side: int, grads: Gradients = (), **scalars: Tensor) -> None:
        """Refuse to train on anything that is not finite; waits for the device once."""
        if torch.stack(list(scalars.values())).isfinite().all():
            return
        bad = next(name for name, value in scalars.items() if not value.isfinite())
        if bad == "grad_norm":
            bad = _first_non_finite((self.generator, self.discriminator)[side], grads)
        raise self._failure(side, f"{bad} is not finite")

    def _failure(self, side: int, what: str) -> NonFiniteError:
        return NonFiniteError(f"step {self.steps_done + 1}: {_NAMES[side]} {what}")

    def _measure(self, suffix: str, **scalars: Tensor) -> None:
        self._means.add(**{name + suffix: value for name, value in scalars.items()})

    def _draw_real(self, count: int) -> Tensor:
        rows = self.shard.take(self.sampler.take(count), self.procedure.accumulate)
        return self.data[rows].to(self.dtype)

    def _draw_noise(self, count: int) -> Tensor:
        noise = self._draw(count, self.generator.latent_dim, parts=self.procedure.accumulate)
        return noise.to(self.data.device, self.dtype)

    def _draw(self, count: int, *shape: int, parts: int = 1) -> Tensor:
        """Normal numbers for ``count`` rows, on the CPU: the same on every device."""
        noise = torch.randn(count * self.shard.size, *shape, generator=self.noise)
        return self.shard.take(noise, parts)

    def _blurred(self, samples: Tensor) -> Tensor:
        """What the discriminator sees of samples: with noise, for a while."""
        std = self.procedure.instance_noise.at(self.steps_done)
        return samples + std * self._draw(*samples.shape).to(samples) if std else samples

    def _exact(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)

    def _context(
        self,
        loss_g: Tensor | None,
        loss_d: Tensor | None,
        real: Tensor,
        fake: Tensor,
        noise: Tensor,
    ) -> StepContext:
        networks = self.generator, self.discriminator
        batch = real, fake, noise
        return StepContext(self.steps_done, *networks, loss_g, loss_d, *batch, self.shard)

    def _forward(self) -> AbstractContextManager[object]:
        """Exact third derivatives where a regulariser needs them; else the chosen precision."""
        if any(each.needs_third_order(self.steps_done) for each in self.regularizers):
            return third_order_safe(self.generator, self.discriminator)
        return autocast(self.procedure.precision, self.data.device)

    def _update_ema(self) -> None:
        # A short memory at the start forgets the initial weights.
        decay = min(self.ema_decay, (1 + self.steps_done) / (10 + self.steps_done))
        with torch.no_grad():
            for average, parameter in self._averages:
                average.lerp_(parameter, 1.0 - decay)
            for copied, buffer in self._copies:
                copied.copy_(buffer)


def _first_non_finite(network: nn.Module, grads: Gradients) -> str:
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    for name, grad in zip(names, grads, strict=True):
        if grad is not None and not grad.isfinite().all():
            return f"gradient of {name}"
    return "gradient norm"


def _own_state(wrapper: OrthogonalGradients) -> dict[str, Any]:
    """Without the optimisers', which the trainer keeps itself."""
    return {name: value for name, value in wrapper.state_dict().items() if name != "optimizers"}
