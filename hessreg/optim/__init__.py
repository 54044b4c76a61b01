"""Corrected steps, and wrappers around torch's optimisers that change the gradient before one."""

from hessreg.optim.correction import (
    CorrectionMethod,
    CorrectionStep,
    correct,
    correction_step,
    diagonal_preconditioner,
    solve_corrected,
)
from hessreg.optim.hessian_correction import (
    CorrectionWarning,
    HessianCorrection,
    HessianPreconditioner,
)
from hessreg.optim.orthogonal_gradients import MODES, OppositeGradientsError, OrthogonalGradients

__all__ = [
    "MODES",
    "CorrectionMethod",
    "CorrectionStep",
    "CorrectionWarning",
    "HessianCorrection",
    "HessianPreconditioner",
    "OppositeGradientsError",
    "OrthogonalGradients",
    "correct",
    "correction_step",
    "diagonal_preconditioner",
    "solve_corrected",
]
