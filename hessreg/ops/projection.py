"""Orthogonal projection of gradients: inner products and linear combinations of tensor lists.

Two multi-tensor operators carry the family. ``gram`` takes all inner products of m lists in one
pass, ``linear_combination`` combines them in another, and each is the other's derivative.
``project`` and ``pcgrad`` are the pair of them with the weights found in between, without leaving
the device: m x m algebra on the inner products.

In all of them a *list* holds the tensors of one vector (a gradient, say), and ``scope`` says which
of its elements share an inner product, a *segment*: all of them (0), each tensor (1), or each row
of each tensor (2). ``batched`` says that every tensor has one more dimension in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hessreg import _backend
from hessreg.ops._registry import Arguments, Operator, is_tracked

_GLOBAL, _TENSOR, _ROW = range(3)
_SCOPES = {"global": _GLOBAL, "tensor": _TENSOR, "row": _ROW}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
_LARGEST = torch.finfo(torch.float64).max
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MODES = ("always", "conflict")


def _lists(tensors: Sequence[Tensor], num_lists: int) -> list[list[Tensor]]:
    """The lists that stand one after another in ``tensors``."""
    n = len(tensors) // num_lists
    return [list(tensors[i * n : (i + 1) * n]) for i in range(num_lists)]


def _shape(tensor: Tensor, scope: int, batched: bool) -> tuple[int, int, int]:
    """A tensor as [batch, rows, length]: each row belongs to one segment."""
    batch = tensor.shape[0] if batched else 1
    rows = tensor.shape[batched] if scope == _ROW and tensor.dim() - batched >= 2 else 1
    return batch, rows, math.prod(tensor.shape[batched:]) // rows if rows else 0


def _result_shape(
    tensors: Sequence[Tensor], num_lists: int, scope: int, batched: bool, matrix: tuple[int, int]
) -> list[int]:
    shapes = [_shape(t, scope, batched) for t in tensors[: len(tensors) // num_lists]]
    segments = 1 if scope == _GLOBAL else sum(rows for _, rows, _ in shapes)
    return [*([shapes[0][0]] if batched else []), segments, *matrix]


# ---- reference ---------------------------------------------------------------------------------


def gram_reference(tensors: Sequence[Tensor], num_lists: int, scope: int, batched: bool) -> Tensor:
    """G[segment, a, b] = <x_a, x_b> in float64, by definition."""
    parts = []
    for position in zip(*_lists(tensors, num_lists), strict=True):
        x = torch.stack([t.double().reshape(_shape(t, scope, batched)) for t in position])
        parts.append(torch.einsum("abrn,cbrn->brac", x, x))
    result = torch.stack(parts).sum(0) if scope == _GLOBAL else torch.cat(parts, 1)
    return result if batched else result[0]


def linear_combination_reference(
    tensors: Sequence[Tensor], weights: Tensor, scope: int, batched: bool
) -> list[Tensor]:
    """Lists y_c = sum_a weights[segment, c, a] x_a, by definition: y_0, then y_1, ..."""
    num_outputs, num_lists = weights.shape[-2:]
    w = weights if batched else weights[None]
    combined, segment = [], 0
    for position in zip(*_lists(tensors, num_lists), strict=True):
        model = position[0]
        shape = _shape(model, scope, batched)
        here = w if scope == _GLOBAL else w[:, segment : segment + shape[1]]
        x = torch.stack([t.double().reshape(shape) for t in position])
        combined.append(
            [_combined(x, part).to(model.dtype).reshape(model.shape) for part in here.unbind(2)]
        )
        segment += shape[1]
    return [combined[t][c] for c in range(num_outputs) for t in range(len(combined))]


def _combined(x: Tensor, weights: Tensor) -> Tensor:
    """One output [batch, rows, length] of lists [m, batch, rows, length]."""
    unused = (weights == 0).permute(2, 0, 1)[..., None]
    used = torch.where(unused & ~x.isfinite(), 0, x)  # zero times infinity is zero here
    return torch.einsum("bra,abrn->brn", weights, used)


def project_reference(
    tensors: Sequence[Tensor],
    num_directions: int,
    strength: float,
    conflict_only: bool,
    rescale: bool,
    scope: int,
    batched: bool,
) -> list[Tensor]:
    """What is left: g - strength P g, with P the orthogonal projection on the directions' span."""
    products = gram_reference(tensors, 1 + num_directions, scope, batched)
    options = strength, conflict_only, rescale, _eps(tensors)
    weights, vanishes = _projection(products, *options)
    projected = linear_combination_reference(tensors, weights, scope, batched)
    # What is left of a vector in the span is rounding error: its value is zero, its derivative is
    # not.
    values, one = [y.detach() for y in projected], vanishes.double()[..., None, None]
    rounding = linear_combination_reference(values, one, scope, batched)
    return [y - r for y, r in zip(projected, rounding, strict=True)]


def pcgrad_reference(
    tensors: Sequence[Tensor],
    num_tasks: int,
    order: Tensor,
    reduction: int,
    scope: int,
    batched: bool,
) -> list[Tensor]:
    """Each list off those it conflicts with, one after another, and their sum or mean."""
    products = gram_reference(tensors, num_tasks, scope, batched)
    weights = pcgrad_weights(products, order, reduction)
    return linear_combination_reference(tensors, weights, scope, batched)


