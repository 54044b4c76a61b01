"""What a picture loses in content and style, as Gatys, Ecker and Bethge 2016 define it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hessreg.gan.checks import require
from hessreg.style.features import FeatureExtractor

__all__ = ["StyleObjective", "content_loss", "feature_gram", "style_loss", "total_variation"]

_RANGE_WEIGHT = 10.0


def feature_gram(features: Tensor) -> Tensor:
    """Mean products of the channels of a feature map: ``F F' / (height width)``.

    Args:
        features: ``[n, channels, height, width]``.

    Returns:
        ``[n, channels, channels]``.

    Raises:
        ValueError: If there are not four dimensions.

    Example:
        >>> feature_gram(torch.tensor([[1.0, 3.0], [0.0, 2.0]]).view(1, 2, 1, 2))
        tensor([[[5., 3.],
                 [3., 2.]]])
    """
    require(features.dim() == 4, "features", "[n, channels, height, width]", features.shape)
    rows = features.flatten(2)
    return rows @ rows.mT / rows.shape[2]


def content_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over layers of ``|F - P|^2 / |P|^2``.

    The division lets every layer count alike, whatever the network's scale.

    Args:
        features: Of the picture, one ``[n, channels, height, width]`` a layer.
        targets: Of the content, likewise.

    Returns:
        A scalar.
    """
    require(len(features) == len(targets) > 0, "features", f"{len(targets)} layers", len(features))
    terms = [_relative(*pair) for pair in zip(features, targets, strict=True)]
    return torch.stack(terms).mean()


def style_loss(
    grams: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """Weighted mean over layers of ``|G - A|^2 / |A|^2``.

    The division lets layers count alike, also those of a network whose weights are random.

    Args:
        grams: Gram matrices of the picture, one ``[n, channels, channels]`` a layer.
        targets: Of the style, likewise.
        weights: Of the layers; equal by default.

    Returns:
        A scalar.
    """
    require(len(grams) == len(targets) > 0, "grams", f"{len(targets)} layers", len(grams))
    shares = _shares(weights, len(targets), "weights")
    terms = [
        share * _relative(found, target)
        for share, found, target in zip(shares, grams, targets, strict=True)
    ]
    return torch.stack(terms).sum()


def _relative(found: Tensor, target: Tensor) -> Tensor:
    """Squared distance in units of the target's squared norm, if it has any."""
    scale = target.square().sum()
    return (found - target).square().sum() / torch.where(scale > 0, scale, 1.0)


def _shares(weights: Sequence[float] | None, count: int, name: str) -> list[float]:
    """Weights with sum 1."""
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    require(len(given) == count, name, f"{count} numbers", weights)
    valid = all(0 <= weight < float("inf") for weight in given) and sum(given) > 0
    require(valid, name, "finite, at least 0 and not all 0", weights)
    return [weight / sum(given) for weight in given]


def total_variation(image: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, down and to the right.

    The square, of Mahendran and Vedaldi 2015, is differentiable where the absolute value is not.

    Args:
        image: ``[n, 3, height, width]``.

    Returns:
        A scalar.
    """
    return image.diff(dim=2).square().mean() + image.diff(dim=3).square().mean()


class StyleObjective:
    """What Gatys' optimisation minimises, as a function of the picture.

    ``content_weight content_loss + style_weight style_loss + tv_weight total_variation``, and ten
    times the mean square of what leaves [0, 1]: so pixels are free while they move, as curvature
    needs it, and end in the range of a picture. Several styles have one target, the weighted mean
    of their Gram matrices: up to a constant that is the weighted mean of their losses.

    Args:
        features: What pictures are compared by.
        content: ``[1, 3, height, width]`` in [0, 1].
        styles: One picture or several, each of any size.
        content_weight: Of the content loss.
        style_weight: Of the style loss.
        tv_weight: Of total variation.
        style_weights: How the styles are blended; equally by default.

    Raises:
        ValueError: If there is no style, or a weight is negative or not finite.

    Example:
        >>> from hessreg.style.features import RandomFeatures
        >>> content, style = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 48, 32)
        >>> objective = StyleObjective(RandomFeatures(), content, [style])
        >>> image = content.clone().requires_grad_()
        >>> objective(image).backward()
        >>> list(objective.parts(content))
        ['content', 'style', 'tv', 'range']
    """

    def __init__(
        self,
        features: FeatureExtractor,
        content: Tensor,
        styles: Sequence[Tensor],
        *,
        content_weight: float = 1.0,
        style_weight: float = 1.0,
        tv_weight: float = 0.0,
        style_weights: Sequence[float] | None = None,
    ) -> None:
        require(len(styles) > 0, "styles", "one picture or more", styles)
        self.weights = {"content": content_weight, "style": style_weight, "tv": tv_weight}
        for name, weight in self.weights.items():
            require(0 <= weight < float("inf"), f"{name}_weight", "finite, at least 0", weight)
        self.weights["range"] = _RANGE_WEIGHT
        self.features = features
        with torch.no_grad():
            self.content_targets = features(content).content
            self.style_targets = self._blend(styles, style_weights)

    def _blend(self, styles: Sequence[Tensor], weights: Sequence[float] | None) -> list[Tensor]:
        shares = _shares(weights, len(styles), "style_weights")
        grams = [[feature_gram(f) for f in self.features(style).style] for style in styles]
        return [
            torch.stack([share * gram for share, gram in zip(shares, layer, strict=True)]).sum(0)
            for layer in zip(*grams, strict=True)
        ]

    def parts(self, image: Tensor) -> dict[str, Tensor]:
        """Return the four parts of the loss of ``[1, 3, height, width]``, without weights."""
        found = self.features(image)
        return {
            "content": content_loss(found.content, self.content_targets),
            "style": style_loss([feature_gram(f) for f in found.style], self.style_targets),
            "tv": total_variation(image),
            "range": (image - image.clamp(0, 1)).square().mean(),
        }

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of what `parts` returned."""
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()

    def __call__(self, image: Tensor) -> Tensor:
        """Return the loss of a picture, a scalar."""
        return self.total(self.parts(image))
