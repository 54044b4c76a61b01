"""How a compiled operator becomes differentiable: the one mechanism behind every family.

A kernel registered with torch alone has no derivatives under ``torch.func`` and a silently zero one
in forward mode; a bare ``autograd.Function`` cannot be compiled with ``fullgraph=True``. So each
:class:`Operator` is both: the registered operator while ``torch.compile`` traces, a new-style
``autograd.Function`` around it otherwise. Backward and forward-mode formulas are written in
operators that are themselves differentiable, which makes every order right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from hessreg import _backend

# Looked up once: a call with nothing of it in the caches is made of look-ups.
_grad_is_enabled = torch.is_grad_enabled
_transforms_are_active = torch._C._are_functorch_transforms_active
_BelowAutograd = torch._C._AutoDispatchBelowAutograd

# An operator's arguments: tensors, lists of tensors, and plain values.
Arguments = Sequence[Any]


class _Slot(int):
    """Stands in a layout for a list of so many tensors, or for one bare tensor."""


_BARE = _Slot(1)


def _flatten(arguments: Arguments) -> tuple[list[Tensor], list[Any]]:
    """The tensors among the arguments, and the arguments with slots in the tensors' places."""
    tensors: list[Tensor] = []
    layout: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            layout.append(_BARE)
        elif isinstance(argument, (list, tuple)) and all(isinstance(t, Tensor) for t in argument):
            tensors.extend(argument)
            layout.append(_Slot(len(argument)))
        else:
            layout.append(argument)
    return tensors, layout


def _unflatten(flat: Sequence[Any], layout: Sequence[Any]) -> list[Any]:
    """Fills the slots with tensors, or with what stands for them: tangents, batch dimensions."""
    rest = iter(flat)

    def fill(item: Any) -> Any:
        if not isinstance(item, _Slot):
            return item
        return next(rest) if item is _BARE else [next(rest) for _ in range(item)]

    return [fill(item) for item in layout]


def _fill_order(results: Sequence[Any], layout: Sequence[Any]) -> list[Any]:
    """One result for each tensor, in the order of the slots; None where there is no result."""
    flat: list[Any] = []
    for result, item in zip(results, layout, strict=True):
        if isinstance(item, _Slot):
            flat.extend([result] if item is _BARE else result or [None] * item)
    return flat


def constant_while_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result`` without importing the compiler: a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_tracked(tensors: Sequence[Tensor]) -> bool:
    """Whether anything differentiates or batches this call: it needs more than the kernel."""
    if _is_transformed():
        return True
    if _grad_is_enabled():
        for tensor in tensors:  # at every call: `any` of a generator takes twice as long
            if tensor.requires_grad:
                return True
    return False


def _is_transformed() -> bool:
    return _transforms_are_active() or forward_ad._current_level >= 0


def _forward_levels() -> int:
    """How deep forward mode is nested; in more than one level torch drops terms of any Function."""
    if not _transforms_are_active():
        return forward_ad._current_level + 1
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


# ``torch.autograd.grad(is_grads_batched=True)`` has batched tensors of its own, other than those of
# ``torch.func.vmap``, and no rule for operators that take lists.
_is_batched_grad = torch._C._functorch.is_legacy_batchedtensor


def _level_of(tensor: Tensor) -> int:
    """How deep in batched gradients a tensor was batched; 0 if it was not."""
    level = 0
    while _is_batched_grad(torch._remove_batch_dim(tensor, level, 1, 0) if level else tensor):
        level += 1
    return level


def _unwrap_batched_grads(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int | None], int]:
    """The tensors with their hidden batch in front, its dimension (0 or None), and its level."""
    level = max(_level_of(tensor) for tensor in tensors)
    plain: list[Tensor] = []
    dims: list[int | None] = []
    for tensor in tensors:
        batched = _is_batched_grad(tensor)
        plain.append(torch._remove_batch_dim(tensor, level, 0, 0) if batched else tensor)
        dims.append(0 if batched else None)
    return plain, dims, level


