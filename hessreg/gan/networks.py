"""Small generators and discriminators for 8 x 8 images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "ARCHITECTURES", "Discriminator", "Generator"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}
ARCHITECTURES = ("mlp", "dcgan")


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def _check_architecture(name: str) -> None:
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; choose from {', '.join(ARCHITECTURES)}")


class Generator(nn.Module):
    """Maps noise ``[n, latent_dim]`` to images ``[n, 1, 8, 8]`` in (-1, 1).

    Args:
        architecture: ``"mlp"`` (two hidden layers) or ``"dcgan"`` (transposed convolutions with
            batch normalisation).
        latent_dim: Number of noise components.
        width: Units of a hidden layer; channels of the widest feature map of the DCGAN.
        activation: ``"silu"``, ``"softplus"``, ``"tanh"`` or ``"leaky_relu"``. The second
            derivative of the last is zero almost everywhere, so a Hessian sees less of it.

    Example:
        >>> Generator(latent_dim=16, width=32)(torch.zeros(5, 16)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        architecture: str = "mlp",
        latent_dim: int = 32,
        width: int = 128,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        _check_architecture(architecture)
        self.latent_dim = latent_dim
        build = _mlp_generator if architecture == "mlp" else _dcgan_generator
        self.layers = build(latent_dim, width, activation)

    def forward(self, noise: Tensor) -> Tensor:
        """Return the images of a batch of noise."""
        return self.layers(noise)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` images from normal noise, in evaluation mode and without a graph."""
        parameter = next(self.parameters())
        noise = torch.randn(count, self.latent_dim, generator=generator).to(parameter)
        training = self.training
        self.eval()
        with torch.no_grad():
            images = self(noise)
        self.train(training)
        return images


class Discriminator(nn.Module):
    """Maps images ``[n, 1, 8, 8]`` to logits ``[n]``: positive means "real".

    Args:
        architecture: ``"mlp"`` or ``"dcgan"``, as for `Generator`.
        width: Units of a hidden layer; channels of the widest feature map of the DCGAN.
        activation: As for `Generator`.

    Example:
        >>> Discriminator(width=32)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5])
    """

    def __init__(
        self, architecture: str = "mlp", width: int = 128, activation: str = "silu"
    ) -> None:
        super().__init__()
        _check_architecture(architecture)
        build = _mlp_discriminator if architecture == "mlp" else _dcgan_discriminator
        self.layers = build(width, activation)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit per image."""
        return self.layers(images).squeeze(1)


def _mlp_generator(latent_dim: int, width: int, activation: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(latent_dim, width),
        _activation(activation),
        nn.Linear(width, width),
        _activation(activation),
        nn.Linear(width, 64),
        nn.Tanh(),
        nn.Unflatten(1, (1, 8, 8)),
    )


def _mlp_discriminator(width: int, activation: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        _activation(activation),
        nn.Linear(width, width),
        _activation(activation),
        nn.Linear(width, 1),
    )


def _dcgan_generator(latent_dim: int, width: int, activation: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(latent_dim, width * 4, bias=False),
        nn.Unflatten(1, (width, 2, 2)),
        nn.BatchNorm2d(width),
        _activation(activation),
        nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width // 2),
        _activation(activation),
        nn.ConvTranspose2d(width // 2, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def _dcgan_discriminator(width: int, activation: str) -> nn.Sequential:
    # No normalisation before the first activation: the usual DCGAN layout.
    return nn.Sequential(
        nn.Conv2d(1, width // 2, 4, stride=2, padding=1),
        _activation(activation),
        nn.Conv2d(width // 2, width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        _activation(activation),
        nn.Flatten(),
        nn.Linear(width * 4, 1),
    )
