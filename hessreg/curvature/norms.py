"""Differentiable norms of a symmetric operator from a few of its products.

Every norm is w' H z for some pair of vectors: with w and z held fixed, the gradient of w' H z is
the gradient of the norm (envelope theorem, or a subgradient where eigenvalues cross), for any H
that depends smoothly on parameters. Only the product H z carries a graph; for the Hessian of a
network its gradient is a third derivative.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from hessreg.curvature._checks import check_at_least, check_not_negative, of_operator
from hessreg.curvature._krylov import random_signs
from hessreg.curvature._statistics import half_width
from hessreg.curvature.eigenvalues import default_tol, eigenvalues
from hessreg.curvature.exact_norms import (
    NormEstimate,
    NormOrder,
    bilinear,
    exact_norm,
    product,
    root_of_squares,
    rounding,
    scalar,
)
from hessreg.curvature.lanczos import deflated_lanczos, norm_of, normalize, start_vector
from hessreg.curvature.operators import LinearOperator

__all__ = [
    "ConvergenceWarning",
    "estimate_norm",
    "frobenius_norm",
    "norm",
    "nuclear_norm",
    "one_norm",
    "spectral_norm",
]

_SMALL = 256  # most rows of an operator whose columns are all computed, if nothing else is asked
_NUM_STEPS, _NUM_PROBES = 40, 10  # for a value with an error bar
_MAX_DEFLATED = 10
_DEFLATED_RESIDUAL = 1e-3  # largest residual of a Ritz pair summed exactly, relative to the norm


class ConvergenceWarning(UserWarning):
    """A number that is not known to be right."""


@of_operator
def norm(
    op: LinearOperator,
    ord: NormOrder = "spectral",
    *,
    num_steps: int | None = None,
    num_probes: int | None = None,
    num_deflated: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Norm of a symmetric operator, differentiable in what the operator depends on.

    The gradient is exact where the norm has one; where eigenvalues cross or vanish it is a finite
    subgradient, and so are its own derivatives: second derivatives of "spectral" and "nuclear"
    leave out how eigenvectors turn. See :func:`estimate_norm`, which returns the error as well and
    takes the same arguments.

    Args:
        op: symmetric operator, (n, n).
        ord: "spectral", "nuclear", "one" or "fro".
        num_steps: products for each Krylov space (spectral, nuclear), or for the search of the
            column (one).
        num_probes: random vectors (nuclear, fro).
        num_deflated: leading eigenvalues to take exactly (nuclear).
        generator: source of the random vectors; None is one seeded with 0, so that calls agree
            and the global random state stays as it is.

    Returns:
        Scalar [].

    Raises:
        TypeError: a count that is not an int.
        ValueError: an unknown ``ord``, a count below its minimum, or a loss that cannot be
            differentiated three times.
        NonFiniteError: NaN or infinity in a product.

    Warns:
        ConvergenceWarning: no count is given, and the value is not known to be right.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = torch.tensor([[2.0, 1.0], [1.0, -2.0]], dtype=torch.float64)
        >>> round(norm(DenseOperator(H), "spectral").item(), 6)
        2.236068
        >>> round(norm(DenseOperator(H), "nuclear").item(), 6)
        4.472136
        >>> norm(DenseOperator(H), "one").item()
        3.0
    """
    found = estimate_norm(
        op,
        ord,
        num_steps=num_steps,
        num_probes=num_probes,
        num_deflated=num_deflated,
        generator=generator,
    )
    automatic = num_steps is None and num_probes is None and num_deflated is None
    if automatic and not found.converged:
        reason = "a lower bound" if ord == "one" else "not converged"
        warnings.warn(f"the {ord} norm is {reason}", ConvergenceWarning, stacklevel=2)
    return found.value


