"""Kernels in plain torch, with the interface of :func:`hessreg.gaussian_kernel`."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from hessreg.curvature._checks import check_at_least, check_not_negative
from hessreg.ops.gaussian import (
    Sigma,
    _broadcast,
    _check_alike,
    _check_points,
    _compute_dtype,
    _gamma,
)

__all__ = [
    "laplacian_kernel",
    "linear_kernel",
    "polynomial_kernel",
    "rational_quadratic_kernel",
]


def linear_kernel(x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""Linear kernel matrix: K_ij = <x_i, y_j>.

    Equivalent to ``x @ y.mT``. Differentiable in ``x`` and ``y`` to any order. Its MMD is the
    distance of the means.

    Args:
        x: points ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        y: points ``[..., m, d]``, like ``x`` in dtype and device; batches broadcast. None: ``x``.

    Returns:
        ``[..., n, m]`` in the dtype of ``x``.

    Raises:
        TypeError: for anything but floating-point tensors.
        ValueError: for shapes, dtypes or devices that do not match.

    References:
        Schoelkopf and Smola, "Learning with Kernels", 2002, section 2.1.

    Example:
        >>> import torch
        >>> linear_kernel(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[11.,  2.]])
    """
    a, b = _pair(x, y)
    return (a @ b.mT).to(x.dtype)


def polynomial_kernel(
    x: Tensor, y: Tensor | None = None, degree: int = 3, offset: float = 1.0
) -> Tensor:
    r"""Polynomial kernel matrix: K_ij = (<x_i, y_j> + offset)^degree.

    Equivalent to ``(x @ y.mT + offset) ** degree``, or scikit-learn's with ``gamma=1``.
    Differentiable in ``x`` and ``y`` to any order, also where the base is zero.

    Args:
        x: points ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        y: points ``[..., m, d]``, like ``x`` in dtype and device; batches broadcast. None: ``x``.
        degree: an integer of at least 1.
        offset: the constant c, finite and not negative: a negative one is not positive definite.

    Returns:
        ``[..., n, m]`` in the dtype of ``x``.

    Raises:
        TypeError: for anything but floating-point tensors, an integer and a number.
        ValueError: for shapes, dtypes or devices that do not match and numbers out of range.

    References:
        Schoelkopf and Smola, "Learning with Kernels", 2002, section 2.1; Binkowski et al.,
        "Demystifying MMD GANs", ICLR 2018 (degree 3: the kernel inception distance).

    Example:
        >>> import torch
        >>> polynomial_kernel(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), degree=2)
        tensor([[144.]])
    """
    check_at_least(1, degree=degree)
    check_not_negative(offset=offset)
    a, b = _pair(x, y)
    return (a @ b.mT + offset).pow(degree).to(x.dtype)


def laplacian_kernel(x: Tensor, y: Tensor | None = None, sigma: Sigma = 1.0) -> Tensor:
    r"""Laplacian kernel matrix of the 1-norm: K_ij = mean_s exp(-|x_i - y_j|_1 / sigma_s).

    The norm is the sum of absolute differences, as in scikit-learn, whose ``gamma`` is
    ``1 / sigma``; others take the Euclidean norm. Takes memory for ``n m d`` numbers.
    Differentiable in ``sigma``, and in ``x`` and ``y`` wherever no coordinate of one equals that
    of the other, to any order. Where one does, and so on the diagonal of ``K(x, x)``, there is a
    kink: the derivative given is the mean of both sides, 0 in that coordinate.

    Args:
        x: points ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        y: points ``[..., m, d]``, like ``x`` in dtype and device; batches broadcast. None: ``x``.
        sigma: bandwidth in the unit of the points, positive: a number, or several (a sequence or a
            tensor ``[components]``) for the mean of their kernels. The values of a tensor are not
            checked.

    Returns:
        ``[..., n, m]`` in the dtype of ``x``, with entries in [0, 1], 1 where points are equal.

    Raises:
        TypeError: for anything but floating-point tensors and real bandwidths.
        ValueError: for shapes, dtypes or devices that do not match and bandwidths that are not
            positive.

    References:
        Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007, figure 1.

    Example:
        >>> import torch
        >>> laplacian_kernel(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), sigma=7.0)
        tensor([[0.3679]])
    """
    a, b = _pair(x, y)
    rates = (2 * _gamma(sigma, x.new_empty(1, 0))[0]).sqrt().to(a.dtype)
    distances = _differences(a, b).abs().sum(-1, keepdim=True)
    return torch.exp(-rates * distances).mean(-1).to(x.dtype)


def rational_quadratic_kernel(
    x: Tensor, y: Tensor | None = None, sigma: Sigma = 1.0, alpha: float = 1.0
) -> Tensor:
    r"""Rational quadratic kernel matrix: mean_s (1 + |x_i - y_j|^2 / (2 alpha sigma_s^2))^-alpha.

    A mixture of Gaussian kernels of all bandwidths, with tails that do not vanish: the Gaussian
    kernel for ``alpha`` to infinity. Takes memory for ``n m d`` numbers. Differentiable in ``x``,
    ``y`` and ``sigma`` to any order, also at equal points.

    Args:
        x: points ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        y: points ``[..., m, d]``, like ``x`` in dtype and device; batches broadcast. None: ``x``.
        sigma: bandwidth in the unit of the points, positive: a number, or several (a sequence or a
            tensor ``[components]``) for the mean of their kernels. The values of a tensor are not
            checked.
        alpha: weight of the tails, positive and finite: the smaller, the heavier.

    Returns:
        ``[..., n, m]`` in the dtype of ``x``, with entries in [0, 1], 1 where points are equal.

    Raises:
        TypeError: for anything but floating-point tensors and real numbers.
        ValueError: for shapes, dtypes or devices that do not match and numbers that are not
            positive.

    References:
        Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, equation 4.19;
        Binkowski et al., "Demystifying MMD GANs", ICLR 2018.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
        >>> rational_quadratic_kernel(x, y, sigma=5.0, alpha=0.5)
        tensor([[0.7071]])
    """
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number, got {type(alpha)}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    a, b = _pair(x, y)
    rates = (_gamma(sigma, x.new_empty(1, 0))[0] / alpha).to(a.dtype)
    distances = _differences(a, b).square().sum(-1, keepdim=True)
    return torch.exp(-alpha * torch.log1p(rates * distances)).mean(-1).to(x.dtype)


def _pair(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both samples, checked, in the dtype that is computed in."""
    y = x if y is None else y
    _check_points(x, "x")
    _check_alike(x, y, "y")
    _broadcast(x, y)
    dtype = _compute_dtype(x)
    return x.to(dtype), y.to(dtype)


def _differences(x: Tensor, y: Tensor) -> Tensor:
    """``x_i - y_j``: ``[..., n, m, d]``."""
    return x[..., :, None, :] - y[..., None, :, :]
