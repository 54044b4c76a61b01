"""Evaluating a user's function without a trace: buffers and random state stay as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessreg.curvature.third_order import third_order_safe

__all__ = ["RandomState", "evaluate"]


class RandomState:
    """The state of torch's random generators when it was made, to return to.

    Args:
        device: the CPU's generator is always held, a GPU's if this is one.

    Example:
        >>> state = RandomState(torch.device("cpu"))
        >>> with state.restored():
        ...     first = torch.rand(2)
        >>> with state.restored():
        ...     torch.equal(torch.rand(2), first)
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(d) for d in self._devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the generators go on from that state; outside they have not moved."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def evaluate(function: Callable[..., Any], *arguments: Any, state: RandomState) -> Any:
    """Calls a function for its graph: third-order safe, from a fixed random state, traceless.

    Args:
        function: computes tensors from modules.
        *arguments: what it takes.
        state: the random state to begin from.

    Returns:
        What the function returns.

    Raises:
        ValueError: a compiled module is called inside.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> y = evaluate(norm, torch.randn(4, 2), state=RandomState(torch.device("cpu")))
        >>> norm.num_batches_tracked.item(), y.requires_grad
        (0, True)
    """
    with ExitStack() as stack:
        stack.enter_context(state.restored())
        stack.enter_context(_buffers_restored())
        stack.enter_context(third_order_safe())
        stack.enter_context(torch.enable_grad())
        return function(*arguments)


@contextmanager
def _buffers_restored() -> Iterator[None]:
    """Puts the buffers of every module called inside back, as far as this thread changed them."""
    saved: dict[nn.Module, dict[str, tuple[Tensor, Tensor, int]]] = {}
    thread = threading.get_ident()

    def save(module: nn.Module, args: Any) -> None:
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            raise ValueError(
                "loss cannot be differentiated twice through torch.compile: pass the module before"
                " it is compiled"
            )
        if threading.get_ident() == thread and module not in saved:
            buffers = module.named_buffers(recurse=False)
            saved[module] = {k: (b, b.detach().clone(), b._version) for k, b in buffers}

    handle = nn.modules.module.register_module_forward_pre_hook(save)
    try:
        yield
    finally:
        handle.remove()
        for module, buffers in saved.items():
            _restore(module, buffers)


@torch.no_grad()
def _restore(module: nn.Module, buffers: dict[str, tuple[Tensor, Tensor, int]]) -> None:
    for name, (buffer, value, version) in buffers.items():
        module._buffers[name] = buffer
        # Unless it was changed under autograd's eyes, the graph may hold the buffer.
        (buffer.data if buffer._version == version else buffer).copy_(value)
