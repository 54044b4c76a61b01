"""Differentiable operators on CPU and CUDA; each is re-exported at the top of the package."""

from hessreg.ops.gaussian import gaussian_kernel, gaussian_kernel_matvec, mmd2
from hessreg.ops.hvp import MLPHessian, mlp_hvp, mlp_parameter_hvp, symmetric_matmul
from hessreg.ops.projection import project_orthogonal

__all__ = [
    "MLPHessian",
    "gaussian_kernel",
    "gaussian_kernel_matvec",
    "mlp_hvp",
    "mlp_parameter_hvp",
    "mmd2",
    "project_orthogonal",
    "symmetric_matmul",
]
