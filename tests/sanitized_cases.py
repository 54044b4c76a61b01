"""Each CUDA kernel once on a small shape with tails: what compute-sanitizer watches."""

from __future__ import annotations

import itertools
import sys

import torch

import hessreg
from hessreg.ops.gaussian import gaussian_energy, gaussian_matrix, gaussian_sum
from hessreg.ops.projection import gram, linear_combination
from hessreg.ops.spectral import (
    lanczos_op,
    lanczos_step,
    power_iteration_op,
    symmetric_eigh_op,
    symmetric_eigvalsh_op,
    tridiagonal_eigh_op,
)

SHAPES = [(1,), (257,), (3, 4097), (0,)]


def projection(dtype: torch.dtype) -> None:
    for num_lists in (1, 2, 3, 4, 9):
        tensors = [
            torch.randn(shape, device="cuda").to(dtype)
            for _ in range(num_lists)
            for shape in SHAPES
        ]
        for scope, segments in ((0, 1), (1, 4), (2, 6)):
            gram(tensors, num_lists, scope, False)
            weights = torch.randn(segments, 2, num_lists, dtype=torch.float64, device="cuda")
            linear_combination(tensors, weights, scope, False)
    lists = [tensors[i : i + len(SHAPES)] for i in range(0, len(tensors), len(SHAPES))]
    for scope in ("global", "tensor", "row"):
        hessreg.project_orthogonal(lists[0], lists[1], scope=scope)
        hessreg.project_orthogonal(lists[0], lists[1:], scope=scope, mode="conflict", rescale=True)
        hessreg.project_orthogonal_(lists[0], lists[1:], scope=scope)
        hessreg.pcgrad(lists, scope=scope)


def gaussian(dtype: torch.dtype) -> None:
    gamma = torch.tensor([[0.5, 0.1]], dtype=torch.float64, device="cuda")
    for (n, m), d in itertools.product([(70, 33), (130, 1)], [2, 17, 40]):
        x, y = (torch.randn(1, count, d, device="cuda").to(dtype) for count in (n, m))
        for tf32 in (False, True):
            gaussian_matrix(x, y, gamma, gamma, tf32)
            if dtype in (torch.float32, torch.float64):
                for e in (1, 70):
                    v = y[..., :1].expand(1, m, e)
                    gaussian_sum(x, y, gamma, gamma, [x, x], [y, y], v, tf32)
                gaussian_energy(x, gamma, n // 3, 1.0, -1.0, 2.0, tf32, True)
                gaussian_energy(x, gamma, n // 3, 1.0, -1.0, 2.0, tf32, False)


def hvp(dtype: torch.dtype) -> None:
    # All layers at once and one by one, tiles of both sizes, sums over the batch in parts.
    for widths, batch in itertools.product([(2, 33, 17, 1), (65, 130, 3)], [1, 70, 530]):
        pairs = list(zip(widths[1:], widths, strict=False))
        weights = [torch.randn(pair, device="cuda").to(dtype) for pair in pairs]
        biases = [torch.randn(out, device="cuda").to(dtype) for out, _ in pairs]
        x = torch.randn(batch, widths[0], device="cuda").to(dtype)
        v = torch.randn(sum(t.numel() for t in weights + biases), 12, device="cuda").to(dtype)
        for gauss_newton in (False, True):
            loss = torch.sin if widths[-1] == 1 else torch.square
            hessreg.mlp_parameter_hvp(
                weights,
                biases,
                "gelu",
                x,
                lambda y, f=loss: f(y).sum(),
                v,
                gauss_newton=gauss_newton,
            )
        if widths[-1] == 1:
            hessreg.mlp_hvp(weights, biases, "tanh", x, x[..., None].expand(*x.shape, 3))
    for (batch, n), k in itertools.product([(2, 3), (2, 130), (1, 600), (70, 65)], [1, 65]):
        a = torch.randn(batch, n, n, device="cuda").to(dtype)
        hessreg.symmetric_matmul(a, a[..., :1].expand(batch, n, k))


def spectral(dtype: torch.dtype) -> None:
    for n in (1, 2, 9, 33, 70, 107, 140):
        a, v0 = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in [(5, n, n), (5, n)])
        a = a + a.mT
        power_iteration_op(a, v0, 3)
        alpha, beta, _ = lanczos_op(a, v0, 6)
        lanczos_op(torch.zeros_like(a), v0, n)
        tridiagonal_eigh_op(alpha, beta[:, :-1])
        if n <= 128:
            symmetric_eigvalsh_op(a)
            symmetric_eigh_op(a)
    for n, count in itertools.product([1, 128, 5001, 70001], [1, 9, 70]):
        basis, w = (
            torch.randn(*shape, device="cuda").to(dtype) for shape in [(count + 1, n), (n,)]
        )
        largest = torch.zeros(1, dtype=torch.float64, device="cuda")
        lanczos_step(basis / n**0.5, w, count, largest, 1e-6)


HALF = (torch.float16, torch.bfloat16)
CASES = {
    f"{family.__name__} {dtype}": lambda family=family, dtype=dtype: family(dtype)
    for family in (gaussian, hvp, projection, spectral)
    for dtype in (torch.float32, torch.float64, *(() if family is spectral else HALF))
}


def main() -> None:
    for name, case in CASES.items():
        print(name)
        if "--list" not in sys.argv:
            case()
    if "--list" not in sys.argv:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
