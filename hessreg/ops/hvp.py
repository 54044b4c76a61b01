r"""Hessian-vector products: symmetric matrices, and multilayer perceptrons by the R-operator.

A network has layers ``z_l = W_l a_{l-1} + b_l``, ``a_l = f(z_l)``, ``a_0 = x``, and the output
``y = z_L``. With ``delta_L`` the gradient of the loss in ``y``: ``g_l = W_{l+1}' delta_{l+1}``,
``delta_l = f'(z_l) o g_l``, ``s_l = f''(z_l) o g_l``. ``R`` is the derivative along a direction,
``V_l`` in ``W_l``, ``c_l`` in ``b_l``, ``u`` in ``x`` (Pearlmutter 1994). Six operators go through
the layers, the first two once for any number of products, the next two for several directions:

- ``mlp_forward``: ``y``, ``a_l``, ``d1_l = f'(z_l)``, ``d2_l = f''(z_l)``, ``d3_l = f'''(z_l)``.
- ``mlp_backward``: ``delta_l``, ``s_l``, ``t_l = d3_l o g_l``.
- ``mlp_tangent``: ``R y``, ``Rz_l = W_l Ra_{l-1} + V_l a_{l-1} + c_l``, ``Ra_l = d1_l o Rz_l``.
- ``mlp_adjoint``: ``Rg_l = W_{l+1}' R delta_{l+1} + V_{l+1}' delta_{l+1}``,
  ``R delta_l = d1_l o Rg_l + s_l o Rz_l``, and the product: ``R delta_l a_{l-1}' + delta_l
  Ra_{l-1}'`` for ``W_l``, the sum of ``R delta_l`` over the batch for ``b_l``, ``Rg_0`` for ``x``.

For third derivatives, along two directions and with ``R_12 = R_1 R_2``:

- ``mlp_second_tangent``: ``R_j y``, ``R_j z_l``, ``R_j a_l`` for j = 1, 2, 12, with ``R_12 z_l =
  W_l R_12 a_{l-1} + V_1l R_2 a_{l-1} + V_2l R_1 a_{l-1}`` and ``R_12 a_l = d2_l o R_1 z_l o R_2 z_l
  + d1_l o R_12 z_l``.
- ``mlp_second_adjoint``: ``R_12`` of the gradient of the loss, which is the product rule applied
  twice to ``delta_l a_{l-1}'`` and to ``delta_l = d1_l o W_{l+1}' delta_{l+1}``.

Where the loss is a sum over the outputs, four operators spare the calls of many:
``mlp_loss_terms`` has its derivatives, ``mlp_lanczos`` multiplies and orthogonalises step
after step, ``mlp_absolute_form`` goes on from there to ``z' |H| z`` and its gradient, and
``mlp_spectral_form`` to the Ritz value of largest modulus and its gradient.

``x``, ``y`` and ``delta_L`` are ``[batch, width]``; what one operator keeps for another is
``[width, batch]``. A direction is one flat vector, ``V_l`` and ``c_l`` at given offsets in it (-1:
none).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hessreg import _backend
from hessreg.ops._registry import Arguments, Operator, is_tracked, reverse_of, vmap_of
from hessreg.ops.spectral import BREAKDOWN, lanczos_step

Activation = str | tuple[str, float]
Head = Callable[[Tensor], Tensor]  # R y [k, batch, outputs] -> R delta_L, of the same shape
# The derivatives of y along w, along z and along both, [batch, outputs] each, to what belongs to
# y, to that along w and to that along z.
ThirdHead = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# In the order of hvp.h, with the parameter of each: the one it has unless it is given another.
_PARAMETERS: dict[str, float | None] = {
    "identity": None,
    "tanh": None,
    "sigmoid": None,
    "softplus": 1.0,
    "silu": None,
    "gelu": None,
    "gelu_tanh": None,
    "relu": None,
    "leaky_relu": 0.01,
    "elu": 1.0,
}
_NAMES = tuple(_PARAMETERS)

Jet = tuple[Tensor, Tensor, Tensor, Tensor]  # f, f', f'' and f'''


# ---- activations -------------------------------------------------------------------------------


def _tanh(z: Tensor, _: float) -> Jet:
    t = z.tanh()
    first = 1 - t * t
    return t, first, -2 * t * first, first * (4 - 6 * first)


def _sigmoid(z: Tensor, _: float) -> Jet:
    s, rest = z.sigmoid(), (-z).sigmoid()
    return s, s * rest, s * rest * (rest - s), s * rest * (1 - 6 * s * rest)


def _softplus(z: Tensor, beta: float) -> Jet:
    slope, bend, third, _ = _sigmoid(beta * z, 0.0)
    value = torch.logaddexp(beta * z, torch.zeros_like(z)) / beta
    return value, slope, beta * bend, beta * beta * third


def _silu(z: Tensor, _: float) -> Jet:
    gate, first, second, third = _sigmoid(z, 0.0)
    return z * gate, gate + z * first, 2 * first + z * second, 3 * second + z * third


def _gelu(z: Tensor, _: float) -> Jet:
    share = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    third = z * density * (z * z - 4)
    return z * share, share + z * density, (2 - z * z) * density, third


def _gelu_tanh(z: Tensor, _: float) -> Jet:
    scale, cube = math.sqrt(8 / math.pi), 0.044715
    slope, bend = scale * (1 + 3 * cube * z * z), 6 * scale * cube * z
    gate, gate1, gate2, gate3 = _sigmoid(scale * (z + cube * z * z * z), 0.0)
    first, second = gate1 * slope, gate2 * slope * slope + gate1 * bend
    third = gate3 * slope * slope * slope + 3 * gate2 * slope * bend + 6 * scale * cube * gate1
    return z * gate, gate + z * first, 2 * first + z * second, 3 * second + z * third


def _leaky_relu(z: Tensor, slope: float) -> Jet:
    first = torch.where(z > 0, torch.ones_like(z), slope)
    return first * z, first, torch.zeros_like(z), torch.zeros_like(z)


def _elu(z: Tensor, alpha: float) -> Jet:
    below = z.clamp(max=0)
    slope = alpha * below.exp()
    first, higher = torch.where(z > 0, 1, slope), torch.where(z < 0, slope, 0)
    return torch.where(z > 0, z, alpha * below.expm1()), first, higher, higher


_JETS: tuple[Callable[[Tensor, float], Jet], ...] = (
    lambda z, _: (z, torch.ones_like(z), torch.zeros_like(z), torch.zeros_like(z)),
    _tanh,
    _sigmoid,
    _softplus,
    _silu,
    _gelu,
    _gelu_tanh,
    lambda z, _: _leaky_relu(z, 0.0),
    _leaky_relu,
    _elu,
)


# ---- reference ---------------------------------------------------------------------------------


def symmetric_matmul_reference(a: Tensor, v: Tensor) -> Tensor:
    """A v with A from its lower triangle; derivatives along symmetric matrices only."""
    in_lower = torch.ones_like(a, dtype=torch.bool).tril()
    lower, upper = torch.where(in_lower, a, a.mT), torch.where(in_lower, a.mT, a)
    # The gradient goes to both triangles in equal parts.
    apart = upper - lower
    return (lower + 0.5 * (apart - apart.detach()).nan_to_num()) @ v


def forward_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[int],
    parameters: Sequence[float],
    with_third: bool,
) -> list[Tensor]:
    """``[y, a_1, ..., d1_1, ..., d2_1, ...]`` and perhaps ``d3_1, ...`` by definition."""
    a, jets = x.mT, []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        z = weight @ a + (bias[:, None] if bias.numel() else 0)
        if i < len(activations):
            jets.append(_JETS[activations[i]](z, parameters[i]))
            a = jets[-1][0]
    return [z.mT, *(jet[i] for i in range(3 + with_third) for jet in jets)]


def backward_reference(
    delta: Tensor,
    weights: Sequence[Tensor],
    d1: Sequence[Tensor],
    d2: Sequence[Tensor],
    d3: Sequence[Tensor],
) -> list[Tensor]:
    """``[delta_1, ..., delta_L, s_1, ...]``, and ``t_1, ...`` where d3 is given, by definition."""
    deltas, g = [delta.mT.clone()], []
    for weight, first in zip(weights[:0:-1], d1[::-1], strict=True):
        g.append(weight.mT @ deltas[-1])
        deltas.append(first * g[-1])
    kept = [[d * g_l for d, g_l in zip(jet, g[::-1], strict=True)] for jet in (d2, d3) if jet]
    return [*deltas[::-1], *(t for part in kept for t in part)]


def _weight_part(v: Tensor, weight: Tensor, offset: int) -> Tensor | None:
    """``V_l`` of every direction, ``[k, out, in]``."""
    if offset < 0:
        return None
    return v[:, offset : offset + weight.numel()].unflatten(1, weight.shape)


def _total(terms: Sequence[Tensor | None]) -> Any:
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def _transposed(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.mT


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a @ b


def tangent_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    direction_x: Tensor,
    v: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
) -> list[Tensor]:
    """``[R y, Rz_1, ..., Rz_{L-1}]`` by definition."""
    ra = direction_x.mT if direction_x.numel() else None
    moved: list[Tensor] = []
    for i, (weight, before) in enumerate(zip(weights, [x.mT, *a], strict=True)):
        start = bias_offsets[i]
        bias = v[:, start : start + len(weight), None] if start >= 0 else None
        direction = _weight_part(v, weight, weight_offsets[i])
        rz = _total([_product(weight, ra), _product(direction, before), bias])
        shape = (len(v), len(weight), len(x))
        moved.append(x.new_zeros(shape) if rz is None else rz.expand(shape))
        ra = d1[i] * moved[-1] if i < len(d1) and rz is not None else None
    return [moved[-1].mT, *moved[:-1]]


def adjoint_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    delta: Sequence[Tensor],
    s: Sequence[Tensor],
    rz: Sequence[Tensor],
    direction_x: Tensor,
    v: Tensor,
    r_delta: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
    gauss_newton: bool,
    with_input: bool,
) -> list[Tensor]:
    """``[product [k, p]]``, and that for the input, ``[k, batch, n_0]``, by definition."""
    before = [x.mT, *a]
    directions = [
        _weight_part(v, w, start) for w, start in zip(weights, weight_offsets, strict=True)
    ]
    ra = [direction_x.mT if direction_x.numel() else None]
    ra += [first * moved for first, moved in zip(d1, rz)]  # noqa: B905 - none for Gauss-Newton
    parts: dict[int, Tensor] = {}
    r = r_delta.mT
    for i in reversed(range(len(weights))):
        if bias_offsets[i] >= 0:
            parts[bias_offsets[i]] = r.sum(-1)
        first_term, rg = r @ before[i].mT, weights[i].mT @ r
        if gauss_newton:
            cross = bent = None
        else:
            cross = _product(delta[i], _transposed(ra[i]))
            bent = _product(_transposed(directions[i]), delta[i])
        if weight_offsets[i] >= 0:
            parts[weight_offsets[i]] = _total([first_term, cross]).flatten(1)
        rg = _total([rg, bent])
        if i > 0:
            r = d1[i - 1] * rg + (0 if gauss_newton else s[i - 1] * rz[i - 1])
    flat = torch.cat(list(_with_gaps(parts, v)), 1)
    return [flat, rg.mT] if with_input else [flat]


def second_tangent_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    d2: Sequence[Tensor],
    v: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
) -> list[Tensor]:
    """``[R y, Rz_1, ..., Ra_1, ...]`` for R_1, R_2 and R_12 side by side, by definition."""
    ra: list[Tensor | None] = [None] * 3
    moved: list[list[Tensor]] = [[], []]
    for i, (weight, before) in enumerate(zip(weights, [x.mT, *a], strict=True)):
        direction = _weight_part(v, weight, weight_offsets[i])
        parts = [None, None] if direction is None else direction.unbind()
        start = bias_offsets[i]
        biases = v[:, start : start + len(weight), None] if start >= 0 else [None, None]
        own = [[_product(part, before), bias] for part, bias in zip(parts, biases, strict=True)]
        own += [[_product(parts[0], ra[1]), _product(parts[1], ra[0])]]
        rz = [_total([_product(weight, r), *rest]) for r, rest in zip(ra, own, strict=True)]
        shape = len(weight), len(x)
        moved[0].append(_stacked(rz, x, shape))
        if i < len(d1):
            bent = None if rz[0] is None else d2[i] * rz[0] * rz[1]
            ra = [None if r is None else d1[i] * r for r in rz]
            ra[2] = _total([ra[2], bent])
            moved[1].append(_stacked(ra, x, shape))
    return [moved[0][-1].mT, *moved[0][:-1], *moved[1]]


def _stacked(parts: Sequence[Tensor | None], like: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.stack([like.new_zeros(shape) if p is None else p.expand(shape) for p in parts])


def second_adjoint_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    d2: Sequence[Tensor],
    delta: Sequence[Tensor],
    s: Sequence[Tensor],
    t: Sequence[Tensor],
    rz: Sequence[Tensor],
    ra: Sequence[Tensor],
    v: Tensor,
    r_delta: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
) -> Tensor:
    """``R_12`` of the gradient, ``[p]``, by definition."""
    before = [x.mT, *a]
    parts: dict[int, Tensor] = {}
    r = r_delta.mT
    for i in reversed(range(len(weights))):
        direction = _weight_part(v, weights[i], weight_offsets[i])
        if bias_offsets[i] >= 0:
            parts[bias_offsets[i]] = r[2].sum(-1)[None]
        if direction is not None:
            crossed = [r[1] @ ra[i - 1][0].mT, r[0] @ ra[i - 1][1].mT] if i > 0 else []
            crossed += [delta[i] @ ra[i - 1][2].mT] if i > 0 else []
            parts[weight_offsets[i]] = _total([r[2] @ before[i].mT, *crossed]).flatten()[None]
        if i == 0:
            break
        g, z = weights[i].mT @ r, rz[i - 1]
        if direction is not None:
            both = direction[0].mT @ r[1] + direction[1].mT @ r[0]
            g = g + torch.cat([direction.mT @ delta[i], both[None]])
        bent = d2[i - 1] * (z[0] * g[1] + z[1] * g[0]) + t[i - 1] * z[0] * z[1]
        r = d1[i - 1] * g + s[i - 1] * z
        r = torch.cat([r[:2], (r[2] + bent)[None]])
    return torch.cat(list(_with_gaps(parts, v[:1])), 1)[0]


def lanczos_reference(
    basis: Tensor,
    first: int,
    num_steps: int,
    breakdown: float,
    largest: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    delta: Sequence[Tensor],
    s: Sequence[Tensor],
    curvature: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
    gauss_newton: bool,
) -> list[Tensor]:
    """`lanczos_step` of ``num_steps`` products, from that with row ``first`` on, one by one."""
    none, offsets = x.new_empty(0), (weight_offsets, bias_offsets)
    results = []
    for row in range(first, first + num_steps):
        v = basis[row : row + 1]
        ry, *rz = mlp_tangent(x, weights, a, d1, none, v, *offsets)
        second = delta, s, [] if gauss_newton else rz
        rest = none, v, ry * curvature, *offsets, gauss_newton, False
        (product,) = mlp_adjoint(x, weights, a, d1, *second, *rest)
        results.append(lanczos_step(basis, product[0], row + 1, largest, breakdown))
        largest = results[-1][-1:]
    return results


def absolute_form_reference(
    z: Tensor,
    num_steps: int,
    smoothing: float,
    weight: float,
    breakdown: float,
    with_gradient: bool,
    *network: Any,
) -> list[Tensor]:
    """As `MLPHessian.absolute_form`, by the other operators."""
    ritz = _ritz_pairs(z, num_steps, breakdown, *network)
    if ritz is None:
        return []
    values, V, _, basis = ritz
    signs = (values / values.hypot(smoothing * values.abs().max())).nan_to_num(0.0)
    parts = weight * signs * V[0]
    found = [(values * parts @ V[0]).to(z), (V @ parts).to(z) @ basis]
    if with_gradient:
        found.append(_third_derivative(torch.stack([found[1], z]), *network))
    return found


def spectral_form_reference(
    z: Tensor, num_steps: int, breakdown: float, with_gradient: bool, *network: Any
) -> list[Tensor]:
    """As `MLPHessian.spectral_form`, by the other operators."""
    ritz = _ritz_pairs(z, num_steps, breakdown, *network)
    if ritz is None:
        return []
    values, V, residuals, basis = ritz
    k = len(values) - 1 if values[-1] >= -values[0] else 0
    v = (V[:, k] if V[0, k] >= 0 else -V[:, k]).to(z) @ basis
    found = [torch.stack([values[k], residuals[k]]), v]
    if with_gradient:
        gradient = _third_derivative(torch.stack([v, v]), *network)
        found.append(gradient if values[k] >= 0 else -gradient)
    return found


def _ritz_pairs(
    z: Tensor, num_steps: int, breakdown: float, *network: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Ritz values [m], their vectors' coordinates [m, m], residuals [m] and the basis [m, p]."""
    basis = z.repeat(min(num_steps, len(z)) + 1, 1)
    start = basis, 0, len(basis) - 1, breakdown, basis.new_zeros(1, dtype=torch.float64)
    x, weights, a, d1, _, delta, s, _, loss, *offsets = network
    rest = x, weights, a, d1, delta, s, loss[1], *offsets, False
    ends = torch.stack([step[-4:-1] for step in lanczos_reference(*start, *rest)]).cpu()
    if not ends.isfinite().all():
        return None
    last = int(torch.cat([ends[:, 2], ends.new_ones(1)]).argmax())  # up to an invariant space
    diagonal, off, invariant = ends[: last + 1].mT
    T = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    values, V = torch.linalg.eigh(T)
    is_exact = len(T) == len(z) or bool(invariant[-1])
    return values, V, 0 * values if is_exact else off[-1] * V[-1].abs(), basis[: len(T)]


