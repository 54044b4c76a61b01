"""Wrappers around torch's optimisers that change the gradient before a step."""

from hessreg.optim.hessian_correction import (
    CorrectionWarning,
    HessianCorrection,
    HessianPreconditioner,
)
from hessreg.optim.orthogonal_gradients import MODES, OppositeGradientsError, OrthogonalGradients

__all__ = [
    "MODES",
    "CorrectionWarning",
    "HessianCorrection",
    "HessianPreconditioner",
    "OppositeGradientsError",
    "OrthogonalGradients",
]
