"""Regularisers for adversarial training."""

from hessreg.regularizers._protocol import BaseRegularizer, Gradients, Regularizer, StepContext
from hessreg.regularizers.gaussian_kernel import GaussianKernel
from hessreg.regularizers.gradient_penalties import DRAGAN, R1, R2, WGANGP, GradientPenalty
from hessreg.regularizers.hessian_penalty import HessianPenalty
from hessreg.regularizers.hsn1r import HSN1R, hsn1r_loss, original_loss
from hessreg.regularizers.iterative_penalty import IterativeGradientPenalty

__all__ = [
    "DRAGAN",
    "HSN1R",
    "R1",
    "R2",
    "WGANGP",
    "BaseRegularizer",
    "GaussianKernel",
    "GradientPenalty",
    "Gradients",
    "HessianPenalty",
    "IterativeGradientPenalty",
    "Regularizer",
    "StepContext",
    "hsn1r_loss",
    "original_loss",
]
