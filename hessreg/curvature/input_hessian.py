"""Hessians of a function in its inputs, one for each sample of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from hessreg.curvature._checks import NonFiniteError, check_at_least, full_precision
from hessreg.curvature.eigenvalues import default_tol
from hessreg.curvature.evaluation import RandomState, evaluate
from hessreg.curvature.exact_norms import NormOrder
from hessreg.curvature.hessian import HessianGraph
from hessreg.curvature.norms import ConvergenceWarning
from hessreg.curvature.parameters import FlatParameters
from hessreg.ops.spectral import (
    symmetric_eigh,
    symmetric_eigvalsh,
    symmetric_norm,
    tridiagonal_eigh,
)

__all__ = ["InputHessianOperator", "SampleEigenpairs"]

_SMALL = 128  # most entries of a sample whose whole matrix is formed for its spectral norm
_NUM_STEPS = 100  # most Lanczos steps where no number is given
_LOOK = 5  # steps between two looks at the Ritz values, each of which waits for the device


class SampleEigenpairs(NamedTuple):
    """An eigenpair of each sample.

    Attributes:
        values: [b], differentiable if gradients are enabled.
        vectors: [b, n], unit vectors.
        residuals: [b], norms of H v - value v: an eigenvalue that close to the value exists.
        converged: bool [b]: the residual is at most 5e-6 (float64: 1e-8) times the value.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor


