"""Hessian-vector products of a loss of a multilayer perceptron by the fused operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hessreg import _backend
from hessreg.curvature.autograd_graph import AutogradGraph
from hessreg.curvature.mlp_graph import Chain, LossTerm, find_chains, find_input_chain
from hessreg.curvature.parameters import FlatParameters
from hessreg.ops.hvp import MLPHessian, loss_terms

__all__ = ["FusedHessian", "FusedInputHessian", "FusedProducts"]


class FusedProducts(Protocol):
    """What multiplies without gradients being recorded."""

    def products(self, vectors: Tensor) -> Tensor:
        """Products with k vectors: [k, n] to [k, n]."""
        ...

    @property
    def elements_per_vector(self) -> int:
        """About how many numbers one vector more takes, beside itself and the product."""
        ...


class FusedHessian:
    """The Hessian of a loss whose parameters are all those of one perceptron.

    The perceptron's part is multiplied by the R-operator, all of its passes in one batch, the
    rest of the loss by autograd.

    Args:
        chains: the perceptron's passes in the loss.
        network: the perceptron with the inputs of all passes.
        head: what the loss makes of their outputs.
        params: the parameters.
        gauss_newton: leave out the curvature of the perceptron itself.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        network: MLPHessian,
        head: _Head | _SumHead,
        params: FlatParameters,
        gauss_newton: bool,
    ) -> None:
        fixed = [*params.tensors, *chains[0].leaves]
        self._versions = [(t, t._version) for t in fixed]
        self._network, self._head, self._gauss_newton = network, head, gauss_newton
        with torch.no_grad():
            network.linearize(head.slopes)

    @classmethod
    def find(
        cls,
        loss: Tensor,
        params: FlatParameters,
        nodes: AutogradGraph | None = None,
        of_outputs: Tensor | None = None,
    ) -> FusedHessian | None:
        """The operator, if the loss is of that kind and there are kernels for its device.

        With ``of_outputs`` the Gauss-Newton matrix is meant, and these must be the perceptron's.
        ``nodes`` is the loss's graph, if it has been walked.
        """
        if not _backend.runs_compiled(params.device):
            return None
        chains = find_chains(loss, params.tensors, nodes)
        if chains is None or not all(chain.same_network(chains[0]) for chain in chains):
            return None
        if of_outputs is not None and [c.output.node for c in chains] != [of_outputs.grad_fn]:
            return None
        network = _network(chains, params, with_third=of_outputs is None)
        head = _SumHead.find(chains, network.outputs) or _Head.find(loss, chains)
        return None if head is None else cls(chains, network, head, params, of_outputs is not None)

    @torch.no_grad()
    def products(self, vectors: Tensor) -> Tensor:
        """Products with k vectors: [k, n] to [k, n].

        Raises:
            ValueError: a parameter was changed since.
        """
        self._check_versions()
        return self._network.product(vectors, self._head, gauss_newton=self._gauss_newton)

    @property
    def elements_per_vector(self) -> int:
        """About how many numbers one vector more takes, beside itself and the product."""
        return self._network.elements_per_vector

    @torch.no_grad()
    def lanczos_steps(
        self, basis: Tensor, first: int, num_steps: int, breakdown: float, largest: Tensor
    ) -> list[Tensor] | None:
        """As :func:`~hessreg.curvature.lanczos.lanczos_steps`, if the loss is a sum over outputs.

        Raises:
            ValueError: a parameter was changed since.
        """
        if not isinstance(self._head, _SumHead):
            return None
        self._check_versions()
        steps = basis, first, num_steps, breakdown, largest
        curvature = self._head.curvature
        return self._network.lanczos_steps(*steps, curvature, gauss_newton=self._gauss_newton)

    @torch.no_grad()
    def absolute_form(
        self, z: Tensor, num_steps: int, smoothing: float, weight: float, with_gradient: bool
    ) -> list[Tensor]:
        """As :meth:`MLPHessian.absolute_form`; nothing for other losses than sums over outputs.

        Raises:
            ValueError: a parameter was changed since.
        """
        if self._gauss_newton or not isinstance(self._head, _SumHead):
            return []
        self._check_versions()
        return self._network.absolute_form(
            z,
            num_steps,
            self._head.derivatives,
            smoothing=smoothing,
            weight=weight,
            with_gradient=with_gradient,
        )

    @torch.no_grad()
    def spectral_form(self, z: Tensor, num_steps: int, with_gradient: bool) -> list[Tensor]:
        """As :meth:`MLPHessian.spectral_form`, likewise; nothing where that is not compiled.

        Raises:
            ValueError: a parameter was changed since.
        """
        is_compiled = z.device.type == "cpu"
        if self._gauss_newton or not isinstance(self._head, _SumHead) or not is_compiled:
            return []
        self._check_versions()
        derivatives = self._head.derivatives
        return self._network.spectral_form(z, num_steps, derivatives, with_gradient=with_gradient)

    @torch.no_grad()
    def third_derivative(self, w: Tensor, z: Tensor) -> Tensor:
        """The gradient of w' H z in the parameters, for vectors [n]: [n].

        Raises:
            ValueError: a parameter was changed since.
        """
        self._check_versions()
        return self._network.third(w, z, self._head.third_derivative)

    def _check_versions(self) -> None:
        if any(t._version != version for t, version in self._versions):
            raise ValueError("params were changed in place since the operator was made of them")