@of_operator
def estimate_norm(
    op: LinearOperator,
    ord: NormOrder = "spectral",
    *,
    num_steps: int | None = None,
    num_probes: int | None = None,
    num_deflated: int | None = None,
    generator: torch.Generator | None = None,
) -> NormEstimate:
    """A norm with its error: :func:`norm` with all that is known about it.

    If a count is given, this is :func:`spectral_norm`, :func:`nuclear_norm`, :func:`one_norm` or
    :func:`frobenius_norm` with it. If none is:

    - spectral: the eigenvalue of largest modulus by :func:`eigenvalues`, to convergence.
    - up to 256 rows, the others are exact, from all columns: n products, each with its graph for
      "nuclear" and "fro" if gradients are enabled.
    - beyond, "nuclear" takes 10 probes of 40 Lanczos steps and "fro" 10 probes, after the leading
      Ritz pairs, up to 10, have been taken exactly; "one" is the lower bound of :func:`one_norm`.

    Where the norm has a kink, the gradient is the subgradient of one choice: for "spectral", where
    the largest modulus is repeated, of the one eigenvector found; for "nuclear", with sign(0) = 0,
    an eigenvalue below n eps times the largest counting as 0; for "one" and "fro" with sign(0) = 0
    and 0 at H = 0. All are linear in the product H z with the other factors held fixed (save "fro",
    whose second derivative is exact as well), so every further derivative is finite.

    Args:
        op: symmetric operator, (n, n).
        ord: "spectral", "nuclear", "one" or "fro".
        num_steps: as in :func:`norm`; 20 if only another count is given.
        num_probes: likewise; 1.
        num_deflated: likewise; 0.
        generator: source of the random vectors.

    Returns:
        The value and its error.

    Raises:
        TypeError, ValueError, NonFiniteError: as :func:`norm`.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([3.0, -2.0, 0.5])))
        >>> found = estimate_norm(H, "nuclear")
        >>> round(found.value.item(), 4), found.converged
        (5.5, True)
    """
    if ord not in get_args(NormOrder):
        raise ValueError(f"ord must be one of {get_args(NormOrder)}, got {ord!r}")
    generator = generator or torch.Generator().manual_seed(0)
    if num_steps is None and num_probes is None and num_deflated is None:
        return _automatic(op, ord, generator)
    num_steps = 20 if num_steps is None else num_steps
    num_probes = 1 if num_probes is None else num_probes
    if ord == "spectral":
        return spectral_norm(op, num_steps=num_steps, generator=generator)
    if ord == "one":
        return one_norm(op, num_steps=num_steps)
    if ord == "fro":
        return frobenius_norm(op, num_probes=num_probes, generator=generator)
    return nuclear_norm(
        op,
        num_steps=num_steps,
        num_probes=num_probes,
        num_deflated=0 if num_deflated is None else num_deflated,
        generator=generator,
    )


def _automatic(op: LinearOperator, ord: NormOrder, generator: torch.Generator) -> NormEstimate:
    if ord == "spectral":
        found = eigenvalues(op, 1, "LM", generator=generator)
        v = found.vectors[:, 0]
        value = bilinear(op, v, v).abs()
        error = found.residuals[0] + rounding(value)
        return NormEstimate(value, v, error, bool(found.converged))
    if op.shape[0] <= _SMALL:
        return exact_norm(op, ord)
    if ord == "one":
        return one_norm(op)
    ritz = _ritz_pairs(op, _NUM_STEPS, start_vector(op, None, generator))
    accurate = ritz.residuals <= _DEFLATED_RESIDUAL * ritz.values.abs().max()
    leading = ritz.leading(min(_MAX_DEFLATED, int(accurate.sum())), accurate)
    if ord == "fro":
        return _frobenius(op, leading, _NUM_PROBES, generator)
    return _nuclear(op, leading, _NUM_STEPS, _NUM_PROBES, 1e-3, generator)