class InputHessianOperator:
    """Hessians of a function in its inputs, one n x n matrix for each sample, by their products.

    ``fn`` maps x [b, ...] to one number for each sample, [b] or [b, 1], such as the logits of a
    discriminator, and number i depends on sample i only. So one product with the Hessian of the
    sum multiplies the matrices of all samples. The gradient is built once, with its graph; each
    product is one reverse pass through it, less than a gradient. Where ``fn`` is a multilayer
    perceptron as :class:`HessianOperator` recognises it, with whatever behind it, and none of its
    parameters is frozen, products are fused and take about half of that.

    What couples the samples, such as batch normalisation in training mode or minibatch standard
    deviation, is refused: one product, along every second sample, shows it where there are mixed
    second derivatives. Put such layers into evaluation mode. Networks of ReLU and other piecewise
    linear activations have Hessians of zero almost everywhere, unless something smooth is among
    them or follows: use a smooth activation.

    The whole batch as one operator (b n, b n), for ``eigenvalues``, ``trace`` and so on, is
    ``HessianOperator(lambda: fn(x).sum(), x)``, fused as well.

    It leaves ``.grad``, the modules' mode and buffers and the random state as they were. ``fn`` is
    evaluated once, under :func:`~hessreg.curvature.third_order.third_order_safe`. ``backward`` of a
    norm frees the graph, unless called with ``retain_graph=True``: make it the last use.

    Args:
        fn: a module or another callable. Nothing in it may go through ``torch.compile``.
        x: [b, ...], float32 or float64, n entries in each sample; b may be 0. If it requires a
            gradient, norms are differentiable in it too, through whatever made it.
        max_bytes: memory for several vectors at once, about; more of them are taken in turn.

    Attributes:
        shape: (b, n, n).
        dtype: of x.
        device: of x.
        outputs: what ``fn`` returned, with its graph.

    Raises:
        TypeError: x or what ``fn`` returns is no tensor of such a type, or ``fn`` no callable.
        ValueError: x without a batch dimension or entries, outputs of another shape or without a
            graph, samples that depend on each other; as :class:`HessianOperator`.
        NonFiniteError: NaN or infinity in the outputs, the gradient or a product.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> H = InputHessianOperator(lambda x: x[:, 0] ** 2 * x[:, 1], x)
        >>> H.matvec(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([[4., 2.],
                [0., 6.]])
        >>> H.norm("one").tolist()
        [6.0, 6.0]
    """

    def __init__(
        self, fn: Callable[[Tensor], Tensor], x: Tensor, *, max_bytes: int = 1 << 30
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be a callable, got {type(fn).__name__}")
        _check_inputs(x)
        check_at_least(1, max_bytes=max_bytes)
        self._max_bytes = max_bytes
        self._x = x if x.requires_grad else x.detach().requires_grad_(True)
        n = x.shape[1:].numel()
        self.shape, self.dtype, self.device = (len(x), n, n), x.dtype, x.device
        self.outputs = _check_outputs(evaluate(fn, self._x, state=RandomState(x.device)), x)
        self._graph = None if len(x) == 0 else self._linearize()
        if len(x) > 1:
            self._require_independent()

    def _linearize(self) -> HessianGraph:
        with torch.enable_grad():
            total = self.outputs.to(self.dtype).sum()
        return HessianGraph(total, FlatParameters(self._x, labels=["x"]))

    @torch.no_grad()
    def _require_independent(self) -> None:
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.shape[:2], dtype=self.dtype, device="cpu", generator=generator)
        v = v.to(self.device)
        # Any two samples differ in a bit of their number: one is moved, the other must not notice.
        numbers = torch.arange(len(v), device=self.device)
        bits = torch.arange((len(v) - 1).bit_length(), device=self.device)
        is_moved = (numbers[:, None] >> bits & 1 == 0)[:, None]
        product = self.matmat(v[..., None] * is_moved).abs()
        if (product * ~is_moved).max() > product.max() * torch.finfo(self.dtype).eps ** 0.5:
            raise ValueError(
                "fn must treat every sample by itself, got outputs that depend on other samples"
                " too: is there batch normalisation in training mode?"
            )

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Product of the matrix of each sample with its own vector.

        Args:
            v: [b, n], or in the shape of x.
            create_graph: make it differentiable in x and in what ``fn`` depends on.

        Returns:
            A tensor like v.

        Raises:
            TypeError: v is not a tensor, or of another dtype.
            ValueError: v has another shape or device.
            NonFiniteError: NaN or infinity in the product (looked for on the CPU only: on a GPU
                the check would wait for the device).
        """
        self._check_vectors("v", v, self.shape[:2], self._x.shape)
        if self._graph is None:
            return v + self.outputs.sum() if create_graph else torch.zeros_like(v)
        with full_precision(self.device):
            product = self._graph.product(v.reshape(-1), create_graph)
        return self._checked(product).view(v.shape)

    def matmat(self, V: Tensor) -> Tensor:
        """Products with k vectors for each sample, many at once: [b, n, k] to the same.

        Raises:
            TypeError, ValueError, NonFiniteError: as :meth:`matvec`.
        """
        k = V.shape[-1] if isinstance(V, Tensor) and V.dim() == 3 else None
        self._check_vectors("V", V, (*self.shape[:2], "k" if k is None else k))
        if self._graph is None or k == 0:
            return torch.zeros_like(V)
        vectors = V.movedim(2, 0).reshape(V.shape[2], -1)
        with full_precision(self.device):
            products = self._checked(self._graph.products(vectors, self._max_bytes))
        return products.view(-1, *self.shape[:2]).movedim(0, 2)

    def dense(self, *, create_graph: bool = False) -> Tensor:
        """The matrices [b, n, n]: n products, with ``create_graph`` each with its graph."""
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        if not create_graph:
            return self.matmat(eye.expand(self.shape))
        rows = [e.expand(self.shape[:2]) for e in eye]
        return torch.stack([self.matvec(e, create_graph=True) for e in rows], 2)

    def eigvalsh(self) -> Tensor:
        """All eigenvalues [b, n], ascending; differentiable if gradients are enabled."""
        return symmetric_eigvalsh(self.dense(create_graph=torch.is_grad_enabled()))

    def norm(self, ord: NormOrder = "spectral") -> Tensor:
        """Norm of the matrix of each sample, [b].

        Exact, as :func:`hessreg.symmetric_norm` of :meth:`dense`; but for "spectral" of samples of
        more than 128 entries, which is the modulus of :meth:`leading_eigenpair`. Differentiable, if
        gradients are enabled, in x and in what ``fn`` depends on; where there is no gradient, as at
        H = 0, it is a finite subgradient. Second derivatives of "spectral" and "one" hold the
        eigenvector or the column fixed.

        Cost: n products; with gradients, one with its graph besides for "spectral" and "one", and
        n with their graphs instead for "nuclear" and "fro", which suits samples of few entries.
        Memory: b n^2 numbers.

        Args:
            ord: "spectral", "nuclear", "one" or "fro".

        Raises:
            ValueError: an unknown ``ord``.
            NonFiniteError: NaN or infinity in a product.

        Warns:
            ConvergenceWarning: the spectral norm of a large sample is not known to be right.

        Example:
            >>> x = torch.ones(1, 2, requires_grad=True)
            >>> norm = InputHessianOperator(lambda x: (x**3).sum(1), x).norm("nuclear")
            >>> torch.autograd.grad(norm.sum(), x)
            (tensor([[6., 6.]]),)
        """
        if ord not in get_args(NormOrder):
            raise ValueError(f"ord must be one of {get_args(NormOrder)}, got {ord!r}")
        if ord == "spectral" and self.shape[1] > _SMALL:
            return self._iterated_spectral_norm()
        differentiable = torch.is_grad_enabled()
        if not differentiable or ord in ("nuclear", "fro"):
            return symmetric_norm(self.dense(create_graph=differentiable), ord)
        H = self.dense()
        if ord == "one":
            column = torch.zeros_like(H[..., 0]).scatter_(1, H.abs().sum(1).argmax(1)[:, None], 1)
            return self.matvec(column, create_graph=True).abs().sum(1)
        values, vectors = symmetric_eigh(H)
        return self._form(_column_of(vectors, values.abs().argmax(1))).abs()

    def _iterated_spectral_norm(self) -> Tensor:
        found = self.leading_eigenpair()
        if not found.converged.all():
            count = int((~found.converged).sum())
            warnings.warn(
                f"the spectral norm is not converged for {count} of {len(found.converged)} samples",
                ConvergenceWarning,
                stacklevel=3,
            )
        return found.values.abs()

    def leading_eigenpair(
        self, num_steps: int | None = None, *, generator: torch.Generator | None = None
    ) -> SampleEigenpairs:
        """The eigenvalue of largest modulus of each sample, all samples in one product.

        Lanczos with full reorthogonalisation for every sample by itself. Unlike power iteration it
        is right where eigenvalues lambda and -lambda are both leading, as at a saddle. The value is
        v' H v; its gradient, with v held fixed, is the eigenvalue's as far as v has converged.

        Cost: num_steps products, and one with its graph. Memory: num_steps vectors.

        Args:
            num_steps: Lanczos steps, at most n are made. None: until all samples have converged,
                at most 100.
            generator: source of the random start; None is one seeded with 0, so that calls agree
                and the global random state stays as it is.

        Raises:
            TypeError: num_steps is not an int.
            ValueError: num_steps < 1.
            NonFiniteError: NaN or infinity in a product.

        Example:
            >>> x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
            >>> H = InputHessianOperator(lambda x: x[:, 0] * x[:, 1] + x[:, 1] ** 3, x)
            >>> [round(value, 3) for value in H.leading_eigenpair().values.abs().tolist()]
            [1.0, 6.162]
        """
        check_at_least(1, num_steps=_NUM_STEPS if num_steps is None else num_steps)
        generator = generator or torch.Generator().manual_seed(0)
        start = torch.randn(
            self.shape[:2], dtype=self.dtype, device=generator.device, generator=generator
        )
        vectors, residuals, converged = self._lanczos(start.to(self.device), num_steps)
        return SampleEigenpairs(self._form(vectors), vectors, residuals, converged)

    @torch.no_grad()
    def _lanczos(self, start: Tensor, num_steps: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz vectors [b, n] of largest modulus, their residuals and whether they converged."""
        m = min(_NUM_STEPS if num_steps is None else num_steps, self.shape[1])
        basis = start.new_zeros(m, *start.shape)
        alpha, beta = basis.new_zeros(2, m, len(start))
        basis[0] = start / _norm_of(start)[:, None]
        largest = previous = beta[0]
        for j in range(m):
            w, alpha[j] = _orthogonalize(self.matvec(basis[j]), basis[: j + 1])
            residual = _norm_of(w)
            largest = largest.maximum(alpha[j].hypot(previous).hypot(residual))
            # After a breakdown the vectors stay zero: no branch, so no wait for the device.
            broken = ~(residual > 64 * torch.finfo(self.dtype).eps * largest)
            beta[j] = previous = residual.masked_fill(broken, 0)
            if j + 1 < m:
                basis[j + 1] = w / residual.masked_fill(broken, torch.inf)[:, None]
            if j + 1 == m or (num_steps is None and (j + 1) % _LOOK == 0):
                found = _leading_ritz(alpha[: j + 1], beta[: j + 1], basis[: j + 1])
                if found[2].all():
                    break
        return found

    def _form(self, vectors: Tensor) -> Tensor:
        """The forms v' H v [b], differentiable if gradients are enabled."""
        product = self.matvec(vectors, create_graph=torch.is_grad_enabled())
        return (vectors * product).sum(1)

    def _checked(self, product: Tensor) -> Tensor:
        if self.device.type == "cpu" and self._graph is not None:
            self._graph.params.check_finite("product", product.detach())
        return product

    def _check_vectors(self, name: str, v: Any, *shapes: tuple[Any, ...]) -> None:
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(v).__name__}")
        if v.shape not in shapes:
            wanted = " or ".join(f"({', '.join(map(str, s))})" for s in dict.fromkeys(shapes))
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(v.shape)}")
        if v.dtype != self.dtype:
            raise TypeError(f"{name} must have dtype {self.dtype}, got {v.dtype}")
        if v.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, got {v.device}")