def _third_derivative(
    v: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    d2: Sequence[Tensor],
    delta: Sequence[Tensor],
    s: Sequence[Tensor],
    t: Sequence[Tensor],
    loss: Tensor,
    *offsets: Sequence[int],
) -> Tensor:
    """That along two vectors v [2, p] of a loss that is a sum over the outputs."""
    caches = x, weights, a, d1, d2
    ry, *moved = mlp_second_tangent(*caches, v, *offsets)
    r_delta = loss[1] * ry
    r_delta[2] += loss[2] * ry[0] * ry[1]
    second = delta, s, t, moved[: len(a)], moved[len(a) :]
    found: Tensor = mlp_second_adjoint(*caches, *second, v, r_delta, *offsets)
    return found


def loss_terms_reference(
    y: Tensor,
    rows: Sequence[int],
    activations: Sequence[int],
    parameters: Sequence[float],
    signs: Sequence[float],
    scales: Sequence[float],
) -> Tensor:
    """``[3, batch, outputs]``: three derivatives of scale f(sign y), by definition."""
    parts = []
    for part, number, parameter, sign, scale in zip(
        y.split(list(rows)), activations, parameters, signs, scales, strict=True
    ):
        _, first, second, third = _JETS[number](sign * part, parameter)
        parts.append(torch.stack([scale * sign * first, scale * second, scale * sign * third]))
    return torch.cat(parts, 1)


