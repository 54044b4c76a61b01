"""The layers of generators and discriminators, by name of their architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

__all__ = ["ACTIVATIONS", "ARCHITECTURES", "Builder", "Style", "builder_for", "make_activation"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}
_LARGEST_BASE = 7  # pixels of the smallest feature map
_MNIST = (1, 28, 28)

Shape = tuple[int, ...]


def make_activation(name: str) -> nn.Module:
    """Return an activation by name.

    Raises:
        ValueError: If there is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


@dataclass(frozen=True)
class Style:
    """What the layers of a network have in common.

    Args:
        width: Units of a hidden layer, or channels of the widest feature map.
        activation: A key of `ACTIVATIONS`.
        dropout: Share of the units of a hidden layer that training leaves out.

    Raises:
        ValueError: If there is no such activation, or dropout is not in [0, 1).
    """

    width: int = 128
    activation: str = "silu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        make_activation(self.activation)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def hidden(self) -> list[nn.Module]:
        """Return what follows a hidden layer."""
        activation = make_activation(self.activation)
        return [activation, nn.Dropout(self.dropout)] if self.dropout else [activation]


@dataclass(frozen=True)
class Builder:
    """The two networks of an architecture.

    Attributes:
        generator: From the number of inputs and the shape of a sample.
        discriminator: From the shape of a sample and the number of outputs; the last layer is
            linear, and before it are features ``[n, features]``.
        check: Says for which shapes it is, or returns an empty text if this is one.
    """

    generator: Callable[[int, Shape, Style], nn.Sequential]
    discriminator: Callable[[Shape, int, Style], nn.Sequential]
    check: Callable[[Shape], str]


def builder_for(name: str, shape: Sequence[int]) -> Builder:
    """Return an architecture by name.

    Raises:
        ValueError: If it is unknown, or not for samples of this shape.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; choose from {', '.join(ARCHITECTURES)}")
    wanted = ARCHITECTURES[name].check(tuple(shape))
    if wanted:
        raise ValueError(f"architecture {name} is for {wanted}, got samples {tuple(shape)}")
    return ARCHITECTURES[name]


def _mlp_generator(inputs: int, shape: Shape, style: Style) -> nn.Sequential:
    # Images are bounded; points are not.
    last = [nn.Tanh()] if len(shape) == 3 else []
    return nn.Sequential(
        nn.Linear(inputs, style.width),
        *style.hidden(),
        nn.Linear(style.width, style.width),
        *style.hidden(),
        nn.Linear(style.width, math.prod(shape)),
        *last,
        nn.Unflatten(1, shape),
    )


def _mlp_discriminator(shape: Shape, outputs: int, style: Style) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), style.width),
        *style.hidden(),
        nn.Linear(style.width, style.width),
        *style.hidden(),
        nn.Linear(style.width, outputs),
    )


def _halvings(shape: Shape) -> int:
    """How often images are halved: at least twice where they can be, down to 7 pixels or fewer."""
    _, height, width = shape
    count = 0
    while height % 2 == width % 2 == 0 and (count < 2 or max(height, width) > _LARGEST_BASE):
        height, width, count = height // 2, width // 2, count + 1
    return count


def _base(shape: Shape) -> tuple[int, int]:
    return shape[1] >> _halvings(shape), shape[2] >> _halvings(shape)


def _check_images(shape: Shape) -> str:
    fits = len(shape) == 3 and min(shape) >= 1 and _halvings(shape) >= 1
    if fits and max(_base(shape)) <= _LARGEST_BASE:
        return ""
    return "images whose sides halve down to 7 pixels or fewer, such as 8, 28, 32 and 64"


def _channels(shape: Shape, width: int) -> list[int]:
    """Of the feature maps, from the smallest to the largest."""
    return [max(1, width >> index) for index in range(_halvings(shape))]


def _dcgan_generator(inputs: int, shape: Shape, style: Style) -> nn.Sequential:
    channels = _channels(shape, style.width)
    layers: list[nn.Module] = [
        nn.Linear(inputs, style.width * math.prod(_base(shape)), bias=False),
        nn.Unflatten(1, (style.width, *_base(shape))),
        nn.BatchNorm2d(style.width),
        *style.hidden(),
    ]
    for wide, narrow in pairwise(channels):
        layers += [
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            *style.hidden(),
        ]
    last = nn.ConvTranspose2d(channels[-1], shape[0], 4, stride=2, padding=1)
    return nn.Sequential(*layers, last, nn.Tanh())


def _dcgan_discriminator(shape: Shape, outputs: int, style: Style) -> nn.Sequential:
    channels = _channels(shape, style.width)[::-1]
    # No normalisation before the first activation: the usual DCGAN layout.
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], channels[0], 4, stride=2, padding=1),
        *style.hidden(),
    ]
    for narrow, wide in pairwise(channels):
        layers += [
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            *style.hidden(),
        ]
    features = style.width * math.prod(_base(shape))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, outputs))


class _Block(nn.Module):
    """A residual block ``x + f(x)`` that doubles or halves the image, without normalisation."""

    def __init__(self, inputs: int, outputs: int, style: Style, grows: bool) -> None:
        super().__init__()
        self.grows = grows
        self.path = nn.Sequential(
            *style.hidden(),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            *style.hidden(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return images of twice or half the size."""
        if self.grows:
            x = interpolate(x, scale_factor=2)
            return self.skip(x) + self.path(x)
        return avg_pool2d(self.skip(x) + self.path(x), 2)


