"""A GAN on handwritten digits in a plain torch loop, with regularisers in its losses.

    python examples/plain_torch.py --steps 2000 --picture digits.png

A regulariser sees a `StepContext`: both networks, the loss of the one that is trained with its
graph, and the batch. Its `loss_terms` are added to the loss before the gradient is taken. Networks
with normalisation layers want their losses computed under `hessreg.curvature.third_order_safe`: a
Hessian norm differentiates them three times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from hessreg.gan import Discriminator, Generator, load_dataset
from hessreg.gan.pictures import save_grid
from hessreg.regularizers import HSN1R, R1, Regularizer, StepContext


def endless(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    """Batches of one pass after another."""
    while True:
        yield from loader


def penalty(regularizers: Sequence[Regularizer], ctx: StepContext) -> Tensor:
    """What all regularisers add to the loss of this phase."""
    terms = [term for each in regularizers for term in each.loss_terms(ctx) if term is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def train(steps: int, seed: int = 0) -> tuple[Generator, Discriminator]:
    """Train for so many steps and return both networks."""
    torch.manual_seed(seed)
    images: Any = load_dataset("digits").train_samples
    generator, discriminator = Generator(width=64), Discriminator(width=64)
    regularizers = [HSN1R(weight=1e-4, every=16, num_steps=3, seed=seed), R1(gamma=1.0)]
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=5e-4, betas=(0.5, 0.999))
    order, random = (torch.Generator().manual_seed(seed) for _ in range(2))
    loader: DataLoader[Tensor] = DataLoader(
        images, batch_size=64, shuffle=True, drop_last=True, generator=order
    )

    for step, real in zip(range(steps), endless(loader), strict=False):
        noise = torch.randn(len(real), generator.latent_dim, generator=random)
        with torch.no_grad():
            fake = generator(noise)
        loss_d = softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()
        ctx = StepContext(step, generator, discriminator, None, loss_d, real, fake, noise)
        optimizer_d.zero_grad()
        (loss_d + penalty(regularizers, ctx)).backward()
        optimizer_d.step()

        noise = torch.randn(len(real), generator.latent_dim, generator=random)
        fake = generator(noise)
        loss_g = softplus(-discriminator(fake)).mean()
        ctx = StepContext(step, generator, discriminator, loss_g, None, real, fake, noise)
        optimizer_g.zero_grad()
        (loss_g + penalty(regularizers, ctx)).backward()
        optimizer_g.step()
    return generator, discriminator


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("digits.png"))
    options = parser.parse_args(args)
    generator, _ = train(options.steps, options.seed)
    save_grid(options.picture, generator.sample(64, torch.Generator().manual_seed(1)))
    print(f"{options.picture}: 64 images after {options.steps} steps")


if __name__ == "__main__":
    main()
