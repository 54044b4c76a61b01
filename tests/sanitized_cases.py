"""Each CUDA kernel once on a small shape with tails: what compute-sanitizer watches."""

from __future__ import annotations

import sys

import torch

import hessreg
from hessreg.ops.projection import gram, linear_combination

SHAPES = [(1,), (257,), (3, 4097), (0,)]


def projection(dtype: torch.dtype) -> None:
    for num_lists in (1, 2, 3, 4, 5):
        tensors = [
            torch.randn(shape, device="cuda").to(dtype)
            for _ in range(num_lists)
            for shape in SHAPES
        ]
        for scope, segments in ((0, 1), (1, 4), (2, 6)):
            gram(tensors, num_lists, scope, False)
            weights = torch.randn(segments, 2, num_lists, dtype=torch.float64, device="cuda")
            linear_combination(tensors, weights, scope, False)
    half = len(tensors) // 5
    hessreg.project_orthogonal(tensors[:half], tensors[half : 2 * half])


CASES = {
    f"projection {dtype}": lambda dtype=dtype: projection(dtype)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
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