def _with_gaps(parts: dict[int, Tensor], v: Tensor) -> Iterator[Tensor]:
    """The parts in their order, and zeros where there is none."""
    end = 0
    for start in sorted(parts):
        yield v.new_zeros(len(v), start - end)
        yield parts[start]
        end = start + parts[start].shape[1]
    yield v.new_zeros(len(v), v.shape[1] - end)


# ---- derivatives, batching, shapes ---------------------------------------------------------------


def _symmetric_part(a: Tensor) -> Tensor:
    return 0.5 * (a + a.mT)


def _symmetric_backward(
    arguments: Arguments, needs: Arguments, cotangent: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    a, v = arguments
    for_a = _symmetric_part(cotangent @ v.mT) if needs[0] else None
    return for_a, symmetric_product(a, cotangent) if needs[1] else None


def _symmetric_jvp(arguments: Arguments, tangents: Arguments) -> Tensor:
    a, v = arguments
    da, dv = tangents
    by_a = None if da is None else symmetric_product(_symmetric_part(da), v)
    by_v = None if dv is None else symmetric_product(a, dv)
    return _total([by_a, by_v])


def _symmetric_vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> Tensor:
    a, v = (
        t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(arguments, dims, strict=True)
    )
    return symmetric_product(a.flatten(0, 1), v.flatten(0, 1)).reshape(v.shape)


def _symmetric_fake(a: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


def _hidden(like: Tensor, weights: Sequence[Tensor], batch: int, *leading: int) -> list[Tensor]:
    return [like.new_empty(*leading, len(weight), batch) for weight in weights]


def _forward_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[int],
    parameters: Sequence[float],
    with_third: bool,
) -> list[Tensor]:
    hidden = [t for _ in range(3 + with_third) for t in _hidden(x, weights[:-1], len(x))]
    return [x.new_empty(len(x), len(weights[-1])), *hidden]


def _backward_fake(
    delta: Tensor,
    weights: Sequence[Tensor],
    d1: Sequence[Tensor],
    d2: Sequence[Tensor],
    d3: Sequence[Tensor],
) -> list[Tensor]:
    kept = [t for jet in (d2, d3) if jet for t in _hidden(delta, weights[:-1], len(delta))]
    return [*_hidden(delta, weights, len(delta)), *kept]


def _tangent_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    direction_x: Tensor,
    v: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
) -> list[Tensor]:
    ry = x.new_empty(len(v), len(x), len(weights[-1]))
    return [ry, *_hidden(x, weights[:-1], len(x), len(v))]


