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
from hessreg.gan.data import ShuffledSampler
from hessreg.gan.losses import discriminator_loss, generator_loss
from hessreg.gan.networks import Generator
from hessreg.regularizers import Gradients, Regularizer, StepContext

__all__ = ["NonFiniteError", "Trainer"]

_NAMES = "generator", "discriminator"


class NonFiniteError(ArithmeticError):
    """A loss, a penalty or a gradient became infinite or NaN; the weights were left alone."""


class Trainer:
    """Alternates one discriminator and one generator step on the non-saturating loss.

    Everything random comes from ``seed`` and everything that a step depends on is in
    `state_dict`, so training continued from a saved state is the same training, bit for bit on
    a CPU.

    Args:
        generator: Maps noise ``[n, latent_dim]`` to samples ``[n, ...]``.
        discriminator: Maps samples ``[n, ...]`` to logits ``[n]``.
        data: Real samples ``[count, ...]``, on the device to train on.
        regularizers: Each may add loss terms and change gradients.
        batch_size: Samples in a batch, the same for both networks.
        learning_rates: Adam's rates for the generator and the discriminator.
        betas: Adam's betas for both.
        ema_decay: Decay of the averaged generator `ema`, which is the one to sample from.
        seed: Seed of the noise and of the order of the data.
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
    ) -> None:
        self.generator = generator.to(data.device)
        self.discriminator = discriminator.to(data.device)
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
        self.sampler = ShuffledSampler(len(data), batch_size, seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.steps_done = 0
        self._sums: dict[str, Tensor] = {}
        self._summed_steps = 0

    def step(self) -> None:
        """Train both networks once.

        Raises:
            NonFiniteError: If a loss, penalty or gradient is not finite.
        """
        real = self.data[next(self.sampler)]
        self._discriminator_step(real)
        self._generator_step(real)
        self._update_ema()
        self.steps_done += 1
        self._summed_steps += 1

    def metrics(self) -> dict[str, float]:
        """Return means of losses, penalties and gradient norms, and the regularisers' metrics.

        The means are over the steps since the last call.
        """
        values = {name: float(total) / self._summed_steps for name, total in self._sums.items()}
        self._sums, self._summed_steps = {}, 0
        for regularizer in self.regularizers:
            values.update(regularizer.metrics())
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
            "sampler": self.sampler.state_dict(),
            "noise": self.noise.get_state(),
            "global_random": torch.get_rng_state(),
            "steps_done": self.steps_done,
            "sums": dict(self._sums),
            "summed_steps": self._summed_steps,
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
        self.sampler.load_state_dict(state["sampler"])
        self.noise.set_state(state["noise"])
        torch.set_rng_state(state["global_random"])
        if self.data.is_cuda and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"], self.data.device)
        self.steps_done = state["steps_done"]
        self._sums = {name: total.to(self.data.device) for name, total in state["sums"].items()}
        self._summed_steps = state["summed_steps"]

    def _discriminator_step(self, real: Tensor) -> None:
        noise = self._draw_noise()
        with torch.no_grad():
            fake = self.generator(noise)
        with self._safe_derivatives():
            loss = discriminator_loss(self.discriminator(real), self.discriminator(fake))
        self._apply(self.discriminator, loss, self._context(None, loss, real, fake, noise))

    def _generator_step(self, real: Tensor) -> None:
        noise = self._draw_noise()
        with self._safe_derivatives():
            fake = self.generator(noise)
            loss = generator_loss(self.discriminator(fake))
        self._apply(self.generator, loss, self._context(loss, None, real, fake, noise))

    def _apply(self, network: nn.Module, loss: Tensor, context: StepContext) -> None:
        """Differentiate the loss and the regularisers' terms, and step the network's optimiser."""
        side = 0 if network is self.generator else 1
        self._check(side, loss=loss)
        penalty = self._penalty(side, loss, context)
        parameters = [p for p in network.parameters() if p.requires_grad]
        grads: Gradients = torch.autograd.grad(loss + penalty, parameters, allow_unused=True)
        for regularizer in self.regularizers:
            g_grads, d_grads = (grads, None) if side == 0 else (None, grads)
            grads = regularizer.transform_grads(g_grads, d_grads, context)[side] or grads
            grads = regularizer.precondition(network, grads, context)
        norm = nn.utils.get_total_norm([grad for grad in grads if grad is not None])
        self._check(side, penalty=penalty, grad_norm=norm, grads=grads)
        self._measure(side, loss=loss, penalty=penalty, grad_norm=norm)
        network.zero_grad()  # those that are frozen or unused stay without a gradient
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        self.optimizers[network].step()

    def _penalty(self, side: int, loss: Tensor, context: StepContext) -> Tensor:
        try:
            terms = [regularizer.loss_terms(context)[side] for regularizer in self.regularizers]
        except NonFiniteCurvatureError as error:
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

    def _measure(self, side: int, **scalars: Tensor) -> None:
        for name, value in scalars.items():
            key = f"{name}_{_NAMES[side][0]}"
            self._sums[key] = self._sums.get(key, 0.0) + value.detach()

    def _draw_noise(self) -> Tensor:
        shape = (self.sampler.batch_size, self.generator.latent_dim)
        noise = torch.randn(shape, generator=self.noise)  # on the CPU: the same on every device
        return noise.to(self.data.device)

    def _context(
        self,
        loss_g: Tensor | None,
        loss_d: Tensor | None,
        real: Tensor,
        fake: Tensor,
        noise: Tensor,
    ) -> StepContext:
        networks = self.generator, self.discriminator
        return StepContext(self.steps_done, *networks, loss_g, loss_d, real, fake, noise)

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
    for name in ("steps_done", "summed_steps"):
        if type(state[name]) is not int or not 0 <= state[name] < 2**63:
            raise ValueError(f"{name} must be an integer of at least 0, got {state[name]!r:.40}")
    for name, total in state["sums"].items():
        if not isinstance(total, Tensor) or total.dim() or not state["summed_steps"]:
            raise ValueError(f"the sum of {name} is not that of {state['summed_steps']} steps")
