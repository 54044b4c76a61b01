"""What a symmetric operator is on a Krylov space, and the corrected steps that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessreg.curvature._checks import (
    NonFiniteError,
    check_at_least,
    check_not_negative,
    full_precision,
)
from hessreg.curvature._krylov import KrylovSpace
from hessreg.curvature.lanczos import normalize
from hessreg.curvature.operators import LinearOperator
from hessreg.optim._corrected_matrix import resolvent_values

__all__ = ["ROUNDING", "KrylovCurvature", "check_damping", "check_vector", "corrected_inverse"]

_LOOK = 5  # steps between two looks at the residual, each of which waits for the device
ROUNDING = 4  # epsilons of a product


@dataclass(frozen=True)
class KrylovCurvature:
    """A symmetric operator H restricted to a Krylov space: H Q = Q T + beta[-1] r e_m'.

    Outside the space H counts as zero, so a space found for one gradient can serve the next ones.
    Vectors [n] and small matrices only: the operator itself is not kept.

    Attributes:
        basis: Q' [m, n], orthonormal rows in the operator's dtype and on its device; the first is
            along the start vector.
        alpha: the diagonal of T, [m]; like all that follows in float64 on the CPU.
        beta: its off-diagonal and, last, the norm of the residual, [m]; 0 at an invariant subspace.
        values: the Ritz values, ascending, [m].
        coordinates: the Ritz vectors in the basis, one a column, [m, m].

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([3.0, 0.0, -1.0])))
        >>> space = KrylovCurvature.build(H, torch.ones(3), num_steps=3)
        >>> space.correct(torch.ones(3), eps=1.0, mu=1.0).round(decimals=4).abs()
        tensor([0.4000, 1.0000, 0.0000])
    """

    basis: Tensor
    alpha: Tensor
    beta: Tensor
    values: Tensor
    coordinates: Tensor

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        op: LinearOperator,
        g: Tensor,
        num_steps: int,
        *,
        eps: float = 1.0,
        tol: float = 0.0,
    ) -> KrylovCurvature:
        """The space of g, Hg, ... by Lanczos with full reorthogonalisation.

        Args:
            op: symmetric operator H, (n, n).
            g: start [n]; the space of zero is empty.
            num_steps: products to spend, at most; no more than n are.
            eps: of the :meth:`residual` that ``tol`` is for.
            tol: stop once that residual is at most this, or is rounding error. 0 makes all steps,
                and waits for the device only once.

        Raises:
            TypeError: num_steps is not an int, or g not like the operator's vectors.
            ValueError: num_steps < 1; a g of the wrong shape; an operator that is not symmetric.
            NonFiniteError: NaN or infinity in g or in a product.
        """
        check_at_least(1, num_steps=num_steps)
        check_vector(op, g=g)
        check_damping(eps, 0.0)
        check_not_negative(tol=tol)
        size = g.detach().abs().max() if len(g) else g.new_zeros(())
        if size == 0:
            nothing = torch.empty(0, dtype=torch.float64, device="cpu")
            return cls(g.new_empty(0, len(g)), nothing, nothing, nothing, nothing.new_empty(0, 0))
        capacity = min(num_steps, op.shape[0])
        deflated = g.new_empty(op.shape[0], 0)
        with full_precision(op.device):
            space = KrylovSpace(op, capacity, deflated, normalize(g.detach() / size))
            while True:
                space.extend(min(_LOOK if tol else capacity, capacity - space.size))
                found = cls._of(space)
                target = max(tol, found._rounding(eps))  # below which more steps change nothing
                is_done = space.is_invariant or found._truncated(eps) <= target
                if is_done or space.size == capacity:
                    return found

    @classmethod
    def _of(cls, space: KrylovSpace) -> KrylovCurvature:
        T = space.projection
        beta = torch.cat([T.diagonal(1), space.coupling[-1:]])
        values, coordinates = torch.linalg.eigh(T)
        return cls(space.basis[: space.size], T.diagonal(), beta, values, coordinates)

    @property
    def num_products(self) -> int:
        """Products with the operator that it took: m."""
        return len(self.values)

    @property
    def vectors(self) -> Tensor:
        """The Ritz vectors, orthonormal columns [n, m]; made anew at each call."""
        return self.basis.mT @ self.coordinates.to(self.basis)

    @torch.no_grad()
    def correct(
        self, g: Tensor, eps: float = 1.0, mu: float = 1.0, saddle_free: bool = False
    ) -> Tensor:
        """The corrected step of any g [n]: Q f(T) Q'g + mu (g - QQ'g), without a wait.

        For the start vector it is the Galerkin solution of the system whose :meth:`residual` this
        object knows. NaN and infinity in g come out as NaN.

        Args:
            g: [n], in the dtype and on the device of the basis.
            eps: damping.
            mu: what the kernel of H gets, and all that is orthogonal to the space.
            saddle_free: |T| in place of T.
        """
        check_damping(eps, mu)
        with full_precision(g.device):
            size = g.detach().abs().max() if len(g) else g.new_ones(())
            size = torch.where(size == 0, 1, size)
            inside, outside = self._split(g.detach() / size)
            weights = corrected_inverse(self.values, eps, mu, saddle_free)
            function = (self.coordinates * weights) @ self.coordinates.mT
            step = (function.to(g.device) @ inside).to(g)
            return size * torch.addmv(mu * outside, self.basis.mT, step)

    def _split(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Q'g [m] in float64 and g - QQ'g [n], by Gram-Schmidt done twice.

        The first pass leaves rounding errors of g, which are no direction: with a large H they
        would outweigh all of f(T) Q'g, so they count as zero.
        """
        first = self.basis @ g
        outside = torch.addmv(g, self.basis.mT, first, alpha=-1)
        again = self.basis @ outside
        outside = torch.addmv(outside, self.basis.mT, again, alpha=-1)
        norms = torch.stack(
            [torch.linalg.vector_norm(v, dtype=torch.float64) for v in (g, outside)]
        )
        is_noise = norms[1] <= 16 * torch.finfo(g.dtype).eps * norms[0]
        return first.double() + again.double(), outside.masked_fill(is_noise, 0)

    def residual(self, eps: float = 1.0) -> float:
        """Of (H + i eps) z = (1 + i mu eps) g for the start vector, relative, without a product.

        The same for every mu: that of exact products, and what rounding adds to it. The step is
        off by at most |(1 + i mu eps) g| / eps times this: no singular value of H + i eps is below
        eps.
        """
        check_damping(eps, 0.0)
        return self._truncated(eps) + self._rounding(eps)

    def _truncated(self, eps: float) -> float:
        """What exact products would leave: beta[-1] |last entry of (T + i eps)^-1 e_1|."""
        if self.num_products == 0:
            return 0.0
        pivot, residual, last = 1 + 0j, 1.0, 0.0
        for alpha, beta in zip(self.alpha.tolist(), self.beta.tolist(), strict=True):
            pivot = complex(alpha, eps) - last * (last / pivot)
            residual *= abs(beta / pivot)
            last = beta
        return residual

    def _rounding(self, eps: float) -> float:
        if self.num_products == 0:
            return 0.0
        length = (self.coordinates[0] / self.values.hypot(self.values.new_tensor(eps))).norm()
        products = 1 + self.values.abs().max() * length
        return ROUNDING * torch.finfo(self.basis.dtype).eps * products.item()

    def corrected_values(
        self, eps: float = 1.0, mu: float = 1.0, saddle_free: bool = False
    ) -> Tensor:
        """What the Ritz values count as in the step: (l^2 + eps^2) / (l + mu eps^2), [m].

        With ``saddle_free`` |l| in place of l. Where the step is zero, at l = -mu eps^2, there is
        no such number, and it is 0.
        """
        check_damping(eps, mu)
        inverse = corrected_inverse(self.values, eps, mu, saddle_free)
        return torch.where(inverse == 0, 0, 1 / torch.where(inverse == 0, 1, inverse))


