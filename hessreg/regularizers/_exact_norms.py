"""Norms of an operator small enough to be formed."""

from __future__ import annotations

import torch
from torch import Tensor

from hessreg.curvature import LinearOperator, NonFiniteError, NormOrder

__all__ = ["exact_norm"]


def exact_norm(op: LinearOperator, ord: NormOrder) -> Tensor:
    """Norm of a symmetric operator from all its columns, differentiable if gradients are enabled.

    With H known, the norm is tr(W' H) for a matrix W that is held fixed (envelope theorem, or a
    subgradient where eigenvalues cross or vanish): sign(H) for "nuclear", H / |H| for "fro", a
    single dyad for "spectral" and "one". Eigenvalues below n eps of the largest are rounding error
    and get no gradient.

    Cost: n products at once and one with its graph ("spectral", "one"), n with their graph
    ("nuclear", "fro"), n^2 numbers, and the eigenvalues of an [n, n] matrix.

    Args:
        op: symmetric operator, (n, n).
        ord: "spectral", "nuclear", "one" or "fro".

    Returns:
        Scalar [].

    Raises:
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
        >>> round(exact_norm(H, "nuclear").item(), 4)
        4.0
    """
    identity = torch.eye(op.shape[0], dtype=op.dtype, device=op.device)
    if ord in ("nuclear", "fro"):
        H = _columns(op, identity)
        return (_direction(_finite(op, H.detach()), ord) * H).sum()
    H = _finite(op, op.matmat(identity))
    if ord == "one":
        column = identity[H.abs().sum(0).argmax()]
        return _columns(op, column[None]).abs().sum()
    values, vectors = _eigh(H)
    v = vectors[:, values.abs().argmax()].contiguous()
    return (_columns(op, v[None])[0] @ v).abs()


def _columns(op: LinearOperator, vectors: Tensor) -> Tensor:
    """Products with the rows of ``vectors`` [k, n], with their graph where one is wanted."""
    if not torch.is_grad_enabled():
        return op.matmat(vectors.mT.contiguous()).mT
    return torch.stack([op.matvec(v, create_graph=True) for v in vectors])


def _finite(op: LinearOperator, H: Tensor) -> Tensor:
    if not H.isfinite().all():
        check_finite = getattr(op, "check_finite", None)
        if check_finite is not None:
            check_finite(H.mT.contiguous())
        raise NonFiniteError("a product of the operator has NaN or infinity")
    return H


def _direction(H: Tensor, ord: NormOrder) -> Tensor:
    """The matrix W [n, n] with |H| = tr(W' H)."""
    if ord == "fro":
        norm = torch.linalg.vector_norm(H, dtype=torch.float64).to(H.dtype)
        return H / torch.where(norm > 0, norm, 1)
    values, vectors = _eigh(H)
    floor = len(values) * torch.finfo(H.dtype).eps * values.abs().max()
    return (vectors * torch.where(values.abs() > floor, values.sign(), 0)) @ vectors.mT


def _eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((0.5 * (H + H.mT)).double())
    return values.to(H), vectors.to(H)