def _resnet_generator(inputs: int, shape: Shape, style: Style) -> nn.Sequential:
    channels = [style.width, *_channels(shape, style.width)]
    pairs = pairwise(channels)
    return nn.Sequential(
        nn.Linear(inputs, style.width * math.prod(_base(shape))),
        nn.Unflatten(1, (style.width, *_base(shape))),
        *(_Block(wide, narrow, style, grows=True) for wide, narrow in pairs),
        *style.hidden(),
        nn.Conv2d(channels[-1], shape[0], 3, padding=1),
        nn.Tanh(),
    )


def _resnet_discriminator(shape: Shape, outputs: int, style: Style) -> nn.Sequential:
    channels = [*_channels(shape, style.width)[::-1], style.width]
    pairs = pairwise(channels)
    return nn.Sequential(
        nn.Conv2d(shape[0], channels[0], 3, padding=1),
        *(_Block(narrow, wide, style, grows=False) for narrow, wide in pairs),
        *style.hidden(),
        nn.Flatten(),
        nn.Linear(style.width * math.prod(_base(shape)), outputs),
    )


def _check_mnist(shape: Shape) -> str:
    return "" if shape == _MNIST else f"images {_MNIST}"


def _orthogonal_generator(inputs: int, shape: Shape, style: Style) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 128),
        *style.hidden(),
        nn.Linear(128, 128),
        *style.hidden(),
        nn.Linear(128, 100),
        *style.hidden(),
        nn.Linear(100, math.prod(shape)),
        _SignedSigmoid(),
        nn.Unflatten(1, shape),
    )


class _SignedSigmoid(nn.Module):
    """The logistic function, moved from (0, 1) to where images are, (-1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 2 s(x) - 1."""
        return 2 * x.sigmoid() - 1


def _orthogonal_discriminator(shape: Shape, outputs: int, style: Style) -> nn.Sequential:
    return _mlp_discriminator(shape, outputs, Style(128, style.activation, style.dropout))


def _gaussian_generator(inputs: int, shape: Shape, style: Style) -> nn.Sequential:
    def up(wide: int, narrow: int) -> list[nn.Module]:
        grow = nn.ConvTranspose2d(wide, narrow, 5, 2, padding=2, output_padding=1, bias=False)
        return [grow, nn.BatchNorm2d(narrow), *style.hidden()]

    return nn.Sequential(
        nn.Linear(inputs, 7 * 7 * 256, bias=False),
        nn.BatchNorm1d(7 * 7 * 256),
        *style.hidden(),
        nn.Unflatten(1, (256, 7, 7)),
        *up(256, 128),
        *up(128, 64),
        nn.ConvTranspose2d(64, 1, 7, padding=3),
        nn.Tanh(),
    )


def _gaussian_discriminator(shape: Shape, outputs: int, style: Style) -> nn.Sequential:
    sizes = [math.prod(shape), 1024, 512, 256]
    pairs = pairwise(sizes)
    hidden = [layer for a, b in pairs for layer in (nn.Linear(a, b), *style.hidden())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], outputs))


ARCHITECTURES: dict[str, Builder] = {
    "mlp": Builder(_mlp_generator, _mlp_discriminator, lambda shape: ""),
    "dcgan": Builder(_dcgan_generator, _dcgan_discriminator, _check_images),
    "resnet": Builder(_resnet_generator, _resnet_discriminator, _check_images),
    "orthogonal_mlp": Builder(_orthogonal_generator, _orthogonal_discriminator, _check_mnist),
    "gaussian_dcgan": Builder(_gaussian_generator, _gaussian_discriminator, _check_mnist),
}
