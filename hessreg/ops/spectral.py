r"""Dense batched symmetric eigenproblems: power iteration, Lanczos, eigenvalues, exact norms.

Five operators carry the family, on matrices ``[batch, n, n]`` of which a whole iteration runs in
one call. ``symmetric_eigh`` and ``tridiagonal_eigh`` return what their derivatives need; those of
``symmetric_eigvalsh`` and of the vector of ``power_iteration`` go through ``symmetric_eigh``, and
``lanczos`` is differentiated as plain torch.

With ``A = V diag(l) V'``, ``K = V' dA V`` and ``F_ij = 1 / (l_j - l_i)``: ``dl = diag(K)`` and
``dV = V (F * K)``. Where eigenvalues are as good as equal (``gap_tolerance`` of the largest), F is
zero: then no derivative of any order is infinite, and sums over all eigenvalues of a group, such as
norms, keep their exact derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hessreg import _backend
from hessreg.ops._registry import (
    Arguments,
    Operator,
    constant_while_compiling,
    is_tracked,
    reverse_of,
)

_COMPUTED = (torch.float32, torch.float64)
_DTYPES = (torch.float16, torch.bfloat16, *_COMPUTED)
_NORMS = ("spectral", "nuclear", "one", "fro")
BREAKDOWN = 64  # rounding errors of the largest product that Lanczos takes for zero
_LARGEST_KERNEL = 128  # rows; beyond, LAPACK and its kin are as fast


# ---- reference ---------------------------------------------------------------------------------


def _column(x: Tensor, dims: int) -> Tensor:
    """One number for each matrix, ready to multiply it."""
    return x.reshape(-1, *[1] * dims)


def _poison(*tensors: Tensor) -> Tensor:
    """0 for each matrix of the batch, NaN where something of it is not finite."""
    finite = [t.detach().flatten(1).isfinite().all(1) for t in tensors]
    zero = tensors[0].new_zeros(tensors[0].shape[0])
    return torch.where(functools.reduce(torch.logical_and, finite), zero, torch.nan)


def _largest(a: Tensor) -> Tensor:
    """The largest magnitude of each matrix or vector, 1 where that is zero."""
    flat = a.detach().abs().flatten(1)
    if flat.shape[1] == 0:
        return flat.new_ones(len(flat))
    largest = flat.amax(1)
    return torch.where(largest > 0, largest, 1)


def _length(w: Tensor, is_zero: Tensor) -> Tensor:
    """The norms of vectors ``[batch, n]``, 1 for those that are zero."""
    return torch.where(is_zero, 1, w.square().sum(-1)).sqrt()


def _times(a: Tensor, v: Tensor) -> Tensor:
    return (a @ v[..., None])[..., 0]


def _orthogonalised(w: Tensor, basis: Tensor) -> Tensor:
    """Twice, against the columns of a basis ``[batch, n, k]``: once leaves rounding errors."""
    for _ in range(2):
        w = w - _times(basis, _times(basis.mT, w))
    return w


def _unit_or_new(w: Tensor, threshold: Tensor | float, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of w and w / |w|; where that is too short, 0 and the unit vector farthest off."""
    is_zero = w.detach().square().sum(-1).sqrt() <= threshold
    norm = _length(w, is_zero)
    least = basis.detach().square().sum(-1).argmin(-1)
    unit = (torch.arange(w.shape[-1], device=w.device) == least[:, None]).to(w.dtype)
    new = _orthogonalised(unit, basis)
    new = new / _length(new, least < 0)[:, None]
    vector = torch.where(is_zero[:, None], new, w / norm[:, None])
    return torch.where(is_zero, 0, norm), vector


def _iterate(a: Tensor, v0: Tensor, num_iterations: int) -> list[Tensor]:
    scale = _largest(a)
    scaled = a / _column(scale, 2)
    smallest = torch.finfo(a.dtype).tiny / torch.finfo(a.dtype).eps
    start = v0 / _column(_largest(v0), 1)
    v = _unit_or_new(start, 0.0, start.new_empty(*start.shape, 0))[1]
    v = v + _column(_poison(a, v0), 1)
    for _ in range(num_iterations):
        y = _times(scaled, v)
        stays = y.square().sum(-1) < smallest
        v = torch.where(stays[:, None], v, y / _length(y, stays)[:, None])
    y = _times(scaled, v)
    value = (v * y).sum(-1)
    residual = (y - value[:, None] * v).square().sum(-1).sqrt()
    return [value * scale, v, residual * scale]


