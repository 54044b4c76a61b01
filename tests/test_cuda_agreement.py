"""The emulator against the GPU: the same kernels on the same input must give the same numbers."""

from __future__ import annotations

import pytest
import torch

from hessreg.ops.gaussian import gaussian_energy, gaussian_matrix, gaussian_sum
from hessreg.ops.projection import gram, linear_combination
from hessreg.ops.spectral import (
    lanczos_op,
    power_iteration_op,
    symmetric_eigh_op,
    symmetric_eigvalsh_op,
    tridiagonal_eigh_op,
)
from tests import emulated


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_lists", [1, 2, 4, 5])
def test_projection_kernels_agree(num_lists, dtype):
    shapes = [(257,), (3, 4097), (16385,)]
    tensors = [torch.randn(s).to(dtype) for _ in range(num_lists) for s in shapes]
    weights = torch.randn(1, 2, num_lists, dtype=torch.float64)
    on_gpu = [t.cuda() for t in tensors]
    with emulated.kernels():
        products = gram(tensors, num_lists, 0, False)
        combined = linear_combination(tensors, weights, 0, False)
    torch.testing.assert_close(
        gram(on_gpu, num_lists, 0, False).cpu(), products, rtol=1e-13, atol=0
    )
    rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for a, b in zip(linear_combination(on_gpu, weights.cuda(), 0, False), combined, strict=True):
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
