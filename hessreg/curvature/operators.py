"""Symmetric linear operators: what every algorithm of this package multiplies by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

__all__ = ["DenseOperator", "LinearOperator", "SumOperator", "SymmetricOperator"]


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


class SymmetricOperator(ABC):
    """What the operators of this package share: checks, arithmetic and the export to scipy.

    Operators of one shape can be added, subtracted, multiplied by numbers and shifted.

    Example:
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> (2.0 * A - A.shifted(0.5)).matvec(torch.tensor([1.0, 1.0]))
        tensor([0.5000, 1.5000])
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Product with v [n]."""

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the k columns of V [n, k]: [n, k]."""
        self._check_vectors("V", V, ndim=2)
        columns = [self.matvec(v) for v in V.unbind(1)]
        return torch.stack(columns, 1) if columns else torch.empty_like(V)

    def bilinear(self, w: Tensor, z: Tensor, value: Tensor | None = None) -> Tensor:
        """The number w' A z [], for constant w and z, with its graph if gradients are enabled.

        The value may be known, which spares some operators a product.
        """
        return w.detach() @ self.matvec(z.detach(), create_graph=torch.is_grad_enabled())

    def shifted(self, shift: float) -> SumOperator:
        """This operator plus ``shift`` times the identity."""
        return SumOperator([self], [1.0], shift)

    def __add__(self, other: SymmetricOperator) -> SumOperator:
        return SumOperator([self, other], [1.0, 1.0])

    def __sub__(self, other: SymmetricOperator) -> SumOperator:
        return SumOperator([self, other], [1.0, -1.0])

    def __mul__(self, factor: float) -> SumOperator:
        return SumOperator([self], [factor])

    __rmul__ = __mul__

    def __neg__(self) -> SumOperator:
        return SumOperator([self], [-1.0])

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

        dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
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


class SumOperator(SymmetricOperator):
    """sum_i factors[i] A_i + shift I.

    Args:
        operators: the A_i, at least one, of one shape, dtype and device.
        factors: as many numbers.
        shift: multiple of the identity.

    Raises:
        TypeError: an operator that is none, or a factor that is no number.
        ValueError: none, another number of factors, or operators that do not fit together.

    Example:
        >>> A = DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> SumOperator([A], [2.0], shift=1.0).matvec(torch.tensor([1.0, 0.0]))
        tensor([1., 2.])
    """

    def __init__(
        self, operators: Sequence[LinearOperator], factors: Sequence[float], shift: float = 0.0
    ) -> None:
        if not operators or len(operators) != len(factors):
            raise ValueError(
                "operators and factors must be as many, and at least one, got"
                f" {len(operators)} and {len(factors)}"
            )
        for op in operators:
            _check_alike(op, operators[0])
        for number in (*factors, shift):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"factors and shift must be numbers, got {number!r}")
        self.operators, self.factors, self.shift = list(operators), list(factors), shift
        self.shape = operators[0].shape
        self.dtype, self.device = operators[0].dtype, operators[0].device

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Product with v [n], differentiable in what the operators depend on if asked."""
        self._check_vectors("v", v, ndim=1)
        products = [op.matvec(v, create_graph=create_graph) for op in self.operators]
        return self._combine(products, v)

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the k columns of V [n, k]: [n, k]."""
        self._check_vectors("V", V, ndim=2)
        return self._combine([op.matmat(V) for op in self.operators], V)

    def _combine(self, products: Sequence[Tensor], v: Tensor) -> Tensor:
        total = self.shift * v
        for factor, product in zip(self.factors, products, strict=True):
            total = torch.add(total, product, alpha=factor)
        return total


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


def _check_alike(op: LinearOperator, first: LinearOperator) -> None:
    if not isinstance(op, LinearOperator):
        raise TypeError(f"operators must be linear operators, got {type(op).__name__}")
    kind, wanted = ((o.shape, o.dtype, o.device) for o in (op, first))
    if kind != wanted:
        raise ValueError(f"operators must agree in shape, dtype and device: {wanted}, got {kind}")


def _check_symmetric(H: Tensor) -> None:
    if not isinstance(H, Tensor):
        raise TypeError(f"H must be a Tensor, got {type(H).__name__}")
    if H.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"H must be float32 or float64, got {H.dtype}")
    if H.dim() != 2 or H.shape[0] != H.shape[1] or H.shape[0] == 0:
        raise ValueError(f"H must be square and not empty, got shape {tuple(H.shape)}")
    values = H.detach()
    if not torch.isfinite(values).all():
        raise ValueError("H must be finite, got NaN or infinity")
    asymmetry = (values - values.mT).abs().max()
    if asymmetry > values.abs().max() * torch.finfo(H.dtype).eps ** 0.5:
        raise ValueError(f"H must be symmetric, got max |H - H'| = {asymmetry.item():.3g}")