def _check_inputs(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if x.dim() == 0 or x.shape[1:].numel() == 0:
        raise ValueError(f"x must be [b, ...] with entries in a sample, got {tuple(x.shape)}")


def _check_outputs(outputs: Any, x: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"fn must return a Tensor, got {type(outputs).__name__}")
    b = len(x)
    if outputs.shape not in ((b,), (b, 1)):
        raise ValueError(
            f"fn must return one number for each sample, shape ({b},) or ({b}, 1), got"
            f" {tuple(outputs.shape)}"
        )
    if not outputs.requires_grad:
        raise ValueError("fn must return a tensor with a graph, got one without")
    bad = (~torch.isfinite(outputs.detach().flatten())).nonzero()
    if len(bad):
        i = int(bad[0])
        raise NonFiniteError(f"fn must return finite numbers, got {outputs[i].item()} for x[{i}]")
    return outputs


def _orthogonalize(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Of w [b, n], the part orthogonal to basis [m, b, n], and the coefficient [b] on the last.

    Classical Gram-Schmidt, twice.
    """
    last = torch.zeros_like(w[:, 0])
    for _ in range(2):
        coefficients = (basis * w).sum(-1)  # [m, b]
        w = w - (coefficients[..., None] * basis).sum(0)
        last = last + coefficients[-1]
    return w, last


def _leading_ritz(alpha: Tensor, beta: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From alpha and beta [m, b] and the basis [m, b, n]: as ``_lanczos`` returns it."""
    values, coordinates = tridiagonal_eigh(alpha.mT.double(), beta[:-1].mT.double())
    # After a breakdown there are zeros besides the eigenvalues, without a part of the start.
    moduli = values.abs().masked_fill(coordinates[:, 0] == 0, -1)
    leading = moduli.argmax(1)
    s = _column_of(coordinates, leading)  # [b, m]
    size = moduli.gather(1, leading[:, None])[:, 0].to(alpha)
    rounding = torch.finfo(alpha.dtype).eps * size
    residuals = (beta[-1] * s[:, -1].to(beta).abs()).maximum(rounding)
    vectors = (s.mT.to(basis)[..., None] * basis).sum(0)
    vectors = vectors / _norm_of(vectors)[:, None]
    return vectors, residuals, residuals <= default_tol(alpha.dtype) * size


def _column_of(matrices: Tensor, index: Tensor) -> Tensor:
    """Column index[i] of matrix i: [b, m, k] and [b] to [b, m]."""
    places = index[:, None, None].expand(-1, matrices.shape[1], 1)
    return matrices.gather(2, places)[..., 0]


def _norm_of(v: Tensor) -> Tensor:
    """Euclidean norms [b] of v [b, n]."""
    return torch.linalg.vector_norm(v, dim=1, dtype=torch.float64).to(v.dtype)
