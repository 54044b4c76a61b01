"""Bandwidths from the data: the median heuristic, a differentiable relative, and adaptive ones."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from hessreg.curvature._checks import check_at_least
from hessreg.kernels._random import drawing_device
from hessreg.ops.gaussian import _check_alike, _check_points, _compute_dtype

__all__ = ["AdaptiveBandwidth", "mean_squared_distance_bandwidth", "median_bandwidth"]

Policy = Literal["learned", "ema"]
_POLICIES = ("learned", "ema")


def median_bandwidth(
    x: Tensor,
    y: Tensor | None = None,
    max_points: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The median heuristic: the median Euclidean distance of distinct pairs of points.

    Equivalent to ``np.median(scipy.spatial.distance.pdist(np.concatenate([x, y])))``. Where more
    than half of the pairs coincide, the median of the positive distances; where all do, 1. NaN
    among the points gives NaN. A constant for autograd: see
    :func:`mean_squared_distance_bandwidth` for a bandwidth with a derivative. Nothing waits for
    the device.

    Args:
        x: points ``[n, d]`` in float16, bfloat16, float32 or float64.
        y: points ``[m, d]``, like ``x`` in dtype and device: the pairs are those of both samples
            joined. None: ``x`` alone.
        max_points: how many points are used at most, at least 2: time and memory grow with its
            square.
        generator: chooses them among more; None: evenly spaced ones, the same each time.

    Returns:
        A tensor without dimensions on the device of ``x``: in its dtype, or in float32 for the
        half-precision types.

    Raises:
        TypeError: for anything but floating-point tensors, an integer and a generator.
        ValueError: for shapes, dtypes or devices that do not match, and less than two points.

    References:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, section 8.

    Example:
        >>> import torch
        >>> median_bandwidth(torch.tensor([[0.0], [1.0], [5.0]]))  # of 1, 4 and 5
        tensor(4.)
    """
    check_at_least(2, max_points=max_points)
    drawing_device(generator, x.device if isinstance(x, Tensor) else torch.device("cpu"))
    points = _subsample(_joined(x, y).detach(), max_points, generator)
    distances = torch.pdist(points)
    is_zero = distances == 0
    left_out = is_zero & (2 * is_zero.sum() > distances.numel())  # the median would be 0
    sigma = torch.where(is_zero.all(), 1.0, _nanmedian(distances.where(~left_out, math.nan)))
    return torch.where(distances.isnan().any(), math.nan, sigma)


