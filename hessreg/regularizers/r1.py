"""R1: the gradient penalty on real data."""

from __future__ import annotations

import torch
from torch import Tensor

from hessreg.curvature._checks import check_not_negative
from hessreg.regularizers._protocol import BaseRegularizer, StepContext

__all__ = ["R1"]


class R1(BaseRegularizer):
    """Gradient penalty gamma/2 E |grad_x D(x)|^2 on real data (Mescheder and others, 2018).

    Args:
        gamma: weight of the penalty.

    Raises:
        TypeError: a weight that is not a number.
        ValueError: a weight that is negative or not finite.

    Example:
        >>> D = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(D.weight, 3.0)
        >>> loss = D(torch.ones(4, 2)).mean()
        >>> ctx = StepContext(0, D, D, None, loss, real=torch.ones(4, 2))
        >>> R1(gamma=0.5).loss_terms(ctx)[1].item()
        4.5
    """

    def __init__(self, gamma: float = 1.0) -> None:
        check_not_negative(gamma=gamma)
        self.gamma = gamma
        self._penalty: Tensor | None = None

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """The penalty, in the discriminator's phase.

        Raises:
            ValueError: there is no batch of real data.
        """
        if ctx.discriminator_loss is None:
            return None, None
        if ctx.real is None:
            raise ValueError("R1 needs a batch of real data in ctx.real, got None")
        x = ctx.real.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(ctx.discriminator(x).sum(), x, create_graph=True)
        penalty = 0.5 * self.gamma * grad.flatten(1).square().sum(1).mean()
        self._penalty = penalty.detach()
        return None, penalty

    def metrics(self) -> dict[str, float]:
        """``r1``: the penalty in the last step."""
        return {} if self._penalty is None else {"r1": self._penalty.item()}
