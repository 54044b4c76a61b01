"""Symmetric linear operators: the Hessian of a loss without forming it, and dense matrices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hessreg.curvature._checks import NonFiniteError
from hessreg.curvature.third_order import (
    refuse_opaque,
    require_third_order_safe,
    third_order_safe,
)

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

__all__ = ["DenseOperator", "HessianOperator", "LinearOperator", "SymmetricOperator"]


@runtime_checkable
class LinearOperator(Protocol):
    """A symmetric real matrix known by its products.

    Attributes:
        shape: (n, n).
        dtype: of the vectors it multiplies.
        device: of the vectors it multiplies.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Product with v [n], differentiable in what the matrix depends on if asked."""
        ...

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the k columns of V [n, k]."""
        ...

    def to_scipy(self) -> ScipyLinearOperator:
        """The same operator for scipy.sparse.linalg."""
        ...


class SymmetricOperator:
    """Checks of vectors and the export to scipy, shared by the operators of this module."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Product with v [n]."""
        raise NotImplementedError

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the k columns of V [n, k]: [n, k]."""
        self._check_vectors("V", V, ndim=2)
        columns = [self.matvec(v) for v in V.unbind(1)]
        return torch.stack(columns, 1) if columns else torch.empty_like(V)

    def to_scipy(self) -> ScipyLinearOperator:
        """The same operator as a ``scipy.sparse.linalg.LinearOperator``.

        Example:
            >>> from scipy.sparse.linalg import eigsh
            >>> A = DenseOperator(torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64)))
            >>> eigsh(A.to_scipy(), k=1, return_eigenvectors=False).round(6).tolist()
            [6.0]
        """
        from scipy.sparse.linalg import LinearOperator as Scipy

        def apply(v: Any) -> Any:
            vector = torch.as_tensor(v, dtype=self.dtype, device=self.device)
            product = self.matmat if vector.dim() == 2 else self.matvec
            return product(vector).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return Scipy(
            self.shape, matvec=lambda v: apply(v.ravel()), rmatvec=apply, matmat=apply, dtype=dtype
        )

    def _check_vectors(self, name: str, v: Tensor, ndim: int) -> None:
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(v).__name__}")
        if v.dim() != ndim or v.shape[0] != self.shape[0]:
            wanted = f"({self.shape[0]},)" if ndim == 1 else f"({self.shape[0]}, k)"
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(v.shape)}")
        if v.dtype != self.dtype:
            raise TypeError(f"{name} must have dtype {self.dtype}, got {v.dtype}")
        if v.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, got {v.device}")


class HessianOperator(SymmetricOperator):
    """Hessian of a scalar loss with respect to parameters, known by its products.

    The gradient is built once, with its graph; each product is one reverse pass through it, about
    1.35 gradients for a multilayer perceptron. The operator is the Hessian at the parameters'
    values when it was made. It leaves ``.grad``, the modules' mode and buffers and the random
    state as they were.

    Args:
        loss: a scalar with its graph (kept alive, never freed), or a callable without arguments
            that returns one. The callable is evaluated once, here, under
            :func:`~hessreg.curvature.third_order.third_order_safe`, and the buffers and the random
            state are put back afterwards. Nothing in it may go through ``torch.compile``: a
            compiled module is refused, a compiled function may raise torch's own error.
        params: the tensors to differentiate by: one, or several of one dtype and device. Vectors
            are their flat concatenation, [n]. Those the loss does not use count as zeros.

    Attributes:
        loss: the scalar, with its graph.
        params: the parameters, as a list.
        gradient: the flat gradient [n], detached.

    Raises:
        TypeError: a loss or a parameter of the wrong type.
        ValueError: no scalar, no graph, no parameters, a parameter twice, a mixture of dtypes or
            devices, a gradient penalty through a normalisation layer that torch differentiates
            wrongly, native weight normalisation, a reentrant checkpoint, a compiled module.
        NonFiniteError: NaN or infinity in the loss or the gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> H = HessianOperator(x[0] ** 3 + x[0] * x[1], x)
        >>> H.matvec(torch.tensor([1.0, 0.0]))
        tensor([6., 1.])
    """

    def __init__(
        self, loss: Tensor | Callable[[], Tensor], params: Tensor | Iterable[Tensor]
    ) -> None:
        self.params = _check_params(params)
        self.dtype = self.params[0].dtype
        self.device = self.params[0].device
        n = sum(p.numel() for p in self.params)
        self.shape = (n, n)
        self.loss = _check_loss(loss if isinstance(loss, Tensor) else _evaluate(loss, self.device))
        refuse_opaque(self.loss)
        require_third_order_safe(self.loss, derivatives=2)
        grads = torch.autograd.grad(
            self.loss, self.params, create_graph=True, materialize_grads=True
        )
        self.gradient = _flatten(grads).detach()
        self._check_finite("gradient", self.gradient)
        # A gradient that is constant in every parameter has no graph and a zero Hessian.
        self._live = [i for i, g in enumerate(grads) if g.requires_grad]
        self._grads = [grads[i] for i in self._live]
        self._batched = True

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Hessian-vector product H v.

        Args:
            v: [n].
            create_graph: make the product differentiable in the parameters and in everything else
                the loss depends on.

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
        if create_graph:
            require_third_order_safe(self.loss)
        return self._checked(_flatten(self._products(self._split(v), create_graph=create_graph)))

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the k columns of V [n, k], in one batched reverse pass: [n, k]."""
        self._check_vectors("V", V, ndim=2)
        if not self._batched or V.shape[1] == 0:
            return super().matmat(V)
        vectors = [part.mT.reshape(-1, *p.shape) for part, p in self._pairs(V)]
        try:
            products = self._products(vectors, batched=True)
        except RuntimeError:  # an operation of the loss has no batching rule
            self._batched = False
            return super().matmat(V)
        return self._checked(torch.cat([h.reshape(V.shape[1], -1) for h in products], 1).mT)

    def check_finite(self, product: Tensor) -> None:
        """Reports NaN or infinity in a product [n] by parameter and position.

        Raises:
            NonFiniteError: names the first parameter concerned, its shape, the position and the
                value.

        Example:
            >>> x = torch.ones(2, requires_grad=True)
            >>> H = HessianOperator(x.square().sum(), x)
            >>> H.check_finite(  # doctest: +IGNORE_EXCEPTION_DETAIL
            ...     torch.tensor([0.0, float("nan")])
            ... )
            Traceback (most recent call last):
            NonFiniteError: Hessian-vector product of params[0], shape (2,), is nan at (1,)
        """
        self._check_finite("Hessian-vector product", product.detach())

    def _checked(self, product: Tensor) -> Tensor:
        if self.device.type == "cpu":
            for column in product.reshape(self.shape[0], -1).unbind(1):
                self.check_finite(column)
        return product

    def _products(
        self, vectors: Sequence[Tensor], create_graph: bool = False, batched: bool = False
    ) -> Sequence[Tensor]:
        if not self._grads:
            return [torch.zeros_like(v) for v in vectors]
        return torch.autograd.grad(
            self._grads,
            self.params,
            [vectors[i] for i in self._live],
            retain_graph=True,
            create_graph=create_graph,
            is_grads_batched=batched,
            materialize_grads=True,
        )

    def _pairs(self, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(v.split([p.numel() for p in self.params]), self.params, strict=True)

    def _split(self, v: Tensor) -> list[Tensor]:
        return [part.reshape(p.shape) for part, p in self._pairs(v)]

    def _check_finite(self, what: str, vector: Tensor) -> None:
        if torch.isfinite(vector.sum()):  # tells nearly always, at a tenth of the time
            return
        for i, part in enumerate(self._split(vector)):
            bad = (~torch.isfinite(part)).nonzero()
            if len(bad):
                place = tuple(bad[0].tolist())
                raise NonFiniteError(
                    f"{what} of params[{i}], shape {tuple(part.shape)},"
                    f" is {part[place].item()} at {place}"
                )


class DenseOperator(SymmetricOperator):
    """A symmetric matrix as an operator.

    Args:
        H: [n, n], symmetric to rounding. If it carries a graph, norms of it are differentiable.

    Raises:
        TypeError: not a tensor of float32 or float64.
        ValueError: not square, empty, not finite or not symmetric.

    Example:
        >>> DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).matvec(torch.tensor([1.0, 2.0]))
        tensor([2., 1.])
    """

    def __init__(self, H: Tensor) -> None:
        _check_symmetric(H)
        self.H = H
        self.shape = (H.shape[0], H.shape[0])
        self.dtype = H.dtype
        self.device = H.device

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Product with v [n]; with ``create_graph``, differentiable in H."""
        self._check_vectors("v", v, ndim=1)
        return (self.H if create_graph else self.H.detach()) @ v

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the k columns of V [n, k]: [n, k]."""
        self._check_vectors("V", V, ndim=2)
        return self.H.detach() @ V


def _flatten(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _check_params(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(params, nn.Module):
        raise TypeError("params must be tensors, got a Module: pass module.parameters()")
    checked = [params] if isinstance(params, Tensor) else list(params)
    for i, p in enumerate(checked):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{i}] must be a Tensor, got {type(p).__name__}")
        if not p.requires_grad:
            raise ValueError(f"params[{i}], shape {tuple(p.shape)}, must require a gradient")
        _check_dtype(f"params[{i}]", p.dtype)
        if (p.dtype, p.device) != (checked[0].dtype, checked[0].device):
            raise ValueError(
                f"params must share one dtype and device: params[0] has {checked[0].dtype} on"
                f" {checked[0].device}, params[{i}] has {p.dtype} on {p.device}"
            )
    _check_distinct(checked)
    return checked


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {dtype}")


def _check_distinct(params: Sequence[Tensor]) -> None:
    if not any(p.numel() for p in params):
        raise ValueError(f"params must hold at least one number, got {len(params)} tensors")
    first: dict[int, int] = {}
    for i, p in enumerate(params):
        if first.setdefault(id(p), i) != i:
            raise ValueError(f"params must be distinct, params[{i}] is params[{first[id(p)]}]")


def _check_loss(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a Tensor or return one, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss must have a graph, got one that requires no gradient")
    if not torch.isfinite(loss):
        raise NonFiniteError(f"loss must be finite, got {loss.item()}")
    return loss


def _check_symmetric(H: Tensor) -> None:
    if not isinstance(H, Tensor):
        raise TypeError(f"H must be a Tensor, got {type(H).__name__}")
    _check_dtype("H", H.dtype)
    if H.dim() != 2 or H.shape[0] != H.shape[1] or H.shape[0] == 0:
        raise ValueError(f"H must be square and not empty, got shape {tuple(H.shape)}")
    values = H.detach()
    if not torch.isfinite(values).all():
        raise ValueError("H must be finite, got NaN or infinity")
    asymmetry = (values - values.mT).abs().max()
    if asymmetry > values.abs().max() * torch.finfo(H.dtype).eps ** 0.5:
        raise ValueError(f"H must be symmetric, got max |H - H'| = {asymmetry.item():.3g}")


def _evaluate(loss: Callable[[], Tensor], device: torch.device) -> Tensor:
    if not callable(loss):
        raise TypeError(f"loss must be a Tensor or a callable, got {type(loss).__name__}")
    with ExitStack() as stack:
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(_buffers_restored())
        stack.enter_context(third_order_safe())
        stack.enter_context(torch.enable_grad())
        return loss()


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
