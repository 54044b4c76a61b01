r"""Gaussian kernels: matrices, sums over pairs of points that are never stored, and MMD.

Everywhere ``s_ij = |x_i - y_j|^2`` and ``phi(s) = sum_c coefficient_c exp(-gamma_c s)``, a mixture
of Gaussian kernels with ``gamma = 1 / (2 sigma^2)``. Three operators carry the family:

- ``gaussian_matrix``: ``K_ij = phi(s_ij)``, stored.
- ``gaussian_sum``: ``out_i = sum_j phi(s_ij) <left_i, right_j> ... v_j`` with any number of factors
  ``<left_i, right_j>``. All its derivatives are sums of the same form, with a factor more for each
  derivative in a point, so memory stays linear in the number of points in every order.
- ``gaussian_energy``: ``sum_{i != j} w_ij phi(|z_i - z_j|^2)`` with its gradient from one sweep;
  the derivatives of that gradient are sums again.

Points are ``[batch, n, d]``, mixtures ``[batch, components]`` in float64.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from hessreg.ops._registry import Arguments, Operator, constant_while_compiling, is_tracked

_LARGEST = torch.finfo(torch.float64).max
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- reference ---------------------------------------------------------------------------------


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _mixture(x: Tensor, y: Tensor, gamma: Tensor, coefficient: Tensor) -> Tensor:
    """phi(s_ij) by definition, in the dtype that is computed in: ``[batch, n, m]``."""
    dtype = _compute_dtype(x)
    s = (x.to(dtype)[:, :, None] - y.to(dtype)[:, None]).square().sum(-1)
    most = torch.finfo(dtype).max
    rates, weights = (t.clamp(-most, most).to(dtype)[:, None, None] for t in (gamma, coefficient))
    return (torch.exp(-rates * s[..., None]) * weights).sum(-1)


def matrix_reference(
    x: Tensor, y: Tensor, gamma: Tensor, coefficient: Tensor, allow_tf32: bool
) -> Tensor:
    """K_ij = phi(s_ij) by definition."""
    return _mixture(x, y, gamma, coefficient).to(x.dtype)


def sum_reference(
    x: Tensor,
    y: Tensor,
    gamma: Tensor,
    coefficient: Tensor,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    v: Tensor,
    allow_tf32: bool,
) -> Tensor:
    """out_i = sum_j phi(s_ij) prod_l <left^l_i, right^l_j> v_j by definition."""
    weights = _mixture(x, y, gamma, coefficient)
    for a, b in zip(left, right, strict=True):
        weights = weights * (a @ b.mT)
    return weights @ v


def energy_reference(
    z: Tensor,
    gamma: Tensor,
    first: int,
    within_first: float,
    across: float,
    within_rest: float,
    allow_tf32: bool,
    with_gradient: bool,
) -> list[Tensor]:
    """sum_{i != j} w_ij phi(|z_i - z_j|^2) in float64, and its gradient, by definition."""
    coefficient = torch.full_like(gamma, 1 / gamma.shape[-1])
    left, right = _group_factor(z, first, within_first, across, within_rest)
    weights = (left @ right.mT) * (1 - torch.eye(z.shape[1], dtype=z.dtype, device=z.device))
    value = (weights * _mixture(z, z, gamma, coefficient)).sum((1, 2), dtype=torch.float64)
    if not with_gradient:
        return [value]
    pulls = weights * _mixture(z, z, gamma, coefficient * gamma)
    return [value, 4 * (pulls @ z - pulls.sum(-1, keepdim=True) * z)]


# ---- factors -----------------------------------------------------------------------------------

Factor = tuple[Tensor, Tensor]  # left [batch, n, r], right [batch, m, r]: <left_i, right_j>


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _ones(x: Tensor) -> Tensor:
    return torch.ones_like(x[..., :1])


def _distance_factor(
    x: Tensor, y: Tensor, scale: Tensor | float = 1.0, shift: float = 0.0
) -> Factor:
    """``scale |x_i - y_j|^2 + shift``."""
    left = torch.cat([scale * _dot(x, x) + shift, scale * _ones(x), -2 * scale * x], -1)
    return left, torch.cat([_ones(y), _dot(y, y), y], -1)


def _motion_factor(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Factor:
    """``<a_i - b_j, x_i - y_j>``: half the change of s_ij where x moves along a and y along b."""
    left = torch.cat([x, a, _dot(a, x), _ones(x)], -1)
    return left, torch.cat([-b, -y, _ones(y), _dot(b, y)], -1)


def _group_factor(
    z: Tensor, first: int, within_first: float, across: float, within_rest: float
) -> Factor:
    """``w_ij``, which depends on whether i and j are among the first points or the rest."""
    is_first = (torch.arange(z.shape[1], device=z.device) < first).to(z.dtype)
    left = torch.stack([is_first, 1 - is_first], -1)
    table = [[within_first, across], [across, within_rest]]
    columns = [left[:, 0] * row[0] + left[:, 1] * row[1] for row in table]
    shape = (z.shape[0], -1, -1)
    return left.expand(shape), torch.stack(columns, -1).expand(shape)


def _centred(*points: Tensor) -> list[Tensor]:
    """The points from a common centre: what is large and equal in them cannot cost digits.

    In each dimension their mean, if all of them are within a factor of two of it, so that nothing
    is rounded; else zero.
    """
    together = torch.cat([p.detach() for p in points], -2)
    if together.shape[-2] == 0:
        return list(points)
    mean = together.mean(-2, keepdim=True)
    nearest, furthest = (mean.abs() * factor for factor in (0.5, 2.0))
    along = together * mean.sign()
    is_far = (along >= nearest).all(-2, keepdim=True) & (along <= furthest).all(-2, keepdim=True)
    centre = torch.where(is_far & mean.isfinite(), mean, 0)
    return [p - centre for p in points]


def _pull(moments: Tensor, x: Tensor) -> Tensor:
    """``sum_j w_ij (y_j - x_i)`` from the moments ``sum_j w_ij [y_j, 1]``."""
    return moments[..., :-1] - moments[..., -1:] * x


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, _ones(x)], -1)


def _per_component(function: Callable[[slice], Tensor], gamma: Tensor) -> Tensor:
    """One number for each component of the mixture: ``[batch, components]`` in float64."""
    columns = [function(slice(c, c + 1)).double() for c in range(gamma.shape[-1])]
    return torch.stack(columns, -1)


def _column(scalars: Tensor, like: Tensor) -> Tensor:
    """One scalar for each sample, ``[batch, 1]``, to multiply points with."""
    return scalars[..., None].to(like.dtype)


# ---- derivatives of the matrix -----------------------------------------------------------------


def _weighted_distance(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``sum_ij w_ij |x_i - y_j|^2``: ``[batch]``."""
    by_x = weights.sum(-1, keepdim=True) * _dot(x, x) - 2 * _dot(x, weights @ y)
    return by_x.sum((1, 2)) + (weights.sum(-2)[..., None] * _dot(y, y)).sum((1, 2))