def _adjoint_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    delta: Sequence[Tensor],
    s: Sequence[Tensor],
    rz: Sequence[Tensor],
    direction_x: Tensor,
    v: Tensor,
    r_delta: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
    gauss_newton: bool,
    with_input: bool,
) -> list[Tensor]:
    result = v.new_empty(v.shape)
    return [result, x.new_empty(len(v), *x.shape)] if with_input else [result]


def _second_tangent_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    d2: Sequence[Tensor],
    v: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
) -> list[Tensor]:
    kept = [t for _ in range(2) for t in _hidden(x, weights[:-1], len(x), 3)]
    return [x.new_empty(3, len(x), len(weights[-1])), *kept]


def _second_adjoint_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    d1: Sequence[Tensor],
    d2: Sequence[Tensor],
    delta: Sequence[Tensor],
    s: Sequence[Tensor],
    t: Sequence[Tensor],
    rz: Sequence[Tensor],
    ra: Sequence[Tensor],
    v: Tensor,
    r_delta: Tensor,
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
) -> Tensor:
    return v.new_empty(v.shape[1])


symmetric_product = Operator(
    "symmetric_matmul",
    reference=symmetric_matmul_reference,
    fake=_symmetric_fake,
    backward=_symmetric_backward,
    jvp=_symmetric_jvp,
    vmap=_symmetric_vmap,
)
mlp_forward = Operator(
    "mlp_forward",
    reference=forward_reference,
    fake=_forward_fake,
    backward=reverse_of(forward_reference),
    vmap=vmap_of(forward_reference),
)
mlp_backward = Operator(
    "mlp_backward",
    reference=backward_reference,
    fake=_backward_fake,
    backward=reverse_of(backward_reference),
    vmap=vmap_of(backward_reference),
)
mlp_tangent = Operator(
    "mlp_tangent",
    reference=tangent_reference,
    fake=_tangent_fake,
    backward=reverse_of(tangent_reference),
    vmap=vmap_of(tangent_reference),
)
mlp_adjoint = Operator(
    "mlp_adjoint",
    reference=adjoint_reference,
    fake=_adjoint_fake,
    backward=reverse_of(adjoint_reference),
    vmap=vmap_of(adjoint_reference),
)
mlp_second_tangent = Operator(
    "mlp_second_tangent",
    reference=second_tangent_reference,
    fake=_second_tangent_fake,
    backward=reverse_of(second_tangent_reference),
    vmap=vmap_of(second_tangent_reference),
)
mlp_second_adjoint = Operator(
    "mlp_second_adjoint",
    reference=second_adjoint_reference,
    fake=_second_adjoint_fake,
    backward=reverse_of(second_adjoint_reference),
    vmap=vmap_of(second_adjoint_reference),
)


# ---- public ------------------------------------------------------------------------------------


def symmetric_matmul(A: Tensor, V: Tensor) -> Tensor:
    r"""Products with symmetric matrices, of which only the lower triangle is read.

    Equivalent to ``A @ V`` with half the memory traffic where A is large. Differentiable to any
    order; A is taken for symmetric there too: its gradient is ``(g V' + V g') / 2``, symmetric
    like that of ``torch.linalg.eigh``.

    Args:
        A: symmetric matrices ``[..., n, n]`` in float16, bfloat16, float32 or float64.
        V: vectors ``[..., n, k]``, like ``A`` in dtype and device; batches broadcast.

    Returns:
        ``[..., n, k]``.

    Raises:
        TypeError: for anything but floating-point tensors.
        ValueError: for shapes, dtypes or devices that do not match.

    Example:
        >>> import torch, hessreg
        >>> A = torch.tensor([[2.0, float("nan")], [1.0, 3.0]])
        >>> hessreg.symmetric_matmul(A, torch.tensor([[1.0], [1.0]]))
        tensor([[3.],
                [4.]])
    """
    _check_tensor(A, "A")
    _check_like(A, V, "V", "A")
    if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square matrices [..., n, n], got shape {tuple(A.shape)}")
    if V.dim() < 2 or V.shape[-2] != A.shape[-1]:
        raise ValueError(
            f"V must be vectors [..., n, k] with n = {A.shape[-1]}, got shape {tuple(V.shape)}"
        )
    batch = _broadcast(A.shape[:-2], V.shape[:-2])
    a, v = (
        t.to(_compute_dtype(t))
        .expand(*batch, *t.shape[-2:])
        .reshape(math.prod(batch), *t.shape[-2:])
        for t in (A, V)
    )
    return symmetric_product(a, v).to(A.dtype).reshape(*batch, *V.shape[-2:])