# ---- weights from inner products ---------------------------------------------------------------


def _eps(tensors: Sequence[Tensor]) -> float:
    """The rounding error of what the tensors are computed in."""
    return torch.finfo(torch.promote_types(tensors[0].dtype, torch.float32)).eps


def _smallest_sine(eps: float) -> float:
    """Directions so near the span of others add nothing to it: float64 cannot tell the angle."""
    return max(16 * eps, 8 * math.sqrt(torch.finfo(torch.float64).eps))


@torch.no_grad()
def _pivots(
    products: Tensor, strength: float, conflict_only: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Which directions to project off: a basis of their span, or of the conflicting ones'.

    Pivoted Cholesky factorisation of their cosines. Next comes the direction farthest from the span
    of those before; where only conflicts count, the one that conflicts most with what is left of g.
    Also the least squared sine of the angle between one and the span of those before it.
    """
    squares = products.diagonal(dim1=-2, dim2=-1)[..., 1:]
    usable = (squares > 0) & squares.isfinite() & (strength != 0)
    if squares.shape[-1] == 1:  # nothing to factorise
        chosen = usable & (products[..., 0, 1:] < 0) if conflict_only else usable
        return chosen, torch.ones_like(squares[..., 0])
    norms = torch.where(usable, squares, 1).sqrt()
    both = usable[..., None] & usable[..., None, :]
    cosines = torch.where(both, products[..., 1:, 1:], 0) / norms[..., None] / norms[..., None, :]
    overlap = torch.where(usable, products[..., 0, 1:], 0) / norms
    rest, chosen = usable.double(), torch.zeros_like(usable)
    columns: list[Tensor] = []
    least = torch.ones_like(squares[..., 0])
    numbers = torch.arange(squares.shape[-1], device=products.device)
    for _ in numbers:
        eligible = rest > _smallest_sine(eps) ** 2
        eligible = eligible & (overlap < 0) if conflict_only else eligible
        score = torch.where(eligible, -overlap if conflict_only else rest, -math.inf)
        pivot = (numbers == score.argmax(-1, keepdim=True)) & eligible
        square = _at(pivot, rest) + ~pivot.any(-1, keepdim=True)
        least, root = torch.minimum(least, square[..., 0]), square.sqrt()
        column = _at(pivot[..., None, :], cosines)[..., 0]
        column = (column - sum(c * _at(pivot, c) for c in columns)) / root
        overlap = overlap - _at(pivot, overlap) / root * column
        rest = torch.where(pivot, 0, rest - column.square())
        chosen = chosen | pivot
        columns.append(column)
    return chosen, least


def _at(pivot: Tensor, values: Tensor) -> Tensor:
    """The value at the one place where ``pivot`` is true, else 0."""
    return torch.where(pivot, values, 0).sum(-1, keepdim=True)


def _coefficients(products: Tensor, chosen: Tensor) -> Tensor:
    """Of P g in the chosen directions; 0 for the others."""
    squares = products.diagonal(dim1=-2, dim2=-1)[..., 1:]
    scale = torch.where(chosen, squares, 1).rsqrt()
    both = chosen[..., None] & chosen[..., None, :]
    eye = torch.eye(chosen.shape[-1], dtype=scale.dtype, device=scale.device)
    cosines = torch.where(both, products[..., 1:, 1:], 0) * scale[..., None] * scale[..., None, :]
    cosines = torch.where(both, cosines, eye)
    overlap = torch.where(chosen, products[..., 0, 1:], 0) * scale
    # Also for derivatives: what is left out may be infinite.
    return torch.where(chosen, _solve(cosines, overlap) * scale, 0)


def _solve(A: Tensor, b: Tensor) -> Tensor:
    """A^-1 b for small positive definite matrices, elimination without pivots.

    torch.linalg.solve is wrong in forward mode over forward mode, and in a vmap of the Hessian
    where there is one matrix (torch 2.13).
    """
    if b.shape[-1] == 1:
        return b / A[..., 0]
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    for t, unit in enumerate(eye):
        below = A[..., :, t] / A[..., t, t, None] * (unit.cumsum(0) - unit)
        A, b = A - below[..., None] * A[..., t, None, :], b - below * b[..., t, None]
    x = torch.zeros_like(b)
    for t, unit in reversed(list(enumerate(eye))):
        x = x + (b[..., t] - (A[..., t, :] * x).sum(-1))[..., None] / A[..., t, t, None] * unit
    return x


def _projection(
    products: Tensor, strength: float, conflict_only: bool, rescale: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The weights [..., 1, m] of g and the directions in the projected g, and where it vanishes.

    Where nothing but rounding errors is left the value is zero; the weights are those of the
    derivative.

    Args:
        products: inner products [..., m, m] of g and m - 1 directions.
        strength: 1 removes what lies in the span, 0 leaves it.
        conflict_only: only directions with which g conflicts.
        rescale: to the norm of g.
        eps: rounding error of what the vectors are computed in.
    """
    chosen, least = _pivots(products, strength, conflict_only, eps)
    coefficients, gg = _coefficients(products, chosen), products[..., 0, 0]
    inside = torch.where(chosen, products[..., 0, 1:], 0) * coefficients
    yy = gg - strength * (2 - strength) * inside.sum(-1)
    smallest = _rescaled_from(least, eps) if rescale else (16 * eps) ** 2
    changed = chosen.any(-1)
    vanishes = changed & gg.isfinite() & (yy <= smallest * gg) & (rescale or strength == 1)
    one = torch.ones_like(products[..., 0, :1])
    weights = torch.cat([one, -strength * coefficients], -1)[..., None, :]
    if rescale:
        left = changed & ~vanishes
        ratio = torch.where(left, gg, 1) / torch.where(left, yy, 1)
        weights = weights * ratio.sqrt()[..., None, None]
    return weights, vanishes


def _rescaled_from(least: Tensor, eps: float) -> Tensor:
    """The share of |g|^2 that must be left to have a length: more than inner products' rounding."""
    rounding = 64 * torch.finfo(torch.float64).eps / least
    return rounding.clamp(min=_smallest_sine(eps) ** 2)


def pcgrad_weights(products: Tensor, order: Tensor, reduction: int) -> Tensor:
    """The weights [..., num_outputs, m] of m gradients in the projected ones, or their sum or mean.

    Args:
        products: inner products [..., m, m].
        order: row i: the order in which gradient i meets the others, [m, m].
        reduction: none (0), sum (1) or mean (2).
    """
    m = products.shape[-1]
    eye = torch.eye(m, dtype=products.dtype, device=products.device)
    weights = eye.expand(products.shape)
    squares = products.diagonal(dim1=-2, dim2=-1)
    for j in order.unbind(-1):
        used = torch.where(weights != 0, products[..., j, :], 0)  # zero times infinity is zero here
        product, square = (used * weights).sum(-1), squares[..., j]
        active = (product < 0) & (square > 0) & square.isfinite() & (eye[j].diagonal() == 0)
        component = torch.where(active, product, 0) / torch.where(active, square, 1)
        weights = weights - component[..., None] * eye[j]
    if reduction == _REDUCTIONS["none"]:
        return weights
    total = weights.sum(-2, keepdim=True)
    return total / m if reduction == _REDUCTIONS["mean"] else total


# ---- derivatives -------------------------------------------------------------------------------


def _needed(needs: Sequence[bool], num_lists: int) -> list[int]:
    """The lists of which at least one tensor wants a gradient."""
    n = len(needs) // num_lists
    return [a for a in range(num_lists) if any(needs[a * n : (a + 1) * n])]


def _scatter(lists: Sequence[Sequence[Tensor]], where: Sequence[int], num_lists: int) -> list[Any]:
    """Gradients of some lists at their places among all, None elsewhere."""
    by_list = dict(zip(where, lists, strict=True))
    n = len(lists[0]) if lists else 0
    return list(chain.from_iterable(by_list.get(a, [None] * n) for a in range(num_lists)))


def _tangents(tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> list[Tensor]:
    pairs = zip(tensors, tangents, strict=True)
    return [torch.zeros_like(t) if tangent is None else tangent for t, tangent in pairs]


def _gram_backward(arguments: Arguments, needs: Arguments, cotangent: Tensor) -> tuple[Any, ...]:
    tensors, num_lists, scope, batched = arguments
    where = _needed(needs[0], num_lists)
    weights = (cotangent + cotangent.mT)[..., where, :]
    lists = _lists(linear_combination(tensors, weights, scope, batched), len(where))
    return _scatter(lists, where, num_lists), None, None, None


def _gram_jvp(arguments: Arguments, tangents: Arguments) -> Tensor:
    tensors, num_lists, scope, batched = arguments
    both = [*_tangents(tensors, tangents[0]), *tensors]
    cross = gram(both, 2 * num_lists, scope, batched)[..., :num_lists, num_lists:]
    return cross + cross.mT


def _combination_backward(
    arguments: Arguments, needs: Arguments, cotangents: Sequence[Tensor]
) -> tuple[Any, ...]:
    tensors, weights, scope, batched = arguments
    num_outputs, num_lists = weights.shape[-2:]
    for_tensors, for_weights = [None] * len(tensors), None
    if where := _needed(needs[0], num_lists):
        transposed = weights.mT[..., where, :]
        lists = _lists(linear_combination(cotangents, transposed, scope, batched), len(where))
        for_tensors = _scatter(lists, where, num_lists)
    if needs[1]:
        both = gram([*cotangents, *tensors], num_outputs + num_lists, scope, batched)
        for_weights = both[..., :num_outputs, num_outputs:]
    return for_tensors, for_weights, None, None


def _combination_jvp(arguments: Arguments, tangents: Arguments) -> list[Tensor]:
    tensors, weights, scope, batched = arguments
    moved = _tangents(tensors, tangents[0])
    if tangents[1] is None:
        return linear_combination(moved, weights, scope, batched)
    both = torch.cat([weights, tangents[1]], -1)
    return linear_combination([*moved, *tensors], both, scope, batched)


# A combination whose weights follow from the inner products of its lists, y = W(G) x: how many
# lists the arguments hold, and the weights.
_Map = Callable[[Tensor], Tensor]
_Rule = Callable[[Arguments], tuple[int, _Map]]


def _project_rule(arguments: Arguments) -> tuple[int, _Map]:
    tensors, num_directions, strength, conflict_only, rescale, _, _ = arguments
    options = strength, conflict_only, rescale, _eps(tensors)
    return 1 + num_directions, lambda products: _projection(products, *options)[0]


def _pcgrad_rule(arguments: Arguments) -> tuple[int, _Map]:
    _, num_tasks, order, reduction, _, _ = arguments
    return num_tasks, lambda products: pcgrad_weights(products, order, reduction)


def _ruled_backward(
    rule: _Rule, arguments: Arguments, needs: Arguments, cotangents: Sequence[Tensor]
) -> tuple[Any, ...]:
    tensors, *_, scope, batched = arguments
    m, weights_of = rule(arguments)
    both, c = [*cotangents, *tensors], len(cotangents) * m // len(tensors)
    products = gram(both, c + m, scope, batched)
    weights, pullback = _vjp(weights_of, products[..., c:, c:])
    moved = pullback(products[..., :c, c:])
    where = _needed(needs[0], m)
    mixed = torch.cat([weights.mT, moved + moved.mT], -1)[..., where, :]
    lists = _lists(linear_combination(both, mixed, scope, batched), len(where))
    return _scatter(lists, where, m), *[None] * (len(arguments) - 1)


def _ruled_jvp(rule: _Rule, arguments: Arguments, tangents: Arguments) -> list[Tensor]:
    tensors, *_, scope, batched = arguments
    m, weights_of = rule(arguments)
    both = [*tensors, *_tangents(tensors, tangents[0])]
    products = gram(both, 2 * m, scope, batched)
    cross = products[..., :m, m:]
    weights, moved = _push(weights_of, products[..., :m, :m], cross + cross.mT)
    return linear_combination(both, torch.cat([moved, weights], -1), scope, batched)


def _vjp(function: _Map, x: Tensor) -> tuple[Tensor, _Map]:
    value, pullback, *_ = torch.func.vjp(function, x)
    return value, lambda cotangent: pullback(cotangent)[0]


def _push(function: _Map, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """The value and its tangent, in reverse mode twice: forward mode does not nest in a rule."""
    value, pullback = _vjp(function, x)
    return value, _vjp(pullback, torch.zeros_like(value))[1](tangent)


# ---- batching ----------------------------------------------------------------------------------


def _lead(tensor: Tensor, dim: int | None, batch_size: int, batched: bool) -> Tensor:
    """The batch in front, and made one with the batch that is there already."""
    expanded = (batch_size, *tensor.shape)
    tensor = tensor.expand(expanded) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1) if batched else tensor


def _lead_all(
    tensors: Sequence[Tensor], dims: Sequence[int | None], batch_size: int, batched: bool
) -> list[Tensor]:
    pairs = zip(tensors, dims, strict=True)
    return [_lead(t, dim, batch_size, batched) for t, dim in pairs]


def _inner_batch(tensor: Tensor, dim: int | None, batched: bool) -> int | None:
    """The size of the batch that is there already."""
    sizes = list(tensor.shape)
    if dim is not None:
        sizes.pop(dim)
    return sizes[0] if batched else None


def _restore(tensor: Tensor, batch_size: int, inner: int | None) -> Tensor:
    return tensor if inner is None else tensor.unflatten(0, (batch_size, inner))


def _gram_vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> Tensor:
    tensors, num_lists, scope, batched = arguments
    moved = _lead_all(tensors, dims[0], batch_size, batched)
    inner = _inner_batch(tensors[0], dims[0][0], batched)
    return _restore(gram(moved, num_lists, scope, True), batch_size, inner)


def _combination_vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> list[Tensor]:
    tensors, weights, scope, batched = arguments
    moved = _lead_all(tensors, dims[0], batch_size, batched)
    inner = _inner_batch(tensors[0], dims[0][0], batched)
    combined = linear_combination(moved, _lead(weights, dims[1], batch_size, batched), scope, True)
    return [_restore(y, batch_size, inner) for y in combined]


def _project_vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> list[Tensor]:
    return _ruled_vmap(project, batch_size, arguments, dims)


def _pcgrad_vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> list[Tensor]:
    return _ruled_vmap(pcgrad_operator, batch_size, arguments, dims)


def _ruled_vmap(
    operator: Operator, batch_size: int, arguments: Arguments, dims: Arguments
) -> list[Tensor]:
    tensors, *options, batched = arguments
    moved = _lead_all(tensors, dims[0], batch_size, batched)
    inner = _inner_batch(tensors[0], dims[0][0], batched)
    return [_restore(y, batch_size, inner) for y in operator(moved, *options, True)]


# ---- shapes ------------------------------------------------------------------------------------


def _gram_fake(tensors: Sequence[Tensor], num_lists: int, scope: int, batched: bool) -> Tensor:
    shape = _result_shape(tensors, num_lists, scope, batched, (num_lists, num_lists))
    return tensors[0].new_empty(shape, dtype=torch.float64)


def _empty_lists(tensors: Sequence[Tensor], num_lists: int, num_outputs: int) -> list[Tensor]:
    first = tensors[: len(tensors) // num_lists]
    return [t.new_empty(t.shape) for _ in range(num_outputs) for t in first]


def _combination_fake(
    tensors: Sequence[Tensor], weights: Tensor, scope: int, batched: bool
) -> list[Tensor]:
    return _empty_lists(tensors, weights.shape[-1], weights.shape[-2])


def _project_fake(tensors: Sequence[Tensor], num_directions: int, *options: Any) -> list[Tensor]:
    return _empty_lists(tensors, 1 + num_directions, 1)


def _pcgrad_fake(
    tensors: Sequence[Tensor],
    num_tasks: int,
    order: Tensor,
    reduction: int,
    scope: int,
    batched: bool,
) -> list[Tensor]:
    outputs = num_tasks if reduction == _REDUCTIONS["none"] else 1
    return _empty_lists(tensors, num_tasks, outputs)


gram = Operator(
    "gram",
    reference=gram_reference,
    fake=_gram_fake,
    backward=_gram_backward,
    jvp=_gram_jvp,
    vmap=_gram_vmap,
)
linear_combination = Operator(
    "linear_combination",
    reference=linear_combination_reference,
    fake=_combination_fake,
    backward=_combination_backward,
    jvp=_combination_jvp,
    vmap=_combination_vmap,
)
project = Operator(
    "project",
    reference=project_reference,
    fake=_project_fake,
    backward=partial(_ruled_backward, _project_rule),
    jvp=partial(_ruled_jvp, _project_rule),
    vmap=_project_vmap,
)
pcgrad_operator = Operator(
    "pcgrad",
    reference=pcgrad_reference,
    fake=_pcgrad_fake,
    backward=partial(_ruled_backward, _pcgrad_rule),
    jvp=partial(_ruled_jvp, _pcgrad_rule),
    vmap=_pcgrad_vmap,
)


# ---- in place ------------------------------------------------------------------------------------


def project_inplace_reference(
    g: Sequence[Tensor],
    directions: Sequence[Tensor],
    num_directions: int,
    strength: float,
    conflict_only: bool,
    rescale: bool,
    scope: int,
) -> Tensor:
    """`project_reference` into g; returns the cosines [segments, k] before."""
    tensors = [*g, *directions]
    products = gram_reference(tensors, 1 + num_directions, scope, False)
    options = strength, conflict_only, rescale, scope, False
    for t, y in zip(g, project_reference(tensors, num_directions, *options), strict=True):
        t.copy_(y)
    squares = products.diagonal(dim1=-2, dim2=-1)
    usable = (squares > 0) & squares.isfinite()
    defined = usable[..., :1] & usable[..., 1:]
    norms = torch.where(usable, squares, 1).sqrt()
    cosines = products[..., 0, 1:] / norms[..., :1] / norms[..., 1:]
    return torch.where(defined, cosines, 0).clamp(-1, 1)


def _project_inplace_fake(
    g: Sequence[Tensor], directions: Sequence[Tensor], num_directions: int, *options: Any
) -> Tensor:
    scope = options[-1]
    shape = _result_shape(g, 1, scope, False, (num_directions, 1))
    return g[0].new_empty(shape[:-1], dtype=torch.float64)


if _backend.compiled():
    torch.library.register_fake("hessreg::project_", _project_inplace_fake)


def _project_inplace(g: list[Tensor], *arguments: Any) -> Tensor:
    if not _backend.runs_compiled(g[0].device):
        return project_inplace_reference(g, *arguments)
    dense = [t if t.is_contiguous() else t.contiguous() for t in g]
    cosines: Tensor = torch.ops.hessreg.project_(dense, *arguments)
    if not torch.compiler.is_compiling():  # where the graph knows what it overwrites
        torch.autograd.graph.increment_version(dense)
    for t, y in zip(g, dense, strict=True):
        if t is not y:
            t.copy_(y)
    return cosines


# ---- public ------------------------------------------------------------------------------------

_Mode = Literal["always", "conflict"]
_Scope = Literal["global", "tensor", "row"]
Vector = Tensor | Sequence[Tensor | None]


@overload
def project_orthogonal(
    g: Tensor,
    against: Tensor | Sequence[Tensor],
    mode: _Mode = ...,
    scope: _Scope = ...,
    strength: float = ...,
    rescale: bool = ...,
) -> Tensor: ...
@overload
def project_orthogonal(
    g: Sequence[Tensor],
    against: Sequence[Tensor | None] | Sequence[Sequence[Tensor | None]],
    mode: _Mode = ...,
    scope: _Scope = ...,
    strength: float = ...,
    rescale: bool = ...,
) -> list[Tensor]: ...
@overload
def project_orthogonal(
    g: Sequence[Tensor | None],
    against: Sequence[Tensor | None] | Sequence[Sequence[Tensor | None]],
    mode: _Mode = ...,
    scope: _Scope = ...,
    strength: float = ...,
    rescale: bool = ...,
) -> list[Tensor | None]: ...
def project_orthogonal(
    g: Vector,
    against: Vector | Sequence[Sequence[Tensor | None]],
    mode: _Mode = "always",
    scope: _Scope = "global",
    strength: float = 1.0,
    rescale: bool = False,
) -> Any:
    r"""Removes from a gradient what lies along another, or in the span of several others.

    For one direction v, y = g - strength <g, v> / <v, v> v: equivalent to
    ``g - strength * (g * v).sum() / (v * v).sum() * v`` for lists of tensors at once. For k
    directions y = g - strength P g with the orthogonal projection P on their span. Two passes over
    the tensors, with the inner products in float64. Differentiable in ``g`` and ``against`` to any
    order.

    Thresholds are relative, so the result scales with ``g`` from 1e-18 to 1e18. Directions whose
    squared norm is zero or not finite in float64 are left out, and so are those within an angle of
    2e-6 (1.2e-7 for float64 tensors) of the span of others. At an angle a of directions to each
    other, the result is orthogonal to each of them, and has up to 1e-16 |g| / a^2 of their span
    left. Where ``strength=1`` leaves less than 16 epsilons (of
    float32 for the half-precision types) of |g|, that is rounding error and becomes exactly zero.
    Float64 inner products cannot see 16 epsilons of float64 itself: there, what is left of
    collinear vectors is at most a few epsilons of |g|.

    Args:
        g: a tensor, or the tensors that together make one vector, such as the gradients of a
            network's parameters: float16, bfloat16, float32 or float64, which may differ between
            the tensors of a list (the widest is computed in). Where an entry is None, that
            position is left out of everything.
        against: v, like ``g``: a tensor or tensors of the same shapes; None stands for zeros. For
            k directions a sequence of them: of tensors if ``g`` is a tensor, else of lists.
        mode: ``"always"``, or ``"conflict"`` to project only off directions with <g, v> < 0. Of
            several, the one that conflicts most comes first, then of those that still conflict
            with the rest, until none does: the result has <y, v> >= 0 for all of them.
        scope: what makes up one vector: ``"global"`` all elements, ``"tensor"`` each tensor on its
            own, ``"row"`` each row of each tensor (its slices along the first dimension; a tensor
            of one dimension is one row).
        strength: 1 removes the component, 0 leaves it, 2 reflects it.
        rescale: bring what is left back to the norm of g (OrthoGrad). Where that is not known from
            rounding errors (below 2e-6 |g|, for float64 1.2e-7 |g|; more where directions are
            nearly dependent), the result is zero.

    Returns:
        Tensors like ``g``: one, or a list.

    Raises:
        TypeError: for anything but floating-point tensors or sequences of them.
        ValueError: for lists, shapes, dtypes or devices that do not match, and unknown options.

    References:
        Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020 (``mode="conflict"``);
        Prieto et al., "Grokking at the Edge of Numerical Stability", 2025 (``rescale``).

    Example:
        >>> import torch
        >>> from hessreg import project_orthogonal
        >>> project_orthogonal(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
        tensor([3., 0.])
        >>> g = [torch.tensor([1.0, 1.0]), torch.tensor([2.0])]
        >>> v = [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
        >>> project_orthogonal(g, v, scope="tensor")
        [tensor([0., 1.]), tensor([0.])]
        >>> x, y = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
        >>> project_orthogonal(torch.tensor([1.0, 2.0, 3.0]), [x, y])
        tensor([0., 0., 3.])
    """
    vectors, names = _with_directions(g, against)
    _check_options(mode, scope, strength, rescale)
    kept = [i for i, t in enumerate(vectors[0]) if t is not None]
    if not kept:
        return list(vectors[0])
    lists, models = _dense([[v[i] for i in kept] for v in vectors], names, kept)
    options = float(strength), mode == "conflict", rescale, _SCOPES[scope], False
    projected = project(list(chain.from_iterable(lists)), len(lists) - 1, *options)
    result = _scattered(projected, models, kept, len(vectors[0]))
    return result[0] if isinstance(g, Tensor) else result


def project_orthogonal_(
    g: Vector,
    against: Vector | Sequence[Sequence[Tensor | None]],
    mode: _Mode = "always",
    scope: _Scope = "global",
    strength: float = 1.0,
    rescale: bool = False,
) -> Tensor:
    """Does to ``g`` itself what `project_orthogonal` does to a copy; for ``.grad``.

    No gradient flows through it, and nothing waits for the device.

    Args:
        g: as in `project_orthogonal`; overwritten. Its tensors must not share memory with each
            other, nor with those of a direction but the one at the same position.
        against: as in `project_orthogonal`; a constant even if it requires gradients.
        mode: as in `project_orthogonal`.
        scope: as in `project_orthogonal`.
        strength: as in `project_orthogonal`.
        rescale: as in `project_orthogonal`.

    Returns:
        The cosines between g and the directions before: float64, on the device of ``g``, zero
        where one of the two has no direction. A scalar; ``[k]`` for a sequence of k directions;
        with scope ``"tensor"`` or ``"row"`` one more dimension in front, of those that are not
        None.

    Raises:
        TypeError: as `project_orthogonal`.
        ValueError: as `project_orthogonal`, or ``g`` requires gradients.
        RuntimeError: for memory shared otherwise.

    Example:
        >>> import torch
        >>> from hessreg import project_orthogonal_
        >>> g = [torch.tensor([3.0, 4.0]), None]
        >>> project_orthogonal_(g, [torch.tensor([0.0, 2.0]), None])
        tensor(0.8000, dtype=torch.float64)
        >>> g
        [tensor([3., 0.]), None]
    """
    vectors, names = _with_directions(g, against)
    _check_options(mode, scope, strength, rescale)
    several = _is_several(g, against)
    kept = [i for i, t in enumerate(vectors[0]) if t is not None]
    if not kept:
        shape = [0] * (scope != "global") + [len(vectors) - 1] * several
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    own = [t for t in vectors[0] if t is not None]
    if is_tracked(own):
        raise ValueError(
            "g must not require gradients or be transformed by torch.func to be overwritten: use"
            " project_orthogonal"
        )
    with torch.no_grad():
        lists, _ = _dense([[v[i] for i in kept] for v in vectors], names, kept)
        directions = list(chain.from_iterable(lists[1:]))
        options = float(strength), mode == "conflict", rescale, _SCOPES[scope]
        cosines = _project_inplace(lists[0], directions, len(lists) - 1, *options)
        for t, y in zip(own, lists[0], strict=True):
            if t is not y:
                t.copy_(y)
    cosines = cosines if several else cosines[:, 0]
    return cosines[0] if scope == "global" else cosines


def pcgrad(
    gradients: Sequence[Vector],
    scope: _Scope = "global",
    reduction: Literal["sum", "mean", "none"] = "sum",
    generator: torch.Generator | None = None,
) -> Any:
    """Gradient surgery: every task's gradient off those of the others that it conflicts with.

    Gradient i meets the others one after another and, where <g_i, g_j> < 0 for what is left of it,
    is projected off g_j as that was in the beginning. All in two passes over the tensors; the
    coefficients come from inner products in float64 and never leave the device. Differentiable to
    any order.

    Args:
        gradients: one for each task: tensors of one shape, or lists of tensors as for
            `project_orthogonal`. None stands for zeros; where all are None, so is the result.
        scope: what makes up one vector, as for `project_orthogonal`.
        reduction: ``"sum"`` or ``"mean"`` over the tasks, or ``"none"``.
        generator: draws the order in which each gradient meets the others, as in the paper; a CPU
            generator. Without one, that of ``gradients``. With two tasks there is only one order.

    Returns:
        One vector like those in ``gradients``; for ``reduction="none"`` a list with one for each.

    Raises:
        TypeError: for anything but floating-point tensors or sequences of them.
        ValueError: for lists, shapes, dtypes or devices that do not match, and unknown options.

    References:
        Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.

    Example:
        >>> import torch
        >>> from hessreg import pcgrad
        >>> pcgrad([torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])])
        tensor([0.5000, 1.5000])
    """
    _check_scope(scope)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of none, sum, mean, got {reduction!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator)}")
    vectors, names = _as_tasks(gradients)
    kept = [i for i in range(len(vectors[0])) if any(v[i] is not None for v in vectors)]
    outputs = len(vectors) if reduction == "none" else 1
    results: list[list[Tensor | None]] = [[None] * len(vectors[0])] * outputs
    if kept:
        lists, models = _dense([[v[i] for i in kept] for v in vectors], names, kept)
        tensors = list(chain.from_iterable(lists))
        order = _order(len(vectors), generator, tensors[0].device)
        options = order, _REDUCTIONS[reduction], _SCOPES[scope], False
        found = _lists(pcgrad_operator(tensors, len(vectors), *options), outputs)
        results = [_scattered(y, models, kept, len(vectors[0])) for y in found]
    like = [y[0] for y in results] if isinstance(gradients[0], Tensor) else results
    return like if reduction == "none" else like[0]


def gram_matrix(gradients: Sequence[Vector], scope: _Scope = "global") -> Tensor:
    """All inner products of gradients, in float64, in one pass over the tensors.

    Args:
        gradients: k vectors: tensors of one shape, or lists of tensors as for
            `project_orthogonal`. None stands for zeros.
        scope: what makes up one vector, as for `project_orthogonal`.

    Returns:
        ``[k, k]``; with scope ``"tensor"`` or ``"row"`` ``[segments, k, k]``. Differentiable to
        any order.

    Raises:
        TypeError: for anything but floating-point tensors or sequences of them.
        ValueError: for lists, shapes, dtypes or devices that do not match, or no tensor at all.

    Example:
        >>> import torch
        >>> from hessreg import gram_matrix
        >>> gram_matrix([torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])])
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
    """
    _check_scope(scope)
    vectors, names = _as_tasks(gradients)
    kept = [i for i in range(len(vectors[0])) if any(v[i] is not None for v in vectors)]
    if not kept:
        raise ValueError("gradients must hold at least one tensor, got none")
    lists, _ = _dense([[v[i] for i in kept] for v in vectors], names, kept)
    products = gram(list(chain.from_iterable(lists)), len(lists), _SCOPES[scope], False)
    return products[0] if scope == "global" else products


def _order(num_tasks: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """In row i, the order in which gradient i meets the others (and itself, which is skipped)."""
    if generator is None or num_tasks <= 2:
        return torch.arange(num_tasks, device=device).repeat(num_tasks, 1)
    drawn = torch.rand(num_tasks, num_tasks, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.argsort(-1).to(device, non_blocking=True)


# ---- what the public functions take ------------------------------------------------------------


def _is_several(g: Any, against: Any) -> bool:
    """Whether ``against`` is a sequence of directions, not one."""
    if not isinstance(against, (list, tuple)):
        return False
    return isinstance(g, Tensor) or any(isinstance(v, (list, tuple)) for v in against)


def _with_directions(g: Any, against: Any) -> tuple[list[list[Tensor | None]], list[str]]:
    """The gradient and the directions as lists, and what to call their tensors."""
    own: list[Tensor | None] = [g] if isinstance(g, Tensor) else _as_list(g, "g")
    if not _is_several(g, against):
        single = isinstance(against, Tensor)
        vectors = [own, [against] if single else _as_list(against, "against")]
        names = ["g[{}]", "against[{}]"]
    else:
        if not against:
            raise ValueError("against must hold at least one direction, got none")
        vectors, names = [own], ["g[{}]"]
        for j, v in enumerate(against):
            vectors.append([v] if isinstance(v, Tensor) else _as_list(v, f"against[{j}]"))
            names.append(f"against[{j}]" + ("" if isinstance(v, Tensor) else "[{}]"))
    for v, name in zip(vectors[1:], names[1:], strict=True):
        if len(v) != len(own):
            title = name.removesuffix("[{}]")
            raise ValueError(
                f"{title} must hold as many tensors as g, got {len(v)} against {len(own)}"
            )
    return vectors, names


def _as_tasks(gradients: Any) -> tuple[list[list[Tensor | None]], list[str]]:
    if not isinstance(gradients, (list, tuple)):
        raise TypeError(f"gradients must be a sequence of vectors, got {type(gradients)}")
    if not gradients:
        raise ValueError("gradients must hold at least one vector, got none")
    vectors: list[list[Tensor | None]] = []
    names: list[str] = []
    for j, v in enumerate(gradients):
        vectors.append([v] if isinstance(v, Tensor) else _as_list(v, f"gradients[{j}]"))
        names.append(f"gradients[{j}]" + ("" if isinstance(v, Tensor) else "[{}]"))
        if len(vectors[j]) != len(vectors[0]) or isinstance(v, Tensor) != isinstance(
            gradients[0], Tensor
        ):
            raise ValueError(f"gradients[{j}] must hold as many tensors as gradients[0]")
    return vectors, names


def _as_list(value: Any, name: str) -> list[Tensor | None]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(value)}")
    for i, tensor in enumerate(value):
        if not isinstance(tensor, Tensor) and tensor is not None:
            raise TypeError(f"{name}[{i}] must be a tensor or None, got {type(tensor)}")
    return list(value)


def _dense(
    vectors: list[list[Tensor | None]], names: list[str], positions: list[int]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Lists of one dtype without None, and a tensor at each position as the user gave it."""
    lists = [[t for t in v if t is not None] for v in vectors]
    models = lists[0]
    if min(map(len, lists)) < len(positions):
        models = [next(t for t in column if t is not None) for column in zip(*vectors, strict=True)]
        lists = [
            [torch.zeros_like(m) if t is None else t for t, m in zip(v, models, strict=True)]
            for v in vectors
        ]
    _check_alike(lists, models, names, positions)
    if len({t.dtype for t in models}) == 1:
        return lists, models
    widest = models[0].dtype
    for model in models:
        widest = torch.promote_types(widest, model.dtype)
    return [[t.to(widest) for t in v] for v in lists], models


def _scattered(
    tensors: Sequence[Tensor], models: Sequence[Tensor], positions: list[int], count: int
) -> list[Tensor | None]:
    """Results at their places, with the user's dtypes, and None elsewhere."""
    result: list[Tensor | None] = [None] * count
    for i, y, model in zip(positions, tensors, models, strict=True):
        result[i] = y if y.dtype is model.dtype else y.to(model.dtype)
    return result


def _check_alike(
    lists: list[list[Tensor]], models: list[Tensor], names: list[str], positions: list[int]
) -> None:
    kinds = _kinds(models)
    allowed = models[0].device, torch.strided
    good = all(kind[1] in _DTYPES and kind[2:] == allowed for kind in kinds)
    for tensors, name in zip(lists, names, strict=True):
        if good and (tensors is models or _kinds(tensors) == kinds):
            continue
        for i, tensor, model in zip(positions, tensors, models, strict=True):
            _check_tensor(name.format(i), tensor, model, models[0], names[0].removesuffix("[{}]"))


def _kinds(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.device, t.layout) for t in tensors]


def _check_tensor(name: str, tensor: Tensor, model: Tensor, first: Tensor, title: str) -> None:
    if tensor.shape != model.shape:
        raise ValueError(
            f"{name} must have the shape of its counterpart in {title}, {tuple(model.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor of float16, bfloat16, float32 or float64, "
            f"got {tensor.dtype}, {tensor.layout}"
        )
    if tensor.dtype is not model.dtype or tensor.device != first.device:
        raise ValueError(
            f"{name} must have dtype and device {model.dtype} on {first.device} as in {title}, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _check_scope(scope: str) -> None:
    if scope not in _SCOPES:
        raise ValueError(f"scope must be one of {', '.join(_SCOPES)}, got {scope!r}")


def _check_options(mode: str, scope: str, strength: float, rescale: bool) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    _check_scope(scope)
    if not isinstance(rescale, bool):
        raise TypeError(f"rescale must be True or False, got {type(rescale)}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"strength must be a number, got {type(strength)}")
    if not -_LARGEST <= strength <= _LARGEST:  # traceable, which math.isfinite is not
        raise ValueError(f"strength must be finite, got {strength}")
