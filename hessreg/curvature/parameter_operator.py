"""What the Hessian and the Gauss-Newton operator share: graphs, batches of data, processes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node

from hessreg.curvature._checks import NonFiniteError, check_at_least, full_precision
from hessreg.curvature.autograd_graph import AutogradGraph
from hessreg.curvature.evaluation import RandomState
from hessreg.curvature.fused import FusedHessian, FusedProducts
from hessreg.curvature.operators import SymmetricOperator
from hessreg.curvature.parameters import FlatParameters
from hessreg.curvature.third_order import require_third_order_safe

__all__ = ["CurvatureGraph", "ParameterOperator", "check_loss", "pull"]


class CurvatureGraph(ABC):
    """The curvature of one scalar at one point, as an autograd graph that is kept.

    Args:
        params: what to differentiate by.
        loss: the scalar.
        fused: multiplies without gradients being recorded, where the graph is of a known kind.
    """

    def __init__(self, params: FlatParameters, loss: Tensor, fused: FusedProducts | None) -> None:
        self.params, self.loss, self._fused = params, loss, fused
        self._batched = True

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """The gradient of the scalar [n], detached."""

    @abstractmethod
    def multiply(
        self, parts: Sequence[Tensor], create_graph: bool = False, batched: bool = False
    ) -> Sequence[Tensor]:
        """Products by parameter; with ``batched``, of k vectors in front of each part."""

    @abstractmethod
    def roots(self) -> Sequence[Tensor]:
        """What products go back through the graphs of."""

    def product(self, v: Tensor, create_graph: bool) -> Tensor:
        """Product with v [n]."""
        if create_graph:
            require_third_order_safe(self.loss, inputs=self.params.tensors)
        elif self._fused is not None:
            return self._fused.products(v[None])[0]
        parts = self.multiply(self.params.split(v), create_graph=create_graph)
        product = self.params.flatten(parts)
        return product + self._zero() if create_graph and not product.requires_grad else product

    def _zero(self) -> Tensor:
        """With a graph, so that what does not depend on the parameters has a gradient of zero."""
        p = self.params.tensors[0]
        return torch.where(torch.zeros_like(p, dtype=torch.bool), p, 0).sum()

    def lanczos_steps(
        self, basis: Tensor, first: int, num_steps: int, breakdown: float, largest: Tensor
    ) -> list[Tensor] | None:
        """As :func:`~hessreg.curvature.lanczos.lanczos_steps`; None where products are single."""
        if not isinstance(self._fused, FusedHessian):
            return None
        return self._fused.lanczos_steps(basis, first, num_steps, breakdown, largest)

    def bilinear(self, w: Tensor, z: Tensor, value: Tensor | None) -> Tensor:
        """The number w' H z [], with its graph; the value may be known."""
        return w @ self.product(z, create_graph=True)

    def absolute_form(
        self, z: Tensor, num_steps: int, smoothing: float, weight: float
    ) -> Tensor | None:
        """As :meth:`ParameterOperator.absolute_form`."""
        return None

    def spectral_form(self, z: Tensor, num_steps: int) -> tuple[Tensor, Tensor, float] | None:
        """As :meth:`ParameterOperator.spectral_form`."""
        return None

    def products(self, vectors: Tensor, max_bytes: int) -> Tensor:
        """Products with k vectors [k, n], several at a time as far as memory goes."""
        if self._batched and len(vectors) > 1:
            size = max(1, max_bytes // self._bytes_per_vector)
            try:
                return torch.cat([self._at_once(part) for part in vectors.split(size)])
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._batched = False  # an operation of the loss has no batching rule
        return torch.stack([self.product(v, create_graph=False) for v in vectors])

    def _at_once(self, vectors: Tensor) -> Tensor:
        if self._fused is not None:
            return self._fused.products(vectors)
        return self.params.flatten(self.multiply(self.params.split(vectors), batched=True), batch=1)

    @cached_property
    def _bytes_per_vector(self) -> int:
        """About what one vector more takes: its share of every tensor on the way back."""
        if self._fused is not None:
            elements = self._fused.elements_per_vector
        else:
            elements = sum(map(_output_elements, AutogradGraph(self.roots()).names))
        return self.params.dtype.itemsize * (2 * self.params.size + elements)


class ParameterOperator(SymmetricOperator):
    """A curvature matrix of a loss with respect to parameters: of one graph, or summed over data.

    Args:
        params: what to differentiate by.
        linearize: builds the graph of one batch; without data, takes nothing.
        data: batches, to go through once for each product; or None.
        process_group: processes of which each has its own data.
        progress: show a bar for each pass over the data.
        max_bytes: memory for several vectors at once, about.
    """

    def __init__(
        self,
        params: FlatParameters,
        linearize: Callable[..., CurvatureGraph],
        data: Iterable[Any] | None,
        process_group: dist.ProcessGroup | None,
        progress: bool,
        max_bytes: int,
    ) -> None:
        _check_data(data)
        check_at_least(1, max_bytes=max_bytes)
        self._flat, self._linearize, self._data = params, linearize, data
        self._group, self._progress, self._max_bytes = process_group, progress, max_bytes
        self.params = params.tensors
        self.dtype, self.device = params.dtype, params.device
        self.shape = (params.size, params.size)
        self._state = RandomState(params.device)
        self._graph = None
        with _all_or_none(process_group, self.device):
            if data is None:
                self._graph = linearize()
            else:  # a batch that is no good is reported here
                first = self._sum_over_data(lambda graph: graph.gradient)
        if data is not None:
            self.gradient = self._mean(*first)

    @property
    def loss(self) -> Tensor | None:
        """The scalar with its graph; None if there is data."""
        return None if self._graph is None else self._graph.loss

    @cached_property
    def gradient(self) -> Tensor:
        """The flat gradient [n], detached; computed when it is first asked for."""
        return self._sum(lambda graph: graph.gradient)

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Product with v.

        Args:
            v: [n].
            create_graph: make the product differentiable in the parameters and in everything else
                the loss depends on. With several processes each has the gradient of its own share,
                to be averaged as gradients are.

        Returns:
            [n].

        Raises:
            TypeError: v is not a tensor, or of another dtype.
            ValueError: v has another shape or device; a product to be differentiated through a
                normalisation layer that torch differentiates wrongly.
            NonFiniteError: NaN or infinity in the product (looked for on the CPU only: on a GPU
                the check would wait for the device).
        """
        self._check_vectors("v", v, ndim=1)
        return self._checked(self._sum(lambda graph: graph.product(v, create_graph)))

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the k columns of V [n, k], many in one batched reverse pass: [n, k]."""
        self._check_vectors("V", V, ndim=2)
        if V.shape[1] == 0:
            return torch.empty_like(V)
        vectors = V.mT.contiguous()
        return self._checked(self._sum(lambda graph: graph.products(vectors, self._max_bytes))).mT

    def bilinear(self, w: Tensor, z: Tensor, value: Tensor | None = None) -> Tensor:
        """The number w' H z, with its graph if gradients are enabled.

        Args:
            w: [n], held constant.
            z: [n], likewise.
            value: the number [] itself, where it is known: only its gradient is computed then.

        Returns:
            Scalar [].

        Raises:
            TypeError, ValueError, NonFiniteError: as :meth:`matvec`.
        """
        self._check_vectors("w", w, ndim=1)
        self._check_vectors("z", z, ndim=1)
        if not torch.is_grad_enabled():
            return w @ self.matvec(z) if value is None else value
        w, z = w.detach(), z.detach()
        return self._sum(lambda graph: graph.bilinear(w, z, value))

    def lanczos_steps(
        self, basis: Tensor, first: int, num_steps: int, breakdown: float, largest: Tensor
    ) -> list[Tensor] | None:
        """Several steps of :func:`lanczos` in one call, for a perceptron; None elsewhere.

        Args:
            basis: [more than first + num_steps, n], changed as ``lanczos_step`` does.
            first: the row to begin with.
            num_steps: products.
            breakdown: as ``lanczos_step`` takes it.
            largest: likewise.

        Returns:
            What ``lanczos_step`` returns, for each step.
        """
        if self._graph is None or self._group is not None:
            return None
        return self._graph.lanczos_steps(basis, first, num_steps, breakdown, largest)

    def absolute_form(
        self, z: Tensor, num_steps: int, smoothing: float, weight: float
    ) -> Tensor | None:
        """The number z' |A| z by Lanczos in one call, where that can be had, with its graph.

        Args:
            z: unit vector [n].
            num_steps: of Lanczos.
            smoothing: of the sign of A, relative to the largest Ritz value.
            weight: multiplies the number.

        Returns:
            Scalar []; None where it is to be put together from products, also because one of them
            has NaN or infinity.
        """
        if self._graph is None or self._group is not None:
            return None
        with full_precision(self.device):
            return self._graph.absolute_form(z, num_steps, smoothing, weight)

    def spectral_form(self, z: Tensor, num_steps: int) -> tuple[Tensor, Tensor, float] | None:
        """The largest modulus of a Ritz value in one call, likewise.

        Args:
            z: unit vector [n] to begin with.
            num_steps: of Lanczos.

        Returns:
            The modulus [] with its graph, the Ritz vector [n] and the norm of its residual; None as
            for :meth:`absolute_form`.
        """
        if self._graph is None or self._group is not None:
            return None
        with full_precision(self.device):
            return self._graph.spectral_form(z, num_steps)

    def check_finite(self, product: Tensor) -> None:
        """Reports NaN or infinity in a product [n] by parameter and position.

        Raises:
            NonFiniteError: names the first parameter concerned, its shape, the position and the
                value.
        """
        self._flat.check_finite("product", product.detach())

    def _checked(self, product: Tensor) -> Tensor:
        if self.device.type == "cpu":
            self.check_finite(product)
        return product

    def _sum(self, of: Callable[[CurvatureGraph], Tensor]) -> Tensor:
        """The mean over the rows of the data, of all processes."""
        if self._graph is not None:
            with full_precision(self.device):
                total, rows = of(self._graph), 1
        else:
            total, rows = self._sum_over_data(of)
        return self._mean(total, rows)

    def _mean(self, total: Tensor, rows: int) -> Tensor:
        return total if self._group is None else _mean_over_processes(total, rows, self._group)

    def _sum_over_data(self, of: Callable[[CurvatureGraph], Tensor]) -> tuple[Tensor, int]:
        total, rows = torch.zeros((), dtype=self.dtype, device=self.device), 0
        with self._state.restored():  # one order and one set of masks for all products
            for batch in self._batches():
                count = _count_rows(batch)
                graph = self._linearize(batch)
                with full_precision(self.device):
                    total = total + count * of(graph)
                rows += count
        if not rows:
            raise ValueError("data has no rows: it is empty, or can be gone through once only")
        return total / rows, rows

    def _batches(self) -> Iterator[Any]:
        if not self._progress:
            return iter(self._data or ())
        from rich.progress import track

        total = len(self._data) if isinstance(self._data, Collection) else None
        return iter(track(self._data or (), "product", total=total, transient=True))


def pull(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = True,
    batched: bool = False,
) -> list[Tensor]:
    """Vector-Jacobian products; with ``batched``, of k cotangents in front of each output.

    They are zero, without a graph, for what the outputs do not depend on. (The zeros that torch
    materializes have graphs of their own, and no batch.)
    """
    found = torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        retain_graph=True,
        create_graph=create_graph,
        is_grads_batched=batched,
        allow_unused=True,
    )
    leading = cotangents[0].shape[:1] if cotangents and batched else torch.Size()
    pairs = zip(found, inputs, strict=True)
    return [x.new_zeros(leading + x.shape) if g is None else g for g, x in pairs]


