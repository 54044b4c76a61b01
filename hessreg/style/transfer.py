"""Optimisation of a picture until content and style are right."""

from __future__ import annotations

import torch
from torch import Tensor

from hessreg.curvature import HessianOperator
from hessreg.gan.trainer import NonFiniteError
from hessreg.style.config import StyleConfig
from hessreg.style.correction import correct
from hessreg.style.losses import StyleObjective

__all__ = ["PictureOptimizer", "start_picture"]

_HISTORY = 20  # pairs that L-BFGS remembers
_NOISE = 0.1  # standard deviation, about mid grey


def start_picture(config: StyleConfig, content: Tensor, style: Tensor) -> Tensor:
    """Return what the optimisation starts from, of the size of the content.

    Args:
        config: Says which; and its seed, for noise.
        content: ``[1, 3, height, width]``.
        style: ``[1, 3, any, any]``.
    """
    if config.init == "content":
        return content.clone()
    if config.init == "style":
        size = list(content.shape[2:])
        return torch.nn.functional.interpolate(style, size, mode="bilinear", antialias=True)
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(content.shape, generator=generator)
    return (0.5 + _NOISE * noise).to(content)


class PictureOptimizer:
    """Moves the pixels of a picture down an objective (Gatys et al. 2016).

    Args:
        objective: What to minimise.
        start: Where from, ``[1, 3, height, width]``.
        config: The optimiser, its learning rate, and the correction of its gradients.

    Example:
        >>> from hessreg.style import RandomFeatures
        >>> content, style = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
        >>> objective = StyleObjective(RandomFeatures(), content, [style])
        >>> optimizer = PictureOptimizer(objective, content, StyleConfig())
        >>> first = optimizer.measure()["loss"]
        >>> for _ in range(5):
        ...     optimizer.step()
        >>> optimizer.measure()["loss"] < first
        True
    """

    def __init__(self, objective: StyleObjective, start: Tensor, config: StyleConfig) -> None:
        self.objective = objective
        self.image = start.detach().clone().requires_grad_()
        self.steps_done = 0
        self.evaluations = 0
        self._parts: dict[str, Tensor] = {}
        self._loss = self._gradient = torch.empty(0)
        self._evaluated: Tensor | None = None  # what the gradient in .grad is of
        self._lowest, self._best = float("inf"), self.image.detach()
        self._optimizer = self._build(config)
        self._corrected = None
        if config.correction == "hsc":
            self._corrected = correct(self._optimizer, self._operator, config.hsc)

    def _build(self, config: StyleConfig) -> torch.optim.Optimizer:
        if config.optimizer == "adam":
            return torch.optim.Adam([self.image], config.rate)
        # The line search compares losses with slopes, and corrected gradients are not slopes.
        search = "strong_wolfe" if config.correction == "none" else None
        tolerances = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
        return torch.optim.LBFGS(
            [self.image],
            config.rate,
            max_iter=1,
            max_eval=25,
            history_size=_HISTORY,
            line_search_fn=search,
            **tolerances,
        )

    def _operator(self) -> HessianOperator:
        return HessianOperator(lambda: self.objective(self.image), [self.image])

    def measure(self) -> dict[str, float]:
        """Return the loss of the picture and its parts.

        Raises:
            NonFiniteError: If one of them, or the gradient, is not finite; names it.
        """
        loss = self._evaluate()
        return {"loss": loss, **{name: part.item() for name, part in self._parts.items()}}

    def metrics(self) -> dict[str, float]:
        """Return what the last correction knows of the curvature; empty without correction."""
        return self._corrected.metrics() if self._corrected else {}

    def step(self) -> None:
        """Move once.

        Raises:
            NonFiniteError: As of `measure`.
        """
        (self._corrected or self._optimizer).step(self._evaluate)
        self.steps_done += 1

    def settle(self) -> bool:
        """Go back to the picture with the lowest loss so far; false if this is it.

        Without a line search a late step can go astray.
        """
        if self.measure()["loss"] <= self._lowest:
            return False
        with torch.no_grad():
            self.image.copy_(self._best)
        return True

    def _evaluate(self) -> float:
        """The loss, and its gradient in ``.grad``; nothing is computed twice at one place."""
        if self._evaluated is None or not torch.equal(self._evaluated, self.image):
            with torch.enable_grad():
                self._parts = self.objective.parts(self.image)
                self._loss = self.objective.total(self._parts)
            self._gradient = torch.autograd.grad(self._loss, self.image)[0]
            self._check_finite()
            self._evaluated = self.image.detach().clone()
            self.evaluations += 1
            if self._loss < self._lowest:
                self._lowest, self._best = self._loss.item(), self._evaluated
        self.image.grad = self._gradient.clone()
        return self._loss.item()

    def _check_finite(self) -> None:
        for name, value in {**self._parts, "gradient": self._gradient}.items():
            if not value.isfinite().all():
                what = "gradient" if name == "gradient" else f"{name} part of the loss"
                raise NonFiniteError(f"step {self.steps_done}: the {what} is not finite")
