"""Curvature of a loss without forming its Hessian."""

from hessreg.curvature._checks import NonFiniteError
from hessreg.curvature.eigenvalues import Eigenvalues, Which, check_symmetric, eigenvalues
from hessreg.curvature.gauss_newton import GaussNewtonOperator
from hessreg.curvature.hessian import HessianOperator
from hessreg.curvature.lanczos import lanczos, power_iteration
from hessreg.curvature.norms import (
    NormEstimate,
    NormOrder,
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
from hessreg.curvature.third_order import native_norms, require_third_order_safe, third_order_safe

__all__ = [
    "DenseOperator",
    "Eigenvalues",
    "GaussNewtonOperator",
    "HessianOperator",
    "LinearOperator",
    "NonFiniteError",
    "NormEstimate",
    "NormOrder",
    "SumOperator",
    "SymmetricOperator",
    "Which",
    "check_symmetric",
    "eigenvalues",
    "frobenius_norm",
    "lanczos",
    "native_norms",
    "norm",
    "nuclear_norm",
    "one_norm",
    "power_iteration",
    "require_third_order_safe",
    "spectral_norm",
    "third_order_safe",
]
