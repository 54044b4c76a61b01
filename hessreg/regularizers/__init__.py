"""Regularisers for adversarial training."""

from hessreg.regularizers._protocol import BaseRegularizer, Gradients, Regularizer, StepContext
from hessreg.regularizers.gaussian_kernel import GaussianKernel
from hessreg.regularizers.hessian_penalty import HessianPenalty
from hessreg.regularizers.hsn1r import HSN1R, hsn1r_loss, original_loss
from hessreg.regularizers.r1 import R1

__all__ = [
    "HSN1R",
    "R1",
    "BaseRegularizer",
    "GaussianKernel",
    "Gradients",
    "HessianPenalty",
    "Regularizer",
    "StepContext",
    "hsn1r_loss",
    "original_loss",
]
