"""Derivatives of functions of symmetric matrices that stay exact at repeated eigenvalues.

Everything here takes float64 matrices ``[..., n, n]`` together with their eigenpairs, which carry
no graph: derivatives come from closed forms of the divided differences (Daleckii and Krein, 1965),
in which close eigenvalues are never subtracted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Eigenpairs",
    "fixed_matrix",
    "inverse_of",
    "outer",
    "resolvent_product",
    "resolvent_values",
]


class Eigenpairs(NamedTuple):
    """Eigenvalues [..., n] and eigenvectors [..., n, n] in columns."""

    values: Tensor
    vectors: Tensor

    def matrix(self, weights: Tensor) -> Tensor:
        """V diag(weights) V'."""
        return (self.vectors * weights[..., None, :]) @ self.vectors.mT

    def product(self, weights: Tensor, g: Tensor) -> Tensor:
        """V diag(weights) V' g, [..., n]."""
        return (self.vectors @ (weights[..., None] * (self.vectors.mT @ g[..., None])))[..., 0]


def outer(a: Tensor, b: Tensor) -> Tensor:
    """The symmetric part of a b', [..., n, n]."""
    product = a[..., None] * b[..., None, :]
    return (product + product.mT) / 2


def resolvent_values(values: Tensor, alpha: float, gamma: float, eps: float) -> Tensor:
    """Re (alpha + i gamma) / (l + i eps) for each l, without overflow.

    Example:
        >>> resolvent_values(torch.tensor([1e30, 1.0, 0.0]), alpha=1.0, gamma=1.0, eps=1.0)
        tensor([1.0000e-30, 1.0000e+00, 1.0000e+00])
    """
    scale = values.abs().clamp(min=eps)
    real, imaginary = values / scale, eps / scale
    squared = real * real + imaginary * imaginary
    return (alpha * real + gamma * imaginary) / squared / scale


class _Resolvent(torch.autograd.Function):
    """u = Re[(alpha + i gamma) R] g with R = (H + i eps)^-1.

    dR = -R dH R, and all that its derivative takes are products of this kind again, so that every
    order is exact.
    """

    @staticmethod
    def forward(
        H: Tensor,
        g: Tensor,
        values: Tensor,
        vectors: Tensor,
        alpha: float,
        gamma: float,
        eps: float,
    ) -> Tensor:
        weights = resolvent_values(values, alpha, gamma, eps)
        return Eigenpairs(values, vectors).product(weights, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.numbers = inputs[4:]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        H, g, values, vectors = ctx.saved_tensors
        alpha, gamma, eps = ctx.numbers

        def product(x: Tensor, alpha: float, gamma: float) -> Tensor:
            return _Resolvent.apply(H, x, values, vectors, alpha, gamma, eps)

        for_matrix = for_vector = None
        if ctx.needs_input_grad[1]:
            for_vector = product(cotangent, alpha, gamma)
        if ctx.needs_input_grad[0]:
            (a, b), (c, d) = ((product(x, 1.0, 0.0), product(x, 0.0, -1.0)) for x in (cotangent, g))
            for_matrix = gamma * (outer(a, d) + outer(b, c)) - alpha * (outer(a, c) - outer(b, d))
        return for_matrix, for_vector, None, None, None, None, None


def resolvent_product(
    H: Tensor, pairs: Eigenpairs, g: Tensor, alpha: float, gamma: float, eps: float
) -> Tensor:
    """Re[(alpha + i gamma)(H + i eps)^-1] g [..., n], differentiable in H and g to every order.

    Args:
        H: symmetric [..., n, n], with the batch of g.
        pairs: its eigenpairs.
        g: [..., n].
        alpha: see above.
        gamma: see above.
        eps: positive.
    """
    return _Resolvent.apply(H, g, *pairs, alpha, gamma, eps)


class _Inverse(torch.autograd.Function):
    """eps^2 H^-1, or zero where weights are: dX = -(X / eps) dH (X / eps), to every order."""

    @staticmethod
    def forward(H: Tensor, vectors: Tensor, weights: Tensor, eps: float) -> Tensor:
        return (vectors * weights[..., None, :]) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.eps = inputs[3]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        X = _Inverse.apply(*ctx.saved_tensors, ctx.eps) / ctx.eps
        return -X @ ((cotangent + cotangent.mT) / 2) @ X, None, None, None


def inverse_of(H: Tensor, pairs: Eigenpairs, weights: Tensor, eps: float) -> Tensor:
    """eps^2 H^-1 [..., n, n], differentiable to every order.

    Args:
        H: symmetric [..., n, n].
        pairs: its eigenpairs.
        weights: eps^2 over its eigenvalues, [..., n]; where zero, the eigenvalue stays out, also of
            the derivatives.
        eps: positive.
    """
    return _Inverse.apply(H, pairs.vectors, weights, eps)


class _Fixed(torch.autograd.Function):
    """V diag(weights) V', with divided differences that are known for the first derivative only."""

    @staticmethod
    def forward(H: Tensor, vectors: Tensor, weights: Tensor, differences: Tensor) -> Tensor:
        return (vectors * weights[..., None, :]) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], inputs[3])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        H, vectors, differences = ctx.saved_tensors
        symmetric = (cotangent + cotangent.mT) / 2
        turned = differences * (vectors.mT @ symmetric @ vectors)
        return _Refused.apply(vectors @ turned @ vectors.mT, H), None, None, None


class _Refused(torch.autograd.Function):
    """The identity, constant in H by no means, but with no derivative here."""

    @staticmethod
    def forward(x: Tensor, H: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "saddle_free=True can be differentiated once only: |H| has a kink at singular H."
            " Use saddle_free=False for second derivatives"
        )


def fixed_matrix(H: Tensor, pairs: Eigenpairs, weights: Tensor, differences: Tensor) -> Tensor:
    """V diag(weights) V' [..., n, n], differentiable once.

    Args:
        H: symmetric [..., n, n].
        pairs: its eigenpairs.
        weights: the function's values, [..., n].
        differences: (f(l_i) - f(l_j)) / (l_i - l_j), [..., n, n].
    """
    return _Fixed.apply(H, pairs.vectors, weights, differences)