def power_iteration_reference(a: Tensor, v0: Tensor, num_iterations: int) -> list[Tensor]:
    """The iteration by definition; its derivative is that of the eigenpair it converged to."""
    if a.shape[-1] == 0:
        return _power_iteration_fake(a, v0, num_iterations, fill=0)
    value, vector, residual = _iterate(a.detach(), v0.detach(), num_iterations)
    if not is_tracked([a]):
        return [value, vector, residual]
    values, vectors = symmetric_eigh_reference(a)
    chosen = _chosen(vectors, vector)
    moving = (vectors * chosen[:, None]).sum(-1)
    return [value + _motion((values * chosen.square()).sum(-1)), vector + _motion(moving), residual]


def lanczos_reference(a: Tensor, v0: Tensor, num_steps: int) -> list[Tensor]:
    """A Q = Q T + r e_m' by definition, orthogonalised twice."""
    n = a.shape[-1]
    if min(num_steps, n) == 0:
        return _lanczos_fake(a, v0, num_steps)
    scale = _largest(a)
    scaled = (a + a.mT) / (2 * _column(scale, 2))
    threshold = 64 * torch.finfo(a.dtype).eps * scaled.detach().square().sum((1, 2)).sqrt()
    start = v0 / _column(_largest(v0), 1) + _column(_poison(a, v0), 1)
    basis = start[..., None][..., :0]
    _, q = _unit_or_new(start, 0.0, basis)
    alpha, beta = [], []
    for step in range(min(num_steps, n)):
        basis = torch.cat([basis, q[..., None]], -1)
        w = _times(scaled, q)
        alpha.append((q * w).sum(-1))
        w = _orthogonalised(w, basis)
        if step + 1 < n:
            norm, q = _unit_or_new(w, threshold, basis)
        else:  # the vectors span everything: what is left is rounding error
            norm = 0 * alpha[-1]
        beta.append(norm)
    return [torch.stack(alpha, -1) * scale[:, None], torch.stack(beta, -1) * scale[:, None], basis]


def _tridiagonal(alpha: Tensor, beta: Tensor) -> Tensor:
    t = torch.diag_embed(alpha)
    return t + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1) if alpha.shape[-1] > 1 else t


def tridiagonal_eigh_reference(alpha: Tensor, beta: Tensor) -> list[Tensor]:
    """The eigenpairs of the dense matrix."""
    return symmetric_eigh_reference(_tridiagonal(alpha, beta))


def symmetric_eigvalsh_reference(a: Tensor) -> Tensor:
    """The eigenvalues by LAPACK."""
    return symmetric_eigh_reference(a)[0]


def symmetric_eigh_reference(a: Tensor) -> list[Tensor]:
    """The eigenpairs by LAPACK, with derivatives that are finite also at repeated eigenvalues.

    Two steps of iterative refinement (Ogita and Aishima 2018) change no value, but each doubles the
    order to which the result follows a motion of ``a``: after two, three derivatives are exact.
    """
    lower = a.detach().tril()
    poison = _poison(lower)
    values, vectors = torch.linalg.eigh(torch.where(_column(poison, 2) == 0, lower, 0))
    values, vectors = values + _column(poison, 1), vectors + _column(poison, 2)
    if not is_tracked([a]):
        return [values, vectors]
    symmetric = (a + a.mT) / 2
    moving = vectors
    for _ in range(2):
        moving = _refined(symmetric, values, moving)
    return [_rayleigh(symmetric, values, moving)[0], moving]


def _motion(x: Tensor) -> Tensor:
    """What moves with the inputs: a value of zero with the derivatives of x."""
    return x - x.detach()


