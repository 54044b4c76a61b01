"""Differentiable norms of a symmetric operator from a few of its products.

Every norm is w' H z for some pair of vectors: with w and z held fixed, the gradient of w' H z is
the gradient of the norm (envelope theorem, or a subgradient where eigenvalues cross), for any H
that depends smoothly on parameters. Only the product H z carries a graph; for the Hessian of a
network its gradient is a third derivative. For a multilayer perceptron a product costs about 1.4
gradients of the loss, and the one with its graph about 5, its differentiation included.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hessreg.curvature._checks import check_at_least, check_not_negative
from hessreg.curvature.lanczos import lanczos
from hessreg.curvature.operators import LinearOperator

__all__ = [
    "NormEstimate",
    "NormOrder",
    "frobenius_norm",
    "norm",
    "nuclear_norm",
    "one_norm",
    "spectral_norm",
]

NormOrder = Literal["spectral", "nuclear", "one", "fro"]


class NormEstimate(NamedTuple):
    """A norm and where a later call on a nearby operator may start.

    Attributes:
        value: scalar [], differentiable if gradients are enabled and the operator is.
        start: vector [n] to pass as ``v0`` next time, or None where a start has no meaning.
    """

    value: Tensor
    start: Tensor | None


def norm(
    op: LinearOperator,
    ord: NormOrder = "spectral",
    *,
    num_steps: int = 20,
    num_probes: int = 1,
    num_deflated: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Norm of a symmetric operator, differentiable in what the operator depends on.

    Args:
        op: symmetric operator, (n, n).
        ord: "spectral", "nuclear", "one" or "fro": see :func:`spectral_norm`,
            :func:`nuclear_norm`, :func:`one_norm` and :func:`frobenius_norm`.
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

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = torch.tensor([[2.0, 1.0], [1.0, -2.0]], dtype=torch.float64)
        >>> round(norm(DenseOperator(H), "spectral").item(), 6)
        2.236068
        >>> round(norm(DenseOperator(H), "nuclear", num_deflated=2).item(), 6)
        4.472136
        >>> norm(DenseOperator(H), "one").item()
        3.0
    """
    if ord == "spectral":
        return spectral_norm(op, num_steps=num_steps, generator=generator).value
    if ord == "nuclear":
        return nuclear_norm(
            op,
            num_steps=num_steps,
            num_probes=num_probes,
            num_deflated=num_deflated,
            generator=generator,
        ).value
    if ord == "one":
        return one_norm(op, num_steps=num_steps).value
    if ord == "fro":
        return frobenius_norm(op, num_probes=num_probes, generator=generator).value
    raise ValueError(f"ord must be one of {get_args(NormOrder)}, got {ord!r}")


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
        The norm [] and the Ritz vector [n].

    Raises:
        TypeError, ValueError: as :func:`norm`.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> saddle = DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> round(spectral_norm(saddle).value.item(), 4)
        1.0
    """
    ritz = _ritz_pairs(op, num_steps, v0, generator)
    v = ritz.leading(1)[1].squeeze(1)
    product = _product(op, v)
    return NormEstimate((v @ product).abs(), v)


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
        The norm [] and, if pairs are deflated, the sum of their vectors [n].

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
    U, value = _deflate(op, num_steps, num_deflated, v0, generator)
    start = U.sum(1) if U.shape[1] else None
    for _ in range(num_probes):
        z = _random_signs(op, generator)
        z = z - U @ (U.mT @ z)
        if not z.any():
            continue
        ritz = _ritz_pairs(op, num_steps, z)
        w = z.norm() * ritz.function(_smooth_sign(ritz.values, smoothing))
        value = value + w @ _product(op, z) / num_probes
    return NormEstimate(value, start)


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
        The norm [] and the unit vector of the column [n].

    Raises:
        TypeError, ValueError: as :func:`norm`.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> one_norm(DenseOperator(torch.tensor([[1.0, -2.0], [-2.0, 5.0]]))).value.item()
        7.0
    """
    check_at_least(1, num_steps=num_steps)
    x = _largest_column(op, max(1, num_steps // 2), v0)
    return NormEstimate(_product(op, x).abs().sum(), x)


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
        The norm [] and None: a start has no meaning.

    Raises:
        TypeError, ValueError: as :func:`norm`.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> frobenius_norm(DenseOperator(torch.diag(torch.tensor([3.0, -4.0])))).value.item()
        5.0
    """
    check_at_least(1, num_probes=num_probes)
    generator = generator or torch.Generator().manual_seed(0)
    products = [_product(op, _random_signs(op, generator)) for _ in range(num_probes)]
    root = torch.linalg.vector_norm(torch.stack(products), dtype=torch.float64)
    return NormEstimate((root / num_probes**0.5).to(op.dtype), None)


class _RitzPairs(NamedTuple):
    """Eigenvalues [m] and eigenvectors [m, m] of T, and the Lanczos basis [n, m]."""

    values: Tensor
    coordinates: Tensor
    basis: Tensor

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """The k values of largest modulus, and their vectors [n, k]."""
        order = self.values.abs().argsort(descending=True)[:k]
        return self.values[order], self.basis @ self.coordinates[:, order]

    def function(self, values: Tensor) -> Tensor:
        """f(A) applied to the unit start vector [n], f given by its values [m] on the spectrum."""
        return self.basis @ (self.coordinates @ (values * self.coordinates[0]))


def _ritz_pairs(
    op: LinearOperator,
    num_steps: int,
    v0: Tensor | None,
    generator: torch.Generator | None = None,
) -> _RitzPairs:
    alpha, beta, Q = lanczos(op, num_steps, v0, generator)
    # A matrix of a few rows: the CPU in float64 is as fast as any device, and more accurate.
    diagonal, off = torch.stack([alpha, beta]).cpu().double()
    T = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    values, coordinates = torch.linalg.eigh(T)
    return _RitzPairs(values.to(Q), coordinates.to(Q), Q)


def _deflate(
    op: LinearOperator,
    num_steps: int,
    num_deflated: int,
    v0: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Leading Ritz vectors [n, k] and the part of the nuclear norm that belongs to them."""
    value = torch.zeros((), dtype=op.dtype, device=op.device)
    if num_deflated < 1:
        return value.new_empty(op.shape[0], 0), value
    ritz = _ritz_pairs(op, num_steps, v0, generator)
    values, U = ritz.leading(num_deflated)
    for sign, u in zip(values.sign(), U.unbind(1), strict=True):
        value = value + sign * (u @ _product(op, u))
    return U, value


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


def _product(op: LinearOperator, z: Tensor) -> Tensor:
    return op.matvec(z, create_graph=torch.is_grad_enabled())


def _random_signs(op: LinearOperator, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, op.shape[:1], generator=generator, device=generator.device)
    return bits.to(op.device, op.dtype) * 2 - 1
