"""Orthogonal projection of gradients: inner products and linear combinations of tensor lists.

Two multi-tensor operators carry the family. ``gram`` takes all inner products of m lists in one
pass, ``linear_combination`` combines them in another, and each is the other's derivative.
``project`` is the pair of them with the coefficient found in between, without leaving the device.

In all three a *list* holds the tensors of one vector (a gradient, say), and ``scope`` says which of
its elements share an inner product, a *segment*: all of them (0), each tensor (1), or each row of
each tensor (2). ``batched`` says that every tensor has one more dimension in front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hessreg.ops._registry import Arguments, Operator

_GLOBAL, _TENSOR, _ROW = range(3)
_SCOPES = {"global": _GLOBAL, "tensor": _TENSOR, "row": _ROW}
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
        unused = (here == 0).all(-2).permute(2, 0, 1)[..., None]
        x = torch.where(unused & ~x.isfinite(), 0, x)  # zero times infinity is zero here
        y = torch.einsum("brca,abrn->cbrn", here, x).to(model.dtype)
        combined.append([part.reshape(model.shape) for part in y])
        segment += shape[1]
    return [combined[t][c] for c in range(num_outputs) for t in range(len(combined))]


def project_reference(
    tensors: Sequence[Tensor], strength: float, conflict_only: bool, scope: int, batched: bool
) -> list[Tensor]:
    """In each segment y = g - strength <g, v> / <v, v> v, by definition."""
    if strength == 0:
        return [t.clone() for t in tensors[: len(tensors) // 2]]
    products = gram_reference(tensors, 2, scope, batched)
    coefficient = _coefficient(products[..., 0, 1], products, conflict_only)
    weights = torch.stack([torch.ones_like(coefficient), -strength * coefficient], -1)[..., None, :]
    projected = linear_combination_reference(tensors, weights, scope, batched)
    if strength != 1:
        return projected
    # What is left of collinear vectors is rounding error: its value is zero, its derivative is not.
    residual = products[..., 0, 0] - coefficient * products[..., 0, 1]
    tolerance = 16 * torch.finfo(torch.promote_types(tensors[0].dtype, torch.float32)).eps
    gg = products[..., 0, 0]
    vanishes = (residual <= tolerance**2 * gg) & gg.isfinite()
    vanishes &= coefficient != 0
    rounding = linear_combination_reference(
        [y.detach() for y in projected], vanishes.double()[..., None, None], scope, batched
    )
    return [y - r for y, r in zip(projected, rounding, strict=True)]


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


def _coefficient(numerator: Tensor, products: Tensor, conflict_only: bool) -> Tensor:
    """The numerator / <v, v> where g is projected, else 0; of the inner products of (g, v, ...)."""
    vv = products[..., 1, 1]
    active = (vv > 0) & vv.isfinite()
    if conflict_only:
        active = active & (products[..., 0, 1] < 0)
    return torch.where(active, numerator, 0) / torch.where(active, vv, 1)


def _rows(*rows: Sequence[Tensor | float], like: Tensor) -> Tensor:
    """The matrix of these entries in every segment: [..., len(rows), len(rows[0])]."""
    entries = [[torch.zeros_like(like) + entry for entry in row] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in entries], -2)


def _project_backward(
    arguments: Arguments, needs: Arguments, cotangents: Sequence[Tensor]
) -> tuple[Any, ...]:
    tensors, strength, conflict_only, scope, batched = arguments
    both = [*tensors, *cotangents]
    products = gram(both, 3, scope, batched)  # of g, v and the cotangent
    c = _coefficient(products[..., 0, 1], products, conflict_only)
    a = _coefficient(products[..., 1, 2], products, conflict_only)
    s = strength
    weights = _rows([0, -s * a, 1], [-s * a, 2 * s * a * c, -s * c], like=c)
    where = _needed(needs[0], 2)
    lists = _lists(linear_combination(both, weights[..., where, :], scope, batched), len(where))
    return _scatter(lists, where, 2), None, None, None, None


def _project_jvp(arguments: Arguments, tangents: Arguments) -> list[Tensor]:
    tensors, strength, conflict_only, scope, batched = arguments
    both = [*tensors, *_tangents(tensors, tangents[0])]
    products = gram(both, 4, scope, batched)  # of g, v and their tangents
    c = _coefficient(products[..., 0, 1], products, conflict_only)
    change = products[..., 1, 2] + products[..., 0, 3] - 2 * c * products[..., 1, 3]
    moved = _coefficient(change, products, conflict_only)
    weights = _rows([0, -strength * moved, 1, -strength * c], like=c)
    return linear_combination(both, weights, scope, batched)


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
    tensors, strength, conflict_only, scope, batched = arguments
    moved = _lead_all(tensors, dims[0], batch_size, batched)
    inner = _inner_batch(tensors[0], dims[0][0], batched)
    projected = project(moved, strength, conflict_only, scope, True)
    return [_restore(y, batch_size, inner) for y in projected]


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


def _project_fake(
    tensors: Sequence[Tensor], strength: float, conflict_only: bool, scope: int, batched: bool
) -> list[Tensor]:
    return _empty_lists(tensors, 2, 1)


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
    backward=_project_backward,
    jvp=_project_jvp,
    vmap=_project_vmap,
)


# ---- public ------------------------------------------------------------------------------------


@overload
def project_orthogonal(
    g: Tensor,
    against: Tensor,
    mode: Literal["always", "conflict"] = ...,
    scope: Literal["global", "tensor", "row"] = ...,
    strength: float = ...,
) -> Tensor: ...
@overload
def project_orthogonal(
    g: Sequence[Tensor],
    against: Sequence[Tensor],
    mode: Literal["always", "conflict"] = ...,
    scope: Literal["global", "tensor", "row"] = ...,
    strength: float = ...,
) -> list[Tensor]: ...
def project_orthogonal(
    g: Tensor | Sequence[Tensor],
    against: Tensor | Sequence[Tensor],
    mode: Literal["always", "conflict"] = "always",
    scope: Literal["global", "tensor", "row"] = "global",
    strength: float = 1.0,
) -> Tensor | list[Tensor]:
    r"""Removes from a gradient its component along another: y = g - strength <g, v> / <v, v> v.

    Equivalent to ``g - strength * (g * v).sum() / (v * v).sum() * v`` for lists of tensors at
    once, with the inner products in float64. Differentiable in ``g`` and ``against`` to any order.

    Thresholds are relative, so the result scales with ``g`` from 1e-18 to 1e18: where <v, v> is
    zero or not finite, ``g`` is returned unchanged; where ``strength=1`` leaves less than 16
    epsilons (of float32 for the half-precision types) of |g|, that is rounding error and becomes
    exactly zero. Float64 inner products cannot see 16 epsilons of float64 itself: there, what is
    left of collinear vectors is at most a few epsilons of |g|.

    Args:
        g: a tensor, or the tensors that together make one vector, such as the gradients of a
            network's parameters. All float32, all float64, all float16 or all bfloat16.
        against: v: a tensor or tensors of the same shapes.
        mode: ``"always"``, or ``"conflict"`` to project only where <g, v> < 0 (PCGrad).
        scope: what makes up one vector: ``"global"`` all elements, ``"tensor"`` each tensor on its
            own, ``"row"`` each row of each tensor (its slices along the first dimension; a tensor
            of one dimension is one row).
        strength: 1 removes the component, 0 leaves it, 2 reflects it.

    Returns:
        Tensors like ``g``: one, or a list.

    Raises:
        TypeError: for anything but floating-point tensors or sequences of them.
        ValueError: for lists, shapes, dtypes or devices that do not match, and unknown options.

    References:
        Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020 (``mode="conflict"``).

    Example:
        >>> import torch
        >>> from hessreg import project_orthogonal
        >>> project_orthogonal(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
        tensor([3., 0.])
        >>> g = [torch.tensor([1.0, 1.0]), torch.tensor([2.0])]
        >>> v = [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
        >>> project_orthogonal(g, v, scope="tensor")
        [tensor([0., 1.]), tensor([0.])]
    """
    single = isinstance(g, Tensor)
    vectors, directions = _as_list(g, "g"), _as_list(against, "against")
    _check_alike(vectors, directions)
    _check_options(mode, scope, strength)
    if not vectors:
        return []
    tensors = [*vectors, *directions]
    projected = project(tensors, float(strength), mode == "conflict", _SCOPES[scope], False)
    return projected[0] if single else projected


def _as_list(value: Any, name: str) -> list[Tensor]:
    tensors = [value] if isinstance(value, Tensor) else value
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(value)}")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor)}")
    return list(tensors)


def _check_alike(g: list[Tensor], against: list[Tensor]) -> None:
    if len(g) != len(against):
        raise ValueError(
            f"against must hold as many tensors as g, got {len(against)} against {len(g)}"
        )
    shapes, others = [t.shape for t in g], [t.shape for t in against]
    if shapes != others:
        i = next(i for i, (a, b) in enumerate(zip(shapes, others, strict=True)) if a != b)
        raise ValueError(
            f"against[{i}] must have the shape of g[{i}], {tuple(shapes[i])}, "
            f"got {tuple(others[i])}"
        )
    if g and not _all_of_one_kind([*g, *against]):
        for name, tensors in (("g", g), ("against", against)):
            for i, tensor in enumerate(tensors):
                _check_kind(f"{name}[{i}]", tensor, g[0])


def _all_of_one_kind(tensors: list[Tensor]) -> bool:
    dtype, device, dense = tensors[0].dtype, tensors[0].device, torch.strided
    return dtype in _DTYPES and all(
        t.dtype is dtype and t.device == device and t.layout is dense for t in tensors
    )


def _check_kind(name: str, tensor: Tensor, model: Tensor) -> None:
    if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor of float16, bfloat16, float32 or float64, "
            f"got {tensor.dtype}, {tensor.layout}"
        )
    if tensor.dtype is not model.dtype or tensor.device != model.device:
        raise ValueError(
            f"{name} must have the dtype and device of g[0], {model.dtype} on {model.device}, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _check_options(mode: str, scope: str, strength: float) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    if scope not in _SCOPES:
        raise ValueError(f"scope must be one of {', '.join(_SCOPES)}, got {scope!r}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"strength must be a number, got {type(strength)}")
    if not -_LARGEST <= strength <= _LARGEST:  # traceable, which math.isfinite is not
        raise ValueError(f"strength must be finite, got {strength}")
