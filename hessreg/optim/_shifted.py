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
from hessreg.optim._krylov_curvature import ROUNDING

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


class _Triangle:
    """R of the factorisation Q R = T + i eps, column by column, and the right-hand side Q' e_1."""

    def __init__(self) -> None:
        self._older, self._newer = _Rotation(), _Rotation()
        self.rest = complex(1.0)  # of the right-hand side: its modulus is the relative residual

    def column(self, above: float, diagonal: complex, below: float) -> tuple[complex, ...]:
        """Its three entries from the top, and the entry of the right-hand side."""
        second, first = self._older.apply(0j, above)
        first, pivot = self._newer.apply(first, diagonal)
        self._older = self._newer
        self._newer, pivot = _Rotation.eliminating(pivot, below)
        kept, self.rest = self._newer.apply(self.rest, 0j)
        return second, first, pivot, kept


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
    triangle = _Triangle()
    beta, steps, scale, before = 0.0, 0, 0.0, torch.inf
    rounding = torch.finfo(g.dtype).eps / eps
    while steps < num_steps and abs(triangle.rest) > max(tol / 2, rounding * scale):
        if steps % _PATIENCE == 0:
            if abs(triangle.rest) > _FALL * before:
                break
            before = abs(triangle.rest)
        alpha, following, u = _lanczos_step(op, v, previous, beta)
        scale = max(scale, math.hypot(beta, alpha, following))
        steps += 1
        second, first, pivot, kept = triangle.column(beta, complex(alpha, eps), following)
        direction = (v - first * directions[1] - second * directions[0]) * (1 / pivot)
        w += kept * direction
        if following == 0:
            break
        directions = [directions[1], direction]
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
    return _relative(math.hypot(_norm(real), _norm(imaginary)), g, eps, mu)


def _relative(residual: float, g: Tensor, eps: float, mu: float) -> float:
    """The residual over |b|, and what rounding may hide of it."""
    return residual / (math.hypot(1, mu * eps) * _norm(g)) + ROUNDING * torch.finfo(g.dtype).eps


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
    search = _Search(op, g, eps, mu, x0, preconditioner)
    target = tol / 2 * math.hypot(1, mu * eps) * _norm(g)  # of the slope; the rest is for rounding
    best, least, stuck = search.p, torch.inf, 0
    for step in range(num_steps + 1):
        residual, size, noise = search.sizes()
        stuck += 1
        if residual < least:
            best, least, stuck = search.p, residual, 0
        if step == num_steps or residual <= max(target, noise) or stuck > _PATIENCE:
            break
        search.advance(size)
    search.restart(best)
    return Solution(best, _relative(_norm(search.slope), g, eps, mu), search.num_products)


class _Search:
    """The state of conjugate gradients: p, the misfit g - H p, and half the negative gradient.

    The slope is over eps: (H misfit + eps^2 (mu g - p)) / eps, the length of which is that of the
    shifted system's residual.
    """

    def __init__(
        self,
        op: LinearOperator,
        g: Tensor,
        eps: float,
        mu: float,
        x0: Tensor | None,
        preconditioner: Tensor | None,
    ) -> None:
        self.op, self.g, self.eps, self.mu = op, g, eps, mu
        self.weights = torch.ones_like(g) if preconditioner is None else preconditioner.rsqrt()
        self.direction, self.last, self.scale = torch.zeros_like(g), 0.0, 0.0
        self.num_products = 0
        self.p, self.misfit = torch.zeros_like(g), g
        if x0 is not None:
            self.p, self.misfit = x0, g - self._times(x0)
        self._turn()

    def sizes(self) -> tuple[float, float, float]:
        """Lengths of the slope, plain and weighted, and of what rounding makes of it."""
        vectors = self.slope, self.weights * self.slope, self.misfit
        residual, size, misfit = torch.stack([_length(v) for v in vectors]).tolist()
        return residual, size, torch.finfo(self.g.dtype).eps * self.scale * misfit / self.eps

    def advance(self, size: float) -> None:
        """One step; ``size`` is the length of the weighted slope."""
        ahead = self.weights * (self.weights * (self.slope / size))  # about one, whatever H is
        momentum = size / self.last if self.last else 0.0
        self.direction = ahead + momentum * self.direction
        image = self._times(self.direction)
        moved, norm = torch.stack([_length(image), _length(self.direction)]).tolist()
        self.scale = max(self.scale, moved / norm)
        curvature = math.hypot(moved / self.eps, norm)
        length = size / self.eps / curvature / curvature
        self.p = self.p + length * self.direction
        self.misfit = self.misfit - length * image
        self.last = size
        self._turn()

    def restart(self, p: Tensor) -> None:
        """From p, with nothing that was only updated."""
        self.p, self.misfit = p, self.g - self._times(p)
        self._turn()

    def _turn(self) -> None:
        downhill = self.eps * (self.mu * self.g - self.p)
        self.slope = self._times(self.misfit) / self.eps + downhill

    def _times(self, v: Tensor) -> Tensor:
        product = self.op.matvec(v)
        self.num_products += 1
        if not math.isfinite(_norm(product)):
            report_non_finite(self.op, product)
        return product


def _length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dtype=torch.float64)