class MLPHessian:
    r"""Hessian-vector products of one multilayer perceptron at one batch, sharing what they can.

    The network is ``y = W_L f(... f(W_1 x + b_1) ...) + b_L``. Its activations are kept from the
    forward pass on, so that each product is a pass forward and a pass backward over tangents; k
    directions at once share the reading of the weights.

    Args:
        weights: W_1, ..., W_L, ``[width, width before]`` as in ``torch.nn.Linear``.
        biases: b_1, ..., b_L, ``[width]``, or None where a layer has none.
        activation: f: ``"identity"``, ``"tanh"``, ``"sigmoid"``, ``"softplus"`` (without the
            threshold of torch, which is off by 2e-9), ``"silu"``, ``"gelu"``, ``"gelu_tanh"``,
            ``"relu"``, ``"leaky_relu"`` or ``"elu"``, or a pair of one of these and its parameter:
            beta of softplus (1), the slope of leaky_relu (0.01), alpha of elu (1). The second
            derivative of relu and leaky_relu is zero almost everywhere, and that of elu jumps at 0:
            on the kink, products take it and the third to be zero. Or a list with one of these for
            each hidden layer.
        x: inputs ``[batch, n_0]``, like all parameters in dtype (float32 or float64) and device.
        weight_offsets: where W_l lies in the flat vectors, row after row; -1: nowhere, it stays
            fixed. By default W_1, b_1, W_2, b_2, ... follow each other.
        bias_offsets: likewise for b_l.
        with_third: keep f''' too, which `third` needs.

    Raises:
        TypeError: for anything but floating-point tensors.
        ValueError: for shapes, dtypes or devices that do not match and unknown activations.

    References:
        Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.

    Example:
        >>> import torch
        >>> from hessreg import MLPHessian
        >>> w = torch.ones(1, 2)
        >>> curvature = MLPHessian([w], [None], "identity", torch.tensor([[1.0, 2.0]]))
        >>> curvature.outputs
        tensor([[3.]])
        >>> curvature.linearize(2 * curvature.outputs)  # the loss is y^2
        >>> curvature.product(torch.tensor([[1.0, 0.0]]), lambda moved: 2 * moved)
        tensor([[2., 4.]])
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activation: Activation | Sequence[Activation],
        x: Tensor,
        *,
        weight_offsets: Sequence[int] | None = None,
        bias_offsets: Sequence[int] | None = None,
        with_third: bool = False,
    ) -> None:
        self._weights = _checked_weights(weights, x)
        self._biases = _checked_biases(biases, self._weights)
        self._x = x
        in_order = _offsets_in_order(self._weights, self._biases)
        self._offsets = [
            list(default if given is None else given)
            for given, default in zip((weight_offsets, bias_offsets), in_order, strict=True)
        ]
        self._length = _length(self._weights, self._offsets[0], self._biases, self._offsets[1])
        hidden = len(self._weights) - 1
        activations = _checked_activations(activation, hidden)
        outputs = mlp_forward(x, self._weights, self._biases, *activations, with_third)
        self.outputs: Tensor = outputs[0]
        self._a, self._d1, self._d2, self._d3 = (
            outputs[1 + i * hidden : 1 + (i + 1) * hidden] for i in range(4)
        )
        self._with_third = with_third
        self._delta: list[Tensor] = []
        self._s: list[Tensor] = []
        self._t: list[Tensor] = []

    @property
    def elements_per_vector(self) -> int:
        """About how many numbers a product takes for each vector, beside it and the result."""
        widths = [self._x.shape[1], *(len(weight) for weight in self._weights)]
        return 4 * len(self._x) * sum(widths)  # Rz, Ra and their adjoints, in two layouts

    def linearize(self, delta: Tensor) -> None:
        """Takes the gradient of the loss in the outputs, ``[batch, outputs]``.

        Products need it from then on, but for those of Gauss-Newton.
        """
        self._check(delta, "delta", self.outputs.shape)
        found = mlp_backward(delta, self._weights, self._d1, self._d2, self._d3)
        depth, end = len(self._weights), 2 * len(self._weights) - 1
        self._delta, self._s, self._t = found[:depth], found[depth:end], found[end:]

    def product(self, v: Tensor, head: Head, *, gauss_newton: bool = False) -> Tensor:
        """The Hessian in the parameters times k flat vectors.

        Args:
            v: ``[k, p]``.
            head: the Hessian of the loss in the outputs, as a function: ``[k, batch, outputs]``
                to the same.
            gauss_newton: without the curvature of the network itself.

        Returns:
            ``[k, p]``, zero where no offset points.
        """
        self._check_flat(v, "v", 2)
        return self._run(v, self._x.new_empty(0), head, gauss_newton, False)[0]

    def input_product(self, u: Tensor, head: Head | None = None) -> Tensor:
        """The Hessian in the inputs, of each sample, times k vectors each.

        Args:
            u: ``[k, batch, n_0]``.
            head: as for `product`; None: the loss is linear in the outputs.

        Returns:
            ``[k, batch, n_0]``.
        """
        self._check(u, "u", u.shape[:1] + self._x.shape)
        return self._run(u.new_empty(len(u), 0), u, head or torch.zeros_like, False, True)[1]

    def lanczos_steps(
        self,
        basis: Tensor,
        first: int,
        num_steps: int,
        breakdown: float,
        largest: Tensor,
        curvature: Tensor,
        *,
        gauss_newton: bool = False,
    ) -> list[Tensor]:
        """Steps of Lanczos with the Hessian of a loss that is a sum over the outputs, in one call.

        Args:
            basis: ``[rows, p]``, contiguous: each of the rows from ``first`` on is multiplied and
                the product made the next row by :func:`~hessreg.ops.spectral.lanczos_step`.
            first: the row to begin with.
            num_steps: as many rows are multiplied.
            breakdown: as `lanczos_step` takes it.
            largest: likewise.
            curvature: the second derivatives of the loss in the outputs, ``[batch, outputs]``.
            gauss_newton: as for `product`.

        Returns:
            What `lanczos_step` returns, for each step.

        Raises:
            RuntimeError: before `linearize`, unless ``gauss_newton``.
            ValueError: for shapes that do not match.
        """
        self._check_flat(basis, "basis", 2)
        self._check(curvature, "curvature", self.outputs.shape)
        self._check_linear(gauss_newton)
        compiled = _backend.runs_compiled(basis.device)
        run: Any = torch.ops.hessreg.mlp_lanczos.default if compiled else lanczos_reference
        second = ([], []) if gauss_newton else (self._delta, self._s)
        caches = self._x, self._weights, self._a, self._d1, *second
        steps = basis, first, num_steps, breakdown, largest
        found: list[Tensor] = run(*steps, *caches, curvature, *self._offsets, gauss_newton)
        return found

    def absolute_form(
        self,
        z: Tensor,
        num_steps: int,
        loss: Tensor,
        *,
        smoothing: float,
        weight: float,
        with_gradient: bool,
    ) -> list[Tensor]:
        """The number z' |H| z and its gradient, of a loss that is a sum over the outputs.

        With f(t) = t / sqrt(t^2 + d^2) in the place of the sign, d being ``smoothing`` times the
        largest Ritz value, and w = f(H) z from the Lanczos decomposition that begins with z: the
        number is w' H z, and its gradient is taken with w and z held fixed. `linearize` comes
        first.

        Args:
            z: a unit vector, ``[p]``.
            num_steps: of Lanczos.
            loss: the first three derivatives of the loss in the outputs, ``[3, batch, outputs]``.
            smoothing: as above.
            weight: what w is multiplied by.
            with_gradient: whether that is wanted, which needs ``with_third``.

        Returns:
            The number ``[]``, w ``[p]`` and the gradient ``[p]``; nothing if a product has NaN or
            infinity.

        Raises:
            RuntimeError: before `linearize`, or a gradient without ``with_third``.
            ValueError: for shapes that do not match.
        """
        run = _on_host("mlp_absolute_form", z.device) or absolute_form_reference
        how = num_steps, smoothing, weight
        return self._run_form(run, z, how, loss, with_gradient)

    def spectral_form(
        self, z: Tensor, num_steps: int, loss: Tensor, *, with_gradient: bool
    ) -> list[Tensor]:
        """The Ritz value of largest modulus, of a loss that is a sum over the outputs.

        With v the Ritz vector after Lanczos steps that begin with z, it is v' H v, and the gradient
        of its modulus is taken with v held fixed: a third derivative along one direction, in 11
        products of the sizes of the layers where `third` takes 18. `linearize` comes first.

        Args:
            z: a unit vector, ``[p]``.
            num_steps: of Lanczos.
            loss: the first three derivatives of the loss in the outputs, ``[3, batch, outputs]``.
            with_gradient: whether that is wanted, which needs ``with_third``.

        Returns:
            The value and the norm of its residual ``[2]``, in float64 on the CPU, v ``[p]`` with
            v' z >= 0 and the gradient ``[p]``; nothing if a product has NaN or infinity.

        Raises:
            RuntimeError: before `linearize`, or a gradient without ``with_third``.
            ValueError: for shapes that do not match.
        """
        run = _on_host("mlp_spectral_form", z.device) or spectral_form_reference
        return self._run_form(run, z, (num_steps,), loss, with_gradient)

    def third(self, w: Tensor, z: Tensor, head: ThirdHead) -> Tensor:
        r"""The third derivative in the parameters, applied to two flat vectors.

        The gradient of ``w' H z`` in the parameters, where H is the Hessian, w and z stay fixed and
        the loss is l(y) with y the outputs of the network::

            D^3 l(y)[w, z, .] = R_w R_z (gradient of the loss)

        in 18 products of the sizes of the layers, where a gradient takes three. `linearize` comes
        first.

        Args:
            w: ``[p]``.
            z: ``[p]``.
            head: takes the derivatives of the outputs along w, along z and along both, ``y_w``,
                ``y_z``, ``y_wz``, ``[batch, outputs]`` each. Returns, likewise, the derivatives of
                ``l''(y)[y_w, y_z] + l'(y) y_wz`` in y, in y_w and in y_z: ``l'''(y)[y_w, y_z, .] +
                l''(y) y_wz``, ``l''(y) y_z`` and ``l''(y) y_w``.

        Returns:
            ``[p]``, zero where no offset points.

        Raises:
            RuntimeError: without ``with_third`` or before `linearize`.
            ValueError: for shapes that do not match.

        References:
            Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994: the
            R-operator, here twice. Griewank, Walther, "Evaluating Derivatives", 2008, chapter 13.

        Example:
            >>> import torch
            >>> from hessreg import MLPHessian
            >>> x = torch.tensor([[1.0, 2.0]])
            >>> curvature = MLPHessian([torch.ones(1, 2)], [None], "tanh", x, with_third=True)
            >>> y = curvature.outputs
            >>> curvature.linearize(3 * y**2)  # the loss is y^3
            >>> def head(y_w, y_z, y_wz):
            ...     return 6 * y_w * y_z + 6 * y * y_wz, 6 * y * y_z, 6 * y * y_w
            >>> curvature.third(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), head)
            tensor([12., 24.])
        """
        self._check_third()
        self._check_flat(w, "w", 1)
        self._check(z, "z", w.shape)
        v, hidden = torch.stack([w, z]), len(self._a)
        caches = self._x, self._weights, self._a, self._d1, self._d2
        ry, *moved = mlp_second_tangent(*caches, v, *self._offsets)
        slope, by_w, by_z = head(*ry.unbind())
        r_delta = torch.stack([by_z, by_w, slope])  # the derivative in y_z is that along w
        second = self._delta, self._s, self._t, moved[:hidden], moved[hidden:]
        return mlp_second_adjoint(*caches, *second, v, r_delta, *self._offsets)

    def _run_form(
        self, run: Any, z: Tensor, how: Sequence[float], loss: Tensor, with_gradient: bool
    ) -> list[Tensor]:
        self._check_flat(z, "z", 1)
        self._check(loss, "loss", (3, *self.outputs.shape))
        self._check_third() if with_gradient else self._check_linear(False)
        breakdown = BREAKDOWN * torch.finfo(z.dtype).eps
        caches = self._x, self._weights, self._a, self._d1, self._d2
        second = self._delta, self._s, self._t, loss.contiguous()
        found: list[Tensor] = run(
            z, *how, breakdown, with_gradient, *caches, *second, *self._offsets
        )
        return found

    def _check_linear(self, gauss_newton: bool) -> None:
        if not self._delta and not gauss_newton:
            raise RuntimeError("linearize must be called before a product with the Hessian")

    def _check_third(self) -> None:
        if not self._with_third or not self._delta:
            raise RuntimeError("third needs MLPHessian(..., with_third=True) and linearize first")

    def _check(self, t: Tensor, name: str, shape: Sequence[int]) -> None:
        _check_like(self._x, t, name, "x")
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")

    def _check_flat(self, v: Tensor, name: str, ndim: int) -> None:
        """A flat vector, or k of them, must be long enough for every offset."""
        _check_like(self._x, v, name, "x")
        if v.dim() != ndim or v.shape[-1] < self._length:
            wanted = "[p]" if ndim == 1 else "[k, p]"
            raise ValueError(
                f"{name} must be {wanted} with p of at least {self._length},"
                f" got shape {tuple(v.shape)}"
            )

    def _run(
        self, v: Tensor, u: Tensor, head: Head, gauss_newton: bool, of_input: bool
    ) -> list[Tensor]:
        self._check_linear(gauss_newton)
        offsets = [[-1] * len(self._weights)] * 2 if of_input else self._offsets
        caches = self._x, self._weights, self._a, self._d1
        ry, *rz = mlp_tangent(*caches, u, v, *offsets)
        second = ([], [], []) if gauss_newton else (self._delta, self._s, rz)
        return mlp_adjoint(*caches, *second, u, v, head(ry), *offsets, gauss_newton, of_input)


def loss_terms(
    y: Tensor,
    rows: Sequence[int],
    activations: Sequence[Activation],
    signs: Sequence[float],
    scales: Sequence[float],
) -> Tensor:
    """Derivatives of a loss that adds up scale f(sign y) over outputs y, with an f for some rows.

    It is not differentiable.

    Args:
        y: ``[batch, outputs]``, float32 or float64.
        rows: how many of them have the same f, one part after another.
        activations: f of each part, as :class:`MLPHessian` takes them.
        signs: 1 or -1 for each part.
        scales: of each part.

    Returns:
        The first, the second and the third derivative in each output, ``[3, batch, outputs]``.
    """
    numbers, parameters = _checked_activations(activations, len(rows))
    run = _on_host("mlp_loss_terms", y.device) or loss_terms_reference
    found: Tensor = run(y, rows, numbers, parameters, signs, scales)
    return found


def _on_host(name: str, device: torch.device) -> Any:
    """An operator that is compiled for the CPU only, if it serves that device now."""
    if device.type != "cpu" or not _backend.runs_compiled(device):
        return None
    return getattr(torch.ops.hessreg, name).default


def mlp_hvp(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: Activation | Sequence[Activation],
    x: Tensor,
    v: Tensor,
) -> Tensor:
    r"""The Hessian of a network's scalar output in its input, per sample, times vectors.

    Equivalent to ``vmap(hessian(network))(x) @ v`` at about the cost of one gradient for each
    vector: nothing of size n_0 x n_0 is formed. Differentiable to any order in all tensors.

    Args:
        weights: W_1, ..., W_L as for :class:`MLPHessian`; the last has one row.
        biases: b_1, ..., b_L, or None where a layer has none.
        activation: as for :class:`MLPHessian`.
        x: inputs ``[..., n_0]`` in float16, bfloat16, float32 or float64.
        v: ``[..., n_0]``, or ``[..., n_0, k]`` for k vectors at once.

    Returns:
        A tensor like ``v``.

    Raises:
        TypeError: for anything but floating-point tensors.
        ValueError: for shapes, dtypes or devices that do not match and unknown activations.

    Example:
        >>> import torch, hessreg
        >>> w, last = torch.tensor([[1.0, 2.0]]), torch.ones(1, 1)
        >>> x, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> hessreg.mlp_hvp([w, last], [None, None], "tanh", x, v)
        tensor([[-0.6397, -1.2794]])
    """
    _check_tensor(x, "x")
    _check_like(x, v, "v", "x")
    if x.dim() < 1 or v.shape[: x.dim()] != x.shape or v.dim() > x.dim() + 1:
        raise ValueError(
            f"v must be like x, {tuple(x.shape)}, or have one more dimension, "
            f"got shape {tuple(v.shape)}"
        )
    parameters = _in_compute_dtype(weights, biases)
    curvature = MLPHessian(*parameters, activation, _rows(x))
    if curvature.outputs.shape[1] != 1:
        raise ValueError(
            f"weights must end in one of shape [1, width], got {curvature.outputs.shape[1]} outputs"
        )
    curvature.linearize(torch.ones_like(curvature.outputs))
    columns = v[..., None] if v.dim() == x.dim() else v
    u = columns.movedim(-1, 0).to(_compute_dtype(v))
    rows = u.reshape(len(u), math.prod(x.shape[:-1]), x.shape[-1])
    product = curvature.input_product(rows)
    return product.reshape(u.shape).movedim(0, -1).reshape(v.shape).to(v.dtype)


def mlp_parameter_hvp(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: Activation | Sequence[Activation],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    v: Tensor,
    *,
    gauss_newton: bool = False,
) -> Tensor:
    r"""The Hessian of a loss in a network's parameters, times vectors.

    Equivalent to ``hessian(lambda p: loss(network(p, x)))(parameters) @ v``. Differentiable to any
    order in all tensors. For many products at the same parameters use :class:`MLPHessian`.

    Args:
        weights: W_1, ..., W_L as for :class:`MLPHessian`.
        biases: b_1, ..., b_L, or None where a layer has none.
        activation: as for :class:`MLPHessian`.
        x: inputs ``[batch, n_0]`` in float16, bfloat16, float32 or float64.
        loss: takes the outputs ``[batch, n_L]`` and returns a scalar.
        v: ``[p]``, or ``[p, k]`` for k vectors at once: entries for W_1 row after row, b_1, W_2,
            b_2, ...
        gauss_newton: take the generalised Gauss-Newton matrix J' (Hessian of the loss in the
            outputs) J, which is positive semidefinite where the loss is convex.

    Returns:
        A tensor like ``v``.

    Raises:
        TypeError: for anything but floating-point tensors.
        ValueError: for shapes, dtypes or devices that do not match and unknown activations.

    Example:
        >>> import torch, hessreg
        >>> w, b = torch.tensor([[1.0, 2.0]]), torch.zeros(1)
        >>> x, v = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0, 0.0])
        >>> hessreg.mlp_parameter_hvp([w], [b], "tanh", x, lambda y: (y**2).sum() / 2, v)
        tensor([ 9., 12.,  3.])
    """
    _check_tensor(x, "x")
    _check_like(x, v, "v", "x")
    parameters = _in_compute_dtype(weights, biases)
    if x.dim() != 2:
        raise ValueError(f"x must be [batch, n_0], got shape {tuple(x.shape)}")
    curvature = MLPHessian(*parameters, activation, _rows(x))
    length = sum(t.numel() for t in [*curvature._weights, *curvature._biases])
    if v.dim() not in (1, 2) or v.shape[0] != length:
        raise ValueError(
            f"v must be [p] or [p, k] with p = {length} parameters, got shape {tuple(v.shape)}"
        )
    delta, head = _derivatives(loss, curvature.outputs)
    curvature.linearize(delta)
    directions = (v if v.dim() == 2 else v[:, None]).mT.to(_compute_dtype(v))
    product = curvature.product(directions, head, gauss_newton=gauss_newton)
    return product.mT.reshape(v.shape).to(v.dtype)


def _derivatives(loss: Callable[[Tensor], Tensor], y: Tensor) -> tuple[Tensor, Head]:
    """The gradient of a loss at the outputs, and its Hessian as a function."""
    keeps_graph = torch.is_grad_enabled()
    if torch.compiler.is_compiling() or is_tracked([]) or (keeps_graph and not y.requires_grad):
        # In reverse: forward mode, which a caller may be in, does not nest.
        delta, pullback, *_ = torch.func.vjp(torch.func.grad(loss), y)
        rows = torch.func.vmap(lambda tangent: pullback(tangent)[0])
        return delta, lambda ry: rows(ry) if len(ry) else ry
    with torch.inference_mode(False), torch.enable_grad():
        at = y if keeps_graph else y.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(at), at, create_graph=True)

    def product(tangent: Tensor) -> Tensor:
        options = {"retain_graph": True, "create_graph": keeps_graph, "allow_unused": True}
        (found,) = torch.autograd.grad(gradient, at, tangent, **options)
        return torch.zeros_like(tangent) if found is None else found

    def head(ry: Tensor) -> Tensor:
        if not gradient.requires_grad or len(ry) == 0:  # a loss that is linear in the outputs
            return torch.zeros_like(ry)
        return torch.stack([product(tangent) for tangent in ry])

    return gradient if keeps_graph else gradient.detach(), head


# ---- arguments ---------------------------------------------------------------------------------


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _in_compute_dtype(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    for i, weight in enumerate(weights):
        _check_tensor(weight, f"weights[{i}]")
    wide = [weight.to(_compute_dtype(weight)) for weight in weights]
    return wide, [b.to(_compute_dtype(b)) if isinstance(b, Tensor) else b for b in biases]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(_compute_dtype(x))


def _offsets_in_order(
    weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[list[int], list[int]]:
    """Offsets of W_1, b_1, W_2, b_2, ... one after another; -1 for a bias that is not there."""
    sizes = [t.numel() for pair in zip(weights, biases, strict=True) for t in pair]
    starts = list(accumulate(sizes, initial=0))[:-1]
    present = [start if size else -1 for start, size in zip(starts, sizes, strict=True)]
    return starts[::2], present[1::2]


def _checked_activations(
    activation: Activation | Sequence[Activation], hidden: int
) -> tuple[list[int], list[float]]:
    """The numbers of the hidden layers' activations in hvp.h, and their parameters."""
    if isinstance(activation, (str, tuple)):
        number, parameter = _checked_activation(activation)
        return [number] * hidden, [parameter] * hidden
    if not isinstance(activation, Sequence) or len(activation) != hidden:
        raise ValueError(
            f"activation must be one, or a list with one for each of {hidden} hidden layers, "
            f"got {activation!r}"
        )
    pairs = [_checked_activation(one) for one in activation]
    return [number for number, _ in pairs], [parameter for _, parameter in pairs]


