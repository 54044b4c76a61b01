"""The emulator against the GPU: the same kernels on the same input must give the same numbers."""

from __future__ import annotations

import pytest
import torch

from hessreg.ops.projection import gram, linear_combination
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
