"""Second-order and kernel regularisers for adversarial training in PyTorch."""

from hessreg import _interrupt

if _interrupt.is_command():  # before what takes long to import
    _interrupt.end_at_once()

from hessreg._backend import backend, build_info
from hessreg.kernels import (
    median_bandwidth,
    mmd2_test,
    nystrom_features,
    random_fourier_features,
)
from hessreg.ops import (
    MLPHessian,
    gaussian_kernel,
    gaussian_kernel_matvec,
    gram_matrix,
    lanczos,
    mlp_hvp,
    mlp_parameter_hvp,
    mmd2,
    pcgrad,
    power_iteration,
    project_orthogonal,
    project_orthogonal_,
    symmetric_eigh,
    symmetric_eigvalsh,
    symmetric_matmul,
    symmetric_norm,
    tridiagonal_eigh,
)

__version__ = "0.1.0"
__all__ = [
    "MLPHessian",
    "__version__",
    "backend",
    "build_info",
    "gaussian_kernel",
    "gaussian_kernel_matvec",
    "gram_matrix",
    "lanczos",
    "median_bandwidth",
    "mlp_hvp",
    "mlp_parameter_hvp",
    "mmd2",
    "mmd2_test",
    "nystrom_features",
    "pcgrad",
    "power_iteration",
    "project_orthogonal",
    "project_orthogonal_",
    "random_fourier_features",
    "symmetric_eigh",
    "symmetric_eigvalsh",
    "symmetric_matmul",
    "symmetric_norm",
    "tridiagonal_eigh",
]
