"""Generators and discriminators: of points or images, with classes or codes, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils import parametrizations

from hessreg.gan.architectures import ACTIVATIONS, ARCHITECTURES, Style, builder_for

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "INITIALIZATIONS",
    "Conditioned",
    "Discriminator",
    "Generator",
    "WrappedDiscriminator",
    "WrappedGenerator",
    "initialize",
    "normalize_spectrally",
]

_IMAGE = (1, 8, 8)

Latent = Literal["normal", "uniform"]
Conditional = Literal["none", "concat", "projection"]


class Generator(nn.Module):
    """Maps noise ``[n, latent_dim]`` to samples ``[n, *shape]``; images are in (-1, 1).

    A generator of classes or codes takes them as further components of the noise, one for each,
    1 for the chosen one and 0 else: `draw_latent` makes such noise.

    Args:
        architecture: A key of `ARCHITECTURES`: ``"mlp"`` (two hidden layers), ``"dcgan"``
            (transposed convolutions with batch normalisation), ``"resnet"`` (residual blocks
            without normalisation), or one of the articles'.
        latent_dim: Number of noise components.
        width: Units of a hidden layer; channels of the widest feature map.
        activation: A key of `ACTIVATIONS`. The second derivative of ``"leaky_relu"`` and
            ``"relu"`` is zero almost everywhere, so a Hessian sees less of them.
        shape: Of a sample: ``(channels, height, width)``, or ``(d,)`` for points, which only the
            MLP draws.
        dropout: Share of hidden units that training leaves out.
        latent: Distribution of the noise: normal, or uniform on [-1, 1].
        num_classes: Number of classes to choose from; 0 for none.
        num_codes: Number of codes of InfoGAN; 0 for none.

    Raises:
        ValueError: If an option is unknown, or the architecture not for such samples.

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
        *,
        dropout: float = 0.0,
        latent: Latent = "normal",
        num_classes: int = 0,
        num_codes: int = 0,
    ) -> None:
        super().__init__()
        self._describe_latent(latent_dim, latent, num_classes, num_codes)
        build = builder_for(architecture, shape).generator
        style = Style(width, activation, dropout)
        self.layers: nn.Module = build(self.num_inputs, tuple(shape), style)

    def _describe_latent(
        self, latent_dim: int, latent: Latent, num_classes: int, num_codes: int
    ) -> None:
        if latent not in ("normal", "uniform"):
            raise ValueError(f"latent must be normal or uniform, got {latent!r}")
        self.latent_dim, self.latent = latent_dim, latent
        self.num_classes, self.num_codes = num_classes, num_codes

    @property
    def num_inputs(self) -> int:
        """Number of components of the noise with those of classes and codes."""
        return self.latent_dim + self.num_classes + self.num_codes

    def forward(self, noise: Tensor) -> Tensor:
        """Return the samples of a batch of noise."""
        return self.layers(noise)

    def draw_latent(
        self,
        count: int,
        random: torch.Generator,
        labels: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        """Return noise ``[count, num_inputs]`` on the CPU.

        Args:
            count: Of samples.
            random: Where it comes from.
            labels: Classes ``[count]``; by default each in turn.
            codes: Codes ``[count]``; drawn by default.
        """
        if self.latent == "normal":
            noise = torch.randn(count, self.latent_dim, generator=random)
        else:
            noise = 2 * torch.rand(count, self.latent_dim, generator=random) - 1
        parts = [noise]
        if self.num_classes:
            labels = torch.arange(count) % self.num_classes if labels is None else labels.cpu()
            parts.append(one_hot(labels, self.num_classes).to(noise))
        if self.num_codes:
            if codes is None:
                codes = torch.randint(self.num_codes, (count,), generator=random)
            parts.append(one_hot(codes, self.num_codes).to(noise))
        return torch.cat(parts, 1) if len(parts) > 1 else noise

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        labels: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        """Return ``count`` samples, in evaluation mode and without a graph.

        Args:
            count: Of samples.
            generator: Where the noise comes from.
            labels: Classes ``[count]``; by default each in turn.
            codes: Codes ``[count]``, without classes; by default each in turn. With classes they
                are drawn.
        """
        if self.num_classes:
            codes = None
        elif self.num_codes and codes is None:
            codes = torch.arange(count) % self.num_codes
        noise = self.draw_latent(count, generator, labels, codes).to(next(self.parameters()))
        training = self.training
        self.eval()
        with torch.no_grad():
            samples = self(noise)
        self.train(training)
        return samples


class Discriminator(nn.Module):
    """Maps samples ``[n, *shape]`` to logits ``[n]``, positive for "real", or to several outputs.

    Args:
        architecture: As for `Generator`.
        width: As for `Generator`.
        activation: As for `Generator`.
        shape: As for `Generator`.
        outputs: For each sample; with more than one they are ``[n, outputs]``.
        dropout: As for `Generator`.
        conditional: How classes matter: not at all; ``"concat"``, as further channels (components
            of points), 1 for the class; or ``"projection"``, by the inner product of the last
            hidden layer with a vector of the class, which is added to the outputs (Miyato and
            Koyama, 2018).
        num_classes: Their number.
        num_codes: Number of codes of InfoGAN, which `codes` tells from samples; 0 for none.

    Raises:
        ValueError: If an option is unknown, or the architecture not for such samples.

    Example:
        >>> Discriminator(width=32)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5])
        >>> network = Discriminator(width=32, conditional="projection", num_classes=10)
        >>> network(torch.zeros(5, 1, 8, 8), torch.arange(5)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        architecture: str = "mlp",
        width: int = 128,
        activation: str = "silu",
        shape: Sequence[int] = _IMAGE,
        outputs: int = 1,
        *,
        dropout: float = 0.0,
        conditional: Conditional = "none",
        num_classes: int = 0,
        num_codes: int = 0,
    ) -> None:
        super().__init__()
        if conditional not in ("none", "concat", "projection"):
            raise ValueError(f"conditional must be none, concat or projection, got {conditional!r}")
        self.conditional, self.num_classes = conditional, num_classes
        build = builder_for(architecture, shape).discriminator
        further = num_classes if conditional == "concat" else 0
        seen = (shape[0] + further, *shape[1:])
        self.layers = build(seen, outputs, Style(width, activation, dropout))
        features: Any = self.layers[-1].in_features
        if conditional == "projection":
            self.embedding = nn.Embedding(num_classes, features)
        if num_codes:
            self.code_head = nn.Linear(features, num_codes)
        self._is_scalar = outputs == 1

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return one logit per sample, or its outputs; with classes, ``labels [n]`` are needed."""
        if self.conditional == "projection":
            features = self.layers[:-1](samples)
            match = (self.embedding(labels) * features).sum(1, keepdim=True)
            outputs = self.layers[-1](features) + match
        else:
            outputs = self.layers(self._with_classes(samples, labels))
        return outputs.squeeze(1) if self._is_scalar else outputs

    def features(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the activations of the last hidden layer, ``[n, features]``."""
        return self.layers[:-1](self._with_classes(samples, labels))

    def codes(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits ``[n, num_codes]`` of the codes that samples were made from."""
        return self.code_head(self.features(samples, labels))

    def _with_classes(self, samples: Tensor, labels: Tensor | None) -> Tensor:
        if self.conditional != "concat":
            return samples
        if labels is None:
            raise ValueError("labels must be given to a discriminator with classes, got None")
        chosen = one_hot(labels, self.num_classes).to(samples)
        planes = chosen.view(*chosen.shape, *[1] * (samples.dim() - 2))
        return torch.cat([samples, planes.expand(-1, -1, *samples.shape[2:])], 1)


class Conditioned(nn.Module):
    """A discriminator that is told the classes of a batch once, so that none else has to know.

    Args:
        discriminator: Takes samples and labels.
        labels: Of the rows of the batch, ``[n]``; fewer samples are its first ones, more are
            several for each row: the whole batch once, then again.
    """

    def __init__(self, discriminator: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.discriminator, self.labels = discriminator, labels

    def forward(self, samples: Tensor) -> Tensor:
        """Return the discriminator's outputs for samples of these classes."""
        return self.discriminator(samples, self._labels_of(samples))

    def features(self, samples: Tensor) -> Tensor:
        """Return its last hidden layer."""
        return self._call("features", samples)

    def codes(self, samples: Tensor) -> Tensor:
        """Return its logits of the codes."""
        return self._call("codes", samples)

    def _call(self, method: str, samples: Tensor) -> Tensor:
        return getattr(self.discriminator, method)(samples, self._labels_of(samples))

    def _labels_of(self, samples: Tensor) -> Tensor:
        turns = -(-len(samples) // len(self.labels))
        return (
            self.labels.repeat(turns)[: len(samples)] if turns > 1 else self.labels[: len(samples)]
        )


class WrappedGenerator(Generator):
    """The user's own generator, with what the trainer asks of one.

    Args:
        network: Maps noise ``[n, num_inputs]`` to samples.
        latent_dim: Number of noise components.
        latent: As for `Generator`.
        num_classes: As for `Generator`.
    """

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        latent: Latent = "normal",
        num_classes: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        self._describe_latent(latent_dim, latent, num_classes, 0)
        self.layers = network


class WrappedDiscriminator(nn.Module):
    """The user's own discriminator, whose outputs may be ``[n, 1]``.

    Args:
        network: Maps samples, with classes also ``labels [n]``, to outputs.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, samples: Tensor, *labels: Tensor) -> Tensor:
        """Return one logit per sample, or its outputs."""
        outputs = self.network(samples, *labels)
        return outputs.squeeze(1) if outputs.shape[1:] == (1,) else outputs


INITIALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda weight: nn.init.normal_(weight, std=0.02),  # the DCGAN's
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


def initialize(network: nn.Module, name: str) -> None:
    """Draw the weights of all linear layers and convolutions anew; ``default`` leaves torch's.

    Args:
        network: Whose.
        name: ``default`` or a key of `INITIALIZATIONS`.
    """
    for layer in network.modules() if name != "default" else ():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            INITIALIZATIONS[name](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def normalize_spectrally(network: nn.Module) -> None:
    """Divide the weight of every linear layer, embedding and convolution by its spectral norm.

    The norm is that of Miyato and others, 2018: one power iteration in every evaluation in
    training mode, its vectors held constant by derivatives of every order.
    """
    kinds = nn.Linear | nn.Embedding | nn.modules.conv._ConvNd
    for layer in list(network.modules()):
        if isinstance(layer, kinds) and math.prod(layer.weight.shape) > 1:
            parametrizations.spectral_norm(layer)
