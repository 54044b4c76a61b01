"""Hessian Singularity Correction with a damping that is relative to the largest curvature."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from hessreg.curvature import HessianOperator, norm
from hessreg.optim import HessianCorrection
from hessreg.style.config import CorrectionConfig

__all__ = ["correct"]

_POWER_STEPS = 5  # for the largest eigenvalue at the start


def correct(
    optimizer: torch.optim.Optimizer,
    operator_factory: Callable[[], HessianOperator],
    options: CorrectionConfig,
) -> HessianCorrection:
    """Wrap an optimiser so that it steps along corrected gradients.

    Args:
        optimizer: Of any kind.
        operator_factory: Makes the Hessian where the parameters are; called once here, to measure
            its largest |eigenvalue|, what ``options.eps`` is relative to.
        options: How to correct.

    Raises:
        ValueError: If the Hessian is zero there.
    """
    operator = operator_factory()
    with torch.no_grad():
        eps = options.eps * norm(operator, "spectral", num_steps=_POWER_STEPS).item()
    if eps == 0:
        raise ValueError("the loss has no curvature at the start that correction could use")
    return HessianCorrection(
        optimizer,
        operator_factory,
        eps=eps,
        mu=options.mu / eps,
        saddle_free=options.saddle_free,
        num_steps=options.num_steps,
        every=options.every,
        trust_radius=options.trust_radius,
        # A few Lanczos steps solve nothing exactly, and their step is a good one nevertheless.
        max_residual=math.inf,
    )