def corrected_inverse(values: Tensor, eps: float, mu: float, saddle_free: bool = False) -> Tensor:
    """f(l) = (l + mu eps^2) / (l^2 + eps^2) without overflow; with |l| if saddle_free.

    Example:
        >>> corrected_inverse(torch.tensor([1e30, 1.0, 0.0, -1.0]), eps=1.0, mu=1.0)
        tensor([1.0000e-30, 1.0000e+00, 1.0000e+00, 0.0000e+00])
    """
    return resolvent_values(values.abs() if saddle_free else values, 1.0, mu * eps, eps)


def check_damping(eps: float, mu: float) -> None:
    """Refuses eps that is not positive and mu that is negative, or either not finite.

    Example:
        >>> check_damping(0.0, 1.0)
        Traceback (most recent call last):
        ValueError: eps must be positive, got 0.0
    """
    check_not_negative(eps=eps, mu=mu)
    if eps == 0:
        raise ValueError(f"eps must be positive, got {eps}")


def check_vector(op: LinearOperator, **vectors: Tensor) -> None:
    """Refuses what is no finite vector [n] in the operator's dtype and on its device, by name."""
    for name, v in vectors.items():
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(v).__name__}")
        if v.shape != op.shape[:1]:
            raise ValueError(f"{name} must have shape ({op.shape[0]},), got {tuple(v.shape)}")
        if v.dtype != op.dtype:
            raise TypeError(f"{name} must have dtype {op.dtype}, got {v.dtype}")
        if v.device != op.device:
            raise ValueError(f"{name} must be on {op.device}, got {v.device}")
        if not torch.isfinite(v).all():
            raise NonFiniteError(f"{name} has NaN or infinity")
