"""Curvature of a loss without forming its Hessian."""

from hessreg.curvature._checks import NonFiniteError
from hessreg.curvature._statistics import Estimate
from hessreg.curvature.eigenvalues import Eigenvalues, Which, check_symmetric, eigenvalues
from hessreg.curvature.exact_norms import NormEstimate, NormOrder, exact_norm
from hessreg.curvature.gauss_newton import GaussNewtonOperator
from hessreg.curvature.hessian import HessianOperator
from hessreg.curvature.input_hessian import InputHessianOperator, SampleEigenpairs
from hessreg.curvature.lanczos import lanczos, power_iteration
from hessreg.curvature.matrix_function import FunctionProduct, matrix_function
from hessreg.curvature.norms import (
    ConvergenceWarning,
    estimate_norm,
    frobenius_norm,
    norm,
    nuclear_norm,
    one_norm,
    spectral_norm,
)
from hessreg.curvature.operators import (
    DenseOperator,
    LinearOperator,
    SumOperator,
    SymmetricOperator,
)
from hessreg.curvature.spectral_density import (
    QuadratureRule,
    SpectralDensity,
    spectral_density,
)
from hessreg.curvature.third_order import native_norms, require_third_order_safe, third_order_safe
from hessreg.curvature.trace import TraceMethod, trace

__all__ = [
    "ConvergenceWarning",
    "DenseOperator",
    "Eigenvalues",
    "Estimate",
    "FunctionProduct",
    "GaussNewtonOperator",
    "HessianOperator",
    "InputHessianOperator",
    "LinearOperator",
    "NonFiniteError",
    "NormEstimate",
    "NormOrder",
    "QuadratureRule",
    "SampleEigenpairs",
    "SpectralDensity",
    "SumOperator",
    "SymmetricOperator",
    "TraceMethod",
    "Which",
    "check_symmetric",
    "eigenvalues",
    "estimate_norm",
    "exact_norm",
    "frobenius_norm",
    "lanczos",
    "matrix_function",
    "native_norms",
    "norm",
    "nuclear_norm",
    "one_norm",
    "power_iteration",
    "require_third_order_safe",
    "spectral_density",
    "spectral_norm",
    "third_order_safe",
    "trace",
]
