"""Angles between gradients before and after a projection, from inner products on the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Angles", "angles_of_pair", "angles_of_terms", "cosine_matrix"]

Angles = dict[str, Tensor]  # names to scalars in degrees


def cosine_matrix(gram: Tensor) -> Tensor:
    """Cosines [..., k, k] of vectors with these inner products; a zero vector has cosine 0."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    return _ratio(gram, norms[..., :, None] * norms[..., None, :]).clamp(-1, 1)


def angles_of_terms(gram: Tensor) -> Angles:
    """Of k terms and their projected sum, from the inner products [..., k + 1, k + 1] of these."""
    k = gram.shape[-1] - 1
    cosines = cosine_matrix(gram)
    pairs = cosines[..., :k, :k].clone()
    pairs.diagonal(dim1=-2, dim2=-1).fill_(1)
    total = gram[..., :k, :k].sum((-2, -1)).clamp_min(0) * gram[..., k, k]
    return {
        "angle": _mean_degrees(pairs.flatten(-2).amin(-1)),
        "angle_after": _mean_degrees(cosines[..., k, :k].amin(-1)),
        "turn": _mean_degrees(_ratio(gram[..., k, :k].sum(-1), total.sqrt())),
    }


def angles_of_pair(cosine: Tensor, strength: float) -> Angles:
    """Of y = g - strength <g, v> / <v, v> v: of g with v, of y with v, and of y with g."""
    squared = cosine.square()
    length = (1 - strength * (2 - strength) * squared).clamp_min(0).sqrt()  # |y| / |g|
    return {
        "angle": _mean_degrees(cosine),
        "angle_after": _mean_degrees(_ratio((1 - strength) * cosine, length)),
        "turn": _mean_degrees(_ratio(1 - strength * squared, length)),
    }


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0, numerator / denominator)


def _mean_degrees(cosines: Tensor) -> Tensor:
    return cosines.clamp(-1, 1).acos().mean().rad2deg()
