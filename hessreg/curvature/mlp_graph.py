"""Finding multilayer perceptrons in the autograd graph of a loss.

A loss of a perceptron leaves a graph of known nodes: a product with a transposed parameter for each
layer, an activation between two of them. Where *all* parameters enter the loss through such chains,
its Hessian can be multiplied by the fused operators, whatever the loss does with the chains'
outputs. Anything that is not recognised is left to the general way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hessreg.ops.hvp import Activation

__all__ = ["Chain", "find_chains", "find_input_chain"]

# Activations by the names of their nodes, with the attributes that hold a parameter.
_ACTIVATIONS: dict[str, tuple[str, str | None]] = {
    "TanhBackward0": ("tanh", None),
    "SigmoidBackward0": ("sigmoid", None),
    "SoftplusBackward0": ("softplus", "_saved_beta"),
    "SiluBackward0": ("silu", None),
    "GeluBackward0": ("gelu", None),
    "ReluBackward0": ("relu", None),
    "LeakyReluBackward0": ("leaky_relu", "_saved_negative_slope"),
    "EluBackward0": ("elu", "_saved_alpha"),
}

# Nodes that keep the order of the elements.
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


@dataclass
class Chain:
    """One pass of a perceptron within a loss.

    Attributes:
        input: what the first layer took, [batch, features].
        weights: parameters [out, in] of the layers.
        biases: parameters [out] of the layers; None for a layer without.
        activation: between the layers, as :class:`~hessreg.MLPHessian` takes it.
        output: the last layer's place in the graph.
    """

    input: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: Activation
    output: GradientEdge

    def same_network(self, other: Chain) -> bool:
        """Whether the other is a pass of the same layers."""
        mine, others = ([*c.weights, *c.biases] for c in (self, other))
        same = len(mine) == len(others) and all(a is b for a, b in zip(mine, others, strict=True))
        return same and self.activation == other.activation


@dataclass
class _Layer:
    node: Node
    weight: Tensor
    bias: Tensor | None
    source: Node | None  # what made its input


def find_chains(loss: Tensor, params: Sequence[Tensor]) -> list[Chain] | None:
    """The chains through which all of the parameters enter a loss.

    Args:
        loss: scalar with its graph.
        params: leaf tensors.

    Returns:
        The chains, each with different layers; None if a parameter enters in any other way, or
        none does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> chains = find_chains(net(torch.randn(4, 2)).square().mean(), list(net.parameters()))
        >>> len(chains), chains[0].activation, [tuple(w.shape) for w in chains[0].weights]
        (1, 'tanh', [(3, 2), (1, 3)])
    """
    graph = _Graph(loss, params)
    layers = graph.layers()
    if layers is None or not layers:
        return None
    chains: list[Chain] = []
    used = 0
    for first in (layer for layer in layers.values() if not graph.depends(layer.source)):
        path = list(_follow(graph, layers, first))
        used += len(path)
        chain = _make_chain(graph, path)
        if chain is None:
            return None
        chains.append(chain)
    return chains if used == len(layers) else None


def find_input_chain(loss: Tensor, x: Tensor) -> Chain | None:
    """The one chain through which a tensor enters a loss.

    Args:
        loss: scalar with its graph.
        x: requires a gradient; what made it is not looked at.

    Returns:
        The chain, whose input has the elements of ``x`` in their order and whose layers have all
        the parameters of the loss; None if ``x`` or a parameter enters in any other way.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> x = torch.randn(5, 1, 2, 2, requires_grad=True)
        >>> find_input_chain(net(x).sum(), x).input.shape
        torch.Size([5, 4])
    """
    node = get_gradient_edge(x).node
    graph = _Graph(loss, entry=node)
    layers = graph.layers() or {}
    user = graph.only_consumer(node)
    while user is not None and user.name() in _VIEWS:
        node, user = user, graph.only_consumer(user)
    first = None if user is None else layers.get(user)
    if first is None or first.source is not node:
        return None
    path = list(_follow(graph, layers, first))
    return _make_chain(graph, path) if len(path) == len(layers) else None


class _Graph:
    """The nodes of a loss, who consumes whom, and which of them depend on the parameters.

    With an entry instead of parameters, what is behind it is left out and every leaf is one.
    """

    def __init__(
        self, loss: Tensor, params: Sequence[Tensor] | None = None, entry: Node | None = None
    ) -> None:
        self.consumers: dict[Node, list[Node]] = {}
        self._order: list[Node] = []
        self._walk(loss.grad_fn, entry)
        if params is None:
            params = [n.variable for n in self._order if n is not entry and hasattr(n, "variable")]
        self._params = {id(p): p for p in params}
        self._dependent: set[Node] = set()
        for node in self._order:  # inputs before what is made from them
            inputs = (parent for parent, _ in node.next_functions)
            if self.parameter(node) is not None or any(n in self._dependent for n in inputs):
                self._dependent.add(node)

    def _walk(self, root: Node | None, entry: Node | None) -> None:
        done: set[Node] = set()
        pending: list[tuple[Node | None, bool]] = [(root, False)]
        while pending:
            node, finished = pending.pop()
            if node is None or (node in done and not finished):
                continue
            if finished:
                self._order.append(node)
                continue
            done.add(node)
            pending.append((node, True))
            for parent, _ in () if node is entry else node.next_functions:
                if parent is not None:
                    self.consumers.setdefault(parent, []).append(node)
                    pending.append((parent, False))

    def parameter(self, node: Node | None) -> Tensor | None:
        """The parameter that a leaf of the graph stands for."""
        variable = getattr(node, "variable", None)
        return None if variable is None else self._params.get(id(variable))

    def only_consumer(self, node: Node) -> Node | None:
        """What consumes a node, if one thing does."""
        users = self.consumers.get(node, [])
        return users[0] if len(users) == 1 else None

    def depends(self, node: Node | None) -> bool:
        return node in self._dependent

    def layers(self) -> dict[Node, _Layer] | None:
        """All layers, or None if a parameter is used otherwise."""
        found: dict[Node, _Layer] = {}
        for node in self._order:
            layer = self._layer(node)
            if layer is not None:
                found[node] = layer
        seen = {id(p) for layer in found.values() for p in (layer.weight, layer.bias)}
        for leaf in (node for node in self._order if self.parameter(node) is not None):
            uses = self.consumers.get(leaf, [])
            users = [self._through_transpose(user) for user in uses]
            if id(self.parameter(leaf)) not in seen or any(user not in found for user in users):
                return None
        return found

    def _through_transpose(self, node: Node) -> Node:
        users = self.consumers.get(node, [])
        return users[0] if node.name() == "TBackward0" and len(users) == 1 else node

    def _layer(self, node: Node) -> _Layer | None:
        inputs = [parent for parent, _ in node.next_functions]
        if node.name() == "AddmmBackward0" and _saved(node, "alpha", "beta") == [1, 1]:
            bias, source, transposed = inputs
        elif node.name() == "MmBackward0":
            bias, (source, transposed) = None, inputs
        else:
            return None
        if transposed is None or transposed.name() != "TBackward0":
            return None
        weight = self.parameter(transposed.next_functions[0][0])
        found = self.parameter(bias)
        # A bias that is no parameter leaves no trace of its value.
        if weight is None or (node.name() == "AddmmBackward0" and found is None):
            return None
        return _Layer(node, weight, found, source)


def _saved(node: Any, *names: str) -> list[Any]:
    return [getattr(node, f"_saved_{name}", None) for name in names]


def _follow(graph: _Graph, layers: Mapping[Node, _Layer], first: _Layer) -> Iterator[_Layer]:
    """The layers from the first on, as long as each feeds the next one and nothing else."""
    layer: _Layer | None = first
    while layer is not None:
        yield layer
        layer = _next_layer(graph, layers, layer)


def _next_layer(graph: _Graph, layers: Mapping[Node, _Layer], layer: _Layer) -> _Layer | None:
    node = layer.node
    for _ in range(2):  # the activation, then the next layer
        users = graph.consumers.get(node, [])
        if len(users) != 1:
            return None
        node = users[0]
        if node in layers and layers[node].source is not None:
            return layers[node] if layers[node].source is not layer.node else None
        if node.name() not in _ACTIVATIONS:
            return None
    return None


def _make_chain(graph: _Graph, path: Sequence[_Layer]) -> Chain | None:
    activations = {_activation(layer.source) for layer in path[1:]}
    tensors = [id(p) for layer in path for p in (layer.weight, layer.bias) if p is not None]
    if len(activations) > 1 or None in activations or len(set(tensors)) < len(tensors):
        return None
    name = "self" if path[0].node.name() == "MmBackward0" else "mat1"
    (entered,) = _saved(path[0].node, name)
    weight = path[0].weight
    if entered is None or (entered.dtype, entered.device) != (weight.dtype, weight.device):
        return None
    return Chain(
        entered.detach(),
        [layer.weight for layer in path],
        [layer.bias for layer in path],
        next(iter(activations), "identity") or "identity",
        GradientEdge(path[-1].node, 0),
    )


def _activation(node: Node | None) -> Activation | None:
    if node is None or node.name() not in _ACTIVATIONS:
        return None
    name, attribute = _ACTIVATIONS[node.name()]
    if _saved(node, "scale", "input_scale") not in ([None, None], [1, 1]):  # SELU, CELU
        return None
    if name == "gelu" and getattr(node, "_saved_approximate", "none") == "tanh":
        name = "gelu_tanh"
    return (name, float(getattr(node, attribute))) if attribute else name
