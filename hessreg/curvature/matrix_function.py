"""Functions of a symmetric operator, applied to a vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hessreg.curvature._checks import (
    NonFiniteError,
    check_at_least,
    check_not_negative,
    of_operator,
)
from hessreg.curvature._krylov import KrylovSpace
from hessreg.curvature.lanczos import norm_of, start_vector
from hessreg.curvature.operators import LinearOperator

__all__ = ["FunctionProduct", "matrix_function"]

_LOOK = 5  # steps between two looks at the error, each of which waits for the device
_SLOWEST = 0.9  # ratio of two changes from which on they count as not falling at all


class FunctionProduct(NamedTuple):
    """A function of an operator, applied to a vector.

    Attributes:
        value: f(A) v, [n].
        error: estimated norm of its error.
        num_products: products spent.
    """

    value: Tensor
    error: float
    num_products: int


@of_operator
@torch.no_grad()
def matrix_function(
    op: LinearOperator,
    f: Callable[[Tensor], Tensor],
    v: Tensor,
    *,
    num_steps: int = 100,
    tol: float | None = None,
) -> FunctionProduct:
    """f(A) v by Lanczos: |v| Q f(T) e_1 with the Lanczos decomposition started at v.

    Exact once the Krylov space is invariant, and for polynomials of degree below the number of
    steps; for smooth f the error falls exponentially (Saad, 1992), at a kink of f on the spectrum,
    such as that of the modulus at 0, only as one over the number of steps. Nothing is inverted:
    ``f`` may be 1 / x as long as no Ritz value comes near 0.

    The error stated is an estimate, not a bound: the changes over the last two fifths of the steps,
    continued as a geometric series. What no step has seen yet it cannot know, such as an outlier in
    the first few steps, nor how accurately f itself is evaluated.

    Args:
        op: symmetric operator A, (n, n).
        f: maps eigenvalues [m] (CPU, float64) to as many values.
        v: [n].
        num_steps: products to spend, at most.
        tol: stop once the error is at most ``tol`` times the norm of the result; by default 1e-6
            in float32 and 1e-12 in float64.

    Returns:
        f(A) v, the estimate of its error, and the products spent.

    Raises:
        TypeError: num_steps is not an int.
        ValueError: num_steps < 1; a v that is zero, not finite or of the wrong shape; an f of the
            wrong shape; an operator that is not symmetric.
        NonFiniteError: NaN or infinity in a product, or in f at a Ritz value.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 4.0, 9.0])))
        >>> matrix_function(A, torch.sqrt, torch.ones(3)).value.round(decimals=4).tolist()
        [1.0, 2.0, 3.0]
    """
    check_at_least(1, num_steps=num_steps)
    tol = (1e-6 if op.dtype == torch.float32 else 1e-12) if tol is None else tol
    check_not_negative(tol=tol)
    start = start_vector(op, v, None)
    nothing = torch.empty(op.shape[0], 0, dtype=op.dtype, device=op.device)
    num_steps = min(num_steps, op.shape[0])
    space = KrylovSpace(op, num_steps, nothing, start)
    while True:
        space.extend(min(_LOOK, num_steps - space.size))
        coordinates, error = _apply(space, f)
        if space.is_invariant or space.size == num_steps or error <= tol * coordinates.norm():
            break
    norm = norm_of(v).item()
    value = norm * space.vectors(coordinates[:, None]).squeeze(1)
    return FunctionProduct(value, norm * error, space.size)


def _apply(space: KrylovSpace, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """The coordinates [m] of f(A) applied to the start, and the error of the vector."""
    coordinates = _first_column(space.projection, f)
    rounding = torch.finfo(space.op.dtype).eps * coordinates.norm().item()
    if space.is_invariant:
        return coordinates, rounding
    return coordinates, _tail(space.projection, f, coordinates) + rounding


def _tail(T: Tensor, f: Callable[[Tensor], Tensor], coordinates: Tensor) -> float:
    """The changes yet to come, from the last two, as a geometric series."""
    m = len(T)
    step = max(1, m // 5)
    if m < 3:
        return torch.inf
    earlier = [_first_column(T[:i, :i], f) for i in (m - step, m - 2 * step)]
    last = _distance(coordinates, earlier[0])
    ratio = last / max(_distance(*earlier), torch.finfo(T.dtype).tiny)
    return last / (1 - min(ratio, _SLOWEST))


def _distance(longer: Tensor, shorter: Tensor) -> float:
    return (
        (longer - torch.nn.functional.pad(shorter, (0, len(longer) - len(shorter)))).norm().item()
    )


def _first_column(T: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    theta, S = torch.linalg.eigh(T)
    values = f(theta)
    if values.shape != theta.shape:
        raise ValueError(f"f must return shape {tuple(theta.shape)}, got {tuple(values.shape)}")
    if not torch.isfinite(values).all():
        place = theta[~torch.isfinite(values)][0].item()
        raise NonFiniteError(f"f must be finite on the spectrum, it is not at {place:.6g}")
    return S @ (values.to(S) * S[0])
