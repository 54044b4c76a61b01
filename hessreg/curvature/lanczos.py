"""Krylov iterations on symmetric operators: power iteration and Lanczos."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from hessreg.curvature._checks import NonFiniteError, check_at_least, of_operator
from hessreg.curvature.operators import LinearOperator
from hessreg.ops.spectral import BREAKDOWN, lanczos_step

__all__ = [
    "deflated_lanczos",
    "lanczos",
    "lanczos_steps",
    "norm_of",
    "normalize",
    "power_iteration",
    "report_non_finite",
    "start_vector",
]


@of_operator
@torch.no_grad()
def power_iteration(
    op: LinearOperator,
    num_iterations: int,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Eigenvalue of largest modulus by power iteration.

    It does not converge if two eigenvalues lambda and -lambda share the largest modulus, as at a
    saddle: :func:`lanczos` does. No host synchronisation except in the check of ``v0``.

    Args:
        op: symmetric operator, (n, n).
        num_iterations: products to spend, at least 1.
        v0: start [n]; random if None.
        generator: source of the random start; None is one seeded with 0, so that calls agree and
            the global random state stays as it is.

    Returns:
        The Rayleigh quotient [] and the unit vector [n] it belongs to.

    Raises:
        TypeError: num_iterations is not an int.
        ValueError: num_iterations < 1, or a v0 that is zero, not finite or of the wrong shape.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> A = DenseOperator(torch.diag(torch.tensor([3.0, -1.0])))
        >>> value, vector = power_iteration(A, 30)
        >>> round(value.item(), 4), vector.abs().round(decimals=4).tolist()
        (3.0, [1.0, 0.0])
    """
    check_at_least(1, num_iterations=num_iterations)
    v = start_vector(op, v0, generator)
    for _ in range(num_iterations):
        product = op.matvec(v)
        eigenvalue = v @ product
        vector, v = v, normalize(product)
    return eigenvalue, vector


