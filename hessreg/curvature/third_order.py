"""Second and third derivatives through normalisation.

The gradient of a Hessian norm is a third derivative of the loss. torch's fused batch, layer and
instance normalisation have right first and second derivatives and a wrong third one, off by
20-50 %, without a warning; of its fused weight normalisation the second is wrong already. Group
and RMS normalisation, and batch normalisation in evaluation mode, are right. Here the wrong ones
are written in primitive operations, which are right to every order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hessreg.curvature.autograd_graph import AutogradGraph

__all__ = [
    "native_norms",
    "refuse_opaque",
    "require_third_order_safe",
    "third_order_safe",
]

_transforms_are_active = torch._C._are_functorch_transforms_active

# What torch calls a layer in its graph: the kind, and how many of its derivatives are right.
_NATIVE_NODES: dict[str, tuple[str, int]] = {
    "NativeBatchNorm": ("batch or instance normalisation", 2),
    "CudnnBatchNorm": ("batch or instance normalisation", 2),
    "MiopenBatchNorm": ("batch or instance normalisation", 2),
    "BatchNormWithUpdate": ("batch or instance normalisation", 2),
    "SyncBatchNorm": ("synchronised batch normalisation", 2),
    "NativeLayerNorm": ("layer normalisation", 2),
    "WeightNormInterface": ("weight normalisation", 1),
}

# Nodes whose gradient has no graph, and the way out.
_OPAQUE_NODES = {
    "CheckpointFunctionBackward": "a reentrant checkpoint: pass use_reentrant=False",
    "CompiledFunctionBackward": "torch.compile: pass the module before it is compiled",
}


@contextmanager
def third_order_safe(*modules: nn.Module) -> Iterator[None]:
    """Runs batch, layer, instance and weight normalisation right to the third derivative.

    Every such layer evaluated in the context, as a module or through ``torch.nn.functional``, runs
    as a composition of primitives with the values, derivatives, running statistics and errors of
    the native layer. Contexts nest, and act on the thread that entered them only. What has been
    evaluated inside may be differentiated outside, except a part under
    ``torch.utils.checkpoint(..., use_reentrant=False)`` that holds such a layer: it is evaluated
    again when it is differentiated, so differentiate inside the context, else torch raises
    CheckpointError.

    The ``spectral_norm`` parametrisation holds its vectors u and v constant, and so do its
    derivatives: a finite difference, in training mode, moves them and differs. What torch cannot
    differentiate often enough raises torch's own error: ``cdist``, and fused attention, for which
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` is the way out.

    Args:
        *modules: the modules about to be evaluated; they are checked for parts that the context
            cannot reach, and not changed.

    Raises:
        ValueError: a normalisation layer is inside a TorchScript module.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        >>> with third_order_safe(model):
        ...     loss = model(torch.randn(5, 3)).square().mean()
        >>> native_norms(loss)
        []
    """
    for module in modules:
        _refuse_scripted(module)
    with _CompositeNorms():
        yield


def native_norms(tensor: Tensor, derivatives: int = 3, inputs: Sequence[Tensor] = ()) -> list[str]:
    """Kinds of normalisation in a graph that torch would differentiate wrongly.

    Args:
        tensor: any tensor; its autograd graph is walked back to the leaves.
        derivatives: how many times it is to be differentiated. Two are right, of weight
            normalisation one, and fewer where the tensor is made from a gradient already, as a
            gradient penalty is.
        inputs: what it is differentiated by: how these were made is not looked at.

    Returns:
        The kinds found, sorted, each once; empty if all those derivatives are right. Batch
        normalisation in evaluation mode is right and is not listed.

    Example:
        >>> x = torch.randn(5, 3, requires_grad=True)
        >>> loss = nn.LayerNorm(3)(x).sum()
        >>> native_norms(loss), native_norms(loss, derivatives=2)
        (['layer normalisation'], [])
    """
    return _wrong_norms(AutogradGraph([tensor], inputs), derivatives)


def _wrong_norms(graph: AutogradGraph, derivatives: int) -> list[str]:
    found: set[str] = set()
    wrong = {name for name in set(graph.names.values()) if derivatives > _normalisation(name)[1]}
    for node, name in graph.names.items() if wrong else ():
        # Forward and first gradient call their mode by different names.
        if name in wrong:
            kind, _ = _normalisation(name)
            training = getattr(node, "_saved_training", getattr(node, "_saved_train", True))
            found.update([kind] if training else [])
    return sorted(found)


@functools.cache
def _normalisation(node_name: str) -> tuple[str, float]:
    """The kind of normalisation of a node, and how many derivatives of it are right."""
    layer, *passes = node_name.lstrip("_").split("Backward")
    kind, right = _NATIVE_NODES.get(layer, ("none", math.inf))
    return kind, right - len(passes) + 1


def require_third_order_safe(
    loss: Tensor | AutogradGraph, derivatives: int = 3, inputs: Sequence[Tensor] = ()
) -> None:
    """Refuses a loss that torch would differentiate wrongly.

    Args:
        loss: tensor with its autograd graph, or that graph.
        derivatives: how many times it is to be differentiated.
        inputs: what it is differentiated by: how these were made is not looked at.

    Raises:
        ValueError: :func:`native_norms` finds a layer; says which and what to do.

    Example:
        >>> x = torch.randn(5, 3, requires_grad=True)
        >>> require_third_order_safe(x.square().sum())
    """
    graph = AutogradGraph([loss], inputs) if isinstance(loss, Tensor) else loss
    found = _wrong_norms(graph, derivatives)
    if found:
        raise ValueError(
            f"loss went through torch's native {' and '.join(found)}, which torch"
            f" differentiates wrongly {derivatives} times: compute it under"
            " `with third_order_safe(model):`, or pass a callable that computes it"
        )


def refuse_opaque(graph: AutogradGraph) -> None:
    """Refuses a loss with a part whose gradient cannot be differentiated.

    Args:
        graph: that of the loss.

    Raises:
        ValueError: a reentrant checkpoint, whose parameters would count as unused, or a compiled
            function.

    Example:
        >>> x = torch.randn(5, 3, requires_grad=True)
        >>> refuse_opaque(AutogradGraph([x.square().sum()]))
    """
    for name in _OPAQUE_NODES.keys() & graph.names.values():
        raise ValueError(f"loss cannot be differentiated twice through {_OPAQUE_NODES[name]}")


def _refuse_scripted(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and part.original_name in _norm_names():
            raise ValueError(
                f"{part.original_name} {name!r} is compiled by TorchScript, where its third"
                " derivative cannot be corrected: pass the module before torch.jit.script"
            )


def _norm_names() -> set[str]:
    return {kind.__name__ for kind in _subclasses((nn.modules.batchnorm._NormBase, nn.LayerNorm))}


class _CompositeNorms(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _COMPOSITES.get(func, func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    channels = (running_mean, running_var, weight, bias)
    count = input.numel() // max(input.shape[1], 1) if input.dim() > 1 else 0
    # What is not regular goes to the native function, which is right in evaluation mode and
    # otherwise raises its own message.
    if not (training and count > 1 and eps > 0 and _fit(input, input.shape[1:2], channels)):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = (0, *range(2, input.dim()))
    normalized, mean, var = _standardize(_channels_contiguous(input), dims, eps)
    _update(running_mean, mean.flatten(), momentum)
    _update(running_var, var.flatten() * (count / (count - 1)), momentum)
    return _scale_shift(normalized, weight, bias, _channel_shape(input)).to(input.dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    channels = (running_mean, running_var, weight, bias)
    count = input[0, 0].numel() if input.dim() > 2 and input.numel() else 0
    if not (use_input_stats and count > 1 and eps > 0 and _fit(input, input.shape[1:2], channels)):
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    normalized, mean, var = _standardize(input.contiguous(), tuple(range(2, input.dim())), eps)
    _update(running_mean, mean.flatten(1).mean(0), momentum)
    _update(running_var, var.flatten(1).mean(0) * (count / (count - 1)), momentum)
    return _scale_shift(normalized, weight, bias, _channel_shape(input)).to(input.dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = tuple(normalized_shape)
    regular = 0 < len(shape) <= input.dim() and input.shape[-len(shape) :] == shape
    if not (regular and input.numel() and _fit(input, shape, (weight, bias))):
        return F.layer_norm(input, list(shape), weight, bias, eps)
    normalized, _, _ = _standardize(input.contiguous(), tuple(range(-len(shape), 0)), eps)
    # Autocast widens the native layer on some devices: an empty call tells.
    dtype = F.layer_norm(input.new_empty(0, *shape), list(shape)).dtype
    return _scale_shift(normalized, weight, bias, shape).to(dtype)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _torch_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def _torch_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


_COMPOSITES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.instance_norm: _torch_instance_norm,
    torch.layer_norm: _torch_layer_norm,
    torch._weight_norm: _torch_weight_norm,
}


def _fit(input: Tensor, shape: Sequence[int], tensors: Sequence[Tensor | None]) -> bool:
    """True if every tensor has this shape and a floating type the native layer accepts."""
    dtypes = (input.dtype, torch.float32) if input.dtype.itemsize == 2 else (input.dtype,)
    return input.dtype.is_floating_point and all(
        t is None or (t.shape == tuple(shape) and t.dtype in dtypes) for t in tensors
    )


def _channels_contiguous(input: Tensor) -> Tensor:
    if _transforms_are_active():  # under vmap torch cannot tell
        return input.contiguous()
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        if input.is_contiguous(memory_format=memory_format):
            return input
    return input.contiguous()


def _standardize(input: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = input.float() if input.dtype.itemsize == 2 else input
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    var = centred.square().mean(dims, keepdim=True)
    return centred * (var + eps).rsqrt(), mean.detach(), var.detach()


def _scale_shift(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    if weight is not None:
        x = x * weight.view(shape)
    if bias is not None:
        x = x + bias.view(shape)
    return x


def _update(running: Tensor | None, batch: Tensor, momentum: float) -> None:
    # As in the native layers, past autograd's check: another graph may hold the old statistics.
    if running is not None:
        # Under vmap there is no .data.
        statistics = running if _transforms_are_active() else running.data
        statistics.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum)


def _channel_shape(input: Tensor) -> tuple[int, ...]:
    return (-1,) + (1,) * (input.dim() - 2)


def _subclasses(bases: Sequence[type]) -> Iterator[type]:
    for base in bases:
        yield base
        yield from _subclasses(base.__subclasses__())