def _checked_activation(activation: Any) -> tuple[int, float]:
    """The number of an activation in hvp.h, and its parameter."""
    name, *given = (activation,) if isinstance(activation, str) else tuple(activation)
    if name not in _NAMES or len(given) > 1:
        raise ValueError(
            f"activation must be one of {', '.join(_NAMES)}, or one with its parameter, "
            f"got {activation!r}"
        )
    default = _PARAMETERS[name]
    if given and default is None:
        raise ValueError(f"activation {name!r} has no parameter, got {given[0]!r}")
    parameter = given[0] if given else default or 0.0
    if isinstance(parameter, bool) or not isinstance(parameter, (int, float)):
        raise TypeError(f"the parameter of an activation must be a number, got {parameter!r}")
    if not -math.inf < parameter < math.inf or (name == "softplus" and parameter <= 0):
        raise ValueError(f"the parameter of {name} must be finite and in its range: {parameter}")
    return _NAMES.index(name), float(parameter)


def _checked_weights(weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    _check_tensor(x, "x")
    if x.dim() != 2:
        raise ValueError(f"x must be [batch, n_0], got shape {tuple(x.shape)}")
    if not weights:
        raise ValueError("weights must hold at least one matrix, got none")
    width = x.shape[1]
    for i, weight in enumerate(weights):
        _check_like(x, weight, f"weights[{i}]", "x")
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"weights[{i}] must be [width, {width}], got shape {tuple(weight.shape)}"
            )
        width = weight.shape[0]
    return list(weights)


