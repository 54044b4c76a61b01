"""Whether two samples come from one distribution: block estimates, variances, permutation tests."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt, perm
from typing import NamedTuple

import torch
from torch import Tensor

from hessreg.curvature._checks import check_at_least
from hessreg.kernels._random import drawing_device
from hessreg.ops import gaussian_kernel_matvec, mmd2
from hessreg.ops.gaussian import (
    Sigma,
    _broadcast,
    _check_alike,
    _check_points,
    _compute_dtype,
    _gamma,
)

__all__ = ["TwoSampleTest", "mmd2_block", "mmd2_test", "mmd2_variance"]

_ENTRIES = 2**22  # how many indicators of permutations are held at a time


class TwoSampleTest(NamedTuple):
    """The outcome of :func:`mmd2_test`.

    Attributes:
        statistic: the unbiased estimate of MMD^2, ``[...]``.
        p_value: how probable one as large is if both samples come from one distribution, ``[...]``.
    """

    statistic: Tensor
    p_value: Tensor


def mmd2_block(x: Tensor, y: Tensor, sigma: Sigma = 1.0, block_size: int | None = None) -> Tensor:
    r"""Squared MMD as the mean of unbiased estimates over blocks of points.

    Between the linear estimate (blocks of 2) and the quadratic one (a single block) in time and
    variance; unbiased as both, and about normal for many blocks, also if there is no difference.
    Takes the points in their order, as many of both as fill whole blocks of the smaller sample;
    the rest is left out. Differentiable in ``x``, ``y`` and ``sigma`` to any order.

    Args:
        x: sample ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        y: sample ``[..., m, d]``, like ``x`` in dtype and device; batches broadcast.
        sigma: bandwidth or bandwidths, as for :func:`hessreg.gaussian_kernel`.
        block_size: points of each sample in a block, at least 2 and at most ``min(n, m)``. None:
            the root of that.

    Returns:
        ``[...]`` in the dtype of ``x``.

    Raises:
        TypeError: for anything but floating-point tensors, real bandwidths and an integer.
        ValueError: for shapes, dtypes or devices that do not match, samples that are smaller than
            a block and numbers out of range.

    References:
        Zaremba, Gretton and Blaschko, "B-test: A Non-parametric, Low Variance Kernel Two-sample
        Test", NeurIPS 2013.

    Example:
        >>> import torch, hessreg
        >>> x, y = torch.randn(2, 64, 3)
        >>> same = mmd2_block(x, y, block_size=64) - hessreg.mmd2(x, y)
        >>> bool(same.abs() < 1e-6)
        True
    """
    _check_samples(x, y, 2)
    smaller = min(x.shape[-2], y.shape[-2])
    size = max(2, isqrt(smaller)) if block_size is None else block_size
    check_at_least(2, block_size=size)
    if size > smaller:
        raise ValueError(f"block_size must be at most {smaller}, the smaller sample, got {size}")
    count = smaller // size
    kept = (t[..., : count * size, :].to(_compute_dtype(t)) for t in (x, y))
    x_blocks, y_blocks = (t.unflatten(-2, (count, size)) for t in kept)
    return mmd2(x_blocks, y_blocks, sigma).mean(-1).to(x.dtype)


def mmd2_variance(x: Tensor, y: Tensor, sigma: Sigma = 1.0) -> Tensor:
    r"""Unbiased estimate of the variance of ``mmd2(x, y, sigma)``, the unbiased estimate.

    Of the whole variance at the given sample sizes, not only its leading term, which vanishes if
    there is no difference. Unbiased, so it may be negative. No matrix is stored, and the sums are
    taken in float64: two sweeps over the pairs. Differentiable in ``x``, ``y`` and ``sigma`` to
    any order.

    With ``r_x(X) = E k(X, X')`` and ``r_y(X) = E k(X, Y)`` the variance is that of the mean over
    pairs of x, ``4 (n-2) / (n (n-1)) Var r_x(X) + 2 / (n (n-1)) Var k(X, X')``, the same for y,
    four times that of the mean over mixed pairs, ``((m-1) Var r_y(X) + (n-1) Var r_x(Y) +
    Var k(X, Y)) / (n m)``, less ``8 / n Cov(r_x(X), r_y(X))`` and the same for y. Each expectation
    in it is estimated by the mean over distinct indices.

    Args:
        x: sample ``[..., n, d]`` in float16, bfloat16, float32 or float64, at least 4 points.
        y: sample ``[..., m, d]``, at least 4 points, like ``x`` in dtype and device; batches
            broadcast.
        sigma: bandwidth or bandwidths, as for :func:`hessreg.gaussian_kernel`.

    Returns:
        ``[...]`` in the dtype of ``x``, or in float32 for the half-precision types.

    Raises:
        TypeError: for anything but floating-point tensors and real bandwidths.
        ValueError: for shapes, dtypes or devices that do not match, samples that are too small
            and bandwidths that are not positive.

    References:
        Sutherland and Deka, "Unbiased estimators for the variance of MMD estimators",
        arXiv:1906.02104, 2019, which corrects Sutherland et al., ICLR 2017; here for samples of
        different size too.

    Example:
        >>> import torch, hessreg
        >>> x, y = torch.randn(200, 2), torch.randn(200, 2) + 1
        >>> deviation = mmd2_variance(x, y).sqrt()
        >>> bool(hessreg.mmd2(x, y) > 4 * deviation)
        True
    """
    z, n = _joined(x, y, 4)
    is_first = (torch.arange(z.shape[-2], device=z.device) < n).to(z.dtype)
    groups = torch.stack([is_first, 1 - is_first], -1)
    sums = gaussian_kernel_matvec(z, z, groups, sigma)
    squares = gaussian_kernel_matvec(z, z, groups, _squared(sigma, z))
    first = _sums(sums[..., :n, :], squares[..., :n, :])
    second = _sums(sums[..., n:, :].flip(-1), squares[..., n:, :].flip(-1))
    across = _variance_across(first, second) - _covariance(first, second)
    variance = _variance_within(first) + _variance_within(second) + across
    return (variance - _covariance(second, first)).to(_compute_dtype(x))


def mmd2_test(
    x: Tensor,
    y: Tensor,
    sigma: Sigma = 1.0,
    num_permutations: int = 200,
    generator: torch.Generator | None = None,
) -> TwoSampleTest:
    r"""Permutation test of whether two samples come from one distribution.

    The joined sample is divided at random ``num_permutations`` times, and the p-value is
    ``(1 + #{MMD^2 as large as the one observed}) / (1 + num_permutations)``. To reject for
    ``p_value <= alpha`` is wrong with a probability of at most ``alpha`` at any sample sizes; a
    bandwidth may be taken from the joined sample (:func:`hessreg.kernels.median_bandwidth`), but
    not tuned for the difference on the same points. All divisions share one sweep over the pairs
    in float64 (several for very many) with memory linear in the number of points. Not
    differentiable: see :func:`hessreg.mmd2`.

    Args:
        x: sample ``[..., n, d]`` in float16, bfloat16, float32 or float64, at least 2 points.
        y: sample ``[..., m, d]``, at least 2 points, like ``x`` in dtype and device; batches
            broadcast, and each is tested by itself.
        sigma: bandwidth or bandwidths, as for :func:`hessreg.gaussian_kernel`.
        num_permutations: at least 1; the least p-value is ``1 / (1 + num_permutations)``.
        generator: draws the permutations; None: torch's own.

    Returns:
        The statistic ``[...]`` in the dtype of ``x`` and the p-value ``[...]`` in float64; NaN for
        samples that give no finite statistic.

    Raises:
        TypeError: for anything but floating-point tensors, real bandwidths, an integer and a
            generator.
        ValueError: for shapes, dtypes or devices that do not match, samples that are too small
            and numbers out of range.

    References:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, section 5; Phipson and Smyth,
        "Permutation P-values Should Never Be Zero", 2010.

    Example:
        >>> import torch
        >>> x, y = torch.randn(100, 2), torch.randn(50, 2) + 2
        >>> statistic, p_value = mmd2_test(x, y, sigma=1.0)
        >>> round(p_value.item(), 4)
        0.005
    """
    check_at_least(1, num_permutations=num_permutations)
    z, n = _joined(x, y, 2)
    drawing_device(generator, z.device)
    with torch.no_grad():
        divisions = _divisions(z, n, num_permutations, generator)
        found = torch.cat([_divided(z, division, n, sigma) for division in divisions], -1)
    observed = found[..., :1]
    slack = 64 * torch.finfo(z.dtype).eps  # divisions into equal groups must count as equal
    as_large = (found >= observed - slack).sum(-1)  # the one observed among them
    p_value = as_large.double() / found.shape[-1]
    p_value = torch.where(observed[..., 0].isfinite(), p_value, torch.nan)
    return TwoSampleTest(observed[..., 0].to(x.dtype), p_value)


# ---- variance ----------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Sums of the kernel for each point of a sample, and of its squares."""

    own: Tensor  # over the other points of the sample: [..., n]
    other: Tensor  # over the other sample: [..., n]
    own_squares: Tensor  # over all pairs in the sample: [...]
    other_squares: Tensor  # over all mixed pairs: [...]


def _sums(sums: Tensor, squares: Tensor) -> _Sums:
    """From the sums ``[..., n, 2]`` over the point's own sample with itself, and over the other."""
    own, other = sums.unbind(-1)
    own_squares, other_squares = squares.sum(-2).unbind(-1)
    return _Sums(own - 1, other, own_squares - own.shape[-1], other_squares)  # not with itself


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _variance_within(s: _Sums) -> Tensor:
    """Of the mean of k over pairs in a sample, from means over distinct indices."""
    n = s.own.shape[-1]
    mean_of_square = s.own_squares / perm(n, 2)  # k(1, 2)^2
    of_chain = (_square(s.own) - s.own_squares) / perm(n, 3)  # k(1, 2) k(1, 3)
    total = s.own.sum(-1)
    apart = total.square() - 4 * _square(s.own) + 2 * s.own_squares
    square_of_mean = apart / perm(n, 4)  # k(1, 2) k(3, 4)
    by_point = 4 * (n - 2) * (of_chain - square_of_mean)
    return (by_point + 2 * (mean_of_square - square_of_mean)) / perm(n, 2)


def _variance_across(x: _Sums, y: _Sums) -> Tensor:
    """Of twice the mean of k over mixed pairs, from means over distinct indices."""
    n, m, squares = x.own.shape[-1], y.own.shape[-1], x.other_squares
    mean_of_square = squares / (n * m)
    by_x = (_square(x.other) - squares) / (n * perm(m, 2))  # k(x1, y1) k(x1, y2)
    by_y = (_square(y.other) - squares) / (m * perm(n, 2))
    apart = x.other.sum(-1).square() - _square(x.other) - _square(y.other) + squares
    square_of_mean = apart / (perm(n, 2) * perm(m, 2))  # k(x1, y1) k(x2, y2)
    by_point = (m - 1) * (by_x - square_of_mean) + (n - 1) * (by_y - square_of_mean)
    return 4 * (by_point + mean_of_square - square_of_mean) / (n * m)


def _covariance(x: _Sums, y: _Sums) -> Tensor:
    """Of the mean over pairs of x with that over mixed pairs, as it enters the variance."""
    n, m = x.own.shape[-1], y.own.shape[-1]
    shared = (x.own * x.other).sum(-1)
    of_chain = shared / (perm(n, 2) * m)  # k(x1, x2) k(x1, y)
    apart = x.own.sum(-1) * x.other.sum(-1) - 2 * shared
    return 8 / n * (of_chain - apart / (perm(n, 3) * m))  # k(x1, x2) k(x3, y)


def _squared(sigma: Sigma, points: Tensor) -> Tensor:
    """The bandwidths of the square of the kernel: all sums of two gammas."""
    gamma = _gamma(sigma, points.new_empty(1, 0))[0]
    return (0.5 / (gamma[:, None] + gamma)).sqrt().flatten()


# ---- permutations ------------------------------------------------------------------------------


def _divisions(
    z: Tensor, n: int, num_permutations: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Which points are the first n, in the order given and in random ones: ``[..., N, some]``."""
    device = drawing_device(generator, z.device)
    some = max(1, _ENTRIES // max(1, z[..., 0].numel()))
    for start in range(0, 1 + num_permutations, some):
        count = min(some, 1 + num_permutations - start)
        shape = (*z.shape[:-2], count, z.shape[-2])
        keys = torch.rand(shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
        if start == 0:
            keys[..., 0, :] = torch.arange(shape[-1], device=z.device)
        first = keys.argsort(-1)[..., :n]
        yield torch.zeros_like(keys).scatter_(-1, first, 1.0).mT


def _divided(z: Tensor, is_first: Tensor, n: int, sigma: Sigma) -> Tensor:
    """The unbiased estimate of MMD^2 for each division of the points: ``[..., divisions]``."""
    m = z.shape[-2] - n
    ones = torch.ones_like(is_first[..., :1])
    sums = gaussian_kernel_matvec(z, z, torch.cat([is_first, ones], -1), sigma)
    sums, everything = sums[..., :-1], sums[..., -1:]
    within = (is_first * sums).sum(-2)
    across = (is_first * everything).sum(-2) - within
    within_rest = everything.sum(-2) - within - 2 * across
    means = (within - n) / (n * (n - 1)) + (within_rest - m) / (m * (m - 1))
    return means - 2 * across / (n * m)


# ---- checks ------------------------------------------------------------------------------------


def _check_samples(x: Tensor, y: Tensor, needed: int) -> torch.Size:
    """The common batch of two samples that are alike and large enough."""
    _check_points(x, "x")
    _check_alike(x, y, "y")
    for name, points in (("x", x), ("y", y)):
        if points.shape[-2] < needed:
            raise ValueError(
                f"{name} must hold at least {needed} points, got shape {tuple(points.shape)}"
            )
    return _broadcast(x, y)


def _joined(x: Tensor, y: Tensor, needed: int) -> tuple[Tensor, int]:
    """Both samples as one in float64, and the size of the first."""
    batch = _check_samples(x, y, needed)
    samples = [t.double().expand(*batch, *t.shape[-2:]) for t in (x, y)]
    return torch.cat(samples, -2), x.shape[-2]
