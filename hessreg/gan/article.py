"""The loop of the article on HSN1R, under its name: ``train(generator, discriminator, ...)``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hessreg.gan.networks import Generator, WrappedDiscriminator, WrappedGenerator
from hessreg.gan.options import PlayerConfig
from hessreg.gan.trainer import Trainer
from hessreg.regularizers import HSN1R
from hessreg.regularizers.hsn1r import latent_shape

__all__ = ["train"]

_RATE = 2e-4  # the article's, for both networks; its betas are the usual ones here


def train(
    generator: nn.Module,
    discriminator: nn.Module,
    dataloader: Iterable[Any],
    lambda_: float,
    epochs: int = 1,
    **options: Any,
) -> list[dict[str, float]]:
    """Train two networks with HSN1R, as the article's function of this name was meant to.

    Both are changed in place, by Adam with rate 2e-4 and betas (0.5, 0.999), on the non-saturating
    loss plus ``lambda_ (|H_G| + |H_D|)``. In the article every body is empty; what it leaves open
    is as in `hessreg.gan.Trainer` and `hessreg.regularizers.HSN1R`.

    Args:
        generator: Maps noise to samples. The size of the noise is its attribute ``latent_dim``, or
            what its first layer takes.
        discriminator: Maps samples to logits, ``[n]`` or ``[n, 1]``.
        dataloader: Gives batches, tensors or tuples that begin with one, each of which makes one
            step; a last one that is smaller than the first is left out.
        lambda_: Weight of the norms.
        epochs: Passes through the data.
        **options: Of `HSN1R`, such as ``norm`` and ``every``.

    Returns:
        The means of losses, penalties and gradient norms in every pass.

    Raises:
        ValueError: If there is no batch, or the size of the noise cannot be told.
        NonFiniteError: If something is not finite.

    Example:
        >>> from hessreg.gan import Discriminator, Generator
        >>> batches = torch.utils.data.DataLoader(torch.rand(64, 1, 8, 8), batch_size=32)
        >>> networks = Generator(width=16), Discriminator(width=16)
        >>> history = train(*networks, batches, 1e-4, num_steps=2)
        >>> len(history), "penalty_d" in history[0]
        (1, True)
    """
    first = next((_samples(batch) for batch in dataloader), None)
    if first is None:
        raise ValueError("dataloader must have at least one batch, got none")
    batches = _Batches(first)
    trainer = Trainer(
        _with_latent(generator),
        WrappedDiscriminator(discriminator),
        batches,
        [HSN1R(weight=lambda_, **options)],
        batch_size=len(first),
        g=PlayerConfig(lr=_RATE),
        d=PlayerConfig(lr=_RATE),
        seed=torch.initial_seed() % 2**63,
    )
    history = []
    for _ in range(epochs):
        for batch in dataloader:
            if len(_samples(batch)) == len(first):
                batches.now = _samples(batch)
                trainer.step()
        history.append(trainer.metrics())
    return history


class _Batches:
    """Gives the trainer whatever batch is there, as its choice of rows would be."""

    def __init__(self, first: Tensor) -> None:
        self.now = first
        self.shape, self.device = first.shape, first.device

    def __len__(self) -> int:
        return len(self.now)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.now

    def to(self, device: torch.device) -> _Batches:
        return _Batches(self.now.to(device))


def _samples(batch: Any) -> Tensor:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _with_latent(generator: nn.Module) -> Generator:
    if isinstance(generator, Generator):
        return generator
    shape = latent_shape(generator)
    layers = generator if len(shape) == 1 else nn.Sequential(nn.Unflatten(1, shape), generator)
    return WrappedGenerator(layers, math.prod(shape))
