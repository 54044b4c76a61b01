"""The Hessian of a loss, known by its products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hessreg.curvature.autograd_graph import AutogradGraph
from hessreg.curvature.evaluation import RandomState, evaluate
from hessreg.curvature.fused import FusedHessian, FusedInputHessian
from hessreg.curvature.parameter_operator import CurvatureGraph, ParameterOperator, check_loss, pull
from hessreg.curvature.parameters import FlatParameters
from hessreg.curvature.third_order import refuse_opaque, require_third_order_safe

__all__ = ["HessianGraph", "HessianOperator"]


class HessianOperator(ParameterOperator):
    """Hessian of a scalar loss with respect to parameters, known by its products.

    The gradient is built once, with its graph; each product is one reverse pass through it, about
    2 gradients. Where all of the parameters are those of one multilayer perceptron, as built of
    ``nn.Linear`` and the usual activations, or are its input, a product is a fused pass forward and
    back instead, less than one gradient; hooks on tensors between its layers are not called, nor
    those on its outputs where the loss is a sum or mean of one activation of them. The
    operator is the Hessian at the parameters' values when it was made. It leaves ``.grad``, the
    modules' mode and buffers and the random state as they were; dropout keeps its masks from
    product to product.

    Args:
        loss: a scalar with its graph (kept alive, never freed), or a callable that returns one,
            without arguments or, if there is ``data``, of a batch. A callable is evaluated under
            :func:`~hessreg.curvature.third_order.third_order_safe`, and the buffers and the random
            state are put back afterwards. Without data it is evaluated once, here. Nothing in it
            may go through ``torch.compile``: a compiled module is refused, a compiled function may
            raise torch's own error.
        params: the tensors to differentiate by: one, or several of one dtype and device. Vectors
            are their flat concatenation, [n]. Those the loss does not use count as zeros.
        data: batches, each a tensor or a collection that begins with one, such as a DataLoader:
            the operator is the Hessian of the mean over all rows, ``loss`` being the mean over the
            rows of a batch. Each product goes through all of it, from the same random state, with
            the parameters' values at that time.
        process_group: every process of the group has its own loss or data, and products are
            averaged over all rows (without data: over the processes). All must make the same
            calls.
        progress: show a bar for each pass over the data.
        max_bytes: memory for several vectors at once, about; more of them are taken in turn.
        only_params: what comes with its graph from :meth:`bilinear`, and so a norm, need be
            differentiable in the parameters only, and once or twice. Where the loss is a
            perceptron's, its gradient is then a fused pass as well, at a third of the cost. Without
            it that is done where the loss depends on nothing else that requires a gradient.

    Attributes:
        loss: the scalar with its graph; None if there is data.
        params: the parameters, as a list.
        gradient: the flat gradient [n], detached.

    Raises:
        TypeError: a loss, a parameter or data of the wrong type.
        ValueError: no scalar, no graph, no parameters, a parameter twice, a mixture of dtypes or
            devices, a gradient penalty through a normalisation layer that torch differentiates
            wrongly, native weight normalisation, a reentrant checkpoint, a compiled module, data
            without rows.
        NonFiniteError: NaN or infinity in the loss or the gradient, of any process.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> H = HessianOperator(x[0] ** 3 + x[0] * x[1], x)
        >>> H.matvec(torch.tensor([1.0, 0.0]))
        tensor([6., 1.])
        >>> batches = [torch.ones(2, 2), torch.zeros(1, 2)]
        >>> HessianOperator(lambda b: (b @ x).square().mean(), x, batches).matvec(torch.ones(2))
        tensor([2.6667, 2.6667])
    """

    def __init__(
        self,
        loss: Tensor | Callable[..., Tensor],
        params: Tensor | Iterable[Tensor],
        data: Iterable[Any] | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        progress: bool = False,
        max_bytes: int = 1 << 30,
        only_params: bool = False,
    ) -> None:
        flat = FlatParameters(params)
        state = RandomState(flat.device)
        if not callable(loss) and (data is not None or not isinstance(loss, Tensor)):
            wanted = "a callable of a batch" if data is not None else "a Tensor or a callable"
            raise TypeError(f"loss must be {wanted}, got {type(loss).__name__}")

        def linearize(*batch: Any) -> HessianGraph:
            value = loss if isinstance(loss, Tensor) else evaluate(loss, *batch, state=state)
            return HessianGraph(check_loss(value), flat, only_params)

        super().__init__(flat, linearize, data, process_group, progress, max_bytes)


class HessianGraph(CurvatureGraph):
    """The gradient of one loss with its graph, unless the fused operators do without.

    Args:
        loss: scalar with its graph.
        params: what to differentiate by.
        only_params: see :class:`HessianOperator`.

    Raises:
        ValueError: the loss cannot be differentiated twice, or torch would do it wrongly.
        NonFiniteError: NaN or infinity in the gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> graph = HessianGraph((x**3).sum(), FlatParameters(x))
        >>> graph.product(torch.ones(2), create_graph=False)
        tensor([ 6., 12.])
    """

    def __init__(self, loss: Tensor, params: FlatParameters, only_params: bool = False) -> None:
        self._nodes = AutogradGraph([loss], params.tensors)
        refuse_opaque(self._nodes)
        require_third_order_safe(self._nodes, derivatives=2)
        fused = FusedHessian.find(loss, params, self._nodes)
        super().__init__(params, loss, fused or FusedInputHessian.find(loss, params))
        self._only_params = only_params
        if self._fused is None:
            _ = self.gradient  # an infinite one is reported here, not at the first product

    @cached_property
    def _grads(self) -> Sequence[Tensor]:
        return pull(self.loss, self.params.tensors)

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the loss [n], detached."""
        gradient = self.params.flatten(self._grads).detach()
        self.params.check_finite("gradient", gradient)
        return gradient

    def multiply(
        self, parts: Sequence[Tensor], create_graph: bool = False, batched: bool = False
    ) -> Sequence[Tensor]:
        """Products by parameter; with ``batched``, of k vectors in front of each part."""
        # A gradient that is constant in every parameter has no graph and a zero Hessian.
        live = [(g, part) for g, part in zip(self._grads, parts, strict=True) if g.requires_grad]
        if not live:
            return [torch.zeros_like(part) for part in parts]
        grads, directions = zip(*live, strict=True)
        options = {"create_graph": create_graph, "batched": batched}
        return pull(grads, self.params.tensors, directions, **options)

    def bilinear(self, w: Tensor, z: Tensor, value: Tensor | None) -> Tensor:
        """The number w' H z [], with its graph; the value may be known."""
        if not (isinstance(self._fused, FusedHessian) and self._depends_on_params_only):
            return super().bilinear(w, z, value)
        require_third_order_safe(self._nodes)
        value = w @ self.product(z, create_graph=False) if value is None else value
        result: Tensor = _Bilinear.apply(self, w, z, value, None, *self.params.tensors)
        return result

    def absolute_form(
        self, z: Tensor, num_steps: int, smoothing: float, weight: float
    ) -> Tensor | None:
        """The number z' |H| z, and its gradient at once if the parameters' is all there can be."""
        fused, with_gradient = self._fused_form, torch.is_grad_enabled()
        if fused is None:
            return None
        found = fused.absolute_form(z, num_steps, smoothing, weight, with_gradient)
        if len(found) < 3:
            return found[0] if found else None
        value, w, gradient = found
        result: Tensor = _Bilinear.apply(self, w, z, value, gradient, *self.params.tensors)
        return result

    def spectral_form(self, z: Tensor, num_steps: int) -> tuple[Tensor, Tensor, float] | None:
        """The largest modulus of a Ritz value, likewise."""
        fused, with_gradient = self._fused_form, torch.is_grad_enabled()
        found = [] if fused is None else fused.spectral_form(z, num_steps, with_gradient)
        if not found:
            return None
        (theta, residual), v = found[0].tolist(), found[1]
        value = torch.tensor(abs(theta), dtype=v.dtype, device=v.device)
        if with_gradient:
            w = v if theta >= 0 else -v
            value = _Bilinear.apply(self, w, v, value, found[2], *self.params.tensors)
        return value, v, residual

    @property
    def _fused_form(self) -> FusedHessian | None:
        """What has a number of H and, if gradients are enabled, all of its gradient."""
        if not isinstance(self._fused, FusedHessian):
            return None
        if torch.is_grad_enabled():
            if not self._depends_on_params_only:
                return None
            require_third_order_safe(self._nodes)
        return self._fused

    @cached_property
    def _depends_on_params_only(self) -> bool:
        known = set(map(id, self.params.tensors))
        return self._only_params or all(id(t) in known for t in self._nodes.leaves.values())

    def third_derivative(
        self, w: Tensor, z: Tensor, scale: Tensor, create_graph: bool
    ) -> Sequence[Tensor]:
        """The gradient of w' H z by parameter, times a number."""
        if isinstance(self._fused, FusedHessian) and not create_graph:
            return self.params.split(self._fused.third_derivative(scale * w, z))
        value = w @ self.product(z, create_graph=True)
        options = {"create_graph": create_graph, "materialize_grads": True, "retain_graph": True}
        return torch.autograd.grad(value, self.params.tensors, scale, **options)

    def roots(self) -> Sequence[Tensor]:
        """The gradients."""
        return self._grads


class _Bilinear(torch.autograd.Function):
    """The number w' H z as a function of the parameters, of which the gradient may be known."""

    @staticmethod
    def forward(
        ctx: Any,
        graph: HessianGraph,
        w: Tensor,
        z: Tensor,
        value: Tensor,
        gradient: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        ctx.graph, ctx.vectors, ctx.gradient = graph, (w, z), gradient
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None or torch.is_grad_enabled():
            found = ctx.graph.third_derivative(*ctx.vectors, cotangent, torch.is_grad_enabled())
        else:
            found = ctx.graph.params.split(cotangent * ctx.gradient)
        return None, None, None, None, None, *found