@of_operator
@torch.no_grad()
def lanczos(
    op: LinearOperator,
    num_steps: int,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lanczos tridiagonalisation with full reorthogonalisation.

    A Q = Q T + beta[-1] r e_m' with Q' Q = I, T tridiagonal and r a unit vector orthogonal to Q.
    Each product is orthogonalised to rounding by classical Gram-Schmidt, so T has no ghost
    eigenvalues. The iteration ends early at an invariant subspace: a residual below 64 eps of the
    largest product, whatever the scale of the operator.

    Args:
        op: symmetric operator A, (n, n).
        num_steps: products to spend, at least 1; no more than n are.
        v0: start [n], need not be a unit vector; random if None.
        generator: source of the random start; None is one seeded with 0, so that calls agree and
            the global random state stays as it is.

    Returns:
        alpha [m], the diagonal of T; beta [m], the off-diagonal and, last, the norm of the
        residual (0 at an invariant subspace); Q [n, m]. m <= min(num_steps, n).

    Raises:
        TypeError: num_steps is not an int.
        ValueError: num_steps < 1, or a v0 that is zero, not finite or of the wrong shape.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> saddle = DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
        >>> alpha, beta, Q = lanczos(saddle, 2)
        >>> T = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
        >>> torch.linalg.eigvalsh(T).round(decimals=6).tolist()
        [-1.0, 1.0]
    """
    check_at_least(1, num_steps=num_steps)
    start = start_vector(op, v0, generator)
    alpha, beta, Q = deflated_lanczos(op, num_steps, start, start.new_empty(len(start), 0))
    return alpha.to(Q), beta.to(Q), Q


@torch.no_grad()
def deflated_lanczos(
    op: LinearOperator, num_steps: int, start: Tensor, deflated: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`lanczos`, of what the operator is between vectors orthogonal to some.

    T is returned on the CPU, in float64.

    Args:
        op: symmetric operator, (n, n).
        num_steps: products to spend; no more than n - d are.
        start: unit vector [n], orthogonal to those.
        deflated: orthonormal [n, d], d < n.
    """
    d = deflated.shape[1]
    m = min(num_steps, op.shape[0] - d)
    basis = torch.empty(d + m + 1, op.shape[0], dtype=op.dtype, device=op.device)
    basis[:d] = deflated.mT
    basis[d] = start
    breakdown = BREAKDOWN * torch.finfo(op.dtype).eps
    largest = basis.new_zeros(1, dtype=torch.float64)
    results = lanczos_steps(op, basis, d, m, breakdown, largest)
    return _truncate(op, torch.stack([result[-4:-1] for result in results]), basis[d:])


def lanczos_steps(
    op: LinearOperator,
    basis: Tensor,
    first: int,
    num_steps: int,
    breakdown: float,
    largest: Tensor,
) -> list[Tensor]:
    """Multiplies rows of an orthonormal basis, each product becoming the next row.

    After a breakdown the rows are zero: no branch, so no wait for the device.

    Args:
        op: symmetric operator, (n, n).
        basis: [more than first + num_steps, n].
        first: the row to begin with.
        num_steps: products.
        breakdown: as :func:`~hessreg.ops.spectral.lanczos_step` takes it.
        largest: likewise.

    Returns:
        What that returns, for each step.
    """
    at_once = getattr(op, "lanczos_steps", None)
    if at_once is not None:
        found: list[Tensor] | None = at_once(basis, first, num_steps, breakdown, largest)
        if found is not None:
            return found
    results = []
    for row in range(first, first + num_steps):
        results.append(lanczos_step(basis, op.matvec(basis[row]), row + 1, largest, breakdown))
        largest = results[-1][-1:]
    return results


def _truncate(op: LinearOperator, ends: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is returned, of alpha, beta and whether the space is invariant, [steps, 3]."""
    rows = ends.tolist()
    for v, row in zip(basis, rows, strict=False):
        if not math.isfinite(sum(row)):
            report_non_finite(op, op.matvec(v))
    m = next((i for i, row in enumerate(rows, 1) if row[2]), len(rows))
    T = [(alpha, 0.0 if is_invariant else beta) for alpha, beta, is_invariant in rows[:m]]
    alpha, beta = torch.tensor(T, dtype=torch.float64, device="cpu").mT
    return alpha, beta, basis[:m].mT


def report_non_finite(op: LinearOperator, product: Tensor) -> NoReturn:
    """Raises NonFiniteError that says where a product is not finite, if the operator knows.

    Args:
        op: symmetric operator, (n, n).
        product: [n], or several, [k, n].
    """
    check_finite = getattr(op, "check_finite", None)
    if check_finite is not None:
        check_finite(product)
    raise NonFiniteError("a product of the operator has NaN or infinity")


def start_vector(
    op: LinearOperator, v0: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """The unit vector [n] along v0, checked, or a random one."""
    if v0 is None:
        generator = generator or torch.Generator().manual_seed(0)
        random = torch.randn(
            op.shape[0], dtype=op.dtype, device=generator.device, generator=generator
        )
        return normalize(random.to(op.device))
    if not isinstance(v0, Tensor):
        raise TypeError(f"v0 must be a Tensor, got {type(v0).__name__}")
    if v0.shape != op.shape[:1]:
        raise ValueError(f"v0 must have shape {op.shape[:1]}, got {tuple(v0.shape)}")
    v0 = v0.detach().to(op.dtype)
    norm = norm_of(v0)
    if not 0 < norm.item() < math.inf:
        raise ValueError("v0 must be finite and not zero")
    return v0 / norm


def normalize(v: Tensor) -> Tensor:
    """The unit vector along v [n], or zero."""
    norm = norm_of(v)
    return v / torch.where(norm > 0, norm, 1)


def norm_of(v: Tensor) -> Tensor:
    """Euclidean norm [] of v [n]."""
    # In float32 the squares of entries below 1e-23 or above 1e19 would be lost.
    return torch.linalg.vector_norm(v, dtype=torch.float64).to(v.dtype)