class FusedInputHessian:
    """The Hessian of a loss in the input of one pass of a perceptron.

    Args:
        chain: the pass.
        head: what the loss makes of its outputs.
        x: what the pass takes, in its own shape.
    """

    def __init__(self, chain: Chain, head: _Head, x: Tensor) -> None:
        self._versions = [(t, t._version) for t in (x, *chain.leaves)]
        self._shape = chain.input.shape
        self._head = head
        with torch.no_grad():
            self._network = MLPHessian(
                [w.detach() for w in chain.weights],
                [None if b is None else b.detach() for b in chain.biases],
                chain.activations,
                chain.input,
            )
            self._network.linearize(head.slopes)

    @classmethod
    def find(cls, loss: Tensor, params: FlatParameters) -> FusedInputHessian | None:
        """The operator, if the loss is of that kind and there are kernels for its device."""
        if len(params.tensors) != 1 or not _backend.runs_compiled(params.device):
            return None
        chain = find_input_chain(loss, params.tensors[0])
        if chain is None:
            return None
        head = _Head.find(loss, [chain])
        return None if head is None else cls(chain, head, params.tensors[0])

    @torch.no_grad()
    def products(self, vectors: Tensor) -> Tensor:
        """Products with k vectors: [k, n] to [k, n].

        Raises:
            ValueError: the input or a parameter was changed since.
        """
        if any(t._version != version for t, version in self._versions):
            raise ValueError(
                "the input or a parameter was changed in place since the operator was made"
            )
        rows = vectors.reshape(-1, *self._shape)
        return self._network.input_product(rows, self._head).reshape(vectors.shape)

    @property
    def elements_per_vector(self) -> int:
        """About how many numbers one vector more takes, beside itself and the product."""
        return self._network.elements_per_vector


