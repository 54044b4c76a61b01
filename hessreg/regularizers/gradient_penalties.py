"""Penalties on the slope of the discriminator: at data, at generated samples, and between them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hessreg.curvature._checks import check_not_negative
from hessreg.regularizers._protocol import BaseRegularizer, StepContext

__all__ = ["DRAGAN", "R1", "R2", "WGANGP", "GradientPenalty"]


class GradientPenalty(BaseRegularizer):
    """A penalty on grad_x D(x) at some points, in the discriminator's phase; to derive from.

    Where D gives several numbers for a sample, its slope is that of their sum.

    Attributes:
        name: of the metric, the penalty in the last step.
    """

    name: str

    def __init__(self) -> None:
        self._penalty: Tensor | None = None

    @abstractmethod
    def points(self, ctx: StepContext) -> Tensor:
        """Where the slope is taken: [n, ...]."""

    @abstractmethod
    def penalty(self, slopes: Tensor) -> Tensor:
        """The scalar to add, of grad_x D at every point: [n, d]."""

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """The penalty, in the discriminator's phase.

        Raises:
            ValueError: samples that it needs are not in ``ctx``, or the discriminator's outputs
                do not depend on them.
        """
        if ctx.discriminator_loss is None:
            return None, None
        penalty = self.penalty(self._slopes(ctx))
        self._penalty = penalty.detach()
        return None, penalty

    def metrics(self) -> dict[str, float]:
        """The penalty in the last step."""
        return {} if self._penalty is None else {self.name: self._penalty.item()}

    def _slopes(self, ctx: StepContext) -> Tensor:
        x = self.points(ctx).detach().requires_grad_(True)
        return _slopes(ctx.discriminator(x), x)

    def _samples(self, ctx: StepContext, name: str) -> Tensor:
        samples: Tensor | None = getattr(ctx, name)
        if samples is None:
            what = {"real": "real data", "fake": "generated samples"}[name]
            raise ValueError(
                f"{type(self).__name__} needs a batch of {what} in ctx.{name}, got None"
            )
        return samples.detach()


def _slopes(outputs: Tensor, x: Tensor) -> Tensor:
    slopes = None
    if outputs.requires_grad:
        (slopes,) = torch.autograd.grad(outputs.sum(), x, create_graph=True, allow_unused=True)
    if slopes is None:
        raise ValueError(
            "ctx.discriminator must return what depends on the samples, got what does not: is"
            " something detached?"
        )
    return slopes.flatten(1)


class R1(GradientPenalty):
    """Gradient penalty gamma/2 E |grad_x D(x)|^2 on real data (Mescheder and others, 2018).

    Args:
        gamma: weight of the penalty.

    Raises:
        TypeError: a weight that is not a number.
        ValueError: a weight that is negative or not finite.

    Example:
        >>> D = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(D.weight, 3.0)
        >>> loss = D(torch.ones(4, 2)).mean()
        >>> ctx = StepContext(0, D, D, None, loss, real=torch.ones(4, 2))
        >>> R1(gamma=0.5).loss_terms(ctx)[1].item()
        4.5
    """

    name = "r1"
    _batch: Literal["real", "fake"] = "real"

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        check_not_negative(gamma=gamma)
        self.gamma = gamma

    def points(self, ctx: StepContext) -> Tensor:
        """The batch of data, or the generated one."""
        return self._samples(ctx, self._batch)

    def penalty(self, slopes: Tensor) -> Tensor:
        """gamma/2 E |slope|^2."""
        return 0.5 * self.gamma * slopes.square().sum(1).mean()

    def _slopes(self, ctx: StepContext) -> Tensor:
        if ctx.outputs is None or ctx.real is None or ctx.fake is None:
            return super()._slopes(ctx)
        at = ("real", "fake").index(self._batch)
        return _slopes(ctx.outputs[at], (ctx.real, ctx.fake)[at])


class R2(R1):
    """Gradient penalty gamma/2 E |grad_x D(G(z))|^2 on generated samples.

    R3GAN (Huang and others, 2024) has it beside :class:`R1`, with a relativistic loss.

    Args:
        gamma: weight of the penalty.

    Raises:
        TypeError: a weight that is not a number.
        ValueError: a weight that is negative or not finite.
    """

    name = "r2"
    _batch = "fake"


class _UnitSlope(GradientPenalty):
    """weight E (|grad_x D| - 1)^2 at random points.

    Args:
        weight: lambda.
        seed: of the random numbers, which are the same on every device.
    """

    def __init__(self, weight: float, seed: int) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        self.weight = weight
        self._random = torch.Generator().manual_seed(seed)

    def penalty(self, slopes: Tensor) -> Tensor:
        """Weight E (|slope| - 1)^2."""
        return self.weight * _deviation(slopes)

    def state_dict(self) -> dict[str, Any]:
        """The state of the random numbers."""
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, so that a resumed run is the same bit for bit.

        Raises:
            ValueError: missing or unknown entries.
        """
        if state.keys() != {"random"}:
            raise ValueError(f"state must have random, got {sorted(state)}")
        self._random.set_state(state["random"].cpu())

    def _uniform(self, ctx: StepContext, rows: int, *shape: int, like: Tensor) -> Tensor:
        """Numbers for this process's rows, drawn for those of all."""
        numbers = torch.rand(rows * ctx.shard.size, *shape, generator=self._random, device="cpu")
        return ctx.shard.take(numbers).to(like)

    def _pairs(self, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Real samples, each with the generated one in its row."""
        real, fake = self._samples(ctx, "real"), self._samples(ctx, "fake")
        if real.shape != fake.shape:
            name, shapes = type(self).__name__, f"{tuple(real.shape)} and {tuple(fake.shape)}"
            raise ValueError(f"{name} needs as many real as generated samples, got {shapes}")
        return real, fake


def _deviation(slopes: Tensor) -> Tensor:
    """E (|slope| - 1)^2."""
    return (torch.linalg.vector_norm(slopes, dim=1) - 1).square().mean()


class WGANGP(_UnitSlope):
    """weight E (|grad_x D(x')| - 1)^2 at x' = x + u (G(z) - x), u uniform in [0, 1].

    From Gulrajani and others, "Improved training of Wasserstein GANs", 2017.

    Args:
        weight: lambda.
        seed: of u.

    Raises:
        TypeError: a weight that is not a number.
        ValueError: a weight that is negative or not finite.

    Example:
        >>> D = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(D.weight, 0.0)
        >>> x = torch.ones(4, 2)
        >>> ctx = StepContext(0, D, D, None, D(x).mean(), real=x, fake=-x)
        >>> WGANGP(weight=10.0).loss_terms(ctx)[1].item()
        10.0
    """

    name = "wgan_gp"

    def __init__(self, weight: float = 10.0, seed: int = 0) -> None:
        super().__init__(weight, seed)

    def points(self, ctx: StepContext) -> Tensor:
        """One point between every real sample and the generated one it is paired with.

        Raises:
            ValueError: not as many of both.
        """
        real, fake = self._pairs(ctx)
        share = self._uniform(ctx, len(real), *[1] * (real.dim() - 1), like=real)
        return torch.lerp(real, fake, share)


class DRAGAN(_UnitSlope):
    """weight E (|grad_x D(x')| - 1)^2 at real samples with noise.

    x' = x + spread std(x) u with u uniform in [0, 1] for every component, as in Kodali and others,
    "On convergence and stability of GANs", 2017.

    Args:
        weight: lambda.
        spread: width of the noise in standard deviations of the batch.
        seed: of u.

    Raises:
        TypeError: a weight or spread that is not a number.
        ValueError: one that is negative or not finite.
    """

    name = "dragan"

    def __init__(self, weight: float = 10.0, spread: float = 0.5, seed: int = 0) -> None:
        super().__init__(weight, seed)
        check_not_negative(spread=spread)
        self.spread = spread

    def points(self, ctx: StepContext) -> Tensor:
        """The batch of data with noise."""
        real = self._samples(ctx, "real")
        noise = self._uniform(ctx, *real.shape, like=real)
        return real + self.spread * ctx.shard.std(real) * noise
