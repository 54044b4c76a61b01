"""Trace of a symmetric operator from a few products, with its error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from hessreg.curvature._checks import NonFiniteError, check_at_least, of_operator
from hessreg.curvature._krylov import random_signs
from hessreg.curvature._statistics import Estimate, half_width
from hessreg.curvature.operators import LinearOperator

__all__ = ["TraceMethod", "trace"]

TraceMethod = Literal["hutch++", "hutchinson"]

_BLOCK = 32  # vectors multiplied at once


@of_operator
@torch.no_grad()
def trace(
    op: LinearOperator,
    *,
    method: TraceMethod = "hutch++",
    num_products: int = 96,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Sum of the eigenvalues.

    "hutchinson" (Hutchinson, 1989): the mean of z' H z over random signs z; its error falls as the
    root of the number of products. "hutch++" (Meyer, Musco, Musco and Woodruff, 2021) sums z' H z
    exactly over a basis of what H makes of a third of the products, and leaves only what is
    orthogonal to it to the probes: much better where a few eigenvalues dominate. Both are unbiased.
    From n products on, the diagonal is summed instead: exact to rounding.

    Args:
        op: symmetric operator, (n, n).
        method: "hutch++" or "hutchinson".
        num_products: products to spend, at most; at least 6 for "hutch++", 2 for "hutchinson".
        generator: source of the random signs; None is one seeded with 0, so that calls agree and
            the global random state stays as it is.

    Returns:
        The trace, and half the width of its 99 % confidence interval (Student's t over the probes,
        and rounding).

    Raises:
        TypeError: num_products is not an int.
        ValueError: too few products, or an unknown method.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([3.0, -1.0, 2.0])))
        >>> float(trace(H))
        4.0
    """
    if method not in get_args(TraceMethod):
        raise ValueError(f"method must be one of {get_args(TraceMethod)}, got {method!r}")
    check_at_least(6 if method == "hutch++" else 2, num_products=num_products)
    generator = generator or torch.Generator().manual_seed(0)
    if num_products >= op.shape[0]:
        return _estimate(op, _diagonal(op), None)
    if method == "hutchinson":
        return _estimate(op, None, _quadratic(op, random_signs(op, num_products, generator)))
    return _hutch_plus_plus(op, num_products // 3, generator)


def _hutch_plus_plus(op: LinearOperator, m: int, generator: torch.Generator) -> Estimate:
    sketch = torch.cat([op.matmat(S) for S in random_signs(op, m, generator).split(_BLOCK, 1)], 1)
    _require_finite(sketch)
    Q = torch.linalg.qr(sketch).Q
    G = random_signs(op, m, generator)
    G -= Q @ (Q.mT @ G)
    return _estimate(op, _quadratic(op, Q), _quadratic(op, G))


def _quadratic(op: LinearOperator, V: Tensor) -> Tensor:
    """Values v' H v in float64 for the columns of V [n, k]: [k]."""
    parts = [(v * op.matmat(v)).sum(0, dtype=torch.float64) for v in V.split(_BLOCK, dim=1)]
    return torch.cat(parts).cpu()


def _diagonal(op: LinearOperator) -> Tensor:
    parts = [_quadratic(op, E) for E in unit_blocks(op)]
    return torch.cat(parts)


def unit_blocks(op: LinearOperator) -> Iterator[Tensor]:
    """The columns of the identity, [n, k] at a time."""
    n = op.shape[0]
    for first in range(0, n, _BLOCK):
        E = torch.zeros(n, min(_BLOCK, n - first), dtype=op.dtype, device=op.device)
        E[first:].fill_diagonal_(1)
        yield E


def _estimate(op: LinearOperator, exact: Tensor | None, samples: Tensor | None) -> Estimate:
    """The sum of the exact terms [k] and the mean of the samples [m]."""
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    exact = zero if exact is None else exact
    rest = zero if samples is None else samples
    value = exact.sum() + rest.mean()
    _require_finite(value)
    rounding = 4 * torch.finfo(op.dtype).eps * (exact.abs().sum() + rest.abs().mean())
    error = rounding + (0.0 if samples is None else half_width(samples))
    return Estimate(value.item(), error.item())


def _require_finite(tensor: Tensor) -> None:
    if not torch.isfinite(tensor.sum()):
        raise NonFiniteError("a product of the operator has NaN or infinity")
