"""What style transfer compares pictures by: random filters at many scales, or VGG-19."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d, pad, relu, softplus

from hessreg.gan.checks import require

__all__ = [
    "FeatureExtractor",
    "Features",
    "RandomFeatures",
    "VGG19Features",
    "WeightsError",
    "load_features",
]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
Pooling = Literal["average", "max"]
_LATTICE = 2**16  # random numbers are integers on it, so that no platform rounds them otherwise


class Features(NamedTuple):
    """Feature maps ``[1, channels, height, width]`` of a picture, from fine to coarse."""

    content: list[Tensor]
    style: list[Tensor]


class FeatureExtractor(Protocol):
    """Maps a picture ``[1, 3, height, width]`` in [0, 1] to its features, differentiably.

    Attributes:
        bytes_per_pixel: About the memory that the gradient of a loss of them takes.
    """

    bytes_per_pixel: int

    def __call__(self, image: Tensor) -> Features:
        """Return the features."""
        ...


class WeightsError(ValueError):
    """A file of weights is missing, damaged, or of another network."""


class _Normalise(nn.Module):
    """Subtracts ImageNet's mean colour and divides by its standard deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Normalise ``[n, 3, height, width]``."""
        return (image - self.mean) / self.std


class RandomFeatures(nn.Module):
    """One layer of fixed random filters at each scale of an image pyramid, and one of colours.

    A single layer of random filters of several sizes makes textures as well as a trained deep
    network does (Ustyuzhaninov, Brendel, Gatys and Bethge 2016, "Texture synthesis using shallow
    convolutional networks with random filters"; He, Wang and Hopcroft 2016, "A powerful
    generative model using random weights for the deep image representation"). Here the sizes are
    those of one small filter on ever smaller pictures, which costs far less. Filters sum to zero
    and have norm 1, so that what they say of a scale does not depend on brightness; random mixtures
    of the colours of single pixels have that part. Softplus in place of their rectifier has a
    second derivative for Hessian products.

    Args:
        seed: Of the filters; the same on every platform.
        channels: Filters of each scale.
        levels: Scales, each half the one before.
        kernel_size: Of the filters, in pixels of their scale; odd.
        content_levels: Scales whose features are those of content.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> features = RandomFeatures(seed=0)(torch.rand(1, 3, 64, 48))
        >>> [tuple(f.shape[1:]) for f in features.style[:3]]
        [(48, 64, 48), (48, 64, 48), (48, 32, 24)]
    """

    colors: Tensor
    offsets: Tensor
    blur: Tensor
    filters: Tensor

    def __init__(
        self,
        seed: int = 0,
        channels: int = 48,
        levels: int = 4,
        kernel_size: int = 7,
        content_levels: Sequence[int] = (1, 2, 3),
    ) -> None:
        super().__init__()
        require(channels >= 1, "channels", "at least 1", channels)
        require(1 <= levels <= 8, "levels", "in [1, 8]", levels)
        require(kernel_size % 2 == 1, "kernel_size", "odd", kernel_size)
        known = all(0 <= level < levels for level in content_levels)
        require(known and len(content_levels) > 0, "content_levels", "levels", content_levels)
        self.content_levels = tuple(content_levels)
        self.bytes_per_pixel = round(14 * channels * (1 + sum(0.25**n for n in range(levels))))
        generator = torch.Generator().manual_seed(seed)
        self.normalise = _Normalise()
        self.register_buffer("colors", _unit(_uniform((channels, 3, 1, 1), generator)).float())
        self.register_buffer("offsets", _uniform((channels,), generator).float())
        filters = _uniform((levels, channels, 3, kernel_size, kernel_size), generator)
        zero_mean = filters - filters.mean((2, 3, 4), keepdim=True)
        self.register_buffer("filters", _unit(zero_mean.flatten(0, 1)).view_as(filters).float())
        binomial = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", torch.outer(binomial, binomial).expand(3, 1, 4, 4).clone())

    def forward(self, image: Tensor) -> Features:
        """Return the features of ``[1, 3, height, width]``; those of colours are first."""
        scaled = self.normalise(image)
        style, content = [_activate(conv2d(scaled, self.colors, self.offsets))], []
        for level, filters in enumerate(self.filters):
            if level:
                scaled = conv2d(_extend(scaled, 1), self.blur, stride=2, groups=3)
            style.append(_activate(conv2d(_extend(scaled, filters.shape[-1] // 2), filters)))
            if level in self.content_levels:
                content.append(style[-1])
        return Features(content, style)


def _uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform in (-1, 1), float64, from integers."""
    drawn = torch.randint(-_LATTICE, _LATTICE, tuple(shape), generator=generator)
    return (drawn.double() + 0.5) / _LATTICE


def _unit(filters: Tensor) -> Tensor:
    """Each filter with norm 1."""
    return filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _extend(image: Tensor, width: int) -> Tensor:
    """Repeat the outermost pixels."""
    return pad(image, [width] * 4, mode="replicate")


def _activate(x: Tensor) -> Tensor:
    return softplus(x, beta=5.0)


# VGG-19: channels of the convolutions up to conv5_1, in blocks between which it pools.
_BLOCKS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,))
_CONTENT = (3, 1)  # block and place: conv4_2


class _Convolution(NamedTuple):
    """A convolution of VGG-19: its key in torchvision's state, and the shape of its weight."""

    key: str
    shape: tuple[int, int, int, int]


def _convolutions() -> list[list[_Convolution]]:
    index, before, blocks = 0, 3, []
    for channels in _BLOCKS:
        block = []
        for out in channels:
            block.append(_Convolution(f"features.{index}", (out, before, 3, 3)))
            index, before = index + 2, out  # a rectifier follows each
        blocks.append(block)
        index += 1  # pooling
    return blocks


class VGG19Features(nn.Module):
    """VGG-19 of Simonyan and Zisserman, cut off where style transfer ends.

    Style is conv1_1, conv2_1, conv3_1, conv4_1 and conv5_1, content is conv4_2, each rectified, as
    Gatys, Ecker and Bethge 2016 have it ("Image style transfer using convolutional neural
    networks").

    Args:
        weights: torchvision's ``vgg19-*.pth``, or its state (of the whole network or of
            ``features`` alone) in a ``.safetensors`` file. No code in a file is ever run.
        pooling: Average, with which pictures look better (Gatys et al.), or maximum, with which
            the network was trained.

    Raises:
        WeightsError: If the file is missing, damaged, or of another network.
    """

    def __init__(self, weights: Path, pooling: Pooling = "average") -> None:
        super().__init__()
        require(pooling in ("average", "max"), "pooling", "average or max", pooling)
        self.bytes_per_pixel = 3600
        self.pool = avg_pool2d if pooling == "average" else max_pool2d
        self.normalise = _Normalise()
        state = _Weights(Path(weights))
        self.blocks = nn.ModuleList(
            nn.Sequential(*map(state.convolution, block)) for block in _convolutions()
        )
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> Features:
        """Return the features of ``[1, 3, height, width]``, of at least 16 x 16 pixels."""
        style, content = [], []
        hidden = self.normalise(image)
        for number, block in enumerate(self.blocks):
            hidden = self.pool(hidden, 2) if number else hidden
            for place, convolution in enumerate(block.children()):
                hidden = relu(convolution(hidden))
                if place == 0:
                    style.append(hidden)
                if (number, place) == _CONTENT:
                    content.append(hidden)
        return Features(content, style)


class _Weights:
    """Weights from a file, checked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        state = _read_state(path)
        self._state = {key.removeprefix("features."): value for key, value in state.items()}

    def convolution(self, wanted: _Convolution) -> nn.Conv2d:
        """A convolution with its weights."""
        out, before, *kernel = wanted.shape
        made = nn.utils.skip_init(nn.Conv2d, before, out, kernel, padding=1)
        with torch.no_grad():
            made.weight.copy_(self._find(f"{wanted.key}.weight", wanted.shape))
            made.bias.copy_(self._find(f"{wanted.key}.bias", wanted.shape[:1]))
        return made

    def _find(self, key: str, shape: Sequence[int]) -> Tensor:
        value = self._state.get(key.removeprefix("features."))
        if not isinstance(value, Tensor):
            raise WeightsError(f"{self._path} has no {key}: not the weights of VGG-19")
        if value.shape != tuple(shape):
            found, wanted = list(value.shape), list(shape)
            raise WeightsError(f"{self._path}: {key} must have shape {wanted}, found {found}")
        if not value.isfinite().all():
            raise WeightsError(f"{self._path}: {key} is not finite")
        return value


def _read_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors in a file by name."""
    if not path.is_file():
        raise WeightsError(f"no file of weights at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on pickles of other programs
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception:  # unpickling what is no pickle raises anything, and advises to trust it
        raise WeightsError(f"{path} is not a readable file of weights") from None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise WeightsError(f"{path} must hold a state dict, found {type(state).__name__}")
    return state


def load_features(name: str, seed: int = 0, pooling: Pooling = "average") -> FeatureExtractor:
    """Return the extractor that a name means.

    Args:
        name: ``random``, or the path of VGG-19's weights.
        seed: Of random features.
        pooling: Of VGG-19.

    Raises:
        WeightsError: If the file cannot be used.
    """
    return RandomFeatures(seed) if name == "random" else VGG19Features(Path(name), pooling)
