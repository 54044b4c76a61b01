"""Walks through the noise of a generator: what lies between two samples."""

from __future__ import annotations

import torch
from torch import Tensor

from hessreg.gan.networks import Generator

__all__ = ["interpolate_noise", "latent_walk"]


def interpolate_noise(start: Tensor, end: Tensor, steps: int, spherical: bool = True) -> Tensor:
    """Return noise on the way between two batches.

    On the straight line between normal vectors noise is shorter than any the generator was trained
    on; the spherical one, sin((1-t) w) / sin w a + sin(t w) / sin w b with w the angle of a and b
    (Shoemake, 1985), keeps to their lengths. In one dimension, and where a and b are parallel, it
    is the straight line.

    Args:
        start: ``[n, d]``.
        end: ``[n, d]``.
        steps: Points on the way, with both ends; at least 2.
        spherical: For normal noise; the straight line otherwise.

    Returns:
        ``[n, steps, d]``.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> interpolate_noise(a, b, 3)[0, 1]
        tensor([0.7071, 0.7071])
    """
    t = torch.linspace(0.0, 1.0, steps, dtype=start.dtype, device=start.device)[None, :, None]
    first, last = 1.0 - t, t
    if spherical:
        angle = torch.acos(torch.cosine_similarity(start, end).clamp(-1.0, 1.0))[:, None, None]
        sine = angle.sin()
        is_bent = sine > 1e-3  # an angle below is a rounding error of its cosine
        first = torch.where(is_bent, (first * angle).sin() / sine, first)
        last = torch.where(is_bent, (last * angle).sin() / sine, last)
    return first * start[:, None] + last * end[:, None]


@torch.no_grad()
def latent_walk(generator: Generator, rows: int, steps: int, random: torch.Generator) -> Tensor:
    """Return the samples on the ways between noise vectors, in evaluation mode.

    Class and code stay the same on a way.

    Args:
        generator: Draws them.
        rows: Number of ways.
        steps: Samples on each.
        random: Where the noise comes from.

    Returns:
        ``[rows, steps, ...]``.
    """
    start, end = (generator.draw_latent(rows, random) for _ in range(2))
    size, is_normal = generator.latent_dim, generator.latent == "normal"
    way = interpolate_noise(start[:, :size], end[:, :size], steps, is_normal)
    fixed = start[:, None, size:].expand(-1, steps, -1)
    noise = torch.cat([way, fixed], 2).flatten(0, 1).to(next(generator.parameters()))
    training = generator.training
    generator.eval()
    samples = generator(noise)
    generator.train(training)
    return samples.unflatten(0, (rows, steps))