def check_loss(loss: Any) -> Tensor:
    """Refuses what is no finite scalar with a graph.

    Raises:
        TypeError: not a tensor.
        ValueError: not a scalar, or without a graph.
        NonFiniteError: NaN or infinity.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a Tensor or return one, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss must have a graph, got one that requires no gradient")
    if not math.isfinite(loss.item()):
        raise NonFiniteError(f"loss must be finite, got {loss.item()}")
    return loss


def _check_data(data: Any) -> None:
    if data is None:
        return
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
    if isinstance(data, Iterator):
        raise TypeError(
            "data is gone through once for each product: it must be a loader or a list, got an"
            f" iterator, {type(data).__name__}"
        )


def _count_rows(batch: Any) -> int:
    """The length of the first tensor of a batch."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, dict) else batch
    if isinstance(parts, Iterable) and not isinstance(parts, str):
        for part in parts:
            return _count_rows(part)
    raise TypeError(f"a batch must hold a tensor to tell its rows, got {type(batch).__name__}")


@contextmanager
def _all_or_none(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """What is not finite in one process is so in all: the others would wait for it for ever."""
    failure = None
    try:
        yield
    except NonFiniteError as error:
        failure = error
    if group is not None:
        failures = torch.tensor(float(failure is not None), device=device)
        dist.all_reduce(failures, group=group)
        if failures and failure is None:
            raise NonFiniteError("the loss or its gradient has NaN or infinity in another process")
    if failure is not None:
        raise failure


def _mean_over_processes(mean: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    weighted = torch.cat([rows * mean.detach().flatten(), mean.new_full((1,), rows)])
    dist.all_reduce(weighted, group=group)
    value = (weighted[:-1] / weighted[-1]).view_as(mean)
    if not mean.requires_grad:
        return value
    # The gradients of the processes' means are yet to be averaged, each with the same weight.
    share = mean * (rows * dist.get_world_size(group) / weighted[-1])
    return share + (value - share.detach())


def _output_elements(node: Node) -> int:
    return sum(torch.Size(output.shape).numel() for output in node._input_metadata)
