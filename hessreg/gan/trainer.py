"""The training loop: alternating steps of two networks, with regularisers plugged in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hessreg.curvature import NonFiniteError as NonFiniteCurvatureError
from hessreg.curvature import third_order_safe
from hessreg.distributed import WHOLE, Shard
from hessreg.gan.data import ShuffledSampler
from hessreg.gan.distributed import gathered, synchronize_norms
from hessreg.gan.losses import AdversarialLoss, NonSaturating
from hessreg.gan.networks import Generator
from hessreg.gan.orthogonal import Orthogonal
from hessreg.optim import OrthogonalGradients
from hessreg.optim._vectors import average
from hessreg.regularizers import Gradients, Regularizer, StepContext

__all__ = ["NonFiniteError", "Trainer"]

_NAMES = "generator", "discriminator"


class NonFiniteError(ArithmeticError):
    """A loss, a penalty or a gradient became infinite or NaN; the weights were left alone."""


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
        batch_size: Samples in a batch, the same for both networks.
        learning_rates: Adam's rates for the generator and the discriminator.
        betas: Adam's betas for both.
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
        learning_rates: tuple[float, float] = (2e-4, 2e-4),
        betas: tuple[float, float] = (0.5, 0.999),
        ema_decay: float = 0.999,
        seed: int = 0,
        loss: AdversarialLoss | None = None,
        orthogonal: Orthogonal | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        shard.check_divides("batch_size", batch_size)
        self.shard = shard
        self.generator = generator.to(data.device)
        self.discriminator = discriminator.to(data.device)
        for network in (self.generator, self.discriminator):
            synchronize_norms(network, shard)
        self.ema = copy.deepcopy(self.generator).requires_grad_(False)
        self.ema_decay = ema_decay
        self.data = data
        self.regularizers = tuple(regularizers)
        self.optimizers = {
            network: torch.optim.Adam(network.parameters(), lr=rate, betas=betas, fused=True)
            for network, rate in zip(
                (self.generator, self.discriminator), learning_rates, strict=True
            )
        }
        self.loss = gathered(loss or NonSaturating(), shard)
        self.orthogonal = orthogonal
        self._projecting: dict[nn.Module, OrthogonalGradients] = {}
        if orthogonal is not None:
            wrappers = orthogonal.wrap(*self.optimizers.values(), group=shard.group)
            pairs = zip(self.optimizers, wrappers, strict=True)
            self._projecting = {network: each for network, each in pairs if each is not None}
        self.sampler = ShuffledSampler(len(data), batch_size, seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.steps_done = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def step(self) -> None:
        """Train both networks once.

        Raises:
            NonFiniteError: If a loss, penalty or gradient is not finite.
        """
        real = self.data[self.shard.take(next(self.sampler))]
        self._discriminator_step(real)
        self._generator_step(real)
        self._update_ema()
        self.steps_done += 1

    def metrics(self) -> dict[str, float]:
        """Return means of losses, penalties, gradient norms and angles, and regularisers' metrics.

        The means are over the steps since the last call, those of angles (`OrthogonalGradients`)
        over the steps that had something to project.
        """
        values = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
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
            "optimizers": [_moments(optimizer) for optimizer in self.optimizers.values()],
            "regularizers": [regularizer.state_dict() for regularizer in self.regularizers],
            "orthogonal": [_own_state(wrapper) for wrapper in self._wrappers()],
            "sampler": self.sampler.state_dict(),
            "noise": self.noise.get_state(),
            "global_random": torch.get_rng_state(),
            "steps_done": self.steps_done,
            "sums": dict(self._sums),
            "counts": dict(self._counts),
        }
        if self.data.is_cuda:
            state["cuda_random"] = torch.cuda.get_rng_state(self.data.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, also after a round trip through a file.

        Raises:
            ValueError: If counters, sums or Adam's moments are not what `state_dict` returns. What
                networks, random states and regularisers refuse has torch's and their own types.
        """
        _check_counters(state)
        optimizers = list(zip(self.optimizers.values(), state["optimizers"], strict=True))
        for optimizer, moments in optimizers:
            _check_moments(optimizer, moments)
        for name in ("generator", "discriminator", "ema"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, moments in optimizers:
            groups = optimizer.state_dict()["param_groups"]
            by_index = {int(index): values for index, values in moments.items() if values}
            optimizer.load_state_dict({"state": by_index, "param_groups": groups})
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
        self._sums = {name: total.to(self.data.device) for name, total in state["sums"].items()}
        self._counts = dict(state["counts"])

    def _discriminator_step(self, real: Tensor) -> None:
        noise = self._draw_noise()
        with torch.no_grad():
            fake = self.generator(noise)
        with self._safe_derivatives():
            losses = self.loss.discriminator(self.discriminator(real), self.discriminator(fake))
            loss = sum(losses[1:], losses[0])
        context = self._context(None, loss, real, fake, noise)
        self._apply(self.discriminator, loss, losses, context)

    def _generator_step(self, real: Tensor) -> None:
        noise = self._draw_noise()
        with self._safe_derivatives():
            fake = self.generator(noise)
            outputs = self.loss.outputs_for_generator(self.discriminator, real, fake)
            loss = self.loss.generator(*outputs)
            rival = None
            if self.orthogonal is not None and self.orthogonal.mode == "game":
                # Its part on real samples does not matter.
                rival = self.loss.discriminator(*reversed(outputs))[-1]
        context = self._context(loss, None, real, fake, noise)
        self._apply(self.generator, loss, [loss], context, rival)

    def _apply(
        self,
        network: nn.Module,
        loss: Tensor,
        parts: Sequence[Tensor],
        context: StepContext,
        rival: Tensor | None = None,
    ) -> None:
        """Differentiate the loss and the regularisers' terms, and step the network's optimiser."""
        side = 0 if network is self.generator else 1
        if self.shard.size == 1:  # several ask each other once, when they have everything
            self._check(side, loss=loss)
        penalty = self._penalty(side, loss, context)
        parameters = [p for p in network.parameters() if p.requires_grad]
        losses = [loss + penalty]
        if self.orthogonal is not None:
            losses = self.orthogonal.losses(loss, parts, penalty, rival)
        grads = self._differentiate(network, parameters, losses)
        for regularizer in self.regularizers:
            g_grads, d_grads = (grads, None) if side == 0 else (None, grads)
            grads = regularizer.transform_grads(g_grads, d_grads, context)[side] or grads
            grads = regularizer.precondition(network, grads, context)
        loss, penalty = self.shard.means(loss, penalty)
        norm = nn.utils.get_total_norm([grad for grad in grads if grad is not None])
        self._check(side, loss=loss, penalty=penalty, grad_norm=norm, grads=grads)
        self._measure(f"_{_NAMES[side][0]}", loss=loss, penalty=penalty, grad_norm=norm)
        network.zero_grad()  # those that are frozen or unused stay without a gradient
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        self._step(side, network, len(losses))

    def _step(self, side: int, network: nn.Module, num_losses: int) -> None:
        """Step a network's optimiser; what projects for both steps both, after the generator."""
        wrapper = self._projecting.get(network)
        if wrapper is None or (wrapper.mode == "terms" and num_losses == 1):
            self.optimizers[network].step()
            return
        together = len(wrapper.optimizers) > 1
        if together and network is self.discriminator:
            return
        wrapper.step()
        self._measure("" if together else f"_{_NAMES[side][0]}", **wrapper.angles)

    def _wrappers(self) -> list[OrthogonalGradients]:
        return list(dict.fromkeys(self._projecting.values()))

    def _differentiate(
        self, network: nn.Module, parameters: Sequence[Tensor], losses: Sequence[Tensor]
    ) -> Gradients:
        """The gradient of the only loss, or the projected one of several."""
        if len(losses) == 1:
            grads = torch.autograd.grad(losses[0], parameters, allow_unused=True)
            group = self.shard.group
            return grads if group is None else average([list(grads)], parameters, group)[0]
        network.zero_grad()
        self._projecting[network].backward(losses)
        return [parameter.grad for parameter in parameters]

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
        for name, value in scalars.items():
            key = name + suffix
            self._sums[key] = self._sums.get(key, 0.0) + value.detach()
            self._counts[key] = self._counts.get(key, 0) + 1

    def _draw_noise(self) -> Tensor:
        shape = (self.sampler.batch_size, self.generator.latent_dim)
        noise = torch.randn(shape, generator=self.noise)  # on the CPU: the same on every device
        return self.shard.take(noise).to(self.data)

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

    def _safe_derivatives(self) -> AbstractContextManager[object]:
        """Exact third derivatives through normalisation layers, where a regulariser needs them."""
        if any(each.needs_third_order(self.steps_done) for each in self.regularizers):
            return third_order_safe(self.generator, self.discriminator)
        return nullcontext()

    def _update_ema(self) -> None:
        # A short memory at the start forgets the initial weights.
        decay = min(self.ema_decay, (1 + self.steps_done) / (10 + self.steps_done))
        parameters = zip(self.ema.parameters(), self.generator.parameters(), strict=True)
        buffers = zip(self.ema.buffers(), self.generator.buffers(), strict=True)
        with torch.no_grad():
            for average, parameter in parameters:
                average.lerp_(parameter, 1.0 - decay)
            for copied, buffer in buffers:
                copied.copy_(buffer)


def _first_non_finite(network: nn.Module, grads: Gradients) -> str:
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    for name, grad in zip(names, grads, strict=True):
        if grad is not None and not grad.isfinite().all():
            return f"gradient of {name}"
    return "gradient norm"


def _moments(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """Adam's state of every parameter; empty for those that never had a gradient."""
    state = optimizer.state_dict()["state"]
    return {index: state.get(index, {}) for index in range(len(_parameters(optimizer)))}


def _own_state(wrapper: OrthogonalGradients) -> dict[str, Any]:
    """Without the optimisers', which the trainer keeps itself."""
    return {name: value for name, value in wrapper.state_dict().items() if name != "optimizers"}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


def _check_moments(optimizer: torch.optim.Optimizer, moments: Any) -> None:
    """Refuse what fused Adam would take unchecked: it writes by the parameter's size."""
    parameters = _parameters(optimizer)
    if {str(index) for index in moments} != {str(index) for index in range(len(parameters))}:
        raise ValueError(f"Adam's state is not that of {len(parameters)} parameters")
    for index, values in moments.items():
        if values and not _fits_adam(values, parameters[int(index)]):
            raise ValueError(f"Adam's state of parameter {index} has a wrong shape, dtype or name")


def _fits_adam(values: Any, parameter: Tensor) -> bool:
    if not isinstance(values, dict) or values.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        return False
    wanted = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    return all(
        isinstance(values[name], Tensor)
        and values[name].shape == shape
        and values[name].dtype == (torch.float32 if name == "step" else parameter.dtype)
        for name, shape in wanted.items()
    )


def _check_counters(state: dict[str, Any]) -> None:
    counts = {f"the count of {name}": value for name, value in state["counts"].items()}
    for name, value in {"steps_done": state["steps_done"], **counts}.items():
        least = 1 if name in counts else 0
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r:.40}")
    if state["counts"].keys() != state["sums"].keys():
        raise ValueError("the sums are not those that are counted")
    for name, total in state["sums"].items():
        if not isinstance(total, Tensor) or total.dim():
            raise ValueError(f"the sum of {name} is not a scalar tensor")
