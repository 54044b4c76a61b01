"""Kernels and what is done with them: bandwidths, feature maps and two-sample tests."""

from hessreg.kernels.bandwidth import (
    AdaptiveBandwidth,
    mean_squared_distance_bandwidth,
    median_bandwidth,
)
from hessreg.kernels.features import (
    RandomFourierFeatures,
    nystrom_features,
    random_fourier_features,
)
from hessreg.kernels.simple import (
    laplacian_kernel,
    linear_kernel,
    polynomial_kernel,
    rational_quadratic_kernel,
)
from hessreg.kernels.two_sample import TwoSampleTest, mmd2_block, mmd2_test, mmd2_variance
from hessreg.ops import gaussian_kernel, gaussian_kernel_matvec, mmd2

__all__ = [
    "AdaptiveBandwidth",
    "RandomFourierFeatures",
    "TwoSampleTest",
    "gaussian_kernel",
    "gaussian_kernel_matvec",
    "laplacian_kernel",
    "linear_kernel",
    "mean_squared_distance_bandwidth",
    "median_bandwidth",
    "mmd2",
    "mmd2_block",
    "mmd2_test",
    "mmd2_variance",
    "nystrom_features",
    "polynomial_kernel",
    "random_fourier_features",
    "rational_quadratic_kernel",
]
