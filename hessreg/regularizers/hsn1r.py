"""HSN1R: the norm of each player's Hessian, added to its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hessreg.curvature._checks import check_at_least, check_not_negative
from hessreg.curvature._krylov import random_vector
from hessreg.curvature.exact_norms import NormEstimate, NormOrder, exact_norm
from hessreg.curvature.hessian import HessianOperator
from hessreg.curvature.norms import (
    frobenius_norm,
    nuclear_norm,
    one_norm,
    spectral_norm,
)
from hessreg.curvature.third_order import third_order_safe
from hessreg.regularizers._protocol import BaseRegularizer, StepContext

__all__ = ["HSN1R", "hsn1r_loss", "original_loss"]

Method = Literal["auto", "krylov", "exact"]

_GRAPH_COST = 4  # products that one with its graph costs, its differentiation included
_METRICS = {
    "generator": "hessian_norm_g",
    "discriminator": "hessian_norm_d",
    "loss": "hessian_norm",
}


class HSN1R(BaseRegularizer):
    """Hessian-norm regulariser: L = L_G + L_D + weight (|H_G| + |H_D|), article "HSN1R".

    H_G is the Hessian of the generator's own loss in the generator's own parameters, H_D likewise.
    The norm is differentiated exactly with its directions held fixed (see
    :mod:`hessreg.curvature.norms`): a third derivative of the loss, so a loss that goes through
    batch, layer, instance or weight normalisation must be computed under
    :func:`~hessreg.curvature.third_order_safe`; another is refused. Random probes come from a
    generator of its own on the CPU: the global random state stays as it is, and the probes are the
    same on every device.

    Args:
        generator: the generator, needed only to call the regulariser on a batch.
        discriminator: the discriminator, likewise.
        norm: "nuclear" (sum of |eigenvalues|, the article's first definition), "one" (largest
            column sum, its second), "spectral" (largest |eigenvalue|, its title) or "fro".
        weight: lambda for the generator, and for :meth:`penalty`.
        discriminator_weight: lambda for the discriminator; ``weight`` if None. A network with
            weight 0 costs nothing.
        every: apply it in steps 0, every, 2 every, ... only, with ``every`` times the weight, so
            that the mean pressure is the same.
        target: penalise max(norm - target, 0).
        num_steps: Hessian-vector products for the search of the directions.
        num_probes: random vectors per step ("nuclear" and "fro").
        num_deflated: leading eigenvalues to take exactly ("nuclear").
        smoothing: of sign(H), relative to the largest eigenvalue ("nuclear"); for the gradient of
            a few steps 0.01 is better than less, and the value about 2 % low.
        method: "krylov" estimates the norm from a few products, as the options above say; "exact"
            forms the Hessian of n parameters by n products (with their graphs for "nuclear" and
            "fro", so it is for very small n); "auto" is exact where that costs no more.
        warm_start: begin the search near the last step's direction ("spectral", "one", and the
            deflated eigenvalues of "nuclear").
        seed: of the random probes.

    Raises:
        TypeError: a count that is not an int, or a weight that is not a number.
        ValueError: an unknown norm or method, a count below its minimum, or a weight, target or
            smoothing that is negative or not finite.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
        >>> x = torch.ones(2, requires_grad=True)
        >>> reg = HSN1R(norm="nuclear", weight=0.1)
        >>> round(reg.penalty(lambda: 0.5 * x @ A @ x, [x]).item(), 4)
        0.5
    """

    def __init__(
        self,
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        *,
        norm: NormOrder = "nuclear",
        weight: float = 1e-4,
        discriminator_weight: float | None = None,
        every: int = 1,
        target: float = 0.0,
        num_steps: int = 8,
        num_probes: int = 1,
        num_deflated: int = 0,
        smoothing: float = 1e-2,
        method: Method = "auto",
        warm_start: bool = True,
        seed: int = 0,
    ) -> None:
        if norm not in get_args(NormOrder):
            raise ValueError(f"norm must be one of {get_args(NormOrder)}, got {norm!r}")
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
        check_at_least(1, every=every, num_steps=num_steps, num_probes=num_probes)
        check_at_least(0, num_deflated=num_deflated)
        d_weight = weight if discriminator_weight is None else discriminator_weight
        check_not_negative(weight=weight, discriminator_weight=d_weight)
        check_not_negative(target=target, smoothing=smoothing)
        self.generator = generator
        self.discriminator = discriminator
        self.norm = norm
        self.weight = weight
        self.discriminator_weight = d_weight
        self.every = every
        self.target = target
        self.num_steps = num_steps
        self.num_probes = num_probes
        self.num_deflated = num_deflated
        self.smoothing = smoothing
        self.method = method
        self.warm_start = warm_start
        self._random = torch.Generator().manual_seed(seed)
        self._starts: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Total loss on a batch of data: :func:`original_loss` and both players' penalties.

        Args:
            x: a batch of data.

        Returns:
            Scalar []; its gradient reaches each network through its own loss only. ``every`` does
            not apply.

        Raises:
            ValueError: the regulariser was made without a generator or a discriminator.
        """
        if self.generator is None or self.discriminator is None:
            raise ValueError("HSN1R needs a generator and a discriminator to be called on a batch")
        losses = _gan_losses(self.generator, self.discriminator, x)
        return self._total(StepContext(0, self.generator, self.discriminator, *losses), *losses)

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """The penalty of each network whose loss is in ``ctx``, on the steps that ``every`` picks.

        Its gradient is meant in the parameters of that network, and may be missing in others.

        Raises:
            ValueError: as :meth:`penalty`.
        """
        if not self.needs_third_order(ctx.step):
            return None, None
        return self._terms(ctx, self.every)

    def penalty(
        self, loss: Tensor | Callable[[], Tensor], params: Tensor | Iterable[Tensor]
    ) -> Tensor:
        """The term to add to any scalar loss of any module: weight * max(norm - target, 0).

        Args:
            loss: the scalar with its graph, which is kept, or a callable without arguments that
                returns it, evaluated once under ``third_order_safe``.
            params: the parameters whose Hessian is meant.

        Returns:
            Scalar [], differentiable in everything the loss depends on. ``every`` does not apply.

        Raises:
            TypeError: see :class:`~hessreg.curvature.HessianOperator`.
            ValueError: likewise, and a loss tensor that went through a normalisation layer whose
                third derivative torch gets wrong.
        """
        return self.weight * self._excess("loss", HessianOperator(loss, params))

    def needs_third_order(self, step: int) -> bool:
        """True on the steps that ``every`` picks: a Hessian norm's gradient is of third order."""
        return step % self.every == 0

    def metrics(self) -> dict[str, float]:
        """The norms last computed, as far as there are any.

        Returns:
            ``hessian_norm_g`` and ``hessian_norm_d`` from :meth:`loss_terms`, ``hessian_norm`` from
            :meth:`penalty`.
        """
        return {_METRICS[k]: self._norms[k].item() for k in _METRICS if k in self._norms}

    def state_dict(self) -> dict[str, Any]:
        """The state of the probes, the warm starts and the last norms, as flat names."""
        state: dict[str, Any] = {"norm": self.norm, "random": self._random.get_state()}
        state.update({f"start.{k}": v.clone() for k, v in self._starts.items()})
        state.update({f"value.{k}": v.clone() for k, v in self._norms.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, so that a resumed run is the same bit for bit.

        Raises:
            ValueError: the state of another norm, or missing or unknown entries; the regulariser
                is as it was.
        """
        _check_entries(state)
        if state["norm"] != self.norm:
            raise ValueError(
                f"state is of norm {state['norm']!r}, this regulariser's {self.norm!r}"
            )
        self._random.set_state(state["random"].cpu())
        self._starts = _section(state, "start.")
        self._norms = _section(state, "value.")

    def _total(self, ctx: StepContext, *losses: Tensor) -> Tensor:
        terms = [term for term in self._terms(ctx, 1) if term is not None]
        return torch.stack([*losses, *terms]).sum()

    def _terms(self, ctx: StepContext, scale: int) -> tuple[Tensor | None, Tensor | None]:
        g_scale, d_scale = scale * self.weight, scale * self.discriminator_weight
        return (
            self._term(ctx, "generator", ctx.generator_loss, ctx.generator, g_scale),
            self._term(ctx, "discriminator", ctx.discriminator_loss, ctx.discriminator, d_scale),
        )

    def _term(
        self,
        ctx: StepContext,
        name: str,
        loss: Tensor | None,
        network: nn.Module,
        weight: float,
    ) -> Tensor | None:
        if loss is None or weight == 0:
            return None
        params = [p for p in network.parameters() if p.requires_grad]
        # Of the whole batch: the mean of the processes' norms is not the norm of the mean.
        op = HessianOperator(loss, params, process_group=ctx.shard.group, only_params=True)
        return weight * self._excess(name, op)

    def _excess(self, name: str, op: HessianOperator) -> Tensor:
        estimate = self._estimate(op, name)
        self._norms[name] = estimate.value.detach()
        if self.warm_start and estimate.start is not None:
            self._starts[name] = estimate.start
        value = estimate.value
        return (value - self.target).clamp_min(0) if self.target else value

    def _start(self, name: str, op: HessianOperator) -> Tensor | None:
        start = self._starts.get(name)
        if start is None or start.shape != op.shape[:1]:
            return None
        start = start.to(op.device, op.dtype)
        if self.norm == "one":
            return start
        # An eigenvector alone spans an invariant space, from which no other is ever seen.
        noise = random_vector(op, self._random)
        return start / start.norm() + noise / noise.norm()

    def _estimate(self, op: HessianOperator, name: str) -> NormEstimate:
        if self._is_exact(op.shape[0]):
            return exact_norm(op, self.norm)
        v0 = self._start(name, op)
        if self.norm == "spectral":
            return spectral_norm(op, num_steps=self.num_steps, v0=v0, generator=self._random)
        if self.norm == "one":
            return one_norm(op, num_steps=self.num_steps, v0=v0)
        if self.norm == "fro":
            return frobenius_norm(op, num_probes=self.num_probes, generator=self._random)
        return nuclear_norm(
            op,
            num_steps=self.num_steps,
            num_probes=self.num_probes,
            num_deflated=self.num_deflated,
            smoothing=self.smoothing,
            v0=v0,
            generator=self._random,
        )

    def _is_exact(self, n: int) -> bool:
        """Whether to form the Hessian of n parameters; "auto" counts products."""
        if self.method != "auto":
            return self.method == "exact"
        if self.norm == "fro":
            return n <= self.num_probes
        if self.norm != "nuclear":
            return n <= self.num_steps
        searches = self.num_probes + (self.num_deflated > 0)
        graphs = self.num_probes + self.num_deflated
        return _GRAPH_COST * n <= self.num_steps * searches + _GRAPH_COST * graphs


def original_loss(generator: nn.Module, discriminator: nn.Module, x: Tensor) -> Tensor:
    """L_G + L_D of a batch, non-saturating: the article's ``original_loss``.

    L_G = mean softplus(-D(G(z))), L_D = mean softplus(-D(x)) + mean softplus(D(G(z))), D giving
    logits. The generator's gradient comes from L_G only and the discriminator's from L_D only, so
    one ``backward`` serves both players. The noise z is standard normal, from torch's global
    random state: [batch, generator.latent_dim], or as the generator's first linear or transposed
    convolutional layer takes it.

    Args:
        generator: maps z to samples like x.
        discriminator: maps samples to logits.
        x: [batch, ...], data.

    Returns:
        Scalar [].

    Raises:
        ValueError: the size of z cannot be told from the generator.

    Example:
        >>> G, D = nn.Linear(2, 3), nn.Linear(3, 1)
        >>> original_loss(G, D, torch.randn(8, 3)).shape
        torch.Size([])
    """
    g_loss, d_loss = _gan_losses(generator, discriminator, x)
    return g_loss + d_loss


def hsn1r_loss(generator: nn.Module, discriminator: nn.Module, x: Tensor, lambda_: float) -> Tensor:
    """L_G + L_D + lambda (|H_G| + |H_D|) of a batch: the article's ``hsn1r_loss``.

    Nuclear norms with the defaults of :class:`HSN1R`, their probes seeded from torch's global
    random state. In a training loop an :class:`HSN1R` object is better: it keeps its state.

    Args:
        generator: maps z to samples like x; see :func:`original_loss` for z.
        discriminator: maps samples to logits.
        x: [batch, ...], data.
        lambda_: weight of both norms.

    Returns:
        Scalar [].

    Raises:
        ValueError: the size of z cannot be told from the generator.

    Example:
        >>> G, D = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> hsn1r_loss(G, D, torch.randn(8, 3), 0.01).backward()
    """
    losses = _gan_losses(generator, discriminator, x)
    seed = int(torch.randint(2**62, (), device="cpu"))
    ctx = StepContext(0, generator, discriminator, *losses)
    return HSN1R(weight=lambda_, seed=seed)._total(ctx, *losses)


def _gan_losses(generator: nn.Module, discriminator: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with third_order_safe(generator, discriminator):
        fake = generator(_noise(generator, x))
        # The generator's loss sees the discriminator as a constant, and the other way round.
        frozen = {k: p.detach() for k, p in discriminator.named_parameters()}
        g_loss = F.softplus(-functional_call(discriminator, frozen, (fake,))).mean()
        d_real, d_fake = discriminator(x), discriminator(fake.detach())
        return g_loss, F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def _noise(generator: nn.Module, x: Tensor) -> Tensor:
    shape = (len(x), *latent_shape(generator))
    return torch.randn(shape, dtype=x.dtype, device=x.device)


def latent_shape(generator: nn.Module) -> tuple[int, ...]:
    """The shape of a sample of noise: the generator's ``latent_dim``, or as its first layer takes.

    Raises:
        ValueError: neither tells.
    """
    latent_dim: Any = getattr(generator, "latent_dim", None)
    if latent_dim is not None:
        return (int(latent_dim),)
    for module in generator.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, nn.ConvTranspose2d):
            return (module.in_channels, 1, 1)
    raise ValueError(
        "the size of the noise is unknown: give the generator an attribute latent_dim, its first"
        " layer is neither Linear nor ConvTranspose2d"
    )


def _check_entries(state: Mapping[str, Any]) -> None:
    required = {"norm", "random"}
    if missing := sorted(required - set(state)):
        raise ValueError(f"state has no entries {missing}")
    known = required | {f"{kind}.{name}" for kind in ("start", "value") for name in _METRICS}
    if unknown := sorted(set(state) - known):
        raise ValueError(f"state has unknown entries {unknown}")


def _section(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v.clone() for k, v in state.items() if k.startswith(prefix)}
