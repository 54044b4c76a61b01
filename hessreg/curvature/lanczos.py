"""Krylov iterations on symmetric operators: power iteration and Lanczos."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from hessreg.curvature._checks import NonFiniteError, check_at_least, of_operator
from hessreg.curvature.operators import LinearOperator
from hessreg.ops.spectral import lanczos_step

__all__ = [
    "deflated_lanczos",
    "lanczos",
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
    return deflated_lanczos(op, num_steps, start, start.new_empty(len(start), 0))


@torch.no_grad()
def deflated_lanczos(
    op: LinearOperator, num_steps: int, start: Tensor, deflated: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`lanczos`, of what the operator is between vectors orthogonal to some.

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
    breakdown = 64 * torch.finfo(op.dtype).eps
    largest, ends = basis.new_zeros(1, dtype=torch.float64), []
    for j in range(d, d + m):  # after a breakdown the vectors stay zero: no branch, so no wait
        result = lanczos_step(basis, op.matvec(basis[j]), j + 1, largest, breakdown)
        largest = result[-1:]
        ends.append(result[-4:-1])
    return _truncate(op, torch.stack(ends), basis[d:])


def _truncate(op: LinearOperator, ends: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `lanczos` returns, of alpha, beta and whether the space is invariant, [steps, 3]."""
    host = ends.cpu()
    bad = ~torch.isfinite(host).all(1)
    if bad.any():
        report_non_finite(op, op.matvec(basis[int(bad.nonzero()[0])]))
    broken = host[:, 2].nonzero()
    m = int(broken[0]) + 1 if len(broken) else len(host)
    alpha, beta, is_invariant = ends[:m].mT
    beta = beta.masked_fill(is_invariant > 0, 0)
    return alpha.to(op.dtype), beta.to(op.dtype), basis[:m].mT


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
        v0 = torch.randn(
            op.shape[0], dtype=op.dtype, device=generator.device, generator=generator
        ).to(op.device)
    elif not isinstance(v0, Tensor):
        raise TypeError(f"v0 must be a Tensor, got {type(v0).__name__}")
    elif v0.shape != op.shape[:1]:
        raise ValueError(f"v0 must have shape {op.shape[:1]}, got {tuple(v0.shape)}")
    elif not 0 < v0.abs().max() < float("inf"):
        raise ValueError("v0 must be finite and not zero")
    return normalize(v0.detach().to(op.dtype))


def normalize(v: Tensor) -> Tensor:
    """The unit vector along v [n], or zero."""
    norm = norm_of(v)
    return v / torch.where(norm > 0, norm, 1)


def norm_of(v: Tensor) -> Tensor:
    """Euclidean norm [] of v [n]."""
    # In float32 the squares of entries below 1e-23 or above 1e19 would be lost.
    return torch.linalg.vector_norm(v, dtype=torch.float64).to(v.dtype)
