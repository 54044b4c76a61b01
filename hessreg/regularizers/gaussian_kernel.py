"""Gaussian kernels in the losses: on pairs, on the discriminator's outputs, and MMD^2."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessreg.curvature import NonFiniteError
from hessreg.kernels import gaussian_kernel, mmd2
from hessreg.regularizers._bandwidths import make_bandwidth
from hessreg.regularizers._protocol import BaseRegularizer, StepContext

__all__ = ["GaussianKernel"]

Space = Literal["samples", "features"] | Callable[[Tensor], Tensor]

_OUTPUT_GAMMA = 1.0  # exp(-(D - 1/2)^2), as the article has it


class GaussianKernel(BaseRegularizer):
    r"""Gaussian-kernel terms for both losses, article "Gaussian kernel".

    With ``k(x, y) = exp(-|x - y|^2 / (2 sigma^2))`` the generator's loss gets

    - ``interaction_weight * MMD^2(G(z), x)``, the unbiased estimate: the distance of the two
      distributions, which the generator makes smaller;
    - ``generator_weight * mean_i k(G(z_i), x_i)`` over the pairs of a batch. A kernel is large
      where points are close, so the article's positive weight (0.01) **repels** a sample from the
      one it happens to be paired with; a negative weight attracts;

    and the discriminator's loss gets

    - ``discriminator_weight * (mean k(D(x), 1/2) + mean k(D(G(z)), 1/2))`` of its outputs as
      probabilities, ``D = sigmoid(logit)``, with ``2 sigma^2 = 1``. The article's positive weight
      (0.01) pushes them away from 1/2, towards decisions; a negative weight pulls them there, as
      smoothed labels do.

    A term with weight 0 costs nothing.

    Args:
        interaction_weight: weight of MMD^2.
        generator_weight: weight of the kernel of the pairs.
        discriminator_weight: weight of the kernels of the discriminator's outputs.
        sigma: bandwidth of the first two terms. A number (``0.5**0.5`` is the article's); several,
            for the mean of their kernels; ``"median"``: the median distance of the points of both
            batches; ``"ema"``: its exponential moving average; ``"learned"``: starts at the median
            and makes a step of Adam towards a larger MMD^2 in every call, so that the kernel looks
            where the samples differ most. None of them is differentiated through.
        space: where the first two terms compare points: ``"samples"``, ``"features"`` (the
            ``features`` method of the discriminator, its last hidden layer), or a callable that
            maps a batch of samples to points.

    Raises:
        TypeError: a weight or a bandwidth that is not a number.
        ValueError: a weight that is not finite, a bandwidth that is not positive, or an unknown
            policy or space.

    References:
        Li, Swersky and Zemel, "Generative Moment Matching Networks", ICML 2015 (MMD^2 as a loss);
        Li et al., "MMD GAN", NeurIPS 2017 (a kernel that maximises it).

    Example:
        >>> fake, real = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
        >>> reg = GaussianKernel(sigma=1.0, interaction_weight=0.1)
        >>> round(reg.penalty(fake, real).item(), 4)
        0.0769
        >>> sorted(reg.metrics())
        ['mmd2', 'sigma']
    """

    def __init__(
        self,
        *,
        interaction_weight: float = 1.0,
        generator_weight: float = 0.0,
        discriminator_weight: float = 0.0,
        sigma: float | Sequence[float] | str = "median",
        space: Space = "samples",
    ) -> None:
        self.interaction_weight = _finite("interaction_weight", interaction_weight)
        self.generator_weight = _finite("generator_weight", generator_weight)
        self.discriminator_weight = _finite("discriminator_weight", discriminator_weight)
        if not callable(space) and space not in ("samples", "features"):
            raise ValueError(f"space must be samples, features or a callable, got {space!r}")
        self.space = space
        self._bandwidth = make_bandwidth(sigma)
        self._values: dict[str, Tensor] = {}

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """The terms of the network whose loss is in ``ctx``.

        Raises:
            ValueError: there is no batch of real or of generated data; as :meth:`embed` and
                :meth:`penalty`.
            NonFiniteError: as :meth:`penalty`.
        """
        if ctx.generator_loss is not None:
            return self._generator_term(ctx), None
        return None, self._discriminator_term(ctx)

    def penalty(self, fake: Tensor, real: Tensor) -> Tensor:
        """The terms of the generator's loss, of any two batches of points.

        A bandwidth that adapts takes note of the batches, except under ``torch.no_grad``.

        Args:
            fake: [n, ...], generated; each is flattened to a point. ``space`` does not apply.
            real: [m, ...], real; m = n if the pairs have a weight.

        Returns:
            Scalar [], differentiable in both.

        Raises:
            TypeError: batches that are not floating-point tensors.
            ValueError: batches of different kinds of points, or too small.
            NonFiniteError: NaN or infinity in a batch.
        """
        _check_batches(fake, real)
        fake, real = fake.flatten(1), real.flatten(1)
        if torch.is_grad_enabled():
            self._bandwidth.adapt(fake.detach(), real.detach())
        sigma = self.bandwidth(fake, real)
        self._values["sigma"] = sigma.mean()
        term = fake.new_zeros(())
        if self.interaction_weight:
            term = term + self.interaction_weight * self._noted("mmd2", mmd2(fake, real, sigma))
        if self.generator_weight:
            kernels = _pair_kernels(fake, real, sigma)
            term = term + self.generator_weight * self._noted("kernel_g", kernels.mean())
        return term

    def discriminator_penalty(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The terms of the discriminator's loss.

        Args:
            real_logits: logits of real samples, of any shape.
            fake_logits: logits of generated samples, of any shape.

        Returns:
            Scalar [], differentiable in both.
        """
        batches = (real_logits, fake_logits)
        distances = ((logits.sigmoid() - 0.5).square() for logits in batches)
        kernels = torch.stack([torch.exp(-_OUTPUT_GAMMA * s).mean() for s in distances])
        return self.discriminator_weight * 2 * self._noted("kernel_d", kernels.mean())

    def embed(self, samples: Tensor, discriminator: nn.Module) -> Tensor:
        """The points ``[n, d]`` that stand for samples ``[n, ...]``, by ``space``.

        Raises:
            ValueError: ``space="features"``, and the discriminator has no method ``features``.
        """
        if callable(self.space):
            return self.space(samples).flatten(1)
        if self.space == "samples":
            return samples.flatten(1)
        features = getattr(discriminator, "features", None)
        if features is None:
            kind = type(discriminator).__name__
            raise ValueError(f"space features needs a discriminator with features(), got {kind}")
        return features(samples).flatten(1)

    def bandwidth(self, fake: Tensor, real: Tensor) -> Tensor:
        """The bandwidths that would be used for points ``[n, d]`` and ``[m, d]`` now.

        Returns:
            [components] or [].
        """
        return self._bandwidth.now(fake, real)

    def metrics(self) -> dict[str, float]:
        """What was last computed, without weights.

        Returns:
            ``mmd2``, ``kernel_g`` (mean kernel of the pairs) and ``kernel_d`` (mean kernel of the
            discriminator's outputs and 1/2), those that have a weight, and ``sigma`` (the mean, if
            there are several).
        """
        return {name: value.item() for name, value in self._values.items()}

    def state_dict(self) -> dict[str, Any]:
        """The policy and, if the bandwidth adapts, its state and that of its optimiser."""
        state = self._bandwidth.state_dict()
        return {"policy": self._bandwidth.policy} | {f"sigma.{k}": v for k, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, so that a resumed run is the same bit for bit.

        Raises:
            ValueError: the state of another policy, or missing or unknown entries; the regulariser
                is as it was.
        """
        policy = self._bandwidth.policy
        if state.get("policy") != policy:
            raise ValueError(
                f"state is of bandwidth {state.get('policy')!r}, this regulariser's {policy!r}"
            )
        names = state.keys() - {"policy"}
        if unknown := sorted(name for name in names if not name.startswith("sigma.")):
            raise ValueError(f"state has unknown entries {unknown}")
        self._bandwidth.load_state_dict({k.removeprefix("sigma."): state[k] for k in names})

    def _generator_term(self, ctx: StepContext) -> Tensor | None:
        if not (self.interaction_weight or self.generator_weight):
            return None
        real, fake = _batches(ctx)
        with torch.no_grad():
            real = self.embed(real, ctx.discriminator)
        fake = self.embed(fake, ctx.discriminator)
        return self.penalty(ctx.shard.gather(fake), ctx.shard.gather(real))

    def _discriminator_term(self, ctx: StepContext) -> Tensor | None:
        if ctx.discriminator_loss is None or not self.discriminator_weight:
            return None
        real, fake = _batches(ctx)
        return self.discriminator_penalty(ctx.discriminator(real), ctx.discriminator(fake.detach()))

    def _noted(self, name: str, value: Tensor) -> Tensor:
        self._values[name] = value.detach()
        return value


def _finite(name: str, weight: float) -> float:
    if not isinstance(weight, Real) or isinstance(weight, bool):
        raise TypeError(f"{name} must be a number, got {weight!r}")
    if not math.isfinite(weight):
        raise ValueError(f"{name} must be finite, got {weight}")
    return float(weight)


def _batches(ctx: StepContext) -> tuple[Tensor, Tensor]:
    if ctx.real is None or ctx.fake is None:
        missing = "real" if ctx.real is None else "fake"
        raise ValueError(f"GaussianKernel needs a batch of data in ctx.{missing}, got None")
    return ctx.real, ctx.fake


def _check_batches(fake: Tensor, real: Tensor) -> None:
    for name, batch in (("fake", fake), ("real", real)):
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            kind = batch.dtype if isinstance(batch, Tensor) else type(batch)
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
        if batch.dim() < 2 or len(batch) < 2:
            raise ValueError(
                f"{name} must be at least 2 points [n, ...], got shape {tuple(batch.shape)}"
            )
        if not batch.isfinite().all():
            place = tuple((~batch.isfinite()).nonzero()[0].tolist())
            raise NonFiniteError(f"{name} is {batch[place].item()} at {place}")
    if fake.shape[1:] != real.shape[1:]:
        shapes = tuple(real.shape[1:]), tuple(fake.shape[1:])
        raise ValueError(f"fake must have points of shape {shapes[0]} like real, got {shapes[1]}")


def _pair_kernels(fake: Tensor, real: Tensor, sigma: Tensor) -> Tensor:
    """k(fake_i, real_i) as a batch of 1 x 1 matrices."""
    if len(fake) != len(real):
        raise ValueError(
            f"fake must have as many points as real for pairs, {len(real)}, got {len(fake)}"
        )
    return gaussian_kernel(fake[:, None], real[:, None], sigma)
