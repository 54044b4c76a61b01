"""Differentiable norms of an operator small enough to be formed, and what every norm returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from hessreg.curvature._checks import of_operator
from hessreg.curvature.lanczos import report_non_finite
from hessreg.curvature.operators import LinearOperator
from hessreg.curvature.trace import unit_blocks

__all__ = [
    "NormEstimate",
    "NormOrder",
    "bilinear",
    "exact_norm",
    "product",
    "root_of_squares",
    "rounding",
    "scalar",
]

NormOrder = Literal["spectral", "nuclear", "one", "fro"]


class NormEstimate(NamedTuple):
    """A norm, how far it may be off, and where a later call on a nearby operator may start.

    Attributes:
        value: scalar [], differentiable if gradients are enabled and the operator is.
        start: vector [n] to pass as ``v0`` next time, or None where a start has no meaning.
        error: scalar []: the norm is within ``error`` of the value; where probes are random, in
            99 % of cases. Infinite where nothing is known.
        converged: whether there is such an error and, for a norm found by iteration, it is as
            small as the iteration was to make it.
    """

    value: Tensor
    start: Tensor | None
    error: Tensor
    converged: bool


@of_operator
def exact_norm(op: LinearOperator, ord: NormOrder = "spectral") -> NormEstimate:
    """Norm of a symmetric operator from all its columns, differentiable as :func:`norm` is.

    With H known, the norm is tr(W' H) for a matrix W that is held fixed (envelope theorem, or a
    subgradient where eigenvalues cross or vanish): sign(H) for "nuclear", H / |H| for "fro", a
    single dyad for "spectral" and "one".

    Cost: n products and one with its graph ("spectral", "one"), or n with their graph ("nuclear",
    "fro"); n^2 numbers; and the eigenvalues of an [n, n] matrix on the CPU ("spectral", "nuclear").

    Args:
        op: symmetric operator, (n, n).
        ord: "spectral", "nuclear", "one" or "fro".

    Returns:
        The norm [], no start, and what rounding makes of it as the error.

    Raises:
        ValueError: an unknown ``ord``, or a loss that cannot be differentiated three times.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
        >>> round(exact_norm(H, "nuclear").value.item(), 4)
        4.0
    """
    if ord not in get_args(NormOrder):
        raise ValueError(f"ord must be one of {get_args(NormOrder)}, got {ord!r}")
    exact: dict[str, Callable[[LinearOperator], NormEstimate]] = {
        "spectral": _spectral,
        "nuclear": _nuclear,
        "one": _one,
        "fro": _frobenius,
    }
    return exact[ord](op)


def _spectral(op: LinearOperator) -> NormEstimate:
    with torch.no_grad():
        values, V = torch.linalg.eigh(_symmetric(_columns(op)))
    v = V[:, values.abs().argmax()].to(op.device, op.dtype)
    value = bilinear(op, v, v).abs()
    return NormEstimate(value, None, rounding(value), True)


def _nuclear(op: LinearOperator) -> NormEstimate:
    H = _columns(op)
    values, V = torch.linalg.eigh(_symmetric(H))
    eps = torch.finfo(op.dtype).eps
    vanishing = values.abs() <= len(values) * eps * values.abs().max()
    sign_of_H = (V * values.sign().masked_fill(vanishing, 0)) @ V.mT
    error = values[vanishing].abs().sum() + 4 * eps * values.abs().sum()
    return NormEstimate((sign_of_H.to(H) * H).sum(), None, scalar(op, error), True)


def _one(op: LinearOperator) -> NormEstimate:
    with torch.no_grad():
        sums = torch.cat([_finite(op, op.matmat(E)).abs().sum(0) for E in unit_blocks(op)])
    x = torch.zeros_like(sums).index_fill_(0, sums.argmax(), 1)
    value = product(op, x).abs().sum()
    return NormEstimate(value, None, rounding(value), True)


def _frobenius(op: LinearOperator) -> NormEstimate:
    value = root_of_squares(_columns(op)).to(op.dtype)
    return NormEstimate(value, None, rounding(value), True)


def _columns(op: LinearOperator) -> Tensor:
    """The matrix [n, n], with its graph if gradients are enabled."""
    if not torch.is_grad_enabled():
        return _finite(op, torch.cat([op.matmat(E) for E in unit_blocks(op)], 1))
    columns = [product(op, e) for E in unit_blocks(op) for e in E.unbind(1)]
    return _finite(op, torch.stack(columns, 1))


def _finite(op: LinearOperator, H: Tensor) -> Tensor:
    if not H.isfinite().all():
        report_non_finite(op, H.detach().mT.contiguous())
    return H


def _symmetric(H: Tensor) -> Tensor:
    values = H.detach().cpu().double()
    return (values + values.mT) / 2


def root_of_squares(H: Tensor) -> Tensor:
    """The 2-norm [] of all entries in float64; at 0, all its derivatives are finite."""
    largest = H.detach().abs().amax().double()
    vanishes = (largest == 0).double()
    scale = largest + vanishes
    root = ((H / scale).double().square().sum() + vanishes).sqrt()
    return scale * (root - vanishes)


def product(op: LinearOperator, z: Tensor) -> Tensor:
    """H z [n], with its graph if gradients are enabled."""
    return op.matvec(z, create_graph=torch.is_grad_enabled())


def bilinear(op: LinearOperator, w: Tensor, z: Tensor, value: Tensor | None = None) -> Tensor:
    """The number w' H z [], with its graph if gradients are enabled; the value may be known."""
    if value is not None and not torch.is_grad_enabled():
        return value
    fast = getattr(op, "bilinear", None)
    if fast is not None:
        return cast(Tensor, fast(w, z, value))
    return w @ product(op, z)


def rounding(value: Tensor) -> Tensor:
    """The error of a norm [] that is exact but for rounding."""
    return 4 * torch.finfo(value.dtype).eps * value.detach().abs()


def scalar(op: LinearOperator, value: float | Tensor) -> Tensor:
    """A number as a tensor [] like the operator's products."""
    return torch.as_tensor(value, dtype=op.dtype, device=op.device)
