"""Solvers of the corrected step that keep a handful of vectors, however many steps they take.

Both approximate p = Re z with (H + i eps) z = b, b = (1 + i mu eps) g: z solves the equation itself
in `shifted_minres`, its real part the normal equations in `damped_least_squares`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hessreg.curvature.lanczos import report_non_finite
from hessreg.curvature.operators import LinearOperator

__all__ = ["Solution", "damped_least_squares", "shifted_minres"]

_PATIENCE = 100  # steps in which the residual has to fall
_FALL = 0.999  # at least by this, where it never rises


class Solution(NamedTuple):
    """An approximate step.

    Attributes:
        step: p, [n].
        residual: |b - (H + i eps) z| / |b|, computed from the products with z.
        num_products: spent on both.
    """

    step: Tensor
    residual: float
    num_products: int


# ---- minimum residual ----------------------------------------------------------------------------


class _Rotation(NamedTuple):
    """[c, s; -conj(s), c], which takes a column (a, b) with real b to (r, 0)."""

    c: float = 1.0
    s: complex = 0j

    def apply(self, a: complex, b: complex) -> tuple[complex, complex]:
        return self.c * a + self.s * b, self.c * b - self.s.conjugate() * a

    @classmethod
    def eliminating(cls, a: complex, b: float) -> tuple[_Rotation, complex]:
        """The rotation and r; a is not zero."""
        length, phase = math.hypot(abs(a), b), a / abs(a)
        return cls(abs(a) / length, phase * (b / length)), phase * length


def shifted_minres(
    op: LinearOperator, g: Tensor, eps: float, mu: float, num_steps: int, tol: float
) -> Solution:
    """The least |b - (H + i eps) z| over the Krylov space of g, by short recurrences.

    Lanczos on the real H gives a real tridiagonal T; complex Givens rotations make T + i eps
    triangular (Paige and Saunders, 1975; Freund, 1990, for shifted systems). One product a step,
    and two for the residual.

    Args:
        op: symmetric operator H, (n, n).
        g: [n], of size about one.
        eps: shift, positive.
        mu: of the right-hand side.
        num_steps: at most.
        tol: of the residual of the recurrence.

    Raises:
        NonFiniteError: NaN or infinity in a product.
    """
    size = _norm(g)
    previous, v = torch.zeros_like(g), g / size
    directions = [torch.zeros_like(g, dtype=g.dtype.to_complex()) for _ in range(2)]
    w = torch.zeros_like(directions[0])
    older, newer = _Rotation(), _Rotation()
    beta, rest, steps, scale, before = 0.0, complex(1.0), 0, 0.0, torch.inf
    rounding = torch.finfo(g.dtype).eps / eps
    while steps < num_steps and abs(rest) > max(tol / 2, rounding * scale):
        if steps % _PATIENCE == 0:
            if abs(rest) > _FALL * before:
                break
            before = abs(rest)
        alpha, following, u = _lanczos_step(op, v, previous, beta)
        scale = max(scale, math.hypot(beta, alpha, following))
        steps += 1
        second, first = older.apply(0j, beta)
        first, diagonal = newer.apply(first, complex(alpha, eps))
        rotation, pivot = _Rotation.eliminating(diagonal, following)
        direction = (v - first * directions[1] - second * directions[0]) * (1 / pivot)
        kept, rest = rotation.apply(rest, 0j)
        w += kept * direction
        if following == 0:
            break
        directions = [directions[1], direction]
        older, newer = newer, rotation
        previous, v, beta = v, u / following, following
    z = (1 + 1j * mu * eps) * size * w
    return Solution(z.real.clone(), _residual(op, g, z, eps, mu), steps + 2)


def _lanczos_step(
    op: LinearOperator, v: Tensor, previous: Tensor, beta: float
) -> tuple[float, float, Tensor]:
    """The next diagonal and off-diagonal entry of T, and the next vector before it is scaled."""
    product = op.matvec(v)
    u = product - beta * previous
    alpha = torch.dot(v, u)
    u = u - alpha * v
    ends = torch.stack([alpha.double(), torch.linalg.vector_norm(u, dtype=torch.float64)])
    diagonal, following = ends.tolist()
    if not math.isfinite(diagonal + following):
        report_non_finite(op, product)
    vanishes = following <= torch.finfo(v.dtype).eps * math.hypot(diagonal, beta)
    return diagonal, 0.0 if vanishes else following, u


def _residual(op: LinearOperator, g: Tensor, z: Tensor, eps: float, mu: float) -> float:
    x, y = z.real.contiguous(), z.imag.contiguous()
    real = g - op.matvec(x) + eps * y
    imaginary = mu * eps * g - op.matvec(y) - eps * x
    return math.hypot(_norm(real), _norm(imaginary)) / (math.hypot(1, mu * eps) * _norm(g))


def _norm(v: Tensor) -> float:
    return torch.linalg.vector_norm(v, dtype=torch.float64).item()


# ---- conjugate gradients -------------------------------------------------------------------------


def damped_least_squares(
    op: LinearOperator,
    g: Tensor,
    eps: float,
    mu: float,
    num_steps: int,
    tol: float,
    x0: Tensor | None = None,
    preconditioner: Tensor | None = None,
) -> Solution:
    """The least |H p - g|^2 + eps^2 |p - mu g|^2, by conjugate gradients on H^2 + eps^2 I.

    In the form that never squares H in a recurrence (Hestenes and Stiefel, 1952: CGLS), so that
    rounding errors grow with |H| / eps and not with its square. Two products a step. z is
    p + i (H p - g) / eps, for which the real part of the residual is zero.

    Args:
        op: symmetric operator H, (n, n).
        g: [n], of size about one.
        eps: damping, positive.
        mu: see above.
        num_steps: at most.
        tol: of the residual.
        x0: first guess of p [n]; 0 if None.
        preconditioner: positive [n], about the diagonal of H^2 + eps^2 I.

    Raises:
        NonFiniteError: NaN or infinity in a product.
    """
    p = torch.zeros_like(g) if x0 is None else x0.clone()
    r = g.clone() if x0 is None else g - op.matvec(p)
    weights = torch.ones_like(g) if preconditioner is None else preconditioner.rsqrt()
    target = tol / 2 * math.hypot(1, mu * eps) * _norm(g)  # of |s|; the rest is for rounding
    s = _slope(op, g, p, r, eps, mu)
    spent = 1 + (x0 is not None)
    direction, last, scale = torch.zeros_like(g), 0.0, 0.0
    best, least, stuck = p, torch.inf, 0
    rounding = torch.finfo(g.dtype).eps / eps
    for _ in range(num_steps):
        lengths = torch.stack([_length(s), _length(weights * s), _length(r)])
        residual, size, misfit = lengths.tolist()
        best, least, stuck = (p, residual, 0) if residual < least else (best, least, stuck + 1)
        if residual <= max(target, rounding * scale * misfit) or stuck > _PATIENCE:
            break
        slope = weights * (weights * (s / size))  # of size about one, whatever H is
        direction = slope + (size / last if last else 0.0) * direction
        image = op.matvec(direction)
        moved, norm = torch.stack([_length(image), _length(direction)]).tolist()
        if not math.isfinite(moved):
            report_non_finite(op, image)
        scale = max(scale, moved / norm)
        curvature = math.hypot(moved / eps, norm)
        length = size / eps / curvature / curvature
        p, r, last = p + length * direction, r - length * image, size
        s = _slope(op, g, p, r, eps, mu)
        spent += 2
    p = p if _norm(s) < least else best
    s = _slope(op, g, p, g - op.matvec(p), eps, mu)
    return Solution(p, _norm(s) / (math.hypot(1, mu * eps) * _norm(g)), spent + 2)


def _slope(op: LinearOperator, g: Tensor, p: Tensor, r: Tensor, eps: float, mu: float) -> Tensor:
    """Half the negative gradient, over eps: (H r + eps^2 (mu g - p)) / eps."""
    product = op.matvec(r)
    s = product / eps + eps * (mu * g - p)
    if not math.isfinite(_norm(s)):
        report_non_finite(op, product)
    return s


def _length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dtype=torch.float64)
