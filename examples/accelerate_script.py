"""A GAN on handwritten digits with Accelerate, with regularisers in its losses.

    pip install 'hessreg[gan,examples]'
    accelerate launch examples/accelerate_script.py --steps 2000 --picture digits.png

`prepare` gets the optimisers and the loader, not the networks: DDP's wrapper gets in the way of
second derivatives. With several processes the gradients are averaged by hand, which is all that
the wrapper would do; a Hessian norm is then the mean of those of the processes' batches, not that
of the whole batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from hessreg.gan import Discriminator, Generator, load_dataset
from hessreg.gan.pictures import save_grid
from hessreg.regularizers import HSN1R, R1, Regularizer, StepContext


def endless(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    """Batches of one pass after another."""
    while True:
        yield from loader


def step(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: Any,
    ctx: StepContext,
    regularizers: Sequence[Regularizer],
) -> None:
    """One step of a network on its loss with what the regularisers add to it."""
    losses = [ctx.generator_loss, ctx.discriminator_loss]
    terms = [term for each in regularizers for term in each.loss_terms(ctx)]
    loss = torch.stack([term for term in (*losses, *terms) if term is not None]).sum()
    parameters = list(network.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = accelerator.reduce(grad, "mean")
    optimizer.step()


def train(steps: int, seed: int = 0) -> tuple[Generator, Discriminator]:
    """Train for so many steps and return both networks."""
    torch.manual_seed(seed)  # the same weights in every process
    accelerator = Accelerator()
    images: Any = load_dataset("digits").train_samples
    generator = Generator(width=64).to(accelerator.device)
    discriminator = Discriminator(width=64).to(accelerator.device)
    regularizers = [HSN1R(weight=1e-4, every=16, num_steps=3, seed=seed), R1(gamma=1.0)]
    order = torch.Generator().manual_seed(seed)
    random = torch.Generator().manual_seed(seed + accelerator.process_index)
    optimizer_g, optimizer_d, loader = accelerator.prepare(
        torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.999)),
        torch.optim.Adam(discriminator.parameters(), lr=5e-4, betas=(0.5, 0.999)),
        DataLoader(images, batch_size=64, shuffle=True, drop_last=True, generator=order),
    )
    for number, real in zip(range(steps), endless(loader), strict=False):
        noise = torch.randn(len(real), generator.latent_dim, generator=random).to(real)
        with torch.no_grad():
            fake = generator(noise)
        loss_d = softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()
        ctx = StepContext(number, generator, discriminator, None, loss_d, real, fake, noise)
        step(accelerator, discriminator, optimizer_d, ctx, regularizers)

        noise = torch.randn(len(real), generator.latent_dim, generator=random).to(real)
        fake = generator(noise)
        loss_g = softplus(-discriminator(fake)).mean()
        ctx = StepContext(number, generator, discriminator, loss_g, None, real, fake, noise)
        step(accelerator, generator, optimizer_g, ctx, regularizers)
    return generator, discriminator


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("digits.png"))
    options = parser.parse_args(args)
    generator, _ = train(options.steps, options.seed)
    save_grid(options.picture, generator.sample(64, torch.Generator().manual_seed(1)).cpu())
    print(f"{options.picture}: 64 images after {options.steps} steps")


if __name__ == "__main__":
    main()
