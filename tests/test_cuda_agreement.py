"""The emulator against the GPU: the same kernels on the same input must give the same numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from hessreg import MLPHessian
from hessreg.ops.gaussian import gaussian_energy, gaussian_matrix, gaussian_sum
from hessreg.ops.hvp import symmetric_product
from hessreg.ops.projection import (
    gram,
    linear_combination,
    pcgrad_operator,
    project,
)
from hessreg.ops.spectral import (
    lanczos_op,
    lanczos_step,
    power_iteration_op,
    symmetric_eigh_op,
    symmetric_eigvalsh_op,
    tridiagonal_eigh_op,
)
from tests import emulated


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_lists", [1, 2, 4, 9])
def test_projection_kernels_agree(num_lists, dtype):
    shapes = [(257,), (3, 4097), (16385,)]
    tensors = [torch.randn(s).to(dtype) for _ in range(num_lists) for s in shapes]
    weights = torch.randn(1, 2, num_lists, dtype=torch.float64)
    on_gpu = [t.cuda() for t in tensors]
    options = num_lists - 1, 1.0, False, False, 1, False
    order = torch.rand(num_lists, num_lists).argsort(-1)
    with emulated.kernels():
        products = gram(tensors, num_lists, 0, False)
        combined = linear_combination(tensors, weights, 0, False)
        combined += project(tensors, *options)
        combined += pcgrad_operator(tensors, num_lists, order, 0, 0, False)
    torch.testing.assert_close(
        gram(on_gpu, num_lists, 0, False).cpu(), products, rtol=1e-13, atol=0
    )
    rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    found = linear_combination(on_gpu, weights.cuda(), 0, False)
    found += project(on_gpu, *options)
    found += pcgrad_operator(on_gpu, num_lists, order.cuda(), 0, 0, False)
    for a, b in zip(found, combined, strict=True):
        torch.testing.assert_close(a.cpu(), b, **rounding)


@pytest.mark.cuda
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 17, 40, 200])
def test_gaussian_kernels_agree(d, dtype, tf32):
    """Up to the last bits of ex2 and the order of summation within an mma."""
    x, y = torch.randn(1, 130, d).to(dtype), torch.randn(1, 70, d).to(dtype)
    gamma = torch.tensor([[1 / d, 0.2 / d]], dtype=torch.float64)

    def run(x, y, gamma):
        v = torch.cat([y, y[..., :1]], -1)
        return [
            gaussian_matrix(x, y, gamma, gamma, tf32),
            gaussian_sum(x, y, gamma, gamma, [x], [y], v, tf32),
            *gaussian_energy(x, gamma, 50, 1.0, -1.0, 2.0, tf32, True),
        ]

    with emulated.kernels():
        expected = run(x, y, gamma)
    rounding = 1e-12 if dtype == torch.float64 else 2e-5
    for a, b in zip(run(x.cuda(), y.cuda(), gamma.cuda()), expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=rounding, atol=rounding * float(b.abs().max()))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 33, 70, 107, 130])
def test_spectral_kernels_agree(n, dtype):
    """Up to fused multiply-adds. Eigenvectors are compared where they do not depend on rounding."""
    values = torch.linspace(-1, 2, n, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(2, n, n, dtype=torch.float64))
    a, v0 = ((q * values) @ q.mT).to(dtype), torch.randn(2, n).to(dtype)
    a = (a + a.mT) / 2

    def run(a, v0):
        found = [*power_iteration_op(a, v0, 5), *lanczos_op(a, v0, 3)]
        if n < 128:
            diagonals = a.diagonal(0, 1, 2).contiguous(), a.diagonal(1, 1, 2).contiguous()
            values, vectors = symmetric_eigh_op(a)
            found += [symmetric_eigvalsh_op(a), values, (vectors * values[:, None]) @ vectors.mT]
            found += tridiagonal_eigh_op(*diagonals)[:1]
        return found

    with emulated.kernels():
        expected = run(a, v0)
    rounding = 1e-13 * n if dtype == torch.float64 else 1e-5
    for x, y in zip(run(a.cuda(), v0.cuda()), expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=rounding, atol=rounding)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "count"), [(128, 1), (5001, 17), (70000, 70)])
def test_lanczos_step_agrees(n, count, dtype):
    """Up to fused multiply-adds."""
    q = torch.linalg.qr(torch.randn(n, count + 1, dtype=torch.float64))[0].mT.to(dtype).contiguous()
    w, largest = torch.randn(n).to(dtype), torch.zeros(1, dtype=torch.float64)

    def run(basis, w, largest):
        breakdown = 4 * torch.finfo(dtype).eps
        return lanczos_step(basis, w, count, largest, breakdown), basis[count]

    with emulated.kernels():
        expected = run(q.clone(), w, largest)
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    for x, y in zip(run(q.cuda(), w.cuda(), largest.cuda()), expected, strict=True):
        size = float(y.abs().max())
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=rounding * size)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(3, 33, 18, 2), (70, 130, 66, 1)])
@pytest.mark.parametrize("batch", [37, 530])
def test_hvp_kernels_agree(batch, widths, dtype):
    """Up to fused multiply-adds and the last bits of the activations."""
    weights = [torch.randn(o, i).to(dtype) / i**0.5 for i, o in itertools.pairwise(widths)]
    biases = [torch.randn(len(weight)).to(dtype) for weight in weights]
    x, length = torch.randn(batch, widths[0]).to(dtype), sum(t.numel() for t in weights + biases)
    v, u = torch.randn(2, length).to(dtype), torch.randn(2, *x.shape).to(dtype)
    a = torch.randn(2, 70, 70).to(dtype)

    def run(weights, biases, x, v, u, a):
        curvature = MLPHessian(weights, biases, "silu", x)
        curvature.linearize(curvature.outputs)
        products = [curvature.product(v, torch.clone, gauss_newton=g) for g in (False, True)]
        moved = curvature.input_product(u, torch.clone)
        return [curvature.outputs, *products, moved, symmetric_product(a, a[..., :3].clone())]

    with emulated.kernels():
        expected = run(weights, biases, x, v, u, a)
    lists = [[t.cuda() for t in tensors] for tensors in (weights, biases)]
    rounding = 1e-13 if dtype == torch.float64 else 2e-5
    for one, other in zip(run(*lists, *(t.cuda() for t in (x, v, u, a))), expected, strict=True):
        torch.testing.assert_close(
            one.cpu(), other, rtol=0, atol=rounding * float(other.abs().max())
        )
