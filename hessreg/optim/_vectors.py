"""Gradients as vectors: one tensor, or None, for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Vector", "add", "average", "check_losses", "differentiate", "laid_out_like"]

Vector = list[Tensor | None]


def differentiate(loss: Tensor, parameters: Sequence[Tensor], retain_graph: bool = False) -> Vector:
    """The gradient of a scalar; None for parameters that are frozen or that it does not reach."""
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted or not loss.requires_grad:
        return [None] * len(parameters)
    found = torch.autograd.grad(loss, wanted, retain_graph=retain_graph, allow_unused=True)
    rest = iter(found)
    return [next(rest) if p.requires_grad else None for p in parameters]


def add(a: Sequence[Vector], b: Sequence[Vector]) -> list[Vector]:
    """Sums of vectors; without a first, the second."""
    if not a:
        return list(b)
    return [[_add(x, y) for x, y in zip(u, v, strict=True)] for u, v in zip(a, b, strict=True)]


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y  # not in place: autograd may return one tensor twice, or an expanded one


def average(
    vectors: Sequence[Vector], parameters: Sequence[Tensor], group: dist.ProcessGroup
) -> list[Vector]:
    """The mean of every vector over the processes, in one flat all-reduce for each dtype.

    A parameter that only some processes reach counts as zero in the others; it is None where none
    does. Waits for the device only if there is a parameter that this process does not reach.
    """
    result: list[Vector] = [[None] * len(parameters) for _ in vectors]
    kinds = {(p.dtype, p.device): None for p in parameters if p.requires_grad}
    for kind in kinds:
        where = [
            i for i, p in enumerate(parameters) if p.requires_grad and (p.dtype, p.device) == kind
        ]
        _average_alike(vectors, parameters, where, group, result)
    return result


def _average_alike(
    vectors: Sequence[Vector],
    parameters: Sequence[Tensor],
    where: Sequence[int],
    group: dist.ProcessGroup,
    result: list[Vector],
) -> None:
    model = parameters[where[0]]
    reached = [any(v[i] is not None for v in vectors) for i in where]
    pieces = [_or_zeros(v[i], parameters[i]).reshape(-1) for v in vectors for i in where]
    flat = torch.cat([*pieces, model.new_tensor(reached)]).div_(dist.get_world_size(group))
    dist.all_reduce(flat, group=group)
    *parts, anywhere = flat.split([*map(len, pieces), len(where)])
    if not all(reached):
        reached = [share > 0 for share in anywhere.tolist()]
    for index, part in enumerate(parts):
        vector, i = divmod(index, len(where))
        if reached[i]:
            result[vector][where[i]] = part.view(parameters[where[i]].shape).clone()


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the parameter's strides, as ``loss.backward()`` leaves it.

    What ``torch.autograd.grad`` returns may have others, of a convolution's second derivative for
    one, and torch's fused Adam steps along the numbers in the order of memory, without a word.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def check_losses(losses: Any, count: int | None, what: str) -> list[Tensor]:
    """The losses as a list, if they are scalars with graphs and as many as wanted.

    Raises:
        TypeError: not a sequence of tensors.
        ValueError: not ``count`` of them, not scalars, or without a graph.
    """
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f"losses must be a sequence of scalar tensors, got {type(losses)}")
    if not losses or count not in (None, len(losses)):
        raise ValueError(f"losses must be {what}, got {len(losses)}")
    for i, loss in enumerate(losses):
        if not isinstance(loss, Tensor):
            raise TypeError(f"losses[{i}] must be a tensor, got {type(loss)}")
        if loss.numel() != 1:
            raise ValueError(f"losses[{i}] must be a scalar, got shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError(f"losses[{i}] must have a graph, got a tensor without one")
    return list(losses)
