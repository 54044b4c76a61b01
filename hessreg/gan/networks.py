"""Small generators and discriminators for points and for small images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "ARCHITECTURES", "Discriminator", "Generator"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}
ARCHITECTURES = ("mlp", "dcgan")
_IMAGE = (1, 8, 8)


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def _check_architecture(name: str, shape: Sequence[int]) -> None:
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; choose from {', '.join(ARCHITECTURES)}")
    if name == "dcgan" and tuple(shape) != _IMAGE:
        raise ValueError(f"architecture dcgan is for samples of shape {_IMAGE}, got {tuple(shape)}")


class Generator(nn.Module):
    """Maps noise ``[n, latent_dim]`` to samples ``[n, *shape]``; images are in (-1, 1).

    Args:
        architecture: ``"mlp"`` (two hidden layers) or ``"dcgan"`` (transposed convolutions with
            batch normalisation).
        latent_dim: Number of noise components.
        width: Units of a hidden layer; channels of the widest feature map of the DCGAN.
        activation: ``"silu"``, ``"softplus"``, ``"tanh"``, ``"relu"`` or ``"leaky_relu"``. The
            second derivative of the last two is zero almost everywhere, so a Hessian sees less of
            them.
        shape: Of a sample: ``(1, 8, 8)``, or ``(d,)`` for points, which only the MLP draws.

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
        shape: Sequence[int] = _IMAGE,
    ) -> None:
        super().__init__()
        _check_architecture(architecture, shape)
        self.latent_dim = latent_dim
        build = _mlp_generator if architecture == "mlp" else _dcgan_generator
        self.layers = build(latent_dim, width, activation, tuple(shape))

    def forward(self, noise: Tensor) -> Tensor:
        """Return the samples of a batch of noise."""
        return self.layers(noise)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` samples from normal noise, in evaluation mode and without a graph."""
        parameter = next(self.parameters())
        noise = torch.randn(count, self.latent_dim, generator=generator).to(parameter)
        training = self.training
        self.eval()
        with torch.no_grad():
            samples = self(noise)
        self.train(training)
        return samples


class Discriminator(nn.Module):
    """Maps samples ``[n, *shape]`` to logits ``[n]``, positive for "real", or to several outputs.

    Args:
        architecture: ``"mlp"`` or ``"dcgan"``, as for `Generator`.
        width: Units of a hidden layer; channels of the widest feature map of the DCGAN.
        activation: As for `Generator`.
        shape: As for `Generator`.
        outputs: For each sample; with more than one they are ``[n, outputs]``.

    Example:
        >>> Discriminator(width=32)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        architecture: str = "mlp",
        width: int = 128,
        activation: str = "silu",
        shape: Sequence[int] = _IMAGE,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        _check_architecture(architecture, shape)
        build = _mlp_discriminator if architecture == "mlp" else _dcgan_discriminator
        self.layers = build(width, activation, tuple(shape), outputs)
        self._is_scalar = outputs == 1

    def forward(self, samples: Tensor) -> Tensor:
        """Return one logit per sample, or its outputs."""
        outputs = self.layers(samples)
        return outputs.squeeze(1) if self._is_scalar else outputs

    def features(self, samples: Tensor) -> Tensor:
        """Return the activations of the last hidden layer, ``[n, features]``."""
        return self.layers[:-1](samples)


def _mlp_generator(
    latent_dim: int, width: int, activation: str, shape: tuple[int, ...]
) -> nn.Sequential:
    # Images are bounded; points are not.
    last = [nn.Tanh()] if len(shape) == 3 else []
    return nn.Sequential(
        nn.Linear(latent_dim, width),
        _activation(activation),
        nn.Linear(width, width),
        _activation(activation),
        nn.Linear(width, math.prod(shape)),
        *last,
        nn.Unflatten(1, shape),
    )


def _mlp_discriminator(
    width: int, activation: str, shape: tuple[int, ...], outputs: int
) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), width),
        _activation(activation),
        nn.Linear(width, width),
        _activation(activation),
        nn.Linear(width, outputs),
    )


def _dcgan_generator(
    latent_dim: int, width: int, activation: str, shape: tuple[int, ...]
) -> nn.Sequential:
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


def _dcgan_discriminator(
    width: int, activation: str, shape: tuple[int, ...], outputs: int
) -> nn.Sequential:
    # No normalisation before the first activation: the usual DCGAN layout.
    return nn.Sequential(
        nn.Conv2d(1, width // 2, 4, stride=2, padding=1),
        _activation(activation),
        nn.Conv2d(width // 2, width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        _activation(activation),
        nn.Flatten(),
        nn.Linear(width * 4, outputs),
    )
