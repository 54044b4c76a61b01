"""Puts the emulated CUDA kernels behind the operators, in the place of their CPU kernels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessreg.ops.hvp import (
    absolute_form_reference,
    lanczos_reference,
    spectral_form_reference,
)
from hessreg.ops.projection import _SCOPES, _shape
from tests.cuda_emulator.build import load

ROOT = Path(__file__).resolve().parent.parent


def kernel_file(family: str) -> Path:
    return ROOT / "csrc" / family / f"{family}_cuda.cu"


def load_family(family: str, *, check: bool = False) -> ModuleType:
    binding = ROOT / "tests" / "cuda_emulator" / f"{family}.cpp"
    return load(f"emulated_{family}", [kernel_file(family), binding], check=check)


@contextlib.contextmanager
def kernels(*, check: bool = False) -> Iterator[None]:
    """Within the block, CPU tensors are served by the emulated CUDA kernels."""
    library = torch.library.Library("hessreg", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for family in (Gaussian, Hvp, Projection, Spectral):
            operators = family(load_family(family.__name__.lower(), check=check))
            for name in family.operators:
                library.impl(name, getattr(operators, name), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def to_numpy(tensor: Tensor) -> np.ndarray:
    dense = tensor.detach().contiguous()
    return (dense.view(torch.uint16) if dense.dtype == torch.bfloat16 else dense).numpy()


def to_numpy_list(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [to_numpy(tensor) for tensor in tensors]


class Gaussian:
    """The operators of the gaussian family as csrc/gaussian/gaussian_op.cpp does them."""

    operators = ("gaussian_matrix", "gaussian_sum", "gaussian_energy")

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def gaussian_matrix(
        self, x: Tensor, y: Tensor, gamma: Tensor, coefficient: Tensor, allow_tf32: bool
    ) -> Tensor:
        out = x.new_empty(x.shape[0], x.shape[1], y.shape[1])
        arrays = map(to_numpy, (x, y, gamma, coefficient))
        self.module.matrix(*arrays, allow_tf32, to_numpy(out))
        return out

    def gaussian_sum(
        self,
        x: Tensor,
        y: Tensor,
        gamma: Tensor,
        coefficient: Tensor,
        left: Sequence[Tensor],
        right: Sequence[Tensor],
        v: Tensor,
        allow_tf32: bool,
    ) -> Tensor:
        out = x.new_empty(x.shape[0], x.shape[1], v.shape[2])
        arrays = map(to_numpy, (x, y, gamma, coefficient))
        factors = [to_numpy(t) for t in left], [to_numpy(t) for t in right]
        self.module.sum(*arrays, *factors, to_numpy(v), allow_tf32, to_numpy(out))
        return out

    def gaussian_energy(
        self,
        z: Tensor,
        gamma: Tensor,
        first: int,
        within_first: float,
        across: float,
        within_rest: float,
        allow_tf32: bool,
        with_gradient: bool,
    ) -> list[Tensor]:
        out = [z.new_empty(z.shape[0], dtype=torch.float64)]
        out += [z.new_empty(z.shape)] if with_gradient else []
        weights = within_first, across, within_rest
        arrays = [to_numpy(y) for y in out] + [None] * (not with_gradient)
        self.module.energy(to_numpy(z), to_numpy(gamma), first, *weights, allow_tf32, *arrays)
        return out


class Hvp:
    """The operators of the hvp family as csrc/hvp/hvp_op.cpp does them."""

    operators = (
        "symmetric_matmul",
        "mlp_forward",
        "mlp_backward",
        "mlp_tangent",
        "mlp_adjoint",
        "mlp_second_tangent",
        "mlp_second_adjoint",
        "mlp_lanczos",
        "mlp_absolute_form",
        "mlp_spectral_form",
    )
    mlp_lanczos = staticmethod(lanczos_reference)  # which calls the others
    mlp_absolute_form = staticmethod(absolute_form_reference)
    mlp_spectral_form = staticmethod(spectral_form_reference)

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def symmetric_matmul(self, a: Tensor, v: Tensor) -> Tensor:
        out = v.new_empty(v.shape)
        self.module.symmetric_product(to_numpy(a), to_numpy(v), to_numpy(out))
        return out

    def mlp_forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        activations: Sequence[int],
        parameters: Sequence[float],
        with_third: bool,
    ) -> list[Tensor]:
        y = x.new_empty(len(x), len(weights[-1]))
        kept = [_hidden(x, weights[:-1], len(x)) for _ in range(3 + with_third)]
        given = [to_numpy(b) if b.numel() else None for b in biases]
        arrays = to_numpy(x), to_numpy_list(weights), given
        out = [to_numpy_list(tensors) for tensors in kept]
        self.module.forward(
            *arrays, activations, parameters, to_numpy(y), *out, *[[]] * (not with_third)
        )
        return [y, *(t for tensors in kept for t in tensors)]

    def mlp_backward(
        self,
        delta: Tensor,
        weights: Sequence[Tensor],
        d1: Sequence[Tensor],
        d2: Sequence[Tensor],
        d3: Sequence[Tensor],
    ) -> list[Tensor]:
        deltas = _hidden(delta, weights, len(delta))
        s = _hidden(delta, weights[:-1], len(delta))
        t = _hidden(delta, weights[:-1], len(delta)) if d3 else []
        lists = map(to_numpy_list, (weights, d1, d2, d3, deltas, s, t))
        self.module.backward(to_numpy(delta), *lists)
        return [*deltas, *s, *t]

    def mlp_tangent(
        self,
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
        rz = _hidden(x, weights[:-1], len(v), len(x))
        lists = map(to_numpy_list, (weights, a, d1))
        directions = to_numpy(direction_x) if direction_x.numel() else None, to_numpy(v)
        out = to_numpy(ry), to_numpy_list(rz)
        offsets = weight_offsets, bias_offsets
        self.module.tangent(to_numpy(x), *lists, *directions, *offsets, *out)
        return [ry, *rz]

    def mlp_adjoint(
        self,
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
        result = _result(v, weights, weight_offsets, bias_offsets)
        r_input = x.new_empty(len(v), *x.shape) if with_input else None
        lists = map(to_numpy_list, (weights, a, d1, delta, s, rz))
        directions = to_numpy(direction_x) if direction_x.numel() else None, to_numpy(v)
        rest = to_numpy(r_delta), weight_offsets, bias_offsets, gauss_newton, to_numpy(result)
        self.module.adjoint(
            to_numpy(x), *lists, *directions, *rest, None if r_input is None else to_numpy(r_input)
        )
        return [result] if r_input is None else [result, r_input]

    def mlp_second_tangent(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        a: Sequence[Tensor],
        d1: Sequence[Tensor],
        d2: Sequence[Tensor],
        v: Tensor,
        weight_offsets: Sequence[int],
        bias_offsets: Sequence[int],
    ) -> list[Tensor]:
        ry = x.new_empty(3, len(x), len(weights[-1]))
        rz, ra = (_hidden(x, weights[:-1], 3, len(x)) for _ in range(2))
        lists = map(to_numpy_list, (weights, a, d1, d2))
        out = to_numpy(ry), to_numpy_list(rz), to_numpy_list(ra)
        offsets = weight_offsets, bias_offsets
        self.module.second_tangent(to_numpy(x), *lists, to_numpy(v), *offsets, *out)
        return [ry, *rz, *ra]

    def mlp_second_adjoint(
        self,
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
        result = _result(v[:1], weights, weight_offsets, bias_offsets)[0]
        lists = map(to_numpy_list, (weights, a, d1, d2, delta, s, t, rz, ra))
        rest = to_numpy(r_delta), weight_offsets, bias_offsets, to_numpy(result)
        self.module.second_adjoint(to_numpy(x), *lists, to_numpy(v), *rest)
        return result


def _result(
    v: Tensor,
    weights: Sequence[Tensor],
    weight_offsets: Sequence[int],
    bias_offsets: Sequence[int],
) -> Tensor:
    """NaN where something must be written, and zeros elsewhere."""
    result = v.new_zeros(v.shape)
    for i, weight in enumerate(weights):
        for start, size in (weight_offsets[i], weight.numel()), (bias_offsets[i], len(weight)):
            if start >= 0:
                result[:, start : start + size] = torch.nan
    return result


def _hidden(like: Tensor, weights: Sequence[Tensor], *sizes: int) -> list[Tensor]:
    """An array of each layer: ``[batch]`` or ``[directions, batch]``, and the width before last."""
    return [like.new_empty(*sizes[:-1], len(weight), sizes[-1]) for weight in weights]


class Projection:
    """The operators of the projection family as csrc/projection/projection_op.cpp does them."""

    operators = ("gram", "linear_combination", "project", "project_", "pcgrad")

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def gram(self, tensors: Sequence[Tensor], num_lists: int, scope: int, batched: bool) -> Tensor:
        layout = self._layout(tensors, num_lists, scope, batched)
        out = torch.empty(layout.size(num_lists, num_lists, batched), dtype=torch.float64)
        self.module.gram(*layout.arguments, layout.num_pieces, out.numpy())
        return out

    def linear_combination(
        self, tensors: Sequence[Tensor], weights: Tensor, scope: int, batched: bool
    ) -> list[Tensor]:
        num_outputs, num_lists = weights.shape[-2:]
        layout = self._layout(tensors, num_lists, scope, batched)
        first = tensors[: len(tensors) // num_lists]
        out = [torch.empty(t.shape, dtype=t.dtype) for _ in range(num_outputs) for t in first]
        if out:
            arrays = [to_numpy(y) for y in out]
            self.module.linear_combination(*layout.arguments, to_numpy(weights), arrays)
        return out

    def project(
        self,
        tensors: Sequence[Tensor],
        num_directions: int,
        strength: float,
        conflict_only: bool,
        rescale: bool,
        scope: int,
        batched: bool,
    ) -> list[Tensor]:
        rule = strength, conflict_only, rescale
        weights, _ = self._project_weights(tensors, num_directions, rule, scope, batched)
        return self.linear_combination(tensors, weights, scope, batched)

    def project_(
        self,
        g: Sequence[Tensor],
        directions: Sequence[Tensor],
        num_directions: int,
        strength: float,
        conflict_only: bool,
        rescale: bool,
        scope: int,
    ) -> Tensor:
        rule = strength, conflict_only, rescale
        tensors = [*g, *directions]
        weights, cosines = self._project_weights(tensors, num_directions, rule, scope, False)
        layout = self._layout(tensors, 1 + num_directions, scope, False)
        self.module.linear_combination_inplace(*layout.arguments, to_numpy(weights))
        return cosines

    def pcgrad(
        self,
        tensors: Sequence[Tensor],
        num_tasks: int,
        order: Tensor,
        reduction: int,
        scope: int,
        batched: bool,
    ) -> list[Tensor]:
        layout = self._layout(tensors, num_tasks, scope, batched)
        outputs = 1 if reduction else num_tasks
        weights = torch.empty(layout.size(outputs, num_tasks, batched), dtype=torch.float64)
        rule = to_numpy(order), reduction, weights.numpy()
        self.module.pcgrad_weights(*layout.arguments, layout.num_pieces, *rule)
        return self.linear_combination(tensors, weights, scope, batched)

    def _project_weights(self, tensors, num_directions, rule, scope, batched):
        layout = self._layout(tensors, 1 + num_directions, scope, batched)
        weights = torch.empty(layout.size(1, 1 + num_directions, batched), dtype=torch.float64)
        cosines = torch.empty(weights.shape[:-2].numel(), num_directions, dtype=torch.float64)
        wide = tensors[0].dtype == torch.float64
        eps = torch.finfo(torch.float64 if wide else torch.float32).eps
        out = weights.numpy(), cosines.numpy()
        self.module.project_weights(*layout.arguments, layout.num_pieces, eps, *rule, *out)
        return weights, cosines

    def _layout(self, tensors, num_lists, scope, batched) -> Layout:
        return Layout(tensors, num_lists, scope, batched, self.module.piece_length)


class Layout:
    """How lists of tensors fall into segments and pieces."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        num_lists: int,
        scope: int,
        batched: bool,
        piece_length: int,
    ) -> None:
        shapes = [_shape(t, scope, batched) for t in tensors[: len(tensors) // num_lists]]
        self.positions, self.num_pieces, segment = [], 0, 0
        is_global = scope == _SCOPES["global"]
        for batch, rows, length in shapes:
            self.positions.append([rows, length, 0 if is_global else segment, self.num_pieces])
            self.num_pieces += batch * rows * -(-length // piece_length)
            segment += rows
        self.batch, self.segments = shapes[0][0], 1 if is_global else segment
        self.arrays = [to_numpy(t) for t in tensors]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.arrays, self.positions, self.batch, self.segments

    def size(self, rows: int, columns: int, batched: bool) -> tuple[int, ...]:
        return (*([self.batch] if batched else []), self.segments, rows, columns)


class Spectral:
    """The operators of the spectral family as csrc/spectral/spectral_op.cpp does them."""

    operators = (
        "power_iteration",
        "lanczos",
        "tridiagonal_eigh",
        "symmetric_eigvalsh",
        "symmetric_eigh",
        "lanczos_step",
    )

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def power_iteration(self, a: Tensor, v0: Tensor, num_iterations: int) -> list[Tensor]:
        out = [a.new_empty(a.shape[0]), a.new_empty(v0.shape), a.new_empty(a.shape[0])]
        self.module.power_iteration(to_numpy(a), to_numpy(v0), num_iterations, *to_numpy_list(out))
        return out

    def lanczos(self, a: Tensor, v0: Tensor, num_steps: int) -> list[Tensor]:
        batch, n = v0.shape
        m = min(num_steps, n)
        out = [a.new_empty(batch, m), a.new_empty(batch, m), a.new_empty(batch, n, m)]
        self.module.lanczos(to_numpy(a), to_numpy(v0), *to_numpy_list(out))
        return out

    def tridiagonal_eigh(self, alpha: Tensor, beta: Tensor) -> list[Tensor]:
        batch, m = alpha.shape
        out = [alpha.new_empty(batch, m), alpha.new_empty(batch, m, m)]
        self.module.tridiagonal_eigh(to_numpy(alpha), to_numpy(beta), *to_numpy_list(out))
        return out

    def symmetric_eigvalsh(self, a: Tensor) -> Tensor:
        values = a.new_empty(a.shape[:2])
        self.module.symmetric_eigh(to_numpy(a), to_numpy(values), None)
        return values

    def symmetric_eigh(self, a: Tensor) -> list[Tensor]:
        out = [a.new_empty(a.shape[:2]), a.new_empty(a.shape)]
        self.module.symmetric_eigh(to_numpy(a), *to_numpy_list(out))
        return out

    def lanczos_step(
        self, basis: Tensor, w: Tensor, count: int, largest: Tensor, breakdown: float
    ) -> Tensor:
        result = basis.new_empty(count + 3, dtype=torch.float64)
        rest = to_numpy(largest), breakdown, to_numpy(result)
        self.module.lanczos_step(to_numpy(basis), to_numpy(w), count, *rest)
        return result