def _rayleigh(a: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The eigenvalues that belong to vectors, V'AV, and I - V'V."""
    product = torch.diag_embed(values) + _motion(vectors.mT @ a @ vectors)
    defect = -_motion(vectors.mT @ vectors)
    diagonals = product.diagonal(0, -2, -1), defect.diagonal(0, -2, -1)
    return diagonals[0] / (1 - diagonals[1]), product, defect


def _refined(a: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    moved, product, defect = _rayleigh(a, values, vectors)
    gaps = _inverse_gaps(moved)
    turn = torch.where(gaps == 0, defect / 2, gaps * (product + defect * moved[:, None]))
    return vectors + vectors @ turn


def lanczos_step_reference(
    basis: Tensor, w: Tensor, count: int, largest: Tensor, breakdown: float
) -> Tensor:
    """As `lanczos_step`, with classical Gram-Schmidt done twice."""
    rows = basis[:count]
    coefficients = rows @ w
    w = torch.addmv(w, rows.mT, coefficients, alpha=-1)
    again = rows @ w
    w = torch.addmv(w, rows.mT, again, alpha=-1)
    coefficients = (coefficients + again).double()
    residual = torch.linalg.vector_norm(w, dtype=torch.float64)
    product = torch.linalg.vector_norm(torch.cat([coefficients, residual[None]]))
    largest = torch.maximum(largest.reshape(()), product)
    vanishes = ~(residual > breakdown * largest)
    basis[count] = w / residual.masked_fill(vanishes, torch.inf).to(w)
    ends = torch.stack([residual, vanishes.double(), largest])
    return torch.cat([coefficients, ends])


def lanczos_step(basis: Tensor, w: Tensor, count: int, largest: Tensor, breakdown: float) -> Tensor:
    """Makes a product the next vector of an orthonormal basis, without waiting for the device.

    It is not differentiable: the basis is changed.

    Args:
        basis: [more than count, n], float32 or float64, contiguous. Row ``count`` becomes the part
            of ``w`` orthogonal to the rows before, as a unit vector, or zero.
        w: [n].
        count: the row to write.
        largest: the norm of the longest product so far, float64 [1] on the basis' device.
        breakdown: what is left of ``w`` is zero if it is at most this, relative to ``largest``.

    Returns:
        float64 [count + 3]: the coefficients of ``w``, the norm of what is left, 1 if that
        is zero, and the new ``largest``.
    """
    compiled = _backend.runs_compiled(basis.device)
    step = torch.ops.hessreg.lanczos_step if compiled else lanczos_step_reference
    return step(basis, w.contiguous(), count, largest, breakdown)


# ---- derivatives -------------------------------------------------------------------------------


def gap_tolerance(dtype: torch.dtype) -> float:
    """What counts as no gap, relative to the largest eigenvalue."""
    return 64 * torch.finfo(dtype).eps


def _inverse_gaps(values: Tensor) -> Tensor:
    """F_ij = 1 / (l_j - l_i), and 0 where the two are as good as equal."""
    if values.shape[-1] == 0:
        return torch.diag_embed(values)
    gaps = values[:, None] - values[..., None]
    sizes = values.detach().abs().amax(-1)
    is_gap = gaps.detach().abs() > gap_tolerance(values.dtype) * _column(sizes, 2)
    return torch.where(is_gap, 1 / torch.where(is_gap, gaps, 1), 0)


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def _eigh(a: Tensor) -> list[Tensor]:
    small = a.shape[-1] <= _LARGEST_KERNEL
    return symmetric_eigh_op(a) if small else symmetric_eigh_reference(a)


def _chosen(vectors: Tensor, v: Tensor) -> Tensor:
    """Which column of V is v, ``[batch, n]``: its sign at its place, 0 elsewhere."""
    overlaps = _times(vectors.detach().mT, v.detach())
    nearest = overlaps.abs().argmax(-1)
    place = torch.arange(v.shape[-1], device=v.device) == nearest[:, None]
    return torch.where(place, torch.where(overlaps < 0, -1.0, 1.0).to(v.dtype), 0)


def _eigh_cotangent(
    values: Tensor, vectors: Tensor, for_values: Tensor | None, for_vectors: Tensor | None
) -> Tensor:
    """The cotangent of the matrix: V (diag(g) + F * V' gV) V', symmetrised."""
    middle = 0 * _inverse_gaps(values).detach()
    if for_values is not None:
        middle = middle + torch.diag_embed(for_values)
    if for_vectors is not None:
        middle = middle + _inverse_gaps(values) * (vectors.mT @ for_vectors)
    return vectors @ _symmetric(middle) @ vectors.mT


def _eigh_tangent(values: Tensor, vectors: Tensor, moved: Tensor) -> list[Tensor]:
    k = vectors.mT @ moved @ vectors
    return [k.diagonal(0, -2, -1), vectors @ (_inverse_gaps(values) * k)]


def _eigh_backward(
    arguments: Arguments, needs: Arguments, cotangents: Sequence[Any], outputs: Sequence[Tensor]
) -> tuple[Any, ...]:
    return (_eigh_cotangent(*outputs, *cotangents),)


def _eigh_jvp(arguments: Arguments, tangents: Arguments) -> list[Tensor]:
    values, vectors = _eigh(arguments[0])
    return _eigh_tangent(values, vectors, _symmetric(tangents[0]))


def _eigvalsh_backward(
    arguments: Arguments, needs: Arguments, cotangent: Tensor
) -> tuple[Tensor, ...]:
    vectors = _eigh(arguments[0])[1]
    return ((vectors * cotangent[:, None]) @ vectors.mT,)


def _eigvalsh_jvp(arguments: Arguments, tangents: Arguments) -> Tensor:
    vectors = _eigh(arguments[0])[1]
    return (vectors * (_symmetric(tangents[0]) @ vectors)).sum(-2)


def _tridiagonal_backward(
    arguments: Arguments, needs: Arguments, cotangents: Sequence[Any], outputs: Sequence[Tensor]
) -> tuple[Any, ...]:
    dense = _eigh_cotangent(*outputs, *cotangents)
    return dense.diagonal(0, -2, -1), 2 * dense[..., 1:, :].diagonal(0, -2, -1)


def _tridiagonal_jvp(arguments: Arguments, tangents: Arguments) -> list[Tensor]:
    pairs = zip(arguments, tangents, strict=True)
    moved = [torch.zeros_like(t) if tangent is None else tangent for t, tangent in pairs]
    values, vectors = tridiagonal_eigh_op(*arguments)
    return _eigh_tangent(values, vectors, _tridiagonal(*moved))


def _dominant(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The eigenvector nearest to v, which moves with a, all of them, and 1 / (l - l_j)."""
    values, vectors = _eigh(a)
    chosen = _chosen(vectors, v)
    gaps = (_inverse_gaps(values) * chosen.square()[:, None]).sum(-1)
    return (vectors * chosen[:, None]).sum(-1), vectors, gaps


def _power_backward(
    arguments: Arguments, needs: Arguments, cotangents: Sequence[Any], outputs: Sequence[Tensor]
) -> tuple[Any, ...]:
    for_value, for_vector, _ = cotangents
    a, v = arguments[0], outputs[1]
    result = None
    if for_value is not None:
        result = for_value[:, None, None] * v[..., None] * v[:, None]
    if for_vector is not None:
        u, vectors, gaps = _dominant(a, v)
        pulled = _times(vectors, gaps * _times(vectors.mT, for_vector))
        outer = _symmetric(pulled[..., None] * u[:, None])
        result = outer if result is None else result + outer
    return result, None, None


def _power_jvp(arguments: Arguments, tangents: Arguments) -> list[Tensor]:
    value, v, residual = power_iteration_op(*arguments)
    if tangents[0] is None:
        return [torch.zeros_like(t) for t in (value, v, residual)]
    moved = _symmetric(tangents[0])
    u, vectors, gaps = _dominant(arguments[0], v)
    for_vector = _times(vectors, gaps * _times(vectors.mT, _times(moved, u)))
    return [(v * _times(moved, v)).sum(-1), for_vector, torch.zeros_like(residual)]


# ---- batching ----------------------------------------------------------------------------------


def _merging_vmap(run: Callable[..., Any]) -> Callable[[int, Arguments, Arguments], Any]:
    """The rule of an operator whose tensors all begin with its batch: one longer batch."""

    def vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> Any:
        def lead(argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            expanded = (batch_size, *argument.shape)
            moved = argument.expand(expanded) if dim is None else argument.movedim(dim, 0)
            return moved.flatten(0, 1)

        led = list(map(lead, arguments, dims))
        sizes = batch_size, led[0].shape[0] // max(batch_size, 1)
        outputs = run(*led)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, sizes)
        return [output.unflatten(0, sizes) for output in outputs]

    return vmap


# ---- shapes ------------------------------------------------------------------------------------


def _power_iteration_fake(
    a: Tensor, v0: Tensor, num_iterations: int, fill: int | None = None
) -> list[Tensor]:
    shapes = a.shape[:1], v0.shape, a.shape[:1]
    return [a.new_empty(s) if fill is None else a.new_full(s, fill) for s in shapes]


def _lanczos_fake(a: Tensor, v0: Tensor, num_steps: int) -> list[Tensor]:
    batch, n = v0.shape
    m = min(num_steps, n)
    return [a.new_empty(batch, m), a.new_empty(batch, m), a.new_empty(batch, n, m)]


def _tridiagonal_fake(alpha: Tensor, beta: Tensor) -> list[Tensor]:
    return [alpha.new_empty(alpha.shape), alpha.new_empty(*alpha.shape, alpha.shape[1])]


def _eigvalsh_fake(a: Tensor) -> Tensor:
    return a.new_empty(a.shape[:2])


def _eigh_fake(a: Tensor) -> list[Tensor]:
    return [a.new_empty(a.shape[:2]), a.new_empty(a.shape)]


power_iteration_op: Operator = Operator(
    "power_iteration",
    reference=power_iteration_reference,
    fake=_power_iteration_fake,
    backward=_power_backward,
    jvp=_power_jvp,
    vmap=_merging_vmap(lambda *arguments: power_iteration_op(*arguments)),
    keeps_outputs=True,
)
lanczos_op: Operator = Operator(
    "lanczos",
    reference=lanczos_reference,
    fake=_lanczos_fake,
    backward=reverse_of(lanczos_reference),
    vmap=_merging_vmap(lambda *arguments: lanczos_op(*arguments)),
)
tridiagonal_eigh_op: Operator = Operator(
    "tridiagonal_eigh",
    reference=tridiagonal_eigh_reference,
    fake=_tridiagonal_fake,
    backward=_tridiagonal_backward,
    jvp=_tridiagonal_jvp,
    vmap=_merging_vmap(lambda *arguments: tridiagonal_eigh_op(*arguments)),
    keeps_outputs=True,
)
symmetric_eigvalsh_op: Operator = Operator(
    "symmetric_eigvalsh",
    reference=symmetric_eigvalsh_reference,
    fake=_eigvalsh_fake,
    backward=_eigvalsh_backward,
    jvp=_eigvalsh_jvp,
    vmap=_merging_vmap(lambda a: symmetric_eigvalsh_op(a)),
)
symmetric_eigh_op: Operator = Operator(
    "symmetric_eigh",
    reference=symmetric_eigh_reference,
    fake=_eigh_fake,
    backward=_eigh_backward,
    jvp=_eigh_jvp,
    vmap=_merging_vmap(lambda a: symmetric_eigh_op(a)),
    keeps_outputs=True,
)


# ---- public ------------------------------------------------------------------------------------


def power_iteration(
    A: Tensor,
    num_iterations: int,
    v0: Tensor | None = None,
    *,
    tol: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    r"""The eigenpair of largest magnitude of symmetric matrices, by power iteration.

    Equivalent to ``num_iterations`` times ``v = A @ v; v = v / v.norm()``, then ``v @ A @ v``, for
    a whole batch in one call. Differentiable in ``A`` to third order, as the eigenpair that the
    iteration converged to; constant in ``v0``. What has not converged has that error in its
    derivatives too: ask for it with ``tol``.

    Args:
        A: symmetric matrices ``[..., n, n]`` in float16, bfloat16, float32 or float64.
        num_iterations: how many products; the error of the vector falls by |l_2 / l_1| in each.
        v0: start vectors ``[..., n]``, like ``A`` in dtype and device; batches broadcast. None: one
            standard normal vector for all matrices, always the same unless ``generator`` is given.
        tol: adds a third output that says where ``|A v - l v| <= tol |l|``.
        generator: draws the start vector.

    Returns:
        The eigenvalues ``[...]``, as Rayleigh quotients, and unit eigenvectors ``[..., n]``; with
        ``tol`` a third tensor ``converged`` of truth values. A matrix with an entry that is not
        finite has NaN for both.

    Raises:
        TypeError: for anything but floating-point tensors and whole numbers.
        ValueError: for shapes, dtypes or devices that do not match and negative numbers.

    References:
        Golub and Van Loan, "Matrix Computations", 2013, section 8.2.1.

    Example:
        >>> import torch, hessreg
        >>> value, vector = hessreg.power_iteration(torch.diag(torch.tensor([1.0, -4.0])), 30)
        >>> value
        tensor(-4.)
        >>> vector.abs().round(decimals=4)
        tensor([0., 1.])
    """
    _check_matrices(A)
    _check_count(num_iterations, "num_iterations", least=0)
    if tol is not None:
        _check_tolerance(tol)
    matrices, starts, batch = _problem(A, v0, generator)
    outputs = power_iteration_op(matrices, starts, num_iterations)
    value, vector = _shaped(outputs[:2], batch, A.dtype)
    if tol is None:
        return value, vector
    converged = (outputs[2] <= tol * outputs[0].abs()).reshape(batch)
    return value, vector, converged


def lanczos(
    A: Tensor,
    num_steps: int,
    v0: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Lanczos tridiagonalisation of symmetric matrices, A Q = Q T + r e_m'.

    Each new vector is orthogonalised against all before it, so Q is orthonormal to rounding. Both
    triangles are read: of a matrix that is not symmetric Q need not be.
    Where the Krylov space is exhausted (what is left is within 64 epsilons of the Frobenius norm of
    the matrix), ``beta`` is zero and the iteration goes on with a unit vector orthogonal to Q: Q
    always has m orthonormal columns, and T has the eigenvalues of A if m = n. Differentiable in
    ``A`` and ``v0`` to any order, as plain torch is.

    Args:
        A: symmetric matrices ``[..., n, n]`` in float16, bfloat16, float32 or float64.
        num_steps: m; no more than n are done.
        v0: start vectors ``[..., n]``, as for :func:`power_iteration`.
        generator: draws the start vector.

    Returns:
        ``alpha`` ``[..., m]``, the diagonal of T, ``beta`` ``[..., m]``, its off-diagonal with |r|
        as the last, and Q ``[..., n, m]``.

    Raises:
        TypeError: for anything but floating-point tensors and whole numbers.
        ValueError: for shapes, dtypes or devices that do not match, and fewer steps than one.

    References:
        Lanczos, "An iteration method for the solution of the eigenvalue problem of linear
        differential and integral operators", 1950; Parlett, "The Symmetric Eigenvalue Problem",
        1998, chapter 13.

    Example:
        >>> import torch, hessreg
        >>> A = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> alpha, beta, Q = hessreg.lanczos(A, 2, torch.tensor([1.0, 0.0]))
        >>> alpha, beta
        (tensor([0., 0.]), tensor([1., 0.]))
    """
    _check_matrices(A)
    _check_count(num_steps, "num_steps", least=1)
    matrices, starts, batch = _problem(A, v0, generator)
    outputs = lanczos_op(matrices, starts, num_steps)
    alpha, beta, q = _shaped(outputs, batch, A.dtype)
    return alpha, beta, q


def tridiagonal_eigh(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of symmetric tridiagonal matrices.

    By implicit QL steps, many matrices side by side. Differentiable to third order in the manner of
    :func:`symmetric_eigh`.

    Args:
        alpha: diagonals ``[..., m]`` in float16, bfloat16, float32 or float64.
        beta: off-diagonals ``[..., m - 1]``, like ``alpha`` in dtype and device; batches broadcast.

    Returns:
        Eigenvalues ``[..., m]`` in ascending order and eigenvectors ``[..., m, m]`` in columns.

    Raises:
        TypeError: for anything but floating-point tensors.
        ValueError: for shapes, dtypes or devices that do not match.

    References:
        Parlett, "The Symmetric Eigenvalue Problem", 1998, chapter 8.

    Example:
        >>> import torch, hessreg
        >>> values, vectors = hessreg.tridiagonal_eigh(torch.zeros(2), torch.ones(1))
        >>> values
        tensor([-1.,  1.])
    """
    _check_tensor(alpha, "alpha", 1, "diagonals [..., m]")
    _check_like(alpha, beta, "beta", "alpha")
    m = alpha.shape[-1]
    if beta.shape[-1] != max(m - 1, 0):
        raise ValueError(
            f"beta must be off-diagonals [..., {max(m - 1, 0)}] to alpha, "
            f"got shape {tuple(beta.shape)}"
        )
    batch = _broadcast("alpha", alpha.shape[:-1], "beta", beta.shape[:-1])
    flat = [_flat(t, batch, 1) for t in (alpha, beta)]
    operator = tridiagonal_eigh_op if m <= _LARGEST_KERNEL else tridiagonal_eigh_reference
    values, vectors = _shaped(operator(*flat), batch, alpha.dtype)
    return values, vectors


def symmetric_eigvalsh(A: Tensor) -> Tensor:
    r"""All eigenvalues of symmetric matrices.

    Equivalent to ``torch.linalg.eigvalsh(A)``, many times faster for batches of small matrices and
    with smaller errors. Differentiable to third order; see :func:`symmetric_eigh` for repeated
    eigenvalues.

    Args:
        A: symmetric matrices ``[..., n, n]`` in float16, bfloat16, float32 or float64; the lower
            triangle is read. The gradient is symmetric.

    Returns:
        Eigenvalues ``[..., n]`` in ascending order, NaN for a matrix with an entry that is not
        finite.

    Raises:
        TypeError: for anything but a floating-point tensor.
        ValueError: for matrices that are not square.

    References:
        Householder's tridiagonalisation and QL steps: Parlett, "The Symmetric Eigenvalue Problem",
        1998, chapters 7 and 8. Twisted factorisations: Parlett and Dhillon, "Fernando's solution to
        Wilkinson's problem", 1997.

    Example:
        >>> import torch, hessreg
        >>> hessreg.symmetric_eigvalsh(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([-1.,  1.])
    """
    _check_matrices(A)
    matrices = _flat(A, A.shape[:-2], 2)
    small = A.shape[-1] <= _LARGEST_KERNEL
    values = symmetric_eigvalsh_op(matrices) if small else symmetric_eigvalsh_reference(matrices)
    return _shaped([values], A.shape[:-2], A.dtype)[0]


def symmetric_eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of symmetric matrices.

    Equivalent to ``torch.linalg.eigh(A)`` up to the signs of the vectors. Differentiable to third
    order, with finite derivatives everywhere: pairs of eigenvalues within 64 epsilons of the
    largest magnitude count as equal and contribute nothing, which is exact for functions in which
    they count alike, and a subgradient for others.

    Args:
        A: symmetric matrices ``[..., n, n]``, as for :func:`symmetric_eigvalsh`.

    Returns:
        Eigenvalues ``[..., n]`` in ascending order and eigenvectors ``[..., n, n]`` in columns, of
        either sign.

    Raises:
        TypeError: for anything but a floating-point tensor.
        ValueError: for matrices that are not square.

    References:
        Magnus, "On differentiating eigenvalues and eigenvectors", 1985.

    Example:
        >>> import torch, hessreg
        >>> values, vectors = hessreg.symmetric_eigh(torch.diag(torch.tensor([2.0, 1.0])))
        >>> values, vectors.abs()
        (tensor([1., 2.]), tensor([[0., 1.],
                [1., 0.]]))
    """
    _check_matrices(A)
    batch = A.shape[:-2]
    values, vectors = _shaped(_eigh(_flat(A, batch, 2)), batch, A.dtype)
    return values, vectors


Norm = Literal["spectral", "nuclear", "one", "fro"]


def symmetric_norm(A: Tensor, ord: Norm = "spectral") -> Tensor:
    r"""Exact norms of symmetric matrices, with derivatives that are finite everywhere.

    ``"spectral"`` is the largest and ``"nuclear"`` the sum of the eigenvalues' magnitudes,
    ``"one"`` the largest sum of magnitudes in a column, ``"fro"`` the root of the sum of squares.
    First and second derivatives are finite also at repeated and zero eigenvalues, where those of
    ``torch.linalg.matrix_norm`` are not: a subgradient stands in where there is none.

    Args:
        A: symmetric matrices ``[..., n, n]``, as for :func:`symmetric_eigvalsh`; ``"one"`` and
            ``"fro"`` read both triangles.
        ord: which norm.

    Returns:
        Norms ``[...]``; 0 for empty matrices.

    Raises:
        TypeError: for anything but a floating-point tensor.
        ValueError: for matrices that are not square and unknown norms.

    References:
        Golub and Van Loan, "Matrix Computations", 2013, section 2.3.

    Example:
        >>> import torch, hessreg
        >>> A = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> hessreg.symmetric_norm(A, "nuclear")
        tensor(2.)
    """
    _check_matrices(A)
    if ord not in _NORMS:
        raise ValueError(f"ord must be one of {', '.join(_NORMS)}, got {ord!r}")
    if A.shape[-1] == 0:
        return A.sum((-2, -1))
    wide = A.to(torch.promote_types(A.dtype, torch.float32))
    if ord == "fro":
        return _frobenius(wide).to(A.dtype)
    if ord == "one":
        return wide.abs().sum(-2).amax(-1).to(A.dtype)
    sizes = symmetric_eigvalsh(wide).abs()
    return (sizes.amax(-1) if ord == "spectral" else sizes.sum(-1)).to(A.dtype)


def _frobenius(a: Tensor) -> Tensor:
    scale = a.detach().abs().amax((-2, -1))
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1)
    squares = (a / scale[..., None, None]).square().sum((-2, -1))
    is_zero = squares == 0
    return scale * torch.where(is_zero, squares, torch.where(is_zero, 1, squares).sqrt())


def _flat(x: Tensor, batch: torch.Size, dims: int) -> Tensor:
    """``[batch, ...]`` in the dtype that is computed in."""
    wide = x if x.dtype in _COMPUTED else x.float()
    if len(batch) == 1 and x.shape[:-dims] == batch:
        return wide
    shape = x.shape[x.dim() - dims :]
    return wide.expand((*batch, *shape)).reshape((batch.numel(), *shape))


def _shaped(outputs: list[Tensor], batch: torch.Size, dtype: torch.dtype) -> list[Tensor]:
    """The outputs with the batch and in the dtype of the input."""
    if len(batch) == 1 and dtype in _COMPUTED:
        return outputs
    return [output.reshape((*batch, *output.shape[1:])).to(dtype) for output in outputs]


def _problem(
    a: Tensor, v0: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, torch.Size]:
    """The matrices and start vectors, flat, and their batch."""
    v0 = _start(a, generator) if v0 is None else v0
    _check_like(a, v0, "v0", "A")
    shape = a.shape[:-1]
    if v0.shape == shape and len(shape) == 2 and a.dtype in _COMPUTED:
        return a, v0, a.shape[:1]
    if v0.shape[-1] != shape[-1]:
        raise ValueError(f"v0 must be vectors [..., {shape[-1]}] to A, got shape {tuple(v0.shape)}")
    batch = _broadcast("A", shape[:-1], "v0", v0.shape[:-1])
    return _flat(a, batch, 2), _flat(v0, batch, 1), batch


def _start(a: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return _default_start(a.shape[-1], a.device).to(a.dtype)
    wide = torch.promote_types(a.dtype, torch.float32)
    drawn = torch.randn(a.shape[-1], generator=generator, dtype=wide, device=generator.device)
    return drawn.to(device=a.device, dtype=a.dtype)


@constant_while_compiling
def _default_start(n: int, device: torch.device) -> Tensor:
    return _drawn_once(n, device)


@functools.cache
def _drawn_once(n: int, device: torch.device) -> Tensor:
    """By NumPy: torch draws nothing while it batches, and its random state stays as it is."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.random.default_rng(0).standard_normal(n)).to(device)


def _check_tensor(x: Any, name: str, dims: int, wanted: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x)}")
    if x.dtype not in _DTYPES or x.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor of float16, bfloat16, float32 or float64, "
            f"got {x.dtype}, {x.layout}"
        )
    if x.dim() < dims:
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")


def _check_matrices(a: Any) -> None:
    _check_tensor(a, "A", 2, "matrices [..., n, n]")
    if a.shape[-1] != a.shape[-2]:
        raise ValueError(f"A must be matrices [..., n, n], got shape {tuple(a.shape)}")


def _check_like(model: Tensor, x: Any, name: str, model_name: str) -> None:
    _check_tensor(x, name, 1, "vectors [..., n]")
    if x.dtype is not model.dtype or x.device != model.device:
        raise ValueError(
            f"{name} must have the dtype and device of {model_name}, {model.dtype} on "
            f"{model.device}, got {x.dtype} on {x.device}"
        )


def _check_count(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be a whole number, got {type(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_tolerance(tol: Any) -> None:
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        raise TypeError(f"tol must be a number, got {type(tol)}")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")


def _broadcast(name: str, shape: torch.Size, other: str, other_shape: torch.Size) -> torch.Size:
    if shape == other_shape:  # torch.broadcast_shapes takes longer than a small iteration
        return shape
    try:
        return torch.broadcast_shapes(shape, other_shape)
    except RuntimeError:
        raise ValueError(
            f"batches must broadcast, got {tuple(shape)} of {name} and {tuple(other_shape)} "
            f"of {other}"
        ) from None
