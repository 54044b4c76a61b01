"""Differentiable operators on CPU and CUDA; each is re-exported at the top of the package."""

from hessreg.ops.projection import project_orthogonal

__all__ = ["project_orthogonal"]
