"""A Krylov space that grows, restarts and takes in new vectors: the state of an eigensolver."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hessreg.curvature.lanczos import lanczos_steps, norm_of, normalize, report_non_finite
from hessreg.curvature.operators import LinearOperator

__all__ = ["KrylovSpace", "RitzPairs", "random_signs", "random_vector"]

_CHUNK = 1 << 16  # columns of the basis rotated at a time
_BREAKDOWN = 4  # rounding errors of a product that a residual must exceed to be a direction


class RitzPairs(NamedTuple):
    """Eigenpairs of the operator projected on the space, on the CPU in float64.

    Attributes:
        values: [m].
        coordinates: [m, m], one vector a column, in the basis of the space.
        residuals: [m], norms of A y - theta y.
        inside: [m], the part of the residuals that more steps can lower.
    """

    values: Tensor
    coordinates: Tensor
    residuals: Tensor
    inside: Tensor

    def take(self, index: Tensor | slice) -> RitzPairs:
        """Some of the pairs, in the order of the index."""
        values, coordinates, residuals, inside = self
        return RitzPairs(values[index], coordinates[:, index], residuals[index], inside[index])


class KrylovSpace:
    """Orthonormal vectors, and the projection of a symmetric operator A on them.

    With Q [n, m] the vectors, q the next one and T the projection,

        A Q = Q T + q coupling' + U outside',

    U holding the deflated vectors and, when a search began anew, what was dropped of the residual
    then: vectors orthogonal to Q, of norm at most one. After a plain step only the last entry of
    ``coupling`` [m] is not zero; after a restart with Ritz vectors (Wu and Simon, 2000) all are.

    T holds the coefficients as they were computed. Symmetry makes those of each new product known
    beforehand, so the difference measures, at no cost, how far the operator is from symmetric.

    Args:
        op: symmetric operator, (n, n).
        capacity: most vectors to hold.
        deflated: orthonormal [n, d]; everything happens orthogonal to them.
        start: unit vector [n] orthogonal to them.
    """

    def __init__(self, op: LinearOperator, capacity: int, deflated: Tensor, start: Tensor) -> None:
        self.op = op
        self.num_deflated = d = deflated.shape[1]
        self.capacity = capacity
        # Rows: the deflated vectors, those of the space, the next one.
        self.basis = deflated.new_empty(d + capacity + 1, op.shape[0])
        self.basis[:d] = deflated.mT
        self.basis[d] = start
        self.size = 0
        self.projection = torch.empty(0, 0, dtype=torch.float64, device="cpu")
        self.outside = torch.empty(0, d, dtype=torch.float64, device="cpu")
        self.coupling = torch.empty(0, dtype=torch.float64, device="cpu")
        self.is_invariant = False  # the operator maps the space into itself, to rounding
        self.scale = 0.0  # norm of the operator, as far as it was seen
        self.asymmetry = 0.0
        self.noise = 0.0
        self._largest = self.basis.new_zeros(1, dtype=torch.float64)

    def is_complete(self) -> bool:
        """Whether the space is all there is beside the deflated vectors."""
        return self.size + self.num_deflated == self.op.shape[0]

    def extend(self, num_steps: int) -> None:
        """Adds as many vectors, fewer at an invariant subspace; waits for the device once.

        Raises:
            ValueError: the operator is not symmetric or not deterministic.
            NonFiniteError: NaN or infinity in a product.
        """
        first = self.num_deflated + self.size
        breakdown = _BREAKDOWN * torch.finfo(self.op.dtype).eps
        steps = self.basis, first, num_steps, breakdown, self._largest
        results = lanczos_steps(self.op, *steps)
        self._largest = results[-1][-1:]
        lengths = [len(result) for result in results]
        for i, row in enumerate(torch.cat(results).cpu().split(lengths)):
            if not torch.isfinite(row).all():
                report_non_finite(self.op, self.op.matvec(self.basis[first + i]))
            self._absorb(*row[:-1].tensor_split([-2]))
            if self.is_invariant:
                break
        self._require("symmetric, u' H v and v' H u differ", self.asymmetry)

    def require_deterministic(self) -> None:
        """Repeats the last product that was made.

        Raises:
            ValueError: it differs.
        """
        d, m = self.num_deflated, self.size
        residual = self.coupling[-1] + self.outside[-1, d:].sum()
        known = torch.cat([self.outside[-1, :d], self.projection[-1], residual[None]])
        product = self.op.matvec(self.basis[d + m - 1])
        expected = self.basis[: d + m + 1].mT @ known.to(product)
        self.noise = norm_of(product - expected).item()
        self._require("deterministic, two products with one vector differ", self.noise)

    def _require(self, what: str, difference: float) -> None:
        # What was dropped at a new search is not in the projection, but is no asymmetry.
        dropped = self.outside[:, self.num_deflated :].norm().item()
        limit = torch.finfo(self.op.dtype).eps ** 0.5 * self.scale + 2 * dropped
        if not difference <= limit:
            raise ValueError(
                f"op must be {what} by {difference:.3g} where |H| is about {self.scale:.3g}"
            )

    def _absorb(self, row: Tensor, ends: Tensor) -> None:
        d, m = self.num_deflated, self.size
        known, diagonal, residual = row[d : d + m], row[d + m], ends[0]
        self.scale = max(self.scale, row.norm().hypot(residual).item())
        if m:
            self.asymmetry = max(self.asymmetry, (known - self.coupling).abs().max().item())
        column = torch.cat([known, diagonal[None]])
        grown = torch.zeros(m + 1, m + 1, dtype=torch.float64, device="cpu")
        grown[:m, :m] = self.projection
        grown[m], grown[:, m] = column, column
        self.projection = grown
        self.size = m + 1
        dropped = row.new_zeros(self.outside.shape[1] - d)
        self.outside = torch.cat([self.outside, torch.cat([row[:d], dropped])[None]])
        self.coupling = row.new_zeros(m + 1)
        self.coupling[m] = residual
        self.is_invariant = bool(ends[1]) or self.is_complete()
        if self.is_invariant:
            self._drop_next()

    def ritz_pairs(self) -> RitzPairs:
        """Eigenpairs of the projection, in ascending order."""
        values, coordinates = torch.linalg.eigh(self.projection)
        outside = coordinates.mT @ self.outside
        deflated, dropped = outside.tensor_split([self.num_deflated], 1)
        inside = (coordinates.mT @ self.coupling).abs()
        # The deflated vectors are orthogonal to the next one, those dropped need not be.
        residuals = inside.hypot(deflated.norm(dim=1)) + dropped.abs().sum(1)
        self.scale = max(self.scale, values.abs().max().item())
        return RitzPairs(values, coordinates, residuals, inside)

    def restart(self, values: Tensor, coordinates: Tensor) -> None:
        """Keeps only Ritz pairs, values [p] and coordinates [m, p], and the next vector."""
        d, m, p = self.num_deflated, self.size, len(values)
        weights = coordinates.to(self.basis).mT
        rows = self.basis[d : d + m]
        for chunk in rows.split(_CHUNK, dim=1):
            chunk[:p] = weights @ chunk
        self.basis[d + p] = self.basis[d + m]
        self.size = p
        self.projection = torch.diag(values)
        self.coupling = coordinates.mT @ self.coupling
        self.outside = coordinates.mT @ self.outside

    def search_anew(self, start: Tensor) -> None:
        """Goes on from another vector [n], made orthogonal to the space, not from the residual."""
        self._drop_next()
        end = self.num_deflated + self.size
        self.basis[end] = orthogonal_part(start, self.basis[:end])

    def _drop_next(self) -> None:
        """The residual is no longer along the next vector, but along one that is not kept."""
        if self.coupling.any():
            self.outside = torch.cat([self.outside, self.coupling[:, None]], 1)
        self.coupling = torch.zeros_like(self.coupling)

    def vectors(self, coordinates: Tensor) -> Tensor:
        """The vectors [n, k] with coordinates [m, k] in the space."""
        d = self.num_deflated
        return self.basis[d : d + self.size].mT @ coordinates.to(self.basis)


def orthogonal_part(v: Tensor, basis: Tensor) -> Tensor:
    """The unit vector [n] along the part of v orthogonal to the rows of basis [m, n]."""
    for _ in range(4):  # where little is left of v, its rounding errors are not orthogonal
        v = normalize(torch.addmv(v, basis.mT, basis @ v, alpha=-1))
    return v


def random_vector(op: LinearOperator, generator: torch.Generator) -> Tensor:
    """Standard normal [n], drawn on the generator's device."""
    v = torch.randn(op.shape[0], dtype=op.dtype, device=generator.device, generator=generator)
    return v.to(op.device)


def random_signs(op: LinearOperator, k: int, generator: torch.Generator) -> Tensor:
    """Random signs [n, k], drawn on the generator's device."""
    shape = (op.shape[0], k)
    bits = torch.randint(
        0, 2, shape, generator=generator, device=generator.device, dtype=torch.int8
    )
    return bits.to(op.device, op.dtype) * 2 - 1
