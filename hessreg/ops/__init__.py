"""Differentiable operators on CPU and CUDA; each is re-exported at the top of the package."""

from hessreg.ops.gaussian import gaussian_kernel, gaussian_kernel_matvec, mmd2
from hessreg.ops.projection import project_orthogonal

__all__ = ["gaussian_kernel", "gaussian_kernel_matvec", "mmd2", "project_orthogonal"]
