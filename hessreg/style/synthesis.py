"""Training a network that redraws pictures in one style, and keeping it in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hessreg.curvature import HessianOperator
from hessreg.gan.checkpoint import CheckpointError, load_state, save_state
from hessreg.gan.checks import require
from hessreg.gan.trainer import NonFiniteError
from hessreg.style.config import CorrectionConfig, StyleConfig
from hessreg.style.correction import correct
from hessreg.style.features import WeightsError
from hessreg.style.losses import (
    StyleObjective,
    content_loss,
    feature_gram,
    style_loss,
    total_variation,
)
from hessreg.style.networks import FeedForwardNetwork

__all__ = ["CropSampler", "SynthesisTrainer", "build_trainer", "load_network", "save_network"]

_KIND = "hessreg.style.FeedForwardNetwork"


class CropSampler:
    """Endless batches of random square crops of pictures, every other one mirrored.

    A crop is of a random picture, place and size, scaled down to ``size``.

    Args:
        pictures: Each ``[1, 3, height, width]``.
        size: Pixels of the crops' sides, at most those of the shortest side of a picture.
        batch_size: Crops in a batch.
        seed: Of everything random.

    Example:
        >>> next(CropSampler([torch.rand(1, 3, 40, 60)], size=32, batch_size=2, seed=0)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, pictures: Sequence[Tensor], size: int, batch_size: int, seed: int) -> None:
        require(len(pictures) > 0, "pictures", "one or more", pictures)
        shortest = min(min(picture.shape[2:]) for picture in pictures)
        require(1 <= size <= shortest, "size", f"in [1, {shortest}] for these pictures", size)
        require(batch_size >= 1, "batch_size", "at least 1", batch_size)
        self.pictures, self.size, self.batch_size = list(pictures), size, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> CropSampler:
        """Return itself: there is one stream of batches."""
        return self

    def __next__(self) -> Tensor:
        """Return the next batch ``[batch_size, 3, size, size]``."""
        return torch.cat([self._crop() for _ in range(self.batch_size)])

    def _crop(self) -> Tensor:
        picture = self.pictures[self._draw(0, len(self.pictures) - 1)]
        height, width = picture.shape[2:]
        side = self._draw(self.size, min(height, width))
        top, left = self._draw(0, height - side), self._draw(0, width - side)
        crop = picture[:, :, top : top + side, left : left + side]
        crop = crop.flip(3) if self._draw(0, 1) else crop
        return interpolate(crop, size=(self.size,) * 2, mode="bilinear", antialias=True)

    def _draw(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self._generator))