def _matrix_weights(
    arguments: Arguments, cotangent: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor | float]:
    """Weights and a factor: together the cotangent times ``-2 phi'(s_ij)``.

    Of a single component that is gamma times the matrix, unless the matrix has been rounded.
    """
    x, y, gamma, coefficient, tf32 = arguments
    if gamma.shape[-1] == 1 and matrix.dtype is x.dtype:
        return cotangent * matrix, 2 * _column(gamma, x)
    return cotangent * gaussian_matrix(x, y, gamma, coefficient * gamma, tf32), 2.0


def _matrix_backward(
    arguments: Arguments, needs: Arguments, cotangent: Tensor, outputs: Sequence[Tensor]
) -> tuple[Any, ...]:
    x, y, gamma, coefficient, tf32 = arguments
    dtype = x.dtype
    x, y = _centred(*(t.to(_compute_dtype(t)) for t in (x, y)))
    g = cotangent.to(x.dtype)
    for_x = for_y = for_gamma = for_coefficient = None
    if needs[0] or needs[1]:
        weights, factor = _matrix_weights((x, y, gamma, coefficient, tf32), g, outputs[0])
        for_x = (factor * _pull(weights @ _with_ones(y), x)).to(dtype) if needs[0] else None
        for_y = (factor * _pull(weights.mT @ _with_ones(x), y)).to(dtype) if needs[1] else None
    if needs[2] or needs[3]:

        def component(c: slice) -> Tensor:
            return g * gaussian_matrix(x, y, gamma[:, c], torch.ones_like(gamma[:, c]), tf32)

        if needs[2]:
            distances = _per_component(lambda c: _weighted_distance(component(c), x, y), gamma)
            for_gamma = -coefficient * distances
        if needs[3]:
            for_coefficient = _per_component(lambda c: component(c).sum((1, 2)), gamma)
    return for_x, for_y, for_gamma, for_coefficient, None


