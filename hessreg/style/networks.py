"""Networks that draw a picture in one pass: what it shows, and in which style.

The style is a vector: the scales and shifts of the synthesis network's instance normalisation, as
in Dumoulin et al., "A Learned Representation for Artistic Style", ICLR 2017, and Huang and
Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessreg.gan.architectures import make_activation

__all__ = ["ContentNetwork", "FeedForwardNetwork", "StyleNetwork", "SynthesisNetwork"]

_REDUCTION = 4  # pixels to a side of one place of the content
_SMALLEST = 8  # pixels to a side: below, there is too little to reflect or to normalise


class ContentNetwork(nn.Module):
    """Encodes what pictures show: [n, 3, h, w] to [n, 4 width, ceil(h / 4), ceil(w / 4)].

    Three reflection-padded convolutions, the last two of stride 2, each with instance
    normalisation, which takes most of the style away.

    Args:
        width: channels of the first convolution.
        activation: ``"silu"``, ``"softplus"``, ``"tanh"`` or ``"leaky_relu"``. The second
            derivative of the last is zero almost everywhere, so a Hessian sees less of it.

    Raises:
        ValueError: an unknown activation or a width below 1; from a call, pictures of another shape
            or below 8 x 8 pixels.

    Example:
        >>> ContentNetwork(width=4)(torch.rand(2, 3, 9, 16)).shape
        torch.Size([2, 16, 3, 4])
    """

    def __init__(self, width: int = 16, activation: str = "silu") -> None:
        super().__init__()
        _check_positive(width=width)
        layers = [_convolution(3, width, 9), nn.InstanceNorm2d(width, affine=True)]
        for inputs in (width, 2 * width):
            layers += [make_activation(activation), _convolution(inputs, 2 * inputs, 3, stride=2)]
            layers += [nn.InstanceNorm2d(2 * inputs, affine=True)]
        self.layers = nn.Sequential(*layers, make_activation(activation))

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns the content of pictures in [0, 1]."""
        _check_pictures(pictures)
        return self.layers(2 * pictures - 1)


class StyleNetwork(nn.Module):
    """Encodes the style of pictures: [n, 3, h, w] to the vector a synthesis network wants.

    Convolutions without normalisation, whose channels' means and deviations over the picture, where
    things are forgotten, are mapped linearly to scales and shifts.

    Args:
        style_size: length of the vector: ``SynthesisNetwork.style_size``.
        width: channels of the first convolution.
        activation: as for :class:`ContentNetwork`.

    Raises:
        ValueError: as for :class:`ContentNetwork`.

    Example:
        >>> StyleNetwork(style_size=24, width=4)(torch.rand(2, 3, 9, 16)).shape
        torch.Size([2, 24])
    """

    def __init__(self, style_size: int, width: int = 16, activation: str = "silu") -> None:
        super().__init__()
        _check_positive(style_size=style_size, width=width)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((3, width, 2 * width, 4 * width)):
            stride = 1 if inputs == 3 else 2
            convolution = _convolution(inputs, outputs, 3, stride, bias=True)
            layers += [convolution, make_activation(activation)]
        self.layers = nn.Sequential(*layers)
        self.to_style = nn.Linear(8 * width, style_size)

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns the style of pictures in [0, 1]."""
        _check_pictures(pictures)
        maps = self.layers(2 * pictures - 1).flatten(2)
        # The root of a variance that may be 0 has no derivative there.
        deviations = (maps.var(2, correction=0) + 1e-5).sqrt()
        return self.to_style(torch.cat([maps.mean(2), deviations], 1))


class SynthesisNetwork(nn.Module):
    """Draws pictures in [0, 1] from their content and a style.

    The second half of the network of Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time
    Style Transfer and Super-Resolution", ECCV 2016: residual blocks, then twice nearest upsampling
    with a convolution, all reflection-padded and with instance normalisation.

    Args:
        width: channels before the last convolution: that of the :class:`ContentNetwork`.
        num_blocks: residual blocks.
        activation: as for :class:`ContentNetwork`.

    Attributes:
        style_size: length of the style: how far every scale is from 1, and every shift.

    Raises:
        ValueError: an unknown activation, a width below 1 or fewer than 0 blocks; from a call, a
            content or a style of another shape.

    Example:
        >>> network = SynthesisNetwork(width=4, num_blocks=1)
        >>> network(torch.randn(2, 16, 3, 4), torch.zeros(2, network.style_size)).shape
        torch.Size([2, 3, 12, 16])
    """

    def __init__(self, width: int = 16, num_blocks: int = 3, activation: str = "silu") -> None:
        super().__init__()
        _check_positive(width=width)
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be at least 0, got {num_blocks}")
        self.blocks = nn.ModuleList(_Residual(4 * width, activation) for _ in range(num_blocks))
        self.upsampling = nn.ModuleList(
            _Upsampling(inputs, activation) for inputs in (4 * width, 2 * width)
        )
        self.to_picture = _convolution(width, 3, 9, bias=True)
        self._channels = 4 * width
        self._sizes = [part.style_size for part in (*self.blocks, *self.upsampling)]
        self.style_size = sum(self._sizes)

    def forward(self, content: Tensor, style: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Returns pictures [n, 3, 4 h, 4 w] of a content [n, 4 width, h, w].

        Args:
            content: from a :class:`ContentNetwork`.
            style: [n, style_size], or [style_size] for all.
            size: crop to this height and width: those the content came from.
        """
        self._check(content, style)
        x, parts = content, style.expand(len(content), -1).split(self._sizes, 1)
        for part, own in zip((*self.blocks, *self.upsampling), parts, strict=True):
            x = part(x, own)
        height, width = size or (x.shape[2], x.shape[3])
        return self.to_picture(x)[:, :, :height, :width].sigmoid()

    def _check(self, content: Tensor, style: Tensor) -> None:
        if content.dim() != 4 or content.shape[1] != self._channels:
            raise ValueError(
                f"content must have shape [n, {self._channels}, h, w], got {list(content.shape)}"
            )
        if style.shape not in ((self.style_size,), (len(content), self.style_size)):
            raise ValueError(
                f"style must have shape [{len(content)}, {self.style_size}] or [{self.style_size}],"
                f" got {list(style.shape)}"
            )


