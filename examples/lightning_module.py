"""A GAN on handwritten digits as a Lightning module, with regularisers in its losses.

    pip install 'hessreg[gan,examples]'
    python examples/lightning_module.py --steps 2000 --picture digits.png

Two networks are stepped in turn, so optimisation is manual. `self.global_step` counts the steps of
both optimisers: regularisers count rounds. Their state (random probes, warm starts) goes into
Lightning's checkpoints with the weights. For one device: DDP's wrapper gets in the way of second
derivatives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from hessreg.gan import Discriminator, Generator, load_dataset
from hessreg.gan.pictures import save_grid
from hessreg.regularizers import HSN1R, R1, Regularizer, StepContext


class RegularizedGAN(lightning.LightningModule):
    """Two networks and what is added to their losses.

    Args:
        regularizers: Of both losses.
        seed: Of the noise.
    """

    def __init__(self, regularizers: Sequence[Regularizer], seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = Generator(width=64), Discriminator(width=64)
        self.regularizers = list(regularizers)
        self.rounds = 0
        self.random = torch.Generator().manual_seed(seed)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for each network."""
        networks = self.generator, self.discriminator
        return [torch.optim.Adam(n.parameters(), lr=5e-4, betas=(0.5, 0.999)) for n in networks]

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        """Train the discriminator, then the generator."""
        optimizers: Any = self.optimizers()
        optimizer_g, optimizer_d = optimizers
        noise = self.noise(real)
        with torch.no_grad():
            fake = self.generator(noise)
        logits = self.discriminator(real), self.discriminator(fake)
        loss_d = softplus(-logits[0]).mean() + softplus(logits[1]).mean()
        self.step(optimizer_d, loss_d, self.context(None, loss_d, real, fake, noise))

        noise = self.noise(real)
        fake = self.generator(noise)
        loss_g = softplus(-self.discriminator(fake)).mean()
        self.step(optimizer_g, loss_g, self.context(loss_g, None, real, fake, noise))
        self.rounds += 1

    def noise(self, real: Tensor) -> Tensor:
        """As many vectors as there are images."""
        return torch.randn(len(real), self.generator.latent_dim, generator=self.random).to(real)

    def context(
        self, loss_g: Tensor | None, loss_d: Tensor | None, real: Tensor, fake: Tensor, z: Tensor
    ) -> StepContext:
        """What regularisers see."""
        networks = self.generator, self.discriminator
        return StepContext(self.rounds, *networks, loss_g, loss_d, real, fake, z)

    def step(self, optimizer: Any, loss: Tensor, ctx: StepContext) -> None:
        """One step on a loss with what the regularisers add to it."""
        terms = [t for each in self.regularizers for t in each.loss_terms(ctx) if t is not None]
        optimizer.zero_grad()
        self.manual_backward(torch.stack([loss, *terms]).sum())
        optimizer.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed run needs to go on as if nothing had happened."""
        checkpoint["regularizers"] = [each.state_dict() for each in self.regularizers]
        checkpoint["rounds"], checkpoint["random"] = self.rounds, self.random.get_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what was kept."""
        for each, state in zip(self.regularizers, checkpoint["regularizers"], strict=True):
            each.load_state_dict(state)
        self.rounds = checkpoint["rounds"]
        self.random.set_state(checkpoint["random"])


def train(steps: int, seed: int = 0) -> RegularizedGAN:
    """Train each network for so many steps and return the module."""
    torch.manual_seed(seed)
    gan = RegularizedGAN(
        [HSN1R(weight=1e-4, every=16, num_steps=3, seed=seed), R1(gamma=1.0)], seed
    )
    images: Any = load_dataset("digits").train_samples
    order = torch.Generator().manual_seed(seed)
    loader: DataLoader[Tensor] = DataLoader(
        images, batch_size=64, shuffle=True, drop_last=True, generator=order
    )
    loop = lightning.Trainer(
        max_steps=2 * steps,
        max_epochs=-1,
        devices=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    loop.fit(gan, loader)
    return gan


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("digits.png"))
    options = parser.parse_args(args)
    gan = train(options.steps, options.seed)
    save_grid(options.picture, gan.generator.sample(64, torch.Generator().manual_seed(1)))
    print(f"{options.picture}: 64 images after {options.steps} steps")


if __name__ == "__main__":
    main()