def _matrix_jvp(arguments: Arguments, tangents: Arguments) -> Tensor:
    x, y, gamma, coefficient, tf32 = arguments
    dtype = x.dtype
    x, y = _centred(*(t.to(_compute_dtype(t)) for t in (x, y)))
    dx, dy, dgamma, dcoefficient = tangents[:4]
    terms = []
    if dx is not None or dy is not None:
        a, b = _or_zeros(dx, x), _or_zeros(dy, y)
        left, right = _motion_factor(x, y, a, b)
        matrix = gaussian_matrix(x, y, gamma, -2 * coefficient * gamma, tf32)
        terms.append(matrix * (left @ right.mT))
    if dgamma is not None:
        left, right = _distance_factor(x, y)
        matrix = gaussian_matrix(x, y, gamma, -coefficient * dgamma, tf32)
        terms.append(matrix * (left @ right.mT))
    if dcoefficient is not None:
        terms.append(gaussian_matrix(x, y, gamma, dcoefficient, tf32))
    return torch.stack(terms).sum(0).to(dtype)


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent.to(like.dtype)


# ---- derivatives of the sum --------------------------------------------------------------------


def _sum_backward(arguments: Arguments, needs: Arguments, cotangent: Tensor) -> tuple[Any, ...]:
    x, y, gamma, coefficient, left, right, v, tf32 = arguments
    x, y = _centred(x, y)
    u = cotangent
    there, back = (x, y, gamma), (y, x, gamma)  # sums over j, sums over i

    def pulls(points: Any, lefts: Any, rights: Any, cotangents: Any, values: Any) -> Tensor:
        """``2 sum_j phi'(s_ij) ... <u_i, v_j> (x_i - y_j)``; a factor of rank 1 joins v."""
        here, others, slope = points[0], _with_ones(points[1]), coefficient * gamma
        if values.shape[-1] == 1:
            moments = gaussian_sum(*points, slope, lefts, rights, values * others, tf32)
            return 2 * cotangents * _pull(moments, here)
        lefts, rights = [*lefts, cotangents], [*rights, values]
        return 2 * _pull(gaussian_sum(*points, slope, lefts, rights, others, tf32), here)

    def swapped(i: int, points: Any, lefts: Any, rights: Any, ends: Any, value: Tensor) -> Tensor:
        """The derivative in one side of factor i: it and <u, v> change places."""
        lefts = [*lefts[:i], ends[0], *lefts[i + 1 :]]
        rights = [*rights[:i], ends[1], *rights[i + 1 :]]
        return gaussian_sum(*points, coefficient, lefts, rights, value, tf32)

    def component(c: slice, lefts: Any, rights: Any) -> Tensor:
        ones = torch.ones_like(gamma[:, c])
        return (u * gaussian_sum(x, y, gamma[:, c], ones, lefts, rights, v, tf32)).sum((1, 2))

    for_gamma = for_coefficient = None
    if needs[2]:
        s = _distance_factor(x, y)
        with_s = [*left, s[0]], [*right, s[1]]
        for_gamma = -coefficient * _per_component(lambda c: component(c, *with_s), gamma)
    if needs[3]:
        for_coefficient = _per_component(lambda c: component(c, left, right), gamma)
    return (
        pulls(there, left, right, u, v) if needs[0] else None,
        pulls(back, right, left, v, u) if needs[1] else None,
        for_gamma,
        for_coefficient,
        [
            swapped(i, there, left, right, (u, v), b) if needed else None
            for i, (b, needed) in enumerate(zip(right, needs[4], strict=True))
        ],
        [
            swapped(i, back, right, left, (v, u), a) if needed else None
            for i, (a, needed) in enumerate(zip(left, needs[5], strict=True))
        ],
        gaussian_sum(*back, coefficient, right, left, u, tf32) if needs[6] else None,
        None,
    )


