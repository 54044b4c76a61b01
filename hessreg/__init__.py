"""Second-order and kernel regularisers for adversarial training in PyTorch."""

from hessreg._backend import backend, build_info
from hessreg.kernels import (
    median_bandwidth,
    mmd2_test,
    nystrom_features,
    random_fourier_features,
)
from hessreg.ops import gaussian_kernel, gaussian_kernel_matvec, mmd2, project_orthogonal

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "backend",
    "build_info",
    "gaussian_kernel",
    "gaussian_kernel_matvec",
    "median_bandwidth",
    "mmd2",
    "mmd2_test",
    "nystrom_features",
    "project_orthogonal",
    "random_fourier_features",
]