class _SumHead:
    """A loss that is a sum over the outputs of passes: its derivatives are numbers for each.

    Args:
        terms: what the sums are of, one for each pass.
        rows: of each pass.
        outputs: of all passes, [rows, outputs].
    """

    def __init__(self, terms: Sequence[LossTerm], rows: Sequence[int], outputs: Tensor) -> None:
        kinds = zip(*((t.activation, t.sign, t.scale) for t in terms), strict=True)
        self.derivatives = loss_terms(outputs, rows, *map(list, kinds))
        self.slopes, self.curvature, self._third = self.derivatives

    @classmethod
    @torch.no_grad()
    def find(cls, chains: Sequence[Chain], outputs: Tensor) -> _SumHead | None:
        """Of the outputs of all passes, if the loss is that, and its slopes are finite."""
        terms = [chain.term for chain in chains if chain.term is not None]
        if len(terms) < len(chains):
            return None
        head = cls(terms, [len(chain.input) for chain in chains], outputs)
        return head if math.isfinite(head.slopes.sum()) else None

    def __call__(self, moved: Tensor) -> Tensor:
        """[k, rows, outputs] to the same."""
        return self.curvature * moved

    def third_derivative(
        self, y_w: Tensor, y_z: Tensor, y_wz: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`MLPHessian.third` takes it: [rows, outputs] each, and returned likewise."""
        slope = self.curvature * y_wz + self._third * y_w * y_z
        return slope, self.curvature * y_z, self.curvature * y_w


class _Head:
    """How the slopes in the outputs of passes move with them.

    Args:
        chains: the passes.
        slopes: the gradients of the loss in their outputs, with their graphs.
    """

    def __init__(self, chains: Sequence[Chain], slopes: Sequence[Tensor]) -> None:
        self._edges = [chain.output for chain in chains]
        self._lengths = [len(chain.input) for chain in chains]
        self.slopes = torch.cat([slope.detach() for slope in slopes])
        # Where a slope is constant, the loss has no curvature in that pass's outputs.
        self._live = [i for i, slope in enumerate(slopes) if slope.requires_grad]
        self._slopes = [slopes[i] for i in self._live]

    @classmethod
    def find(cls, loss: Tensor, chains: Sequence[Chain]) -> _Head | None:
        """Of a loss, or None where the general way is to say more."""
        edges = [chain.output for chain in chains]
        slopes = torch.autograd.grad(loss, edges, create_graph=True, allow_unused=True)
        undefined = any(slope is None or not torch.isfinite(slope).all() for slope in slopes)
        return None if undefined else cls(chains, slopes)

    def __call__(self, moved: Tensor) -> Tensor:
        """[k, rows, outputs] to the same."""
        if not self._slopes:
            return torch.zeros_like(moved)
        parts = moved.split(self._lengths, 1)
        return _joined(self._curves([parts[i] for i in self._live]), parts, dim=1)

    def third_derivative(
        self, y_w: Tensor, y_z: Tensor, y_wz: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`MLPHessian.third` takes it: [rows, outputs] each, and returned likewise."""
        if not self._slopes:
            return torch.zeros_like(y_w), torch.zeros_like(y_w), torch.zeros_like(y_w)
        along_w, along_z, along_wz = (y.split(self._lengths) for y in (y_w, y_z, y_wz))
        with torch.enable_grad():
            moving = [along_z[i].detach().requires_grad_() for i in self._live]
            bent = self._gradients(self._slopes, self._edges, moving, create_graph=True)
        # A derivative of zero, as of a sign, may have no graph.
        curved = [None if b is None or not b.requires_grad else b for b in bent]
        pairs = [(b, w) for b, w in zip(curved, along_w, strict=True) if b is not None]
        cotangents = [w for _, w in pairs] + [along_wz[i] for i in self._live]
        outputs = [b for b, _ in pairs] + self._slopes
        found = self._gradients(outputs, [*self._edges, *moving], cotangents)
        of_moving: list[Tensor | None] = [None] * len(along_z)
        for i, gradient in zip(self._live, found[len(self._edges) :], strict=True):
            of_moving[i] = gradient
        return (
            _joined(found[: len(self._edges)], along_w),
            _joined([None if b is None else b.detach() for b in bent], along_w),
            _joined(of_moving, along_w),
        )

    def _curves(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        """That of k vectors in front of each part."""
        if len(parts[0]) > 1:
            try:
                return self._curve(parts, batched=True)
            except RuntimeError:  # an operation of the loss has no batching rule
                pass
        rows = [self._curve(row) for row in zip(*parts, strict=True)]
        return [None if c[0] is None else torch.stack(c) for c in zip(*rows, strict=True)]

    def _curve(self, parts: Sequence[Tensor], batched: bool = False) -> list[Tensor | None]:
        return self._gradients(self._slopes, self._edges, parts, is_grads_batched=batched)

    @staticmethod
    def _gradients(
        outputs: Sequence[Tensor],
        inputs: Sequence[Any],
        cotangents: Sequence[Tensor],
        **options: bool,
    ) -> list[Tensor | None]:
        found = torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, allow_unused=True, **options
        )
        return list(found)


def _joined(parts: Sequence[Tensor | None], like: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The parts in one, zero where there is none."""
    pairs = zip(parts, like, strict=True)
    return torch.cat([torch.zeros_like(t) if part is None else part for part, t in pairs], dim)


def _network(chains: Sequence[Chain], params: FlatParameters, with_third: bool) -> MLPHessian:
    starts = dict(zip(map(id, params.tensors), params.offsets, strict=True))
    first = chains[0]
    with torch.no_grad():
        return MLPHessian(
            [w.detach() for w in first.weights],
            [None if b is None else b.detach() for b in first.biases],
            first.activations,
            torch.cat([chain.input for chain in chains]),
            weight_offsets=[starts.get(id(w), -1) for w in first.weights],
            bias_offsets=[starts.get(id(b), -1) for b in first.biases],
            with_third=with_third,
        )