def _sum_jvp(arguments: Arguments, tangents: Arguments) -> Tensor:
    x, y, gamma, coefficient, left, right, v, tf32 = arguments
    x, y = _centred(x, y)
    dx, dy, dgamma, dcoefficient, dleft, dright, dv, _ = tangents

    def term(weights: Tensor, lefts: Any, rights: Any, values: Tensor = v) -> Tensor:
        return gaussian_sum(x, y, gamma, weights, lefts, rights, values, tf32)

    terms = []
    if dx is not None or dy is not None:
        a, b = _motion_factor(x, y, _or_zeros(dx, x), _or_zeros(dy, y))
        terms.append(term(-2 * coefficient * gamma, [*left, a], [*right, b]))
    if dgamma is not None:
        a, b = _distance_factor(x, y)
        terms.append(term(-coefficient * dgamma, [*left, a], [*right, b]))
    if dcoefficient is not None:
        terms.append(term(dcoefficient, left, right))
    terms += [term(coefficient, lefts, right) for lefts in _each_moved(left, dleft)]
    terms += [term(coefficient, left, rights) for rights in _each_moved(right, dright)]
    if dv is not None:
        terms.append(term(coefficient, left, right, dv))
    return torch.stack(terms).sum(0)


def _each_moved(
    tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Iterator[list[Tensor]]:
    """The tensors with one of them replaced by its tangent, for each that has one."""
    for i, tangent in enumerate(tangents):
        if tangent is not None:
            yield [*tensors[:i], tangent, *tensors[i + 1 :]]


# ---- derivatives of the energy -----------------------------------------------------------------


def _energy_slope(arguments: Arguments) -> Tensor:
    """The derivative of the value in gamma: ``[batch, components]``."""
    z, gamma, *groups, tf32, _ = arguments
    (z,) = _centred(z)
    factors = [_group_factor(z, *groups), _distance_factor(z, z)]
    return -_totals(z, gamma, lambda c: factors, tf32)


def _totals(
    z: Tensor, gamma: Tensor, factors: Callable[[slice], list[Factor]], tf32: bool
) -> Tensor:
    """``1 / components sum_ij exp(-gamma_c s_ij)`` times factors, for each component."""

    def total(c: slice) -> Tensor:
        weight = torch.full_like(gamma[:, c], 1 / gamma.shape[-1])
        left, right = zip(*factors(c), strict=True)
        return gaussian_sum(z, z, gamma[:, c], weight, left, right, _ones(z), tf32).sum((1, 2))

    return _per_component(total, gamma)


def _hessian_product(
    arguments: Arguments, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Callable[[], Tensor]]:
    """The value's Hessian times ``a`` (in z) and ``b`` (in gamma): its parts in z and gamma."""
    z, gamma, *groups, tf32, _ = arguments
    (z,) = _centred(z)
    w = _group_factor(z, *groups)
    share = torch.full_like(gamma, 1 / gamma.shape[-1])
    others = _with_ones(z)

    def sums(weights: Tensor, factors: list[Factor], values: Tensor) -> Tensor:
        left, right = zip(*factors, strict=True)
        return gaussian_sum(z, z, gamma, weights, left, right, values, tf32)

    in_z = []
    if a is not None:
        t = _motion_factor(z, z, a, a)
        in_z.append(-8 * _pull(sums(share * gamma**2, [w, t], others), z))
        in_z.append(4 * _pull(sums(share * gamma, [w], _with_ones(a)), a))
    if b is not None:
        in_z.append(4 * _pull(sums(share * b, [w], others), z))
        in_z.append(-4 * _pull(sums(share * b * gamma, [w, _distance_factor(z, z)], others), z))

    def in_gamma() -> Tensor:
        parts = []
        if a is not None:
            t = _motion_factor(z, z, a, a)
            shifted = lambda c: _distance_factor(z, z, _column(gamma[:, c], z), -1.0)  # noqa: E731
            parts.append(2 * _totals(z, gamma, lambda c: [w, t, shifted(c)], tf32))
        if b is not None:
            s = _distance_factor(z, z)
            parts.append(b * _totals(z, gamma, lambda c: [w, s, s], tf32))
        return torch.stack(parts).sum(0)

    return torch.stack(in_z).sum(0), in_gamma


def _energy_backward(
    arguments: Arguments, needs: Arguments, cotangents: Sequence[Tensor | None], outputs: Any
) -> tuple[Any, ...]:
    for_value, for_gradient = (*cotangents, None)[:2]
    in_z, in_gamma = [], []
    if for_value is not None:
        if needs[0]:
            in_z.append(_column(for_value[:, None], outputs[1]) * outputs[1])
        if needs[1]:
            in_gamma.append(for_value[:, None] * _energy_slope(arguments))
    if for_gradient is not None:
        product, slope = _hessian_product(arguments, for_gradient, None)
        in_z.append(product)
        if needs[1]:
            in_gamma.append(slope())
    return (_total(in_z), _total(in_gamma), *[None] * 6)


def _total(terms: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(terms)).sum(0) if terms else None


def _energy_jvp(arguments: Arguments, tangents: Arguments) -> list[Tensor]:
    dz, dgamma = tangents[:2]
    _, gradient = gaussian_energy(*arguments)
    in_value = []
    if dz is not None:
        in_value.append((gradient * dz).sum((1, 2), dtype=torch.float64))
    if dgamma is not None:
        in_value.append((_energy_slope(arguments) * dgamma).sum(-1))
    return [torch.stack(in_value).sum(0), _hessian_product(arguments, dz, dgamma)[0]]


# ---- batching ----------------------------------------------------------------------------------


def _lead(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """The new batch in front, made one with the batch that is there already."""
    if dim is None:
        return tensor.expand(batch_size, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)


def _lead_all(batch_size: int, arguments: Arguments, dims: Arguments) -> list[Any]:
    def lead(argument: Any, dim: Any) -> Any:
        if isinstance(argument, Tensor):
            return _lead(argument, dim, batch_size)
        if isinstance(argument, (list, tuple)):
            return [_lead(t, d, batch_size) for t, d in zip(argument, dim, strict=True)]
        return argument

    return [lead(argument, dim) for argument, dim in zip(arguments, dims, strict=True)]


def _restore(tensor: Tensor, batch_size: int) -> Tensor:
    return tensor.unflatten(0, (batch_size, len(tensor) // max(batch_size, 1)))


def _matrix_vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> Tensor:
    return _restore(gaussian_matrix(*_lead_all(batch_size, arguments, dims)), batch_size)


def _sum_vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> Tensor:
    others = [*dims[:4], *dims[4], *dims[5]]
    if all(dim is None for dim in others):  # several v for the same points: so many more columns
        *points, v, tf32 = arguments
        columns = v.movedim(dims[6], -2)
        out = gaussian_sum(*points, columns.flatten(-2), tf32)
        return out.unflatten(-1, columns.shape[-2:]).movedim(-2, 0)
    return _restore(gaussian_sum(*_lead_all(batch_size, arguments, dims)), batch_size)


def _energy_vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> list[Tensor]:
    outputs = gaussian_energy(*_lead_all(batch_size, arguments, dims))
    return [_restore(output, batch_size) for output in outputs]


# ---- shapes ------------------------------------------------------------------------------------


def _matrix_fake(
    x: Tensor, y: Tensor, gamma: Tensor, coefficient: Tensor, allow_tf32: bool
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], y.shape[1])


def _sum_fake(
    x: Tensor,
    y: Tensor,
    gamma: Tensor,
    coefficient: Tensor,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    v: Tensor,
    allow_tf32: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], v.shape[2])


def _energy_fake(z: Tensor, gamma: Tensor, *options: Any) -> list[Tensor]:
    value = z.new_empty(z.shape[0], dtype=torch.float64)
    return [value, z.new_empty(z.shape)] if options[-1] else [value]


gaussian_matrix = Operator(
    "gaussian_matrix",
    reference=matrix_reference,
    fake=_matrix_fake,
    backward=_matrix_backward,
    jvp=_matrix_jvp,
    vmap=_matrix_vmap,
    keeps_outputs=True,
)
gaussian_sum = Operator(
    "gaussian_sum",
    reference=sum_reference,
    fake=_sum_fake,
    backward=_sum_backward,
    jvp=_sum_jvp,
    vmap=_sum_vmap,
)
gaussian_energy = Operator(
    "gaussian_energy",
    reference=energy_reference,
    fake=_energy_fake,
    backward=_energy_backward,
    jvp=_energy_jvp,
    vmap=_energy_vmap,
    keeps_outputs=True,
)


# ---- public ------------------------------------------------------------------------------------

Sigma = float | Sequence[float] | Tensor
Estimator = Literal["unbiased", "biased", "linear"]
_ESTIMATORS = ("unbiased", "biased", "linear")


def gaussian_kernel(x: Tensor, y: Tensor | None = None, sigma: Sigma = 1.0) -> Tensor:
    r"""Gaussian kernel matrix: K_ij = mean_s exp(-|x_i - y_j|^2 / (2 sigma_s^2)).

    Equivalent to ``torch.exp(-(x[:, None] - y).square().sum(-1) / (2 * sigma**2))``, in one pass
    without a second matrix of that size. Differentiable in ``x``, ``y`` and ``sigma`` to any order,
    also at equal points.

    Args:
        x: points ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        y: points ``[..., m, d]``, like ``x`` in dtype and device; batches broadcast. None: ``x``.
        sigma: bandwidth in the unit of the points, positive: a number, or several (a sequence or a
            tensor ``[components]``) for the mean of their kernels. The values of a tensor are not
            checked.

    Returns:
        ``[..., n, m]`` with entries in [0, 1], 1 where points are equal, up to rounding.

    Raises:
        TypeError: for anything but floating-point tensors and real bandwidths.
        ValueError: for shapes, dtypes or devices that do not match and bandwidths that are not
            positive.

    References:
        Schoelkopf and Smola, "Learning with Kernels", 2002, section 2.3.

    Example:
        >>> import torch, hessreg
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> hessreg.gaussian_kernel(x, sigma=5.0)
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]])
    """
    y = x if y is None else y
    _check_points(x, "x")
    _check_alike(x, y, "y")
    batch = _broadcast(x, y)
    points = _flat(x, batch), _flat(y, batch)
    gamma = _gamma(sigma, points[0])
    matrix = gaussian_matrix(*points, gamma, _equal(gamma), _allow_tf32())
    return matrix.reshape(*batch, *matrix.shape[1:])


def gaussian_kernel_matvec(x: Tensor, y: Tensor | None, v: Tensor, sigma: Sigma = 1.0) -> Tensor:
    r"""The Gaussian kernel matrix of ``x`` and ``y`` times ``v``; the matrix is never stored.

    Equivalent to ``gaussian_kernel(x, y, sigma) @ v`` with memory linear in n and m, forward and in
    every derivative. Differentiable in ``x``, ``y``, ``v`` and ``sigma`` to any order.

    Args:
        x: points ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        y: points ``[..., m, d]``, like ``x`` in dtype and device; batches broadcast. None: ``x``.
        v: vectors ``[..., m, e]``.
        sigma: bandwidth or bandwidths, as for :func:`gaussian_kernel`.

    Returns:
        ``[..., n, e]``.

    Raises:
        TypeError: for anything but floating-point tensors and real bandwidths.
        ValueError: for shapes, dtypes or devices that do not match and bandwidths that are not
            positive.

    References:
        Charlier et al., "Kernel operations on the GPU, with autodiff, without memory overflows",
        JMLR 2021.

    Example:
        >>> import torch, hessreg
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> hessreg.gaussian_kernel_matvec(x, x, torch.ones(2, 1), sigma=1.0)
        tensor([[1.6065],
                [1.6065]])
    """
    y = x if y is None else y
    _check_points(x, "x")
    _check_alike(x, y, "y")
    _check_alike(x, v, "v", same_width=False)
    if v.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"v must have a row for each of the {y.shape[-2]} points y, got shape {tuple(v.shape)}"
        )
    batch = _broadcast(x, y, v)
    x3, y3, v3 = (_flat(t, batch).to(_compute_dtype(t)) for t in (x, y, v))
    gamma = _gamma(sigma, x3)
    out = gaussian_sum(x3, y3, gamma, _equal(gamma), [], [], v3, _allow_tf32())
    return out.to(x.dtype).reshape(*batch, *out.shape[1:])


def mmd2(x: Tensor, y: Tensor, sigma: Sigma = 1.0, estimator: Estimator = "unbiased") -> Tensor:
    r"""Squared maximum mean discrepancy of two samples in the Gaussian kernel.

    Equivalent to ``K(x, x).mean() + K(y, y).mean() - 2 K(x, y).mean()`` (``"biased"``), with the
    diagonals of the first two left out (``"unbiased"``). Value and gradient come from one sweep
    over the pairs, and no matrix is stored, forward or in any derivative. Differentiable in ``x``,
    ``y`` and ``sigma`` to any order. In float32 its gradient in the points is as exact as
    that of differences taken one by one, far from the origin too; from 5 dimensions on, and in
    ``sigma`` and in further derivatives, it loses a digit for each factor of 10 by which clusters
    are apart further than ``sigma`` and their own size.

    Args:
        x: sample ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        y: sample ``[..., m, d]``, like ``x`` in dtype and device; batches broadcast.
        sigma: bandwidth or bandwidths, as for :func:`gaussian_kernel`.
        estimator: ``"unbiased"`` (a U-statistic, may be negative; needs n, m >= 2), ``"biased"``
            (a V-statistic, not negative but for rounding; n, m >= 1), or ``"linear"`` (unbiased,
            of independent pairs of points, in linear time: the points in their order, as many of
            both as there are in the smaller sample; at least 2 of each).

    Returns:
        ``[...]`` in the dtype of ``x``; sums are taken in float64.

    Raises:
        TypeError: for anything but floating-point tensors and real bandwidths.
        ValueError: for shapes, dtypes or devices that do not match, samples that are too small,
            bandwidths that are not positive and unknown estimators.

    References:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 2012: equations 3 (unbiased), 5 (biased)
        and lemma 14 (linear).

    Example:
        >>> import torch, hessreg
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
        >>> hessreg.mmd2(x, y, sigma=1.0)
        tensor(-0.4323)
        >>> hessreg.mmd2(x, x, sigma=1.0, estimator="biased")
        tensor(0.)
    """
    _check_points(x, "x")
    _check_alike(x, y, "y")
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(_ESTIMATORS)}, got {estimator!r}")
    needed = 1 if estimator == "biased" else 2
    for name, points in (("x", x), ("y", y)):
        if points.shape[-2] < needed:
            raise ValueError(
                f"{name} must hold at least {needed} points for the {estimator} estimator, "
                f"got shape {tuple(points.shape)}"
            )
    batch = _broadcast(x, y)
    x3, y3 = (_flat(t, batch).to(_compute_dtype(t)) for t in (x, y))
    gamma = _gamma(sigma, x3)
    value = (
        _linear(x3, y3, gamma) if estimator == "linear" else _quadratic(x3, y3, gamma, estimator)
    )
    return value.to(x.dtype).reshape(batch)


