"""Eigenvalues of a symmetric operator, with residuals and a check that none was missed."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hessreg.curvature._checks import check_at_least, check_not_negative, of_operator
from hessreg.curvature._krylov import KrylovSpace, RitzPairs, orthogonal_part, random_vector
from hessreg.curvature.lanczos import normalize
from hessreg.curvature.operators import LinearOperator

__all__ = ["Eigenvalues", "Which", "check_symmetric", "default_tol", "eigenvalues"]

Which = Literal["LA", "SA", "LM"]

_LOOK = 5  # steps between two looks at the Ritz values, each of which waits for the device
_WARM_NOISE = 0.1  # a start that is an eigenvector spans a space from which no other is seen


class Eigenvalues(NamedTuple):
    """Eigenpairs, best first.

    Attributes:
        values: [k].
        vectors: [n, k], orthonormal.
        residuals: [k], norms of H v - value v.
        converged: bool [k]: the residual is at most ``tol`` times the norm of the operator and,
            for k > 1, a search among what is orthogonal to all k found nothing better. False means
            that the value is not to be trusted.
        num_products: products spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_products: int


@of_operator
@torch.no_grad()
def eigenvalues(
    op: LinearOperator,
    k: int = 1,
    which: Which = "LA",
    *,
    tol: float | None = None,
    max_products: int | None = None,
    v0: Tensor | None = None,
    deflate: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigenvalues:
    """The k largest or smallest eigenvalues, each as often as it occurs.

    Thick-restart Lanczos (Wu and Simon, 2000) with full reorthogonalisation, so that no eigenvalue
    is found more often than it occurs. A Krylov space holds one vector of a multiple eigenvalue:
    for k > 1, the search goes on from a random vector orthogonal to the k pairs found until it
    finds nothing better.

    Everything is relative to the norm of the operator. An eigenvalue is off by at most its
    residual, and by the square of the residual over the gap to the next one where that is less.

    Cost: for k = 1 the products of one Lanczos iteration, as few as the residual allows, and one
    that shows whether the operator is deterministic. For k > 1 at least as many as for k + 1
    values. Memory: k + max(k, 30) + 1 vectors.

    Args:
        op: symmetric operator, (n, n).
        k: how many, at most n less the deflated vectors.
        which: "LA" the largest, in descending order; "SA" the smallest, in ascending order; "LM"
            those of largest modulus, that first.
        tol: largest residual relative to the norm of the operator; by default 5e-6 in float32 and
            1e-8 in float64.
        max_products: give up after as many, at least k + 1; 1000 + 100 k if None.
        v0: start [n], or [n, j] for the span of j vectors, such as the vectors found at an earlier
            training step. Some noise is added: from an eigenvector alone no other is ever seen.
        deflate: linearly independent vectors, [n] or [n, j], to stay orthogonal to: eigenvectors
            found before. If they are no eigenvectors, the residuals say so.
        generator: source of the random vectors; None is one seeded with 0, so that calls agree and
            the global random state stays as it is.

    Returns:
        The eigenpairs. Those not even approached within ``max_products`` are NaN, with vectors 0.

    Raises:
        TypeError: a count that is not an int, vectors that are no tensor or of another dtype.
        ValueError: a count out of range, an unknown ``which``, vectors of the wrong shape or
            device, zero, not finite or dependent; an operator that is not symmetric or not
            deterministic.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([5.0, 5.0, 1.0, -7.0])))
        >>> found = eigenvalues(H, k=2)
        >>> found.values.round(decimals=4).tolist(), found.converged.tolist()
        ([5.0, 5.0], [True, True])
    """
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {get_args(Which)}, got {which!r}")
    check_at_least(1, k=k)
    tol = default_tol(op.dtype) if tol is None else tol
    check_not_negative(tol=tol)
    max_products = 1000 + 100 * k if max_products is None else max_products
    check_at_least(k + 1, max_products=max_products)
    generator = generator or torch.Generator().manual_seed(0)
    deflated = _deflated(op, deflate, k)
    start = orthogonal_part(_start(op, v0, generator), deflated.mT)
    capacity = min(k + max(k, 30), op.shape[0] - deflated.shape[1])
    space = KrylovSpace(op, capacity, deflated, start)
    return _Search(space, k, which, tol, max_products, generator).run()


@of_operator
@torch.no_grad()
def check_symmetric(
    op: LinearOperator, *, num_steps: int = 8, generator: torch.Generator | None = None
) -> float:
    """Refuses an operator that is not symmetric or not deterministic.

    Compares u' H v with v' H u for all pairs of ``num_steps`` Lanczos vectors, and two products
    with one vector. :func:`eigenvalues` does the same with the vectors it has.

    Args:
        op: operator, (n, n).
        num_steps: products to spend, and one more.
        generator: source of the random start.

    Returns:
        The largest difference relative to the norm of the operator: rounding error.

    Raises:
        TypeError: num_steps is not an int.
        ValueError: num_steps < 1, or a difference above the root of the machine precision.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> check_symmetric(DenseOperator(torch.eye(3)))
        0.0
    """
    check_at_least(1, num_steps=num_steps)
    generator = generator or torch.Generator().manual_seed(0)
    nothing = torch.empty(op.shape[0], 0, dtype=op.dtype, device=op.device)
    num_steps = min(num_steps, op.shape[0])
    space = KrylovSpace(op, num_steps, nothing, normalize(random_vector(op, generator)))
    space.extend(num_steps)
    space.require_deterministic()
    return max(space.asymmetry, space.noise) / max(space.scale, torch.finfo(torch.float64).tiny)


class _Search:
    """Grows, restarts and renews a Krylov space until the wanted pairs are there."""

    def __init__(
        self,
        space: KrylovSpace,
        k: int,
        which: Which,
        tol: float,
        max_products: int,
        generator: torch.Generator,
    ) -> None:
        self.space = space
        self.k = k
        self.which = which
        self.tol = tol
        self.max_products = max_products
        self.generator = generator
        self.num_products = 0
        self.verified = False
        # The values best when the search last began anew.
        self.reference = torch.empty(0, dtype=torch.float64, device="cpu")

    def run(self) -> Eigenvalues:
        self.num_products = 1  # that which is repeated
        pairs = self._look()
        self.space.require_deterministic()
        while not self._is_done(pairs):
            self._make_room(pairs)
            pairs = self._look()
        return self._result(pairs)

    def _look(self) -> RitzPairs:
        """A few steps; then the Ritz pairs, best first."""
        space = self.space
        # A vector added to an invariant space is often an eigenvector: more would be products with
        # zero. Where it is to prove that nothing was missed, it gets its steps.
        steps = 1 if space.is_invariant and len(self.reference) < self.k else _LOOK
        steps = min(steps, space.capacity - space.size, self.max_products - self.num_products)
        space.extend(steps)
        self.num_products += steps
        pairs = space.ritz_pairs()
        return pairs.take(self._key(pairs.values).argsort(descending=True, stable=True))

    def _key(self, values: Tensor) -> Tensor:
        """Larger is better."""
        if self.which == "LM":
            return values.abs()
        return values if self.which == "LA" else -values

    def _is_done(self, pairs: RitzPairs) -> bool:
        if self.space.is_complete():
            self.verified = True
        elif self._has_converged(pairs):
            self.verified = self.k == 1 or self._nothing_was_missed(pairs)
        return self.verified or self.num_products >= self.max_products

    def _has_converged(self, pairs: RitzPairs) -> bool:
        # Half, because a new search turns the pairs a little among themselves.
        limit = (1.0 if self.k == 1 else 0.5) * self.tol * self.space.scale
        return len(pairs.values) >= self.k and bool((pairs.inside[: self.k] <= limit).all())

    def _nothing_was_missed(self, pairs: RitzPairs) -> bool:
        """Whether the new search settled on something no better than the k pairs it began with."""
        k, limit = self.k, self.tol * self.space.scale
        found_again = self._is_reference(pairs) and len(pairs.values) > k
        return found_again and pairs.inside[k].item() <= limit

    def _is_reference(self, pairs: RitzPairs) -> bool:
        if len(self.reference) < self.k:
            return False
        change = (self._key(pairs.values[: self.k]) - self._key(self.reference)).abs().max()
        return change.item() <= self.tol * self.space.scale

    def _make_room(self, pairs: RitzPairs) -> None:
        space, k = self.space, self.k
        converged = self._has_converged(pairs)
        if space.is_invariant or (converged and not self._is_reference(pairs)):
            self._keep(pairs, min(k, space.size))
            self.reference = pairs.values[:k]
            space.search_anew(random_vector(space.op, self.generator))
        elif space.size == space.capacity:
            self._keep(pairs, k + (space.capacity - k) // 3)

    def _keep(self, pairs: RitzPairs, p: int) -> None:
        self.space.restart(pairs.values[:p], pairs.coordinates[:, :p])

    def _result(self, pairs: RitzPairs) -> Eigenvalues:
        space, k = self.space, self.k
        limit = self.tol * space.scale
        floor = torch.finfo(space.op.dtype).eps * space.scale  # of the products
        found = min(k, space.size)
        values = torch.full((k,), torch.nan, dtype=torch.float64, device="cpu")
        residuals = torch.full((k,), torch.inf, dtype=torch.float64, device="cpu")
        values[:found] = pairs.values[:found]
        residuals[:found] = pairs.residuals[:found].clamp_min(floor)
        converged = (pairs.residuals[:found] <= limit) & self.verified
        vectors = space.vectors(pairs.coordinates[:, :found])
        return Eigenvalues(
            values.to(vectors),
            torch.nn.functional.pad(vectors, (0, k - found)),
            residuals.to(vectors),
            torch.nn.functional.pad(converged, (0, k - found)).to(vectors.device),
            self.num_products,
        )


def _start(op: LinearOperator, v0: Tensor | None, generator: torch.Generator) -> Tensor:
    noise = normalize(random_vector(op, generator))
    if v0 is None:
        return noise
    columns = _check_columns(op, "v0", v0)
    return normalize(normalize(columns.sum(1)) + _WARM_NOISE * noise)


def _deflated(op: LinearOperator, deflate: Tensor | None, k: int) -> Tensor:
    """An orthonormal basis [n, d] of what to stay orthogonal to."""
    n = op.shape[0]
    empty = torch.empty(n, 0, dtype=op.dtype, device=op.device)
    deflate = empty if deflate is None else _check_columns(op, "deflate", deflate)
    d = deflate.shape[1]
    if k > n - d:
        raise ValueError(f"k must be at most {n - d}, n less the deflated vectors, got {k}")
    U, stretch, _ = torch.linalg.svd(deflate, full_matrices=False)
    if d and stretch[-1] <= torch.finfo(op.dtype).eps ** 0.5:
        raise ValueError(f"deflate must have linearly independent columns, got {d} dependent ones")
    return U


def _check_columns(op: LinearOperator, name: str, V: Tensor) -> Tensor:
    """The vector [n] or the columns [n, j], scaled to unit vectors [n, j]."""
    if not isinstance(V, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(V).__name__}")
    n = op.shape[0]
    if V.shape[:1] != (n,) or V.dim() > 2:
        raise ValueError(f"{name} must have shape ({n},) or ({n}, j), got {tuple(V.shape)}")
    if V.dtype != op.dtype:
        raise TypeError(f"{name} must have dtype {op.dtype}, got {V.dtype}")
    if V.device != op.device:
        raise ValueError(f"{name} must be on {op.device}, got {V.device}")
    V = V.detach().reshape(n, -1)
    largest = V.abs().amax(0)
    if not ((largest > 0) & (largest < torch.inf)).all():
        raise ValueError(f"{name} must be finite, and no column zero")
    return torch.nn.functional.normalize(V / largest, dim=0)


def default_tol(dtype: torch.dtype) -> float:
    """Largest residual of an eigenpair, relative to the norm of the operator."""
    return 5e-6 if dtype == torch.float32 else 1e-8
