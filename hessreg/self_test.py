"""Every public operator where it runs, against the reference in float64: values and derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hessreg
from hessreg._backend import backend, build_info

__all__ = ["SelfTest", "self_tests", "tested_devices"]

_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-8}  # relative to the largest entry
_POINTS, _DIM = 6, 5


class SelfTest(NamedTuple):
    """What became of one operator on one device.

    Attributes:
        operator: Its name.
        device: Where it ran.
        errors: Largest relative error of value and gradient, by dtype.
        failure: What is wrong, or nothing.
    """

    operator: str
    device: str
    errors: dict[str, float]
    failure: str

    def __str__(self) -> str:
        """A line for people."""
        state = "FAILED" if self.failure else "ok"
        shown = ", ".join(f"{error:.1e} in {dtype}" for dtype, error in self.errors.items())
        what = "; ".join(filter(None, [f"error {shown}" if shown else "", self.failure]))
        return f"{state:6s} {self.device} {self.operator}: {what}"


Function = Callable[[list[Tensor]], Tensor]


def _symmetric(A: Tensor) -> Tensor:
    return A + A.mT


def _layers(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None], str, Tensor]:
    first, bias, last, x = tensors
    return [first, last], [bias, None], "tanh", x


def _mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


def _parameters(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors[:3]])


def _hessian(tensors: list[Tensor]) -> Tensor:
    curvature = hessreg.MLPHessian(*_layers(tensors))
    y = curvature.outputs
    curvature.linearize(2 * y / y.numel())
    v = _parameters(tensors)[None]
    return curvature.product(v, lambda moved: 2 * moved / y.numel())


def _projected_in_place(tensors: list[Tensor]) -> Tensor:
    g, v = (t.detach().clone() for t in tensors)
    hessreg.project_orthogonal_(g, v)
    return g


def _rebuilt(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Eigenvalues and eigenvectors without signs: V diag(exp(l)) V'."""
    values, vectors = pair
    return (vectors * values.exp()[..., None, :]) @ vectors.mT


def _surgery(tensors: list[Tensor]) -> Tensor:
    return hessreg.pcgrad(tensors, generator=torch.Generator().manual_seed(0))


_MATRIX = ((_DIM, _DIM),)
_SAMPLES = ((_POINTS, _DIM), (_POINTS + 1, _DIM))
_NETWORK = ((4, _DIM), (4,), (1, 4), (_POINTS, _DIM))
_VECTORS = ((40,), (40,))

# By name: the shapes of its arguments, and a function of them.
_OPERATORS: dict[str, tuple[tuple[tuple[int, ...], ...], Function]] = {
    "project_orthogonal": (_VECTORS, lambda t: hessreg.project_orthogonal(*t)),
    "project_orthogonal_": (_VECTORS, _projected_in_place),
    "pcgrad": ((*_VECTORS, (40,)), _surgery),
    "gram_matrix": (_VECTORS, hessreg.gram_matrix),
    "gaussian_kernel": (_SAMPLES, lambda t: hessreg.gaussian_kernel(*t, 2.0)),
    "gaussian_kernel_matvec": (
        (*_SAMPLES, (_POINTS + 1, 2)),
        lambda t: hessreg.gaussian_kernel_matvec(*t, 2.0),
    ),
    "mmd2": (_SAMPLES, lambda t: hessreg.mmd2(*t, (1.0, 2.0))),
    "symmetric_matmul": (
        (*_MATRIX, (_DIM, 2)),
        lambda t: hessreg.symmetric_matmul(_symmetric(t[0]), t[1]),
    ),
    "symmetric_eigh": (_MATRIX, lambda t: _rebuilt(hessreg.symmetric_eigh(_symmetric(t[0])))),
    "symmetric_eigvalsh": (_MATRIX, lambda t: hessreg.symmetric_eigvalsh(_symmetric(t[0]))),
    "symmetric_norm": (_MATRIX, lambda t: hessreg.symmetric_norm(_symmetric(t[0]), "nuclear")),
    "tridiagonal_eigh": (
        ((_DIM,), (_DIM - 1,)),
        lambda t: _rebuilt(hessreg.tridiagonal_eigh(*t)),
    ),
    "lanczos": (_MATRIX, lambda t: torch.cat(hessreg.lanczos(_symmetric(t[0]), 3)[:2], -1)),
    "power_iteration": (_MATRIX, lambda t: hessreg.power_iteration(_symmetric(t[0]), 40)[0]),
    "mlp_hvp": ((*_NETWORK, (_POINTS, _DIM)), lambda t: hessreg.mlp_hvp(*_layers(t[:4]), t[4])),
    "mlp_parameter_hvp": (
        _NETWORK,
        lambda t: hessreg.mlp_parameter_hvp(*_layers(t), _mean_square, _parameters(t)),
    ),
    "MLPHessian": (_NETWORK, _hessian),
}


def tested_devices() -> list[str]:
    """Return where compiled kernels or the reference serve tensors here."""
    return ["cpu", *(["cuda"] if "cuda" in build_info()["backend"] else [])]


def self_tests(device: str = "cpu") -> Iterator[SelfTest]:
    """Run every operator on the active backend and in plain torch.

    Args:
        device: Where.

    Yields:
        What became of each operator.

    Example:
        >>> all(not test.failure for test in self_tests())
        True
    """
    for name, (shapes, function) in _OPERATORS.items():
        errors: dict[str, float] = {}
        try:
            for dtype in _TOLERANCES:
                errors[str(dtype)[6:]] = _error(function, shapes, dtype, device)
            bad = [d for d in _TOLERANCES if not errors[str(d)[6:]] <= _TOLERANCES[d]]
            failure = f"more than {_TOLERANCES[bad[0]]:g} allowed" if bad else ""
        except Exception as error:
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield SelfTest(name, device, errors, failure)


def _error(
    function: Function, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: str
) -> float:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    found = _value_and_gradients(function, [t.to(device) for t in drawn])
    with backend("reference"):
        wanted = _value_and_gradients(function, [t.double() for t in drawn])
    pairs = zip(found, wanted, strict=True)
    errors = [_distance(a.double().cpu(), b.double()) for a, b in pairs]
    return float(torch.stack(errors).max())  # NaN if one is


def _distance(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"shape {tuple(a.shape)} in place of {tuple(b.shape)}")
    return (a - b).abs().max() / b.abs().max().clamp(min=1e-12)


def _value_and_gradients(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    """The value and, if it has any, gradients of its weighted sum, once and twice."""
    leaves = [tensor.requires_grad_(True) for tensor in tensors]
    value = function(leaves)
    if not value.requires_grad:
        return [value]
    first = _gradients(value, leaves)
    moving = [g for g in first if g.requires_grad]
    flat = torch.cat([g.flatten() for g in moving]) if moving else None
    second = [] if flat is None else _gradients(flat, leaves)
    return [value.detach(), *(g.detach() for g in (*first, *second))]


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).to(value.device)
    total = (weights * value.flatten()).sum()
    found: Any = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
    return list(found)
