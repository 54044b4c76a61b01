"""A GAN on handwritten digits whose gradients are made orthogonal before the steps.

    python examples/orthogonal_gradients.py --picture digits.png
    python examples/orthogonal_gradients.py --generator-lr 1e-3 --discriminator-lr 1e-3

Two multilayer perceptrons with sigmoid outputs and a learning rate each. With ``--mode previous``
the joint gradient of both networks is projected on the last one; with ``terms`` those of the
discriminator's losses on real and on generated images are projected where they conflict (the
generator has one loss, so nothing to project); ``none`` is the same GAN without projection.

At the default rates a hundred epochs of so few images draw no digits in any mode, only noise in the
shape of one; at those of the second command ``previous`` draws blurred ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, interpolate

from hessreg.gan.pictures import save_grid
from hessreg.optim import OrthogonalGradients

NOISE, SIDE = 100, 28


def make_generator() -> nn.Sequential:
    """Maps noise [n, 100] to images [n, 784] in (0, 1)."""
    return nn.Sequential(
        *(nn.Linear(NOISE, 128), nn.LeakyReLU(0.2)),
        *(nn.Linear(128, 128), nn.LeakyReLU(0.2)),
        *(nn.Linear(128, 100), nn.LeakyReLU(0.2)),
        *(nn.Linear(100, SIDE * SIDE), nn.Sigmoid()),
    )


def make_discriminator() -> nn.Sequential:
    """Maps images [n, 784] to the probability [n, 1] that they are real."""
    return nn.Sequential(
        *(nn.Linear(SIDE * SIDE, 128), nn.LeakyReLU(0.2)),
        *(nn.Linear(128, 128), nn.LeakyReLU(0.2)),
        *(nn.Linear(128, 1), nn.Sigmoid()),
    )


def load_images() -> Tensor:
    """The 1797 digits that come with scikit-learn, resized: [1797, 784] in [0, 1]."""
    images = torch.from_numpy(load_digits().images).float().div(16).unsqueeze(1)
    return interpolate(images, size=(SIDE, SIDE), mode="bilinear").flatten(1)


class OrthogonalGAN:
    """Both networks, their Adam optimisers and the projection around these."""

    def __init__(self, mode: str, generator_lr: float, discriminator_lr: float) -> None:
        self.generator, self.discriminator = make_generator(), make_discriminator()
        betas = (0.5, 0.999)
        adam_g = torch.optim.Adam(self.generator.parameters(), generator_lr, betas)
        adam_d = torch.optim.Adam(self.discriminator.parameters(), discriminator_lr, betas)
        # With strength 0 the wrapper is the two optimisers and no more.
        strength = 0.0 if mode == "none" else None
        self.both = OrthogonalGradients(adam_g, adam_d, mode="previous", strength=strength)
        self.discriminator_only = OrthogonalGradients(adam_d, mode="terms")
        self.generator_only = OrthogonalGradients(adam_g, mode="terms")
        self.step = self.step_on_terms if mode == "terms" else self.step_at_once

    def discriminator_losses(self, real: Tensor) -> list[Tensor]:
        """-log D(x) and -log(1 - D(G(z)))."""
        on_real = self.discriminator(real)
        on_fake = self.discriminator(self.generate(len(real)).detach())
        return [
            binary_cross_entropy(on_real, torch.ones_like(on_real)),
            binary_cross_entropy(on_fake, torch.zeros_like(on_fake)),
        ]

    def generator_loss(self, count: int) -> Tensor:
        """-log D(G(z))."""
        on_fake = self.discriminator(self.generate(count))
        return binary_cross_entropy(on_fake, torch.ones_like(on_fake))

    def generate(self, count: int) -> Tensor:
        """G(z) of standard normal noise: [count, 784]."""
        return self.generator(torch.randn(count, NOISE))

    def step_on_terms(self, real: Tensor) -> tuple[float, float]:
        """The discriminator, then the generator, each with the gradients of its loss terms."""
        losses_d = self.discriminator_losses(real)
        self.discriminator_only.zero_grad()
        self.discriminator_only.backward(losses_d)
        self.discriminator_only.step()
        loss_g = self.generator_loss(len(real))
        self.generator_only.zero_grad()
        self.generator_only.backward([loss_g])
        self.generator_only.step()
        return loss_g.item(), sum(loss.item() for loss in losses_d)

    def step_at_once(self, real: Tensor) -> tuple[float, float]:
        """Both at once, with their joint gradient."""
        loss_g = self.generator_loss(len(real))
        loss_d = torch.stack(self.discriminator_losses(real)).sum()
        self.both.zero_grad()
        self.both.backward([loss_g, loss_d])
        self.both.step()
        return loss_g.item(), loss_d.item()


def train(options: argparse.Namespace) -> OrthogonalGAN:
    """Trains for the wanted number of epochs and prints the losses of some."""
    torch.manual_seed(options.seed)
    images = load_images()[: options.images]
    gan = OrthogonalGAN(options.mode, options.generator_lr, options.discriminator_lr)
    for epoch in range(1, options.epochs + 1):
        for rows in torch.randperm(len(images)).split(options.batch_size):
            loss_g, loss_d = gan.step(images[rows])
        if epoch % options.print_every == 0:
            losses = f"Generator Loss: {loss_g:.4f}, Discriminator Loss: {loss_d:.4f}"
            print(f"Epoch {epoch}/{options.epochs}, {losses}", flush=True)
    return gan


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["previous", "terms", "none"], default="previous")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--print-every", type=int, default=10, help="epochs between two lines")
    parser.add_argument("--generator-lr", type=float, default=2e-4)
    parser.add_argument("--discriminator-lr", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1797, help="how many to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="PNG file for 64 generated images")
    options = parser.parse_args(arguments)
    gan = train(options)
    if options.picture:
        with torch.no_grad():
            drawn = gan.generate(64).view(64, 1, SIDE, SIDE)
        save_grid(options.picture, 2 * drawn - 1)


if __name__ == "__main__":
    main(sys.argv[1:])