def _quadratic(x: Tensor, y: Tensor, gamma: Tensor, estimator: Estimator) -> Tensor:
    n, m = x.shape[1], y.shape[1]
    pairs = [n * n, m * m] if estimator == "biased" else [n * (n - 1), m * (m - 1)]
    diagonal = 1 / n + 1 / m if estimator == "biased" else 0.0
    weights = 1 / pairs[0], -1 / (n * m), 1 / pairs[1]
    z = torch.cat([x, y], 1)
    outputs = gaussian_energy(z, gamma, n, *weights, _allow_tf32(), is_tracked([z, gamma]))
    return outputs[0] + diagonal


def _linear(x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
    count = min(x.shape[1], y.shape[1]) // 2 * 2
    (a, b), (c, d) = ((t[:, 0:count:2], t[:, 1:count:2]) for t in (x, y))

    def mean(p: Tensor, q: Tensor) -> Tensor:
        s = (p - q).double().square().sum(-1)
        return torch.exp(-gamma[:, :, None] * s[:, None]).mean((1, 2))

    return mean(a, b) + mean(c, d) - mean(a, d) - mean(b, c)


def _equal(gamma: Tensor) -> Tensor:
    return torch.full_like(gamma, 1 / gamma.shape[-1])


# A graph that is compiled keeps the setting of that time: torch cannot trace the question.
@constant_while_compiling
def _allow_tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def _gamma(sigma: Sigma, points: Tensor) -> Tensor:
    """1 / (2 sigma^2) for each sample and component: ``[batch, components]`` in float64."""
    shape = (points.shape[0], -1)
    if isinstance(sigma, Tensor):
        if not sigma.is_floating_point():
            raise TypeError(f"sigma must be floating-point, got a tensor of {sigma.dtype}")
        if sigma.dim() > 1 or sigma.numel() == 0:
            raise ValueError(
                f"sigma must be a number or numbers [components], got shape {tuple(sigma.shape)}"
            )
        if sigma.device != points.device:
            raise ValueError(
                f"sigma must be on the device of x, {points.device}, got {sigma.device}"
            )
        return (0.5 / sigma.double().square()).reshape(1, -1).expand(shape)
    columns = [_filled(_gamma_of(value), points) for value in _values(sigma)]
    return torch.cat(columns, 1).expand(shape)


def _filled(value: float, points: Tensor) -> Tensor:
    # Filled on the device: a copy from the host could not be recorded in a CUDA graph.
    return points.new_full((1, 1), value, dtype=torch.float64)


def _values(sigma: float | Sequence[float]) -> Sequence[float]:
    if not isinstance(sigma, Sequence):
        return [sigma]
    if not sigma:
        raise ValueError("sigma must hold at least one bandwidth, got none")
    return sigma


def _gamma_of(sigma: float) -> float:
    if isinstance(sigma, bool) or not isinstance(sigma, Real):
        raise TypeError(f"sigma must be a number, numbers or a tensor, got {sigma!r}")
    try:
        square = float(sigma) * float(sigma)
        gamma = 0.5 / square if sigma > 0 else 0.0
    except (OverflowError, ZeroDivisionError):
        gamma = 0.0
    if not 0 < gamma <= _LARGEST:
        raise ValueError(
            f"sigma must be positive and finite, and so its square, got {reprlib.repr(sigma)}"
        )
    return gamma


def _broadcast(*tensors: Tensor) -> torch.Size:
    batches = [t.shape[:-2] for t in tensors]
    if all(batch == batches[0] for batch in batches):
        return batches[0]
    try:
        return torch.broadcast_shapes(*batches)
    except RuntimeError:
        shapes = " and ".join(str(tuple(batch)) for batch in batches)
        raise ValueError(f"leading dimensions must broadcast, got {shapes}") from None


def _flat(x: Tensor, batch: torch.Size) -> Tensor:
    """The points with one batch dimension."""
    if not batch and x.dim() == 2:
        return x[None]
    return x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:])


def _check_points(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x)}")
    if x.dtype not in _DTYPES or x.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor of float16, bfloat16, float32 or float64, "
            f"got {x.dtype}, {x.layout}"
        )
    if x.dim() < 2:
        wanted = "vectors [..., m, e]" if name == "v" else "points [..., n, d]"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")


def _check_alike(x: Tensor, other: Any, name: str, *, same_width: bool = True) -> None:
    _check_points(other, name)
    if other.dtype is not x.dtype or other.device != x.device:
        raise ValueError(
            f"{name} must have the dtype and device of x, {x.dtype} on {x.device}, "
            f"got {other.dtype} on {other.device}"
        )
    if same_width and other.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{name} must have points of {x.shape[-1]} dimensions like x, "
            f"got shape {tuple(other.shape)}"
        )
