"""A gradient penalty whose points and weight follow the distance of the two distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hessreg.curvature._checks import check_at_least, check_not_negative
from hessreg.kernels import median_bandwidth, mmd2
from hessreg.ops.gaussian import _gamma_of, _values
from hessreg.regularizers._protocol import StepContext
from hessreg.regularizers.gradient_penalties import _deviation, _UnitSlope

__all__ = ["IterativeGradientPenalty"]

_DISTANCES = ("mmd", "energy", "critic")
_SCHEDULES = ("distance", "uniform")
_RUNNING = ("mean", "largest")
_MEDIAN_POINTS = 256


class IterativeGradientPenalty(_UnitSlope):
    r"""WGAN-GP whose points and weight follow the distance between data and generated samples.

    In step t, with d_t a distance of the two distributions, smoothed over the steps, and d_ref the
    largest d so far:

    - ``rho = clip(d_t / d_ref, 0, 1)``: 1 at the start, 0 where the distributions are equal;
    - ``lambda = max(lam_min, weight rho^power)``;
    - the penalty is ``lambda E (|grad_x D(x_t)| - 1)^2`` at ``x_t = (1 - s) x + s G(z)`` with
      ``s = rho^point_power``: at the generated samples first, then ever nearer to the data.

    The article says that points and weight are given by the distance, get closer to the data and
    smaller with it, and are renewed in every iteration; these formulas are the simplest that do
    so. :class:`WGANGP` is ``schedule="uniform"`` with ``lam_min=weight``, to the last bit.

    Distances are estimated without bias, so that they vanish on average where the distributions
    are equal. The estimate is what is smoothed:

    - ``"mmd"``: the root of MMD^2 in the Gaussian kernel. It does not depend on D;
    - ``"energy"``: the root of 2 E|x - y| - E|x - x'| - E|y - y'|, without a bandwidth;
    - ``"critic"``: abs(E D(x) - E D(G(z))), for which D looks at both batches once more.

    Args:
        weight: lambda at the start.
        distance: which distance.
        power: of rho in lambda; 0 for a constant lambda.
        point_power: of rho in the points.
        lam_min: smallest lambda; None for a tenth of ``weight``; the article's is 0.
        jitter: share of a random number u, uniform in [0, 1], in place of s: s (1 - jitter) +
            jitter u.
        num_points: K points on the way from the data to x_t, at s/K, 2 s/K, ..., s, whose mean
            counts.
        decay: of the smoothed estimate, in [0, 1).
        schedule: ``"uniform"`` takes u in place of s, as ``jitter=1`` does.
        sigma: bandwidth of the kernel, or several for the mean of their kernels; ``"median"``: the
            median distance within the first batch of data.
        seed: of u.

    Raises:
        TypeError: an option that is not a number where one is wanted.
        ValueError: one out of its range, or an unknown distance or schedule.

    References:
        Chen Yao, Song Xiaoning and Yu Dongjun, "Iterative cost function and variable-hyperparameter
        GAN", Journal of Nanjing University of Science and Technology 43(1):35-40, 2019,
        doi 10.14177/j.cnki.32-1397n.2019.43.01.005; Gretton et al., JMLR 2012 (MMD); Szekely and
        Rizzo, "Energy statistics", 2013.

    Example:
        >>> D = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(D.weight, 0.0)
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> reg = IterativeGradientPenalty(weight=10.0, distance="energy", decay=0.0)
        >>> for shift in (4.0, 2.0, 0.0):
        ...     ctx = StepContext(0, D, D, None, D(x).mean(), real=x, fake=x + shift)
        ...     penalty = reg.loss_terms(ctx)[1].item()
        ...     print(f"{reg.metrics()['rho']:.2f} {penalty:.2f}")
        1.00 10.00
        0.63 6.28
        0.00 1.00
    """

    name = "iterative"

    def __init__(
        self,
        weight: float = 10.0,
        *,
        distance: Literal["mmd", "energy", "critic"] = "mmd",
        power: float = 1.0,
        point_power: float = 1.0,
        lam_min: float | None = None,
        jitter: float = 0.0,
        num_points: int = 1,
        decay: float = 0.99,
        schedule: Literal["distance", "uniform"] = "distance",
        sigma: float | Sequence[float] | Literal["median"] = "median",
        seed: int = 0,
    ) -> None:
        super().__init__(weight, seed)
        lam_min = 0.1 * weight if lam_min is None else lam_min
        check_not_negative(power=power, point_power=point_power, lam_min=lam_min)
        check_at_least(1, num_points=num_points)
        _check_choice("distance", distance, _DISTANCES)
        _check_choice("schedule", schedule, _SCHEDULES)
        _check_shares(jitter, decay)
        if lam_min > weight:
            raise ValueError(f"lam_min must be at most weight, {weight}, got {lam_min}")
        self.distance, self.power, self.point_power = distance, power, point_power
        self.lam_min, self.num_points, self.decay = lam_min, num_points, decay
        self.jitter = 1.0 if schedule == "uniform" else jitter
        self._sigma = _bandwidths(sigma)
        self._running: dict[str, Tensor] = {}

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """Takes note of the distance and gives the penalty, in the discriminator's phase.

        Raises:
            ValueError: there are no real or generated samples in ``ctx``, not as many of both, or,
                unless the distance is the critic's, less than two.
        """
        if ctx.discriminator_loss is not None:
            self._follow(ctx)
        return super().loss_terms(ctx)

    def points(self, ctx: StepContext) -> Tensor:
        """K points between every real sample and the generated one it is paired with."""
        real, fake = self._pairs(ctx)
        singles = [1] * (real.dim() - 1)
        steps = torch.arange(1, self.num_points + 1, device="cpu") / self.num_points
        shares = steps.view(-1, 1, *singles).to(real) * self._rho().pow(self.point_power).to(real)
        if self.jitter:
            random = self._uniform(ctx, len(real), self.num_points, *singles, like=real)
            random = random.transpose(0, 1)
            shares = shares * (1 - self.jitter) + random * self.jitter
        return torch.lerp(real, fake, shares).flatten(0, 1)

    def penalty(self, slopes: Tensor) -> Tensor:
        """Lambda E (|slope| - 1)^2."""
        return self._lambda().to(slopes) * _deviation(slopes)

    def metrics(self) -> dict[str, float]:
        """The penalty, rho, lambda and the smoothed distance in the last step."""
        if not self._running:
            return {}
        state = {"rho": self._rho(), "lambda": self._lambda(), "distance": self._distance()}
        return super().metrics() | {name: value.item() for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """The random numbers' state and, after a step, the distances and the bandwidth."""
        known = {"sigma": self._sigma} if self._sigma is not None else {}
        return super().state_dict() | {k: v.clone() for k, v in (self._running | known).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, so that a resumed run is the same bit for bit.

        Raises:
            ValueError: missing or unknown entries, or such as are no tensors.
        """
        own = {name: value for name, value in state.items() if name != "random"}
        if own.keys() - {"sigma"} not in (set(), {*_RUNNING}):
            raise ValueError(f"state must have {', '.join(_RUNNING)} or neither, got {sorted(own)}")
        if not all(isinstance(value, Tensor) and value.dim() < 2 for value in own.values()):
            raise ValueError("distances and bandwidths in the state must be tensors")
        super().load_state_dict({name: state[name] for name in state if name == "random"})
        self._sigma = own.pop("sigma", self._sigma)
        self._running = own

    @torch.no_grad()
    def _follow(self, ctx: StepContext) -> None:
        """Smooths the estimate of the distance and keeps the largest; nothing waits for it."""
        now = self._estimate(ctx).double()
        last = {name: value.to(now.device) for name, value in self._running.items()}
        mean = torch.lerp(now, last.get("mean", now), self.decay)
        self._running = {"mean": mean}
        reached = self._distance()
        self._running["largest"] = torch.maximum(reached, last.get("largest", reached))

    def _estimate(self, ctx: StepContext) -> Tensor:
        """Of the squared distance, or of the critic's gap with its sign."""
        real, fake = self._pairs(ctx)
        if self.distance == "critic":
            gap = ctx.discriminator(real).mean() - ctx.discriminator(fake).mean()
            return ctx.shard.mean(gap)
        x, y = (ctx.shard.gather(samples.flatten(1)) for samples in (real, fake))
        if len(x) < 2:
            raise ValueError(f"distance {self.distance} needs at least 2 samples, got {len(x)}")
        return _energy(x, y) if self.distance == "energy" else mmd2(x, y, self._bandwidth(x))

    def _bandwidth(self, real: Tensor) -> Tensor:
        if self._sigma is None:
            self._sigma = median_bandwidth(real, max_points=_MEDIAN_POINTS)
        return self._sigma.to(real.device)

    def _distance(self) -> Tensor:
        mean = self._running["mean"]
        return mean.abs() if self.distance == "critic" else mean.clamp_min(0).sqrt()

    def _rho(self) -> Tensor:
        distance, largest = self._distance(), self._running["largest"]
        return torch.where(largest == 0, largest, distance / largest)

    def _lambda(self) -> Tensor:
        return (self.weight * self._rho().pow(self.power)).clamp_min(self.lam_min)


def _energy(x: Tensor, y: Tensor) -> Tensor:
    """The squared energy distance of points [n, d], without bias."""
    n = len(x)
    within = torch.cdist(x, x).sum() + torch.cdist(y, y).sum()
    return 2 * torch.cdist(x, y).mean() - within / (n * (n - 1))


def _bandwidths(sigma: float | Sequence[float] | str) -> Tensor | None:
    """What is given, as a tensor, or None for what is to be measured."""
    if isinstance(sigma, str):
        _check_choice("sigma", sigma, ("median",))
        return None
    values = _values(sigma)
    for value in values:
        _gamma_of(value)
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _check_shares(jitter: float, decay: float) -> None:
    check_not_negative(jitter=jitter, decay=decay)
    if jitter > 1:
        raise ValueError(f"jitter must be in [0, 1], got {jitter}")
    if decay >= 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