def mean_squared_distance_bandwidth(x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""A bandwidth with a derivative: sigma^2 = half the mean squared distance of distinct pairs.

    With it the Gaussian kernel is ``exp(-s / mean(s))`` of the squared distances s. Equivalent to
    ``torch.pdist(torch.cat([x, y])).square().mean().div(2).sqrt()``, in linear time, because half
    the mean squared distance is the sum of the variances of the coordinates. Differentiable in
    ``x`` and ``y`` to any order. Where all points coincide it is 1, and its derivative 0.

    Args:
        x: points ``[n, d]`` in float16, bfloat16, float32 or float64.
        y: points ``[m, d]``, like ``x`` in dtype and device: the pairs are those of both samples
            joined. None: ``x`` alone.

    Returns:
        A tensor without dimensions on the device of ``x``: in its dtype, or in float32 for the
        half-precision types.

    Raises:
        TypeError: for anything but floating-point tensors.
        ValueError: for shapes, dtypes or devices that do not match, and less than two points.

    References:
        Long et al., "Learning Transferable Features with Deep Adaptation Networks", ICML 2015,
        in whose common implementations it is the bandwidth in the middle.

    Example:
        >>> import torch
        >>> mean_squared_distance_bandwidth(torch.tensor([[0.0], [2.0], [4.0]]))  # 4, 4 and 16
        tensor(2.)
    """
    points = _joined(x, y)
    points = points - points[:1].detach()  # points that coincide have a variance of exactly 0
    variance = points.var(0).sum()
    return torch.where(variance == 0, 1.0, variance).sqrt()  # NaN stays NaN


class AdaptiveBandwidth(nn.Module):
    """A bandwidth that follows the data, or that is learned.

    Args:
        policy: ``"learned"``: the exponential of the parameter ``log_sigma``; ``"ema"``: an
            exponential moving average of the median heuristic.
        initial: the bandwidth to begin with. None: 1, and the first :meth:`update` replaces it by
            the median of its points, under either policy.
        decay: share of the past in the average after an update, in [0, 1); for ``"ema"``.
        max_points: how many points :func:`median_bandwidth` uses in an update.

    Raises:
        TypeError: for numbers that are none.
        ValueError: for unknown policies and numbers out of range.

    References:
        Sutherland et al., "Generative Models and Model Criticism via Optimized Maximum Mean
        Discrepancy", ICLR 2017 (learned); Gretton et al., "A Kernel Two-Sample Test", JMLR 2012
        (median).

    Example:
        >>> import torch, hessreg
        >>> x, y = torch.tensor([[0.0], [3.0]]), torch.tensor([[6.0]])
        >>> bandwidth = AdaptiveBandwidth("ema", initial=1.0, decay=0.5)
        >>> bandwidth.update(x, y)
        >>> bandwidth()  # half of 1 and half of 3
        tensor(2.)
        >>> loss = hessreg.mmd2(x, y.expand(2, 1), bandwidth())
    """

    average: Tensor
    is_fresh: Tensor

    def __init__(
        self,
        policy: Policy = "ema",
        initial: float | None = None,
        decay: float = 0.9,
        max_points: int = 1000,
    ) -> None:
        super().__init__()
        if policy not in _POLICIES:
            raise ValueError(f"policy must be one of {', '.join(_POLICIES)}, got {policy!r}")
        check_at_least(2, max_points=max_points)
        _check_numbers(initial, decay)
        self.policy, self.decay, self.max_points = policy, float(decay), max_points
        start = torch.tensor(1.0 if initial is None else float(initial))
        if policy == "learned":
            self.log_sigma = nn.Parameter(start.log())
        else:
            self.register_buffer("average", start)
        self.register_buffer("is_fresh", torch.tensor(initial is None))

    def forward(self) -> Tensor:
        """The bandwidth: a tensor without dimensions, differentiable if it is learned."""
        return self.log_sigma.exp() if self.policy == "learned" else self.average.clone()

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Takes note of a batch; nothing waits for the device.

        ``"ema"``: moves towards the median of its points. ``"learned"``: only the first call may
        change anything, and only without an ``initial`` bandwidth. A median that is not finite is
        passed over.

        Args:
            x: points ``[n, d]``.
            y: points ``[m, d]``, joined with ``x``; None: ``x`` alone.

        Raises:
            TypeError: for anything but floating-point tensors.
            ValueError: for shapes, dtypes or devices that do not match, and less than two points.
        """
        now = self.forward()
        median = median_bandwidth(x, y, self.max_points).to(now)
        kept = 1.0 if self.policy == "learned" else self.decay
        moved = torch.where(self.is_fresh, median, kept * now + (1 - kept) * median)
        usable = median.isfinite()
        moved = torch.where(usable, moved, now)
        if self.policy == "learned":
            self.log_sigma.copy_(torch.where(self.is_fresh & usable, moved.log(), self.log_sigma))
        else:
            self.average.copy_(moved)
        self.is_fresh.logical_and_(~usable)

    def extra_repr(self) -> str:
        """The policy and its numbers."""
        return f"policy={self.policy!r}, decay={self.decay}, max_points={self.max_points}"


def _joined(x: Tensor, y: Tensor | None) -> Tensor:
    """Both samples as one, in the dtype that is computed in."""
    _check_points(x, "x")
    samples = [x]
    if y is not None:
        _check_alike(x, y, "y")
        samples.append(y)
    for name, points in zip("xy", samples, strict=False):
        if points.dim() != 2:
            raise ValueError(f"{name} must be points [n, d], got shape {tuple(points.shape)}")
    joined = torch.cat(samples).to(_compute_dtype(x))
    if len(joined) < 2:
        raise ValueError(f"x and y must hold at least 2 points together, got {len(joined)}")
    return joined


def _subsample(points: Tensor, max_points: int, generator: torch.Generator | None) -> Tensor:
    count, device = len(points), points.device
    if count <= max_points:
        return points
    if generator is None:
        return points[torch.arange(max_points, device=device) * count // max_points]
    order = torch.randperm(count, generator=generator, device=drawing_device(generator, device))
    return points[order[:max_points].to(device)]


def _nanmedian(x: Tensor) -> Tensor:
    """The median of what is not NaN; torch's own is the lower of the two in the middle."""
    return (x.nanmedian() - (-x).nanmedian()) / 2


def _check_numbers(initial: float | None, decay: float) -> None:
    for name, number in (("initial", initial), ("decay", decay)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, Real)):
            raise TypeError(f"{name} must be a number, got {type(number)}")
    if initial is not None and not 0 < initial < math.inf:
        raise ValueError(f"initial must be positive and finite, got {initial}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