class FeedForwardNetwork(nn.Module):
    """Redraws pictures of any size in the one style it was trained for.

    A :class:`ContentNetwork` and a :class:`SynthesisNetwork` with the style as a parameter: the
    network of Johnson et al. (2016), with fewer channels and blocks.

    Args:
        width: as for :class:`SynthesisNetwork`.
        num_blocks: as for :class:`SynthesisNetwork`.
        activation: as for :class:`ContentNetwork`.

    Attributes:
        options: the arguments, to build another one.

    Raises:
        ValueError: as for its parts.

    Example:
        >>> FeedForwardNetwork(width=4, num_blocks=1)(torch.rand(2, 3, 9, 17)).shape
        torch.Size([2, 3, 9, 17])
    """

    def __init__(self, width: int = 16, num_blocks: int = 3, activation: str = "silu") -> None:
        super().__init__()
        self.options = {"width": width, "num_blocks": num_blocks, "activation": activation}
        self.content = ContentNetwork(width, activation)
        self.synthesis = SynthesisNetwork(width, num_blocks, activation)
        self.style = nn.Parameter(torch.zeros(self.synthesis.style_size))

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns pictures [n, 3, h, w] in [0, 1], redrawn."""
        return self.synthesis(self.content(pictures), self.style, pictures.shape[2:])


class _Normalization(nn.Module):
    """Instance normalisation with a scale and a shift for every picture and channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.style_size = 2 * channels

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = style[:, :, None, None].chunk(2, 1)
        return F.instance_norm(x) * (1 + scale) + shift


class _Residual(nn.Module):
    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.first, self.second = (_convolution(channels, channels, 3) for _ in range(2))
        self.activation = make_activation(activation)
        self.normalization = _Normalization(channels)
        self.style_size = 2 * self.normalization.style_size

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        first, second = style.chunk(2, 1)
        inner = self.activation(self.normalization(self.first(x), first))
        return x + self.normalization(self.second(inner), second)


class _Upsampling(nn.Module):
    """Twice the size, half the channels."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.convolution = _convolution(channels, channels // 2, 3)
        self.normalization = _Normalization(channels // 2)
        self.activation = make_activation(activation)
        self.style_size = self.normalization.style_size

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        larger = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.activation(self.normalization(self.convolution(larger), style))


def _convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = False
) -> nn.Module:
    """Without a bias by default: normalisation takes it away again."""
    return nn.Conv2d(
        inputs, outputs, size, stride, padding=size // 2, padding_mode="reflect", bias=bias
    )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_pictures(pictures: Tensor) -> None:
    if pictures.dim() != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must have shape [n, 3, h, w], got {list(pictures.shape)}")
    if min(pictures.shape[2:]) < _SMALLEST:
        height, width = pictures.shape[2:]
        raise ValueError(
            f"pictures must be at least {_SMALLEST} x {_SMALLEST} pixels, got {height} x {width}"
        )