def _no_autocast(ctx: Any) -> AbstractContextManager[object]:
    """Derivatives are as exact as what they are derivatives of."""
    device = ctx.device_type
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else nullcontext()
    )


def reverse_of(reference: Callable[..., Any]) -> Callable[..., Sequence[Any]]:
    """The ``backward`` of an operator of which only the value is worth a kernel.

    Plain torch differentiates the reference, as often as it is asked to.
    """

    def backward(arguments: Arguments, needs: Arguments, cotangent: Any) -> Sequence[Any]:
        tensors, layout = _flatten(arguments)
        wanted = [i for i, need in enumerate(_fill_order(needs, layout)) if need]

        def restricted(*moving: Tensor) -> Any:
            filled = list(tensors)
            for i, tensor in zip(wanted, moving, strict=True):
                filled[i] = tensor
            return reference(*_unflatten(filled, layout))

        pullback = torch.func.vjp(restricted, *[tensors[i] for i in wanted])[1]
        found = dict(zip(wanted, pullback(cotangent), strict=True))
        results = _unflatten([found.get(i) for i in range(len(tensors))], layout)
        pairs = zip(results, layout, strict=True)
        return [result if isinstance(item, _Slot) else None for result, item in pairs]

    return backward


def vmap_of(reference: Callable[..., Any]) -> Callable[[int, Arguments, Arguments], Any]:
    """The ``vmap`` of an operator of which only the value is worth a kernel."""

    def vmap(batch_size: int, arguments: Arguments, dims: Arguments) -> Any:
        tensors, layout = _flatten(arguments)

        def run(*filled: Tensor) -> Any:
            return reference(*_unflatten(filled, layout))

        in_dims = tuple(_fill_order(dims, layout))
        return torch.func.vmap(run, in_dims)(*tensors)

    return vmap


def _as_function_output(outputs: Any) -> Any:
    return tuple(outputs) if isinstance(outputs, list) else outputs


def _leading(outputs: Any) -> Any:
    """The batch dimension of each output of a vmap rule: always the first."""
    return type(outputs)(0 for _ in outputs) if isinstance(outputs, (list, tuple)) else 0