@of_operator
def spectral_norm(
    op: LinearOperator,
    *,
    num_steps: int = 20,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> NormEstimate:
    """Largest modulus of an eigenvalue, max_i |lambda_i|.

    |v' H v| with v the Ritz vector of largest modulus after ``num_steps`` Lanczos steps; w =
    sign(lambda) v and z = v. Unlike power iteration it is right at a saddle with eigenvalues
    +-lambda. It is a lower bound, exact once the Krylov space holds the eigenvector.

    Cost: num_steps products, and one with its graph.

    Args:
        op: symmetric operator, (n, n).
        num_steps: Lanczos steps.
        v0: start [n]; random if None.
        generator: source of the random start.

    Returns:
        The norm [], the Ritz vector [n] on the side of the start, and its residual as the error: an
        eigenvalue of this modulus, to that error, exists.

    Raises:
        TypeError, ValueError: as :func:`norm`.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> saddle = DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> round(spectral_norm(saddle).value.item(), 4)
        1.0
    """
    check_at_least(1, num_steps=num_steps)
    value, v, residual = _largest_modulus(op, num_steps, start_vector(op, v0, generator))
    converged = residual <= default_tol(op.dtype) * value.item()
    return NormEstimate(value, v, residual + rounding(value), converged)


def _largest_modulus(
    op: LinearOperator, num_steps: int, start: Tensor
) -> tuple[Tensor, Tensor, float]:
    """That of a Ritz value [], with its graph, the vector [n] and the norm of the residual."""
    fast = getattr(op, "spectral_form", None)
    found = None if fast is None else fast(start, num_steps)
    if found is not None:
        return cast("tuple[Tensor, Tensor, float]", found)
    leading = _ritz_pairs(op, num_steps, start).leading(1)
    v = leading.vectors.squeeze(1)
    # Its sign means nothing, but a warm start comes of it: it must not depend on the way.
    v = torch.where(v @ start < 0, -v, v)
    value = bilinear(op, v, v, scalar(op, leading.values[0])).abs()
    return value, v, leading.residual


@of_operator
def nuclear_norm(
    op: LinearOperator,
    *,
    num_steps: int = 20,
    num_probes: int = 1,
    num_deflated: int = 0,
    smoothing: float = 1e-3,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> NormEstimate:
    """Sum of the moduli of the eigenvalues, sum_i |lambda_i|: the norm of the article "HSN1R".

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017): the mean of z' |H| z over random
    signs z (Hutchinson, 1989), with w = sign(H) z from the Lanczos decomposition started at z. The
    gradient of the mean is that of the norm; a single probe's is a noisy estimate of it. As in
    Hutch++ (Meyer and others, 2021), the ``num_deflated`` leading Ritz pairs may be summed exactly,
    which leaves only the rest to the probes: worth its cost where a few eigenvalues dominate,
    otherwise more probes are.

    Near zero, sign(x) is replaced by x / sqrt(x^2 + delta^2), delta = ``smoothing`` times the
    largest Ritz value: eigenvalues that are rounding error get no gradient. It lowers the value by
    at most 0.3 delta for each eigenvalue. Too few steps bias the value as well, either way.

    Cost: num_steps products for each probe, and one with its graph for each probe and each deflated
    pair; another num_steps if pairs are deflated.

    Args:
        op: symmetric operator, (n, n).
        num_steps: Lanczos steps for each probe.
        num_probes: random sign vectors to average over.
        num_deflated: leading Ritz pairs to sum exactly; at most num_steps are found.
        smoothing: delta relative to the largest Ritz value.
        v0: start [n] of the search for the deflated pairs; random if None.
        generator: source of the random vectors.

    Returns:
        The norm [] and, if pairs are deflated, the sum of their vectors [n]. The error has four
        parts: the 99 % interval of the mean over probes, which takes two at least; what smoothing
        lowered; the change over the last two fifths of the steps; the residuals of the pairs.

    Raises:
        TypeError, ValueError: as :func:`norm`.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([3.0, -2.0, 0.5])))
        >>> round(nuclear_norm(H, num_probes=4).value.item(), 4)
        5.5
    """
    check_at_least(1, num_steps=num_steps, num_probes=num_probes)
    check_at_least(0, num_deflated=num_deflated)
    check_not_negative(smoothing=smoothing)
    generator = generator or torch.Generator().manual_seed(0)
    leading = _no_pairs(op)
    if num_deflated:
        leading = _ritz_pairs(op, num_steps, start_vector(op, v0, generator)).leading(num_deflated)
    return _nuclear(op, leading, num_steps, num_probes, smoothing, generator)


def _nuclear(
    op: LinearOperator,
    leading: _Leading,
    num_steps: int,
    num_probes: int,
    smoothing: float,
    generator: torch.Generator,
) -> NormEstimate:
    U = leading.vectors
    terms = [
        theta.sign().item() * bilinear(op, u, u, scalar(op, theta))
        for theta, u in zip(leading.values, U.unbind(1), strict=True)
    ]
    samples = []
    for _ in range(num_probes):
        z, length = _probe(op, U, generator)
        if length == 0:
            samples.append([0.0, 0.0, 0.0])
            continue
        if num_probes == 1 and U.shape[1] == 0:
            term = _at_once(op, z, num_steps, smoothing, length**2)
            if term is not None:
                terms.append(term)
                continue
        ritz = _ritz_pairs(op, num_steps, z, U)
        signs = length**2 / num_probes * _smooth_sign(ritz.values, smoothing)
        known = scalar(op, ritz.at_start(ritz.values * signs))
        terms.append(bilinear(op, ritz.function(signs), z, known))
        if num_probes > 1:
            samples.append(_moduli(ritz, smoothing, length))
    start = U.sum(1) if U.shape[1] else None
    value = sum(terms[1:], start=terms[0]) if terms else scalar(op, 0.0)
    if not samples:
        return NormEstimate(value, start, scalar(op, math.inf), False)
    error = _error_of_probes(samples) + leading.residual
    return NormEstimate(value, start, scalar(op, error) + rounding(value), math.isfinite(error))


def _at_once(
    op: LinearOperator, z: Tensor, num_steps: int, smoothing: float, weight: float
) -> Tensor | None:
    """As `ParameterOperator.absolute_form`, where an operator has it."""
    fast = getattr(op, "absolute_form", None)
    return None if fast is None else cast("Tensor | None", fast(z, num_steps, smoothing, weight))


def _probe(op: LinearOperator, U: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Random signs orthogonal to the columns of U, as a unit vector [n], and their length."""
    z = random_signs(op, 1, generator).squeeze(1)
    if U.shape[1] == 0:
        return z / len(z) ** 0.5, len(z) ** 0.5
    z = z - U @ (U.mT @ z)
    # What is left where nothing should be is rounding error.
    return normalize(z), 0.0 if U.shape[1] == len(z) else norm_of(z).item()


def _moduli(ritz: _RitzPairs, smoothing: float, length: float) -> list[float]:
    """Of z' |H| z: with smoothing; without; and without, from three fifths of the steps."""
    fewer = len(ritz.T) if ritz.is_exact else max(1, 3 * len(ritz.T) // 5)
    theta, S = torch.linalg.eigh(ritz.T[:fewer, :fewer])
    parts = [
        ritz.at_start(ritz.values * _smooth_sign(ritz.values, smoothing)),
        ritz.at_start(ritz.values.abs()),
        (S[0].square() * theta.abs()).sum(),
    ]
    return [length**2 * part.item() for part in parts]


def _error_of_probes(samples: list[list[float]]) -> float:
    """That of the mean over probes, of the smoothing and of the number of Lanczos steps."""
    smooth, sharp, coarse = torch.tensor(samples, dtype=torch.float64, device="cpu").unbind(1)
    bias = (sharp - smooth).mean().abs() + (sharp - coarse).mean().abs()
    return (half_width(smooth) + bias).item()


@of_operator
def one_norm(op: LinearOperator, *, num_steps: int = 20, v0: Tensor | None = None) -> NormEstimate:
    """Largest column sum, max_j sum_i |H_ij|, the norm induced by the vector 1-norm.

    The estimator of Hager (1984) as refined by Higham (1988): starting from the mean of the
    columns, each round goes to the column at which the convex function |H x|_1 rises most. A lower
    bound, on random matrices about 0.9 of the value on average. With the column j found, w =
    sign(H e_j) and z = e_j.

    Cost: num_steps products, two for each round, and one with its graph.

    Args:
        op: symmetric operator, (n, n).
        num_steps: products for the search; at least one round is made.
        v0: start [n] with |v0|_1 = 1; 1/n in each entry if None.

    Returns:
        The norm [] and the unit vector of the column [n]; the error is infinite.

    Raises:
        TypeError, ValueError: as :func:`norm`.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> one_norm(DenseOperator(torch.tensor([[1.0, -2.0], [-2.0, 5.0]]))).value.item()
        7.0
    """
    check_at_least(1, num_steps=num_steps)
    x = _largest_column(op, max(1, num_steps // 2), v0)
    return NormEstimate(product(op, x).abs().sum(), x, scalar(op, math.inf), False)


@of_operator
def frobenius_norm(
    op: LinearOperator, *, num_probes: int = 1, generator: torch.Generator | None = None
) -> NormEstimate:
    """Root of the sum of squares, (sum_ij H_ij^2)^(1/2).

    The root of the mean of |H z|^2 over random signs z (Hutchinson, 1989), so w is H z divided by
    the norm. The square is unbiased, the root a little low (Jensen): by about an eighth of the
    relative variance of the square.

    Cost: one product with its graph for each probe.

    Args:
        op: symmetric operator, (n, n).
        num_probes: random sign vectors.
        generator: source of the random signs.

    Returns:
        The norm [] and None: a start has no meaning. The error is the 99 % interval of the mean
        over probes, which takes two at least.

    Raises:
        TypeError, ValueError: as :func:`norm`.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> frobenius_norm(DenseOperator(torch.diag(torch.tensor([3.0, -4.0])))).value.item()
        5.0
    """
    check_at_least(1, num_probes=num_probes)
    generator = generator or torch.Generator().manual_seed(0)
    return _frobenius(op, _no_pairs(op), num_probes, generator)


def _frobenius(
    op: LinearOperator, leading: _Leading, num_probes: int, generator: torch.Generator
) -> NormEstimate:
    """The root of |H U|^2 and the mean of |H z|^2 over probes orthogonal to the columns of U."""
    U = leading.vectors
    exact = [product(op, u) for u in U.unbind(1)]
    Z = [random_signs(op, 1, generator).squeeze(1) for _ in range(num_probes)]
    random = [product(op, z - U @ (U.mT @ z)) / num_probes**0.5 for z in Z]
    value = root_of_squares(torch.stack(exact + random))
    error = torch.full_like(value, math.inf, requires_grad=False)
    if num_probes > 1:
        squares = [num_probes * norm_of(h.detach()).double().square() for h in random]
        error = _error_of_root(value.detach(), half_width(torch.stack(squares)))
    value, error = value.to(op.dtype), error.to(op.dtype)
    return NormEstimate(value, None, error + rounding(value), num_probes > 1)


def _error_of_root(root: Tensor, width: Tensor) -> Tensor:
    """Of the root of a number that is known within ``width``."""
    low, high = (root.square() + sign * width for sign in (-1, 1))
    return torch.maximum(root - low.clamp_min(0).sqrt(), high.sqrt() - root)


class _Leading(NamedTuple):
    """Ritz pairs to take exactly: values [k] (CPU), vectors [n, k], the sum of the residuals."""

    values: Tensor
    vectors: Tensor
    residual: float


def _no_pairs(op: LinearOperator) -> _Leading:
    empty = torch.empty(op.shape[0], 0, dtype=op.dtype, device=op.device)
    return _Leading(torch.empty(0, dtype=torch.float64, device="cpu"), empty, 0.0)


class _RitzPairs(NamedTuple):
    """The Lanczos matrix T [m, m] with its eigenpairs (CPU, float64), and the basis [n, m].

    ``is_exact`` tells whether the basis spans an invariant subspace.
    """

    T: Tensor
    values: Tensor
    coordinates: Tensor
    residuals: Tensor
    basis: Tensor
    is_exact: bool

    def leading(self, k: int, allowed: Tensor | None = None) -> _Leading:
        """The k pairs of largest modulus among those allowed [m]."""
        moduli = self.values.abs()
        if allowed is not None:
            moduli = moduli.masked_fill(~allowed, -1)
        order = moduli.argsort(descending=True)[:k]
        vectors = self.basis @ self.coordinates[:, order].to(self.basis)
        return _Leading(self.values[order], vectors, self.residuals[order].sum().item())

    def function(self, values: Tensor) -> Tensor:
        """f(A) applied to the unit start vector [n], f given by its values [m] on the spectrum."""
        return self.basis @ (self.coordinates @ (values * self.coordinates[0])).to(self.basis)

    def at_start(self, values: Tensor) -> Tensor:
        """The number v' f(A) v [] for the unit start vector v."""
        return values @ self.coordinates[0].square()


def _ritz_pairs(
    op: LinearOperator, num_steps: int, start: Tensor, deflated: Tensor | None = None
) -> _RitzPairs:
    check_at_least(1, num_steps=num_steps)
    deflated = _no_pairs(op).vectors if deflated is None else deflated
    diagonal, off, Q = deflated_lanczos(op, num_steps, start, deflated)
    # A matrix of a few rows: the CPU in float64 is as fast as any device, and more accurate.
    T = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    values, coordinates = torch.linalg.eigh(T)
    is_exact = len(T) < num_steps or len(T) == op.shape[0] - deflated.shape[1]
    residuals = 0 * values if is_exact else off[-1] * coordinates[-1].abs()
    return _RitzPairs(T, values, coordinates, residuals, Q, is_exact)


@torch.no_grad()
def _largest_column(op: LinearOperator, num_rounds: int, v0: Tensor | None) -> Tensor:
    n = op.shape[0]
    x = torch.full((n,), 1 / n, dtype=op.dtype, device=op.device) if v0 is None else v0
    for _ in range(num_rounds):
        signs = torch.where(op.matvec(x) < 0, -1, 1).to(op.dtype)
        # As |H x|_1 is convex, it is at least as large at the column of the steepest slope.
        x = torch.zeros_like(x).index_fill_(0, op.matvec(signs).abs().argmax(), 1)
    return x


def _smooth_sign(values: Tensor, smoothing: float) -> Tensor:
    delta = smoothing * values.abs().max()
    return (values / values.hypot(delta)).nan_to_num(0.0)  # 0 / 0 where both vanish
