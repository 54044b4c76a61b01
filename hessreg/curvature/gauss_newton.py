"""The generalised Gauss-Newton matrix of a loss of a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hessreg.curvature.autograd_graph import AutogradGraph
from hessreg.curvature.evaluation import RandomState, evaluate
from hessreg.curvature.fused import FusedHessian
from hessreg.curvature.parameter_operator import CurvatureGraph, ParameterOperator, check_loss, pull
from hessreg.curvature.parameters import FlatParameters
from hessreg.curvature.third_order import refuse_opaque, require_third_order_safe

__all__ = ["GaussNewtonOperator"]


class GaussNewtonOperator(ParameterOperator):
    """G = J' H_L J: J the derivative of a model's outputs, H_L the loss's Hessian in them.

    The Hessian without the curvature of the model itself: positive semidefinite wherever the loss
    is convex in the outputs (Schraudolph, 2002; Martens, 2020). Each product is a pass forward and
    one back through graphs that are kept.

    Args:
        outputs: the model's outputs with their graph, or a callable that returns them, without
            arguments or, if there is ``data``, of a batch.
        loss: a callable that returns the scalar loss of the outputs, which it takes alone or, if
            there is ``data``, with the batch.
        params, data, process_group, progress, max_bytes: as for
            :class:`~hessreg.curvature.HessianOperator`.

    Attributes:
        params: the parameters, as a list.
        gradient: the flat gradient of the loss [n], detached.

    Raises:
        TypeError, ValueError, NonFiniteError: as for :class:`~hessreg.curvature.HessianOperator`.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> G = GaussNewtonOperator(w**2, lambda y: 0.5 * y.square().sum(), w)
        >>> G.matvec(torch.tensor([1.0, 1.0]))
        tensor([ 4., 16.])
    """

    def __init__(
        self,
        outputs: Tensor | Callable[..., Tensor],
        loss: Callable[..., Tensor],
        params: Tensor | Iterable[Tensor],
        data: Iterable[Any] | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        progress: bool = False,
        max_bytes: int = 1 << 30,
    ) -> None:
        flat = FlatParameters(params)
        state = RandomState(flat.device)
        if not callable(loss):
            raise TypeError(f"loss must be a callable of the outputs, got {type(loss).__name__}")
        if not callable(outputs) and (data is not None or not isinstance(outputs, Tensor)):
            wanted = "a callable of a batch" if data is not None else "a Tensor or a callable"
            raise TypeError(f"outputs must be {wanted}, got {type(outputs).__name__}")

        def linearize(*batch: Any) -> _GaussNewtonGraph:
            y = outputs if isinstance(outputs, Tensor) else evaluate(outputs, *batch, state=state)
            return _GaussNewtonGraph(y, lambda at: evaluate(loss, at, *batch, state=state), flat)

        super().__init__(flat, linearize, data, process_group, progress, max_bytes)


class _GaussNewtonGraph(CurvatureGraph):
    """J'u for a free u, whose derivative in u is J, and the loss's gradient in the outputs."""

    def __init__(
        self, outputs: Tensor, loss: Callable[[Tensor], Tensor], params: FlatParameters
    ) -> None:
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            raise ValueError("outputs must be a Tensor with its graph")
        value = check_loss(loss(outputs))
        graph = AutogradGraph([value])
        refuse_opaque(graph)
        require_third_order_safe(graph, derivatives=2)
        super().__init__(params, value, FusedHessian.find(value, params, graph, outputs))
        self._outputs = outputs
        if self._fused is None:
            _ = self.gradient  # an infinite one is reported here, not at the first product

    @cached_property
    def gradient(self) -> Tensor:
        slope = self._slope.detach()
        gradient = self.params.flatten(pull(self._outputs, self.params.tensors, [slope])).detach()
        self.params.check_finite("gradient", gradient)
        return gradient

    @cached_property
    def _slope(self) -> Tensor:
        return pull(self.loss, [self._outputs])[0]

    @cached_property
    def _free(self) -> Tensor:
        return torch.zeros_like(self._outputs, requires_grad=True)

    @cached_property
    def _pulled(self) -> Sequence[Tensor]:
        return pull(self._outputs, self.params.tensors, [self._free])

    def multiply(
        self, parts: Sequence[Tensor], create_graph: bool = False, batched: bool = False
    ) -> Sequence[Tensor]:
        live = [(p, part) for p, part in zip(self._pulled, parts, strict=True) if p.requires_grad]
        if not self._slope.requires_grad or not live:  # linear in the outputs, or they are
            return [torch.zeros_like(part) for part in parts]
        options = {"create_graph": create_graph, "batched": batched}
        pulled, directions = zip(*live, strict=True)
        (pushed,) = pull(pulled, [self._free], directions, **options)
        (curved,) = pull(self._slope, [self._outputs], [pushed], **options)
        return pull(self._outputs, self.params.tensors, [curved], **options)

    def roots(self) -> Sequence[Tensor]:
        return [*self._pulled, self._slope]
