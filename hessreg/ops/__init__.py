"""Differentiable operators on CPU and CUDA; each is re-exported at the top of the package."""

from hessreg.ops.gaussian import gaussian_kernel, gaussian_kernel_matvec, mmd2
from hessreg.ops.hvp import MLPHessian, mlp_hvp, mlp_parameter_hvp, symmetric_matmul
from hessreg.ops.projection import (
    gram_matrix,
    pcgrad,
    project_orthogonal,
    project_orthogonal_,
)
from hessreg.ops.spectral import (
    lanczos,
    power_iteration,
    symmetric_eigh,
    symmetric_eigvalsh,
    symmetric_norm,
    tridiagonal_eigh,
)

__all__ = [
    "MLPHessian",
    "gaussian_kernel",
    "gaussian_kernel_matvec",
    "gram_matrix",
    "lanczos",
    "mlp_hvp",
    "mlp_parameter_hvp",
    "mmd2",
    "pcgrad",
    "power_iteration",
    "project_orthogonal",
    "project_orthogonal_",
    "symmetric_eigh",
    "symmetric_eigvalsh",
    "symmetric_matmul",
    "symmetric_norm",
    "tridiagonal_eigh",
]