def _checked_biases(biases: Sequence[Tensor | None], weights: list[Tensor]) -> list[Tensor]:
    """The biases, with an empty tensor for each that is not there."""
    if len(biases) != len(weights):
        raise ValueError(
            f"biases must hold one for each of {len(weights)} weights, got {len(biases)}"
        )
    for i, (bias, weight) in enumerate(zip(biases, weights, strict=True)):
        if bias is None:
            continue
        _check_like(weight, bias, f"biases[{i}]", "the weights")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"biases[{i}] must be [{len(weight)}], got shape {tuple(bias.shape)}")
    return [weights[0].new_empty(0) if bias is None else bias for bias in biases]


def _length(
    weights: Sequence[Tensor],
    weight_offsets: Sequence[int],
    biases: Sequence[Tensor],
    bias_offsets: Sequence[int],
) -> int:
    """What a flat vector needs to have at least, for all offsets."""
    tensors, starts = [*weights, *biases], [*weight_offsets, *bias_offsets]
    ends = [i + t.numel() for t, i in zip(tensors, starts, strict=True) if i >= 0]
    return max([0, *ends])


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError:
        raise ValueError(
            f"leading dimensions must broadcast, got {tuple(a)} and {tuple(b)}"
        ) from None


def _check_tensor(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x)}")
    if x.dtype not in _DTYPES or x.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor of float16, bfloat16, float32 or float64, "
            f"got {x.dtype}, {x.layout}"
        )


def _check_like(x: Tensor, other: Any, name: str, model: str) -> None:
    _check_tensor(other, name)
    if other.dtype is not x.dtype or other.device != x.device:
        raise ValueError(
            f"{name} must have the dtype and device of {model}, {x.dtype} on {x.device}, "
            f"got {other.dtype} on {other.device}"
        )
