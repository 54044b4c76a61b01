"""Three networks trained together: one reads the content, one the style, one draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hessreg.curvature import HessianOperator
from hessreg.gan.trainer import NonFiniteError
from hessreg.optim import HessianPreconditioner
from hessreg.style.features import FeatureExtractor
from hessreg.style.losses import content_loss, feature_gram, style_loss
from hessreg.style.networks import ContentNetwork, StyleNetwork, SynthesisNetwork

__all__ = ["ThreeNetworkTransfer"]

# What is not solved exactly is still bounded: no reason for the plain gradient instead.
_DEFAULT = partial(HessianPreconditioner, max_residual=math.inf)


class ThreeNetworkTransfer:
    """Trains a content, a style and a synthesis network along two corrected gradients.

    A step differentiates the content loss and the style loss in the parameters of all three
    networks, corrects each gradient g by the Hessian H of its own loss, p = (H + eps^2 H^-1)^-1 g,
    adds both, clips the synthesis network's part, and steps three Adam optimisers.

    Both losses are squared errors of what a *fixed* extractor sees: of its features for the content
    (`content_loss`), of their Gram matrices for the style (`style_loss`). Measured with the content
    and the style network themselves they would vanish as soon as these see nothing at all.

    Args:
        features: The fixed extractor.
        width: Channels of the networks' first convolutions.
        num_blocks: Residual blocks of the synthesis network.
        activation: Of the networks, as for `ContentNetwork`.
        style_weight: Of the style loss; that of the content loss is 1.
        learning_rate: Adam's, for all three.
        max_norm: Of the synthesis network's gradient.
        correction: Makes what corrects the gradient of one loss; called for each. None steps along
            the plain gradients. By default eps is 1, as in the article, the kernel of a Hessian
            gets the gradient, and a step takes ten products with each Hessian.
        seed: Of the initial weights.

    Example:
        >>> from hessreg.style import RandomFeatures
        >>> transfer = ThreeNetworkTransfer(RandomFeatures(seed=0), width=2, num_blocks=1)
        >>> content, style = torch.rand(2, 1, 3, 32, 32)
        >>> sorted(transfer.step(content, style))
        ['content_loss', 'style_loss']
        >>> transfer.draw(content, style).shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self,
        features: FeatureExtractor,
        *,
        width: int = 8,
        num_blocks: int = 2,
        activation: str = "silu",
        style_weight: float = 1.0,
        learning_rate: float = 2e-4,
        max_norm: float = 1.0,
        correction: Callable[[], HessianPreconditioner] | None = _DEFAULT,
        seed: int = 0,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.content_network = ContentNetwork(width, activation)
            self.synthesis_network = SynthesisNetwork(width, num_blocks, activation)
            size = self.synthesis_network.style_size
            self.style_network = StyleNetwork(size, width, activation)
        self.networks = self.content_network, self.style_network, self.synthesis_network
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.5, 0.999))
            for network in self.networks
        ]
        self.features = features
        self.style_weight, self.max_norm = style_weight, max_norm
        self.corrections = None if correction is None else (correction(), correction())
        self.steps_done = 0

    @property
    def parameters(self) -> list[Tensor]:
        """Those of all three networks."""
        return list(chain.from_iterable(network.parameters() for network in self.networks))

    def synthesize(self, content: Tensor, style: Tensor) -> Tensor:
        """Return pictures ``[n, 3, h, w]`` of a content in a style, with their graph."""
        encoded = self.content_network(content)
        return self.synthesis_network(encoded, self.style_network(style), content.shape[2:])

    @torch.no_grad()
    def draw(self, content: Tensor, style: Tensor) -> Tensor:
        """Return pictures ``[n, 3, h, w]`` of a content in a style."""
        return self.synthesize(content, style)

    def losses(
        self, content: Tensor, style: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the content loss and the style loss, with their graphs.

        Args:
            content: ``[n, 3, h, w]`` in [0, 1].
            style: ``[n, 3, h', w']``.
            target: ``[n, 3, h, w]``, what the pictures should be, if that is known: its mean
                squared error is added to the content loss.
        """
        drawn = self.synthesize(content, style)
        seen = self.features(drawn)
        with torch.no_grad():
            shown, painted = self.features(content), self.features(style)
        content_part = content_loss(seen.content, shown.content)
        if target is not None:
            content_part = content_part + mse_loss(drawn, target)
        grams, wanted = ([feature_gram(f) for f in found.style] for found in (seen, painted))
        return content_part, self.style_weight * style_loss(grams, wanted)

    def step(
        self, content: Tensor, style: Tensor, target: Tensor | None = None
    ) -> dict[str, float]:
        """Train all three networks once and return both losses before that.

        Args:
            content: As for `losses`, like the other two.
            style: Likewise.
            target: Likewise.

        Raises:
            NonFiniteError: If a loss or a gradient is not finite; no weight was changed.
        """
        losses = self.losses(content, style, target)
        directions = [self._direction(index, loss) for index, loss in enumerate(losses)]
        self._write(directions[0] + directions[1])
        nn.utils.clip_grad_norm_(self.synthesis_network.parameters(), self.max_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps_done += 1
        return {"content_loss": losses[0].item(), "style_loss": losses[1].item()}

    def _direction(self, index: int, loss: Tensor) -> Tensor:
        """The gradient of a loss, flat, and corrected if wanted."""
        parts = torch.autograd.grad(
            loss, self.parameters, retain_graph=True, materialize_grads=True
        )
        gradient = torch.cat([part.flatten() for part in parts])
        if not gradient.isfinite().all():
            name = ("content", "style")[index]
            raise NonFiniteError(
                f"step {self.steps_done + 1}: the gradient of the {name} loss is not finite"
            )
        if self.corrections is None:
            return gradient
        return self.corrections[index].correct(
            gradient, lambda: HessianOperator(loss, self.parameters)
        )

    def _write(self, flat: Tensor) -> None:
        parameters = self.parameters
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