class Operator:
    """One operator ``torch.ops.hessreg.<name>`` with its reference and its derivatives.

    Its first argument is a tensor or a list of them; it returns one tensor or one list of tensors.

    Args:
        name: its name in the ``hessreg`` namespace.
        reference: the definition in plain torch; takes the operator's arguments.
        fake: output shapes for tracing; takes the operator's arguments.
        backward: ``(arguments, needs, cotangent) -> cotangents of the arguments``: None for plain
            values; ``needs`` has the form of the arguments with a flag for each tensor.
        keeps_outputs: ``backward`` takes the outputs too, as a fourth argument, and cotangents may
            be None: for an operator that returns what its own derivative needs.
        jvp: ``(arguments, tangents) -> tangent of the output``; a missing tangent is None. Without
            it, the reference runs in forward mode.
        vmap: ``(batch_size, arguments, dims) -> output`` with the batch in front.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Sequence[Any]],
        jvp: Callable[[Arguments, Arguments], Any] | None = None,
        vmap: Callable[[int, Arguments, Arguments], Any],
        keeps_outputs: bool = False,
    ) -> None:
        self.reference, self._backward, self._jvp, self._vmap = reference, backward, jvp, vmap
        self._keeps_outputs = keeps_outputs
        self._function = self._make_function(name)
        if _backend.compiled():
            self._kernel = getattr(torch.ops.hessreg, name).default
            self._register(f"hessreg::{name}", fake)

    def __call__(self, *arguments: Any) -> Any:
        """Runs the reference, the registered operator or the differentiable function."""
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        if not _backend.runs_compiled(first.device):
            return self.reference(*arguments)
        if is_compiling():  # a registered operator has no transforms
            return (self.reference if _is_transformed() else self._kernel)(*arguments)
        tensors, layout = _flatten(arguments)
        if any(map(_is_batched_grad, tensors)):
            return self._call_batched_grads(tensors, layout)
        if not is_tracked(tensors):
            return self._run_kernel(arguments)
        if _forward_levels() > (self._jvp is not None):
            return self.reference(*arguments)
        outputs = self._function.apply(layout, *tensors)
        return list(outputs) if isinstance(outputs, tuple) else outputs

    def _run_kernel(self, arguments: Arguments) -> Any:
        """The kernel alone: the registered derivative (10 microseconds) is for compiled graphs."""
        with _BelowAutograd():
            return self._kernel._op(*arguments)

    def _call_batched_grads(self, tensors: Sequence[Tensor], layout: Sequence[Any]) -> Any:
        plain, dims, level = _unwrap_batched_grads(tensors)
        batch_size = next(t.shape[0] for t, dim in zip(plain, dims, strict=True) if dim == 0)
        arguments = _unflatten(plain, layout)
        outputs = self._vmap(batch_size, arguments, _unflatten(dims, layout))
        if isinstance(outputs, list):
            return [torch._add_batch_dim(y, 0, level) for y in outputs]
        return torch._add_batch_dim(outputs, 0, level)

    def _save(self, ctx: Any, tensors: Sequence[Tensor], output: Any) -> None:
        ctx.num_inputs, ctx.device_type = len(tensors), tensors[0].device.type
        if not self._keeps_outputs:
            ctx.save_for_backward(*tensors)
            return
        ctx.set_materialize_grads(False)  # zeros would cost a second derivative
        ctx.save_for_backward(*tensors, *([output] if isinstance(output, Tensor) else output))

    def _derive(self, ctx: Any, needs: Arguments, cotangent: Any) -> Sequence[Any]:
        saved = ctx.saved_tensors  # once: checkpointing lets nobody unpack twice
        tensors, outputs = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        arguments = _unflatten(tensors, ctx.layout)
        if not self._keeps_outputs:
            return self._backward(arguments, needs, cotangent)
        if cotangent is None:  # nothing came back for the only output
            return [None] * len(arguments)
        return self._backward(arguments, needs, cotangent, outputs)

    def _register(self, qualified_name: str, fake: Callable[..., Any]) -> None:
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors, ctx.layout = _flatten(inputs)
            self._save(ctx, tensors, output)

        def backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
            return tuple(self._derive(ctx, ctx.needs_input_grad, cotangent))

        def vmap(info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
            outputs = self._vmap(info.batch_size, arguments, dims)
            return outputs, _leading(outputs)

        torch.library.register_fake(qualified_name, fake)
        torch.library.register_autograd(qualified_name, backward, setup_context=setup_context)
        torch.library.register_vmap(qualified_name, vmap)

    def _make_function(operator, name: str) -> type[Function]:
        class _Function(Function):
            @staticmethod
            def forward(layout: Any, *tensors: Tensor) -> Any:
                return _as_function_output(operator._run_kernel(_unflatten(tensors, layout)))

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                ctx.layout, *tensors = inputs
                ctx.returns_list = isinstance(output, tuple)
                operator._save(ctx, tensors, output)
                ctx.save_for_forward(*tensors)

            @staticmethod
            def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
                needs = _unflatten(ctx.needs_input_grad[1:], ctx.layout)
                incoming = list(cotangents) if ctx.returns_list else cotangents[0]
                with _no_autocast(ctx):
                    results = operator._derive(ctx, needs, incoming)
                return (None, *_fill_order(results, ctx.layout))

            @staticmethod
            def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
                arguments = _unflatten(ctx.saved_tensors, ctx.layout)
                rule: Any = operator._jvp  # without one the reference has run
                with _no_autocast(ctx):
                    moved = rule(arguments, _unflatten(tangents, ctx.layout))
                return _as_function_output(moved)

            @staticmethod
            def vmap(info: Any, dims: Any, layout: Any, *tensors: Tensor) -> tuple[Any, Any]:
                arguments, in_dims = _unflatten(tensors, layout), _unflatten(dims[1:], layout)
                outputs = operator._vmap(info.batch_size, arguments, in_dims)
                return _as_function_output(outputs), _leading(_as_function_output(outputs))

        _Function.__name__ = _Function.__qualname__ = f"Hessreg_{name}"
        return _Function
