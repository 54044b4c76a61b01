"""The training loop: alternating steps of two networks, with regularisers plugged in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessreg.distributed import WHOLE, Shard
from hessreg.gan.averaging import MovingAverage
from hessreg.gan.batches import Batch, Batches
from hessreg.gan.data import Samples, ShuffledSampler
from hessreg.gan.distributed import gathered, synchronize_layers
from hessreg.gan.losses import AdversarialLoss, NonSaturating
from hessreg.gan.networks import Generator
from hessreg.gan.optimizers import optimizer_state, state_loader
from hessreg.gan.options import PlayerConfig
from hessreg.gan.orthogonal import Orthogonal
from hessreg.gan.phases import SIDES, Game, NonFiniteError, Phase, non_finite
from hessreg.gan.players import Player, Procedure, weighted
from hessreg.gan.precision import LossScale
from hessreg.gan.running_means import RunningMeans, check_integer
from hessreg.optim import OrthogonalGradients
from hessreg.optim._vectors import Vector, add, average, differentiate, laid_out_like
from hessreg.regularizers import Gradients, Regularizer, StepContext

__all__ = ["NonFiniteError", "Trainer"]


class Trainer:
    """Alternates one discriminator and one generator step on an adversarial loss.

    Everything random comes from ``seed`` and everything that a step depends on is in
    `state_dict`, so training continued from a saved state is the same training, bit for bit on
    a CPU.

    Args:
        generator: Maps noise ``[n, latent_dim]`` to samples ``[n, ...]``.
        discriminator: Maps samples ``[n, ...]`` to logits ``[n]``, or as many outputs as the loss
            takes.
        data: Real samples ``[count, ...]``: a tensor on the device to train on, or anything with a
            length and a ``device``, from which indices ``[n]`` take a batch.
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
        labels: Classes of the data ``[count]``, if both networks are told them: the discriminator
            takes them beside samples, and the generator as `Generator.draw_latent` puts them.
        shard: This process's share of every batch, where several train together; all of them call
            the same methods.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: nn.Module,
        data: Samples,
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
        labels: Tensor | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        self.procedure, self.shard = procedure or Procedure(), shard
        wanted = torch.float64 if self.procedure.precision == "float64" else None
        self.generator = generator.to(data.device, wanted)
        self.discriminator = discriminator.to(data.device, wanted)
        self.dtype = next(generator.parameters()).dtype
        for network in (self.generator, self.discriminator):
            synchronize_layers(network, shard)
        self._average = MovingAverage(self.generator, ema_decay)
        self.data, self.labels = data, labels
        self.regularizers = tuple(regularizers)
        is_half = self.procedure.precision == "fp16"
        own = optimizers or (None, None)
        self.players = [
            Player("g", self.generator, g or PlayerConfig(), own[0], is_half),
            Player("d", self.discriminator, d or PlayerConfig(), own[1], is_half),
        ]
        self.batch_sizes = [player.config.batch_size or batch_size for player in self.players]
        self.loss = gathered(loss or NonSaturating(), shard)
        self.orthogonal = orthogonal
        self._check_and_wrap()
        self.batches = self._make_batches(seed)
        self._game = self._make_game()
        self.steps_done = 0
        self._means = RunningMeans()

    def _check_and_wrap(self) -> None:
        """Refuse what does not go together, and let optimisers project if they are to."""
        names = [player.batch_option for player in self.players]
        sizes = dict(zip(names, self.batch_sizes, strict=True))
        rest = self.regularizers, self.orthogonal, self.shard
        self.procedure.check(sizes, len(self.data), *rest)
        if self.orthogonal is not None:
            pair = self.players[0].optimizer, self.players[1].optimizer
            wrappers = self.orthogonal.wrap(*pair, group=self.shard.group)
            for player, wrapper in zip(self.players, wrappers, strict=True):
                player.wrapper = wrapper

    def _make_batches(self, seed: int) -> Batches:
        return Batches(
            self.data,
            self.labels,
            ShuffledSampler(len(self.data), self.batch_sizes[1], seed),
            self.generator,
            seed=seed,
            parts=self.procedure.accumulate,
            shard=self.shard,
        )

    def _make_game(self) -> Game:
        return Game(
            self.generator,
            self.discriminator,
            self.loss,
            self.regularizers,
            self.batches,
            precision=self.procedure.precision,
            instance_noise=self.procedure.instance_noise,
            has_rival=self.orthogonal is not None and self.orthogonal.mode == "game",
            shard=self.shard,
        )

    @property
    def ema(self) -> Generator:
        """The averaged generator."""
        return self._average.network

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
            ValueError: If a schedule has no end to go by, or a network's loss depends on none of
                its parameters.
        """
        if self.procedure.schedule_steps:
            done = self.steps_done / self.procedure.schedule_steps
        for player in self.players:
            player.set_rate(self.steps_done, done)
        growth = self.procedure.growth
        for_g, for_d = (growth.size(size, self.steps_done) for size in self.batch_sizes)
        for _ in range(self.procedure.discriminator_steps):
            batch = self.batches.draw(for_d)
            self._update(1, batch)
        self._update(0, batch if for_g == for_d else self.batches.draw(for_g))
        self._average.update(self.steps_done)
        self.steps_done += 1

    def judging(self, labels: Tensor | None) -> nn.Module:
        """Return the discriminator of samples of these classes ``[n]``, if it takes classes."""
        return self._game.judging(None if self.labels is None else labels)

    def metrics(self) -> dict[str, float]:
        """Return means of losses, penalties, gradient norms and angles, and regularisers' metrics.

        The means are over the steps since the last call, those of angles (`OrthogonalGradients`)
        over the steps that had something to project. Learning rates are among the metrics where
        they change.
        """
        values = self._means.read()
        for player, name in zip(self.players, SIDES, strict=True):
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
        for network, title in zip(self.optimizers, SIDES, strict=True):
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
            "global_random": torch.get_rng_state(),
            "steps_done": self.steps_done,
            "loss_scales": [scale.state_dict() for scale in self._scales()],
            **self.batches.state_dict(),
            **self._means.state_dict(),
        }
        if self.data.device.type == "cuda":
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
        self.batches.load_state_dict(state)
        torch.set_rng_state(state["global_random"])
        if self.data.device.type == "cuda" and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"], self.data.device)
        self.steps_done = state["steps_done"]

    def _scales(self) -> list[LossScale]:
        return [player.scale for player in self.players if player.scale is not None]

    def _wrappers(self) -> list[OrthogonalGradients]:
        wrappers = [player.wrapper for player in self.players if player.wrapper is not None]
        return list(dict.fromkeys(wrappers))

    def _update(self, side: int, batch: Batch) -> None:
        """Differentiate a network's loss and the regularisers' terms, and step its optimiser."""
        player = self.players[side]
        # Those that are frozen or unused stay without a gradient.
        player.forget_gradients()
        parameters = [p for p in player.parameters if p.requires_grad]
        grads, phase, num_losses = self._differentiate(side, parameters, batch)
        grads = self._transformed(side, grads, phase.context)
        grads = player.regularized(parameters, grads)
        means = self.shard.means(phase.loss, phase.penalty)
        norms = torch._foreach_norm([grad for grad in grads if grad is not None])
        loss, penalty, *numbers = _numbers([*means, *norms])
        norm = math.hypot(*numbers)  # of the whole gradient, from those of its tensors
        if not player.accepts(norm):
            return
        scalars = {"loss": loss, "penalty": penalty, "grad_norm": norm}
        self._check(side, scalars, grads)
        self._means.add(player.suffix, scalars)
        for parameter, grad in zip(parameters, player.clipped(grads, norm), strict=True):
            parameter.grad = None if grad is None else laid_out_like(parameter, grad)
        self._step(side, num_losses)

    def _differentiate(
        self, side: int, parameters: Sequence[Tensor], batch: Batch
    ) -> tuple[Gradients, Phase, int]:
        """The gradient of the only loss, or the projected one of several, over a batch's parts.

        Returns:
            The gradient, the last part with the batch's loss and penalty, and how many losses.
        """
        player, last = self.players[side], self.procedure.accumulate
        found: list[Vector] = []
        means: list[Tensor] = []
        for number, rows in enumerate(self.batches.rows(batch), 1):
            phase = self._game.phase(side, self.steps_done, rows)
            losses = player.scaled(self._losses(phase), rows.share)
            if len(losses) == 1:
                found = add(found, [differentiate(losses[0], parameters)])
            elif player.wrapper is not None:
                player.wrapper.backward(losses, accumulate=number < last)
            values = weighted([phase.loss.detach(), phase.penalty.detach()], rows.share)
            means = [a + b for a, b in zip(means, values, strict=True)] if means else values
        (phase.loss, phase.penalty), group = means, self.shard.group
        if len(losses) > 1:
            found = [[parameter.grad for parameter in parameters]]
        elif group is not None:
            found = average(found, parameters, group)
        _check_reached(side, found[0])
        return player.unscaled(found[0]), phase, len(losses)

    def _losses(self, phase: Phase) -> list[Tensor]:
        """What to differentiate: the loss and the penalty, together or apart."""
        if self.orthogonal is None:
            return [phase.loss + phase.penalty if phase.penalty.requires_grad else phase.loss]
        return self.orthogonal.losses(phase.loss, phase.parts, phase.penalty, phase.rival)

    def _transformed(self, side: int, grads: Gradients, context: StepContext) -> Gradients:
        """What the regularisers make of a network's gradients."""
        for regularizer in self.regularizers:
            g_grads, d_grads = (grads, None) if side == 0 else (None, grads)
            grads = regularizer.transform_grads(g_grads, d_grads, context)[side] or grads
            grads = regularizer.precondition(self.players[side].network, grads, context)
        return grads

    def _check(self, side: int, scalars: Mapping[str, float], grads: Gradients) -> None:
        """Refuse to train on what is not finite."""
        for name, value in scalars.items():
            if not math.isfinite(value):
                if name == "grad_norm":
                    name = _first_non_finite(self.players[side].network, grads)
                raise non_finite(self.steps_done, side, f"{name} is not finite")

    def _step(self, side: int, num_losses: int) -> None:
        """Step a network's optimiser; what projects for both steps both, after the generator."""
        player = self.players[side]
        wrapper = player.wrapper
        if wrapper is None or (wrapper.mode == "terms" and num_losses == 1):
            player.optimizer.step()
            return
        together = len(wrapper.optimizers) > 1
        if not together or side == 0:
            wrapper.step()
            self._means.add("" if together else player.suffix, wrapper.angles)


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Their values; a device is waited for once, and a CPU does not join what it can read."""
    if all(each.is_cpu for each in scalars):
        return [each.item() for each in scalars]
    return torch.stack(list(scalars)).tolist()


def _check_reached(side: int, grads: Vector) -> None:
    if all(grad is None for grad in grads):
        raise ValueError(
            f"the loss of the {SIDES[side]} must depend on a parameter of it that requires a"
            " gradient, got one that does not: is something frozen or detached?"
        )


def _first_non_finite(network: nn.Module, grads: Gradients) -> str:
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    for name, grad in zip(names, grads, strict=True):
        if grad is not None and not grad.isfinite().all():
            return f"gradient of {name}"
    return "gradient norm"


def _own_state(wrapper: OrthogonalGradients) -> dict[str, Any]:
    """Without the optimisers', which the trainer keeps itself."""
    return {name: value for name, value in wrapper.state_dict().items() if name != "optimizers"}