class SynthesisTrainer:
    """Trains a network to redraw any picture in the style of an objective.

    The loss is the objective's, of what the network draws and with the crop it was given as the
    content, as in Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and
    Super-Resolution", ECCV 2016. The same seeds train the same network, bit for bit on a CPU.

    Args:
        network: What to train, with Adam.
        objective: Whose extractor, styles and weights are used, but not its content.
        crops: Batches of pictures to train on, ``[n, 3, h, w]``.
        learning_rate: Adam's.
        correction: How to correct its gradients by the Hessian of the loss of the batch, if at all.

    Example:
        >>> from hessreg.style import RandomFeatures
        >>> content, style = torch.rand(2, 1, 3, 32, 32)
        >>> objective = StyleObjective(RandomFeatures(), content, [style])
        >>> crops = CropSampler([content], size=32, batch_size=1, seed=0)
        >>> trainer = SynthesisTrainer(FeedForwardNetwork(width=2), objective, crops)
        >>> first = trainer.measure()["loss"]
        >>> for _ in range(5):
        ...     trainer.step()
        >>> trainer.measure()["loss"] < first
        True
    """

    def __init__(
        self,
        network: FeedForwardNetwork,
        objective: StyleObjective,
        crops: Iterator[Tensor],
        *,
        learning_rate: float = 2e-3,
        correction: CorrectionConfig | None = None,
    ) -> None:
        self.network, self.objective, self.crops = network, objective, crops
        self.parameters = list(network.parameters())
        self.steps_done = 0
        self.evaluations = 0
        self._parts: dict[str, Tensor] = {}  # of the next batch, once it was measured
        self._optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        self._corrected = None
        if correction is not None:
            self._corrected = correct(self._optimizer, self._hessian, correction)

    def parts(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the parts of the loss of pictures ``[n, 3, h, w]``, without weights."""
        drawn = self.network(pictures)
        with torch.no_grad():
            shown = self.objective.features(pictures).content
        seen = self.objective.features(drawn)
        grams = [feature_gram(each) for each in seen.style]
        targets = [each.expand(len(pictures), -1, -1) for each in self.objective.style_targets]
        return {
            "content": content_loss(seen.content, shown),
            "style": style_loss(grams, targets),
            "tv": total_variation(drawn),
        }

    def measure(self) -> dict[str, float]:
        """Return the loss of the next batch, and its parts.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
        loss = self._loss().item()
        if not math.isfinite(loss):
            raise NonFiniteError(f"step {self.steps_done}: the loss is {loss}")
        return {"loss": loss, **{name: part.item() for name, part in self._parts.items()}}

    def metrics(self) -> dict[str, float]:
        """Return what the last correction knows of the curvature; empty without correction."""
        return self._corrected.metrics() if self._corrected else {}

    def step(self) -> None:
        """Train on the next batch.

        Raises:
            NonFiniteError: If the loss or a gradient is not finite; no weight was changed.
        """
        self.measure()
        self._optimizer.zero_grad()
        self._loss().backward(retain_graph=True)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not norm.isfinite():
            raise NonFiniteError(f"step {self.steps_done}: the gradient is not finite")
        (self._corrected or self._optimizer).step()
        self._parts = {}
        self.steps_done += 1

    @torch.no_grad()
    def draw(self, picture: Tensor) -> Tensor:
        """Return pictures ``[n, 3, h, w]`` as the network draws them now."""
        return self.network(picture)

    def _loss(self) -> Tensor:
        with torch.enable_grad():
            if not self._parts:
                self._parts = self.parts(next(self.crops))
                self.evaluations += 1
            return self.objective.total(self._parts)

    def _hessian(self) -> HessianOperator:
        return HessianOperator(self._loss(), self.parameters)


def build_trainer(
    objective: StyleObjective, pictures: Sequence[Tensor], config: StyleConfig
) -> SynthesisTrainer:
    """Return a trainer with a new network, which the seed determines.

    Args:
        objective: As for `SynthesisTrainer`.
        pictures: To train on, each ``[1, 3, height, width]``.
        config: Of everything else.
    """
    chosen = config.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = FeedForwardNetwork(chosen.width, chosen.num_blocks, chosen.activation)
    crop = min(chosen.crop, *(min(picture.shape[2:]) for picture in pictures))
    return SynthesisTrainer(
        network,
        objective,
        CropSampler(pictures, crop, chosen.batch_size, config.seed),
        learning_rate=config.rate,
        correction=config.hsc if config.correction == "hsc" else None,
    )


def save_network(path: Path, network: FeedForwardNetwork) -> None:
    """Write a network to a safetensors file, atomically."""
    save_state(path, {"kind": _KIND, "options": network.options, "weights": network.state_dict()})


def load_network(path: Path) -> FeedForwardNetwork:
    """Read what `save_network` wrote, on the CPU.

    Raises:
        WeightsError: If there is no such file, it is damaged, or it holds something else.
    """
    if not path.is_file():
        raise WeightsError(f"no network at {path}")
    try:
        state = load_state(path)
        if state.get("kind") != _KIND:
            raise CheckpointError(f"{path} holds something else")
        network = FeedForwardNetwork(**state["options"])
        network.load_state_dict(state["weights"])
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        raise WeightsError(f"{path} is damaged, or is no network of hessreg style") from None
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise WeightsError(f"{path}: {name} is not finite")
    return network
