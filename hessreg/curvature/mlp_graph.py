"""Finding multilayer perceptrons in the autograd graph of a loss.

A loss of a perceptron leaves a graph of known nodes: a product with a transposed weight for each
layer, an activation between two of them. Where *all* parameters enter the loss through such chains,
its Hessian can be multiplied by the fused operators, whatever the loss does with the chains'
outputs. A chain goes on through layers that have no parameter of the loss, such as those of the
discriminator that judges a generator. Anything that is not recognised is left to the general way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hessreg.curvature.autograd_graph import AutogradGraph
from hessreg.ops.hvp import Activation

__all__ = ["Chain", "LossTerm", "find_chains", "find_input_chain"]

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

_SOFTPLUS_THRESHOLD = 20  # above it softplus is the identity: off by 2e-9, which ours is not
_PRODUCTS = ("AddmmBackward0", "MmBackward0")
# Nodes that keep the order of the elements.
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_SQUEEZES = ("SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0")


@dataclass
class LossTerm:
    """What a loss adds up of the outputs of one pass: scale times f(sign y), for each output y.

    Attributes:
        activation: f, as :class:`~hessreg.MLPHessian` takes it.
        sign: 1 or -1.
        scale: that of the sum.
    """

    activation: Activation
    sign: float
    scale: float


@dataclass
class Chain:
    """One pass of a perceptron within a loss.

    Attributes:
        input: what the first layer took, [batch, features].
        weights: leaves [out, in] of the layers.
        biases: leaves [out] of the layers; None for a layer without.
        activations: between the layers, as :class:`~hessreg.MLPHessian` takes them.
        output: the last layer's place in the graph.
        term: what the loss makes of the outputs, if it is a sum over them of a known kind.
    """

    input: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    activations: list[Activation]
    output: GradientEdge
    term: LossTerm | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """All weights and biases."""
        return [t for t in (*self.weights, *self.biases) if t is not None]

    def same_network(self, other: Chain) -> bool:
        """Whether the other is a pass of the same layers."""
        mine, others = ([*c.weights, *c.biases] for c in (self, other))
        same = len(mine) == len(others) and all(a is b for a, b in zip(mine, others, strict=True))
        return same and self.activations == other.activations


@dataclass
class _Layer:
    node: Node
    weight: Tensor
    bias: Tensor | None
    source: Node | None  # what made its input

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def find_chains(
    loss: Tensor, params: Sequence[Tensor], nodes: AutogradGraph | None = None
) -> list[Chain] | None:
    """The chains through which all of the parameters enter a loss.

    Args:
        loss: scalar with its graph.
        params: tensors; those that are no leaves are never weights or biases.
        nodes: that graph, if it has been walked.

    Returns:
        The chains, each with different layers; None if a parameter enters in any other way, or
        none does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> chains = find_chains(net(torch.randn(4, 2)).sigmoid().mean(), list(net.parameters()))
        >>> len(chains), chains[0].activations, [tuple(w.shape) for w in chains[0].weights]
        (1, ['tanh'], [(3, 2), (1, 3)])
        >>> chains[0].term
        LossTerm(activation='sigmoid', sign=1.0, scale=0.25)
    """
    if not all(p.is_leaf for p in params):
        return None
    graph = _Graph(nodes or AutogradGraph([loss]), params)
    layers = graph.layers()
    if layers is None:
        return None
    chains: list[Chain] = []
    used = 0
    moving = [layer for layer in layers.values() if graph.is_moving(layer)]
    for first in (layer for layer in moving if not graph.depends(layer.source)):
        path = list(_follow(graph, layers, first))
        used += sum(graph.is_moving(layer) for layer, _ in path)
        chain = _make_chain(path)
        if chain is None:
            return None
        chain.term = _find_term(graph, path[-1][0], len(chain.input))
        chains.append(chain)
    return chains if chains and used == len(moving) else None


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
    node, output_nr, *_ = get_gradient_edge(x)
    graph = _Graph(AutogradGraph([loss], [x]), entry=node)
    layers = graph.layers() or {}
    user = graph.only_consumer(node)
    if user is None or (node, output_nr) not in user.next_functions:  # a sibling of x
        return None
    while user is not None and graph.names[user] in _VIEWS:
        node, user = user, graph.only_consumer(user)
    first = None if user is None else layers.get(user)
    if first is None or first.source is not node:
        return None
    path = list(_follow(graph, layers, first))
    return _make_chain(path) if len(path) == len(layers) else None


class _Graph:
    """Who consumes whom among the nodes of a loss, and which of them depend on the parameters.

    With an entry instead of parameters, every leaf but that is one.
    """

    def __init__(
        self,
        nodes: AutogradGraph,
        params: Sequence[Tensor] | None = None,
        entry: Node | None = None,
    ) -> None:
        self.names = nodes.names
        self.consumers: dict[Node, list[Node]] = {}
        for node in self.names:
            for parent in nodes.parents[node]:
                self.consumers.setdefault(parent, []).append(node)
        self._leaves = {node: leaf for node, leaf in nodes.leaves.items() if node is not entry}
        self._params = set(map(id, self._leaves.values() if params is None else params))
        self._dependent: set[Node] = set()
        for node in self.names:  # inputs before what is made from them
            if self._is_param(node) or not self._dependent.isdisjoint(nodes.parents[node]):
                self._dependent.add(node)

    def _is_param(self, node: Node) -> bool:
        return node in self._leaves and id(self._leaves[node]) in self._params

    def leaf(self, node: Node | None) -> Tensor | None:
        """The tensor that a leaf of the graph stands for."""
        return None if node is None else self._leaves.get(node)

    def is_moving(self, layer: _Layer) -> bool:
        """Whether a layer has a parameter."""
        return any(id(t) in self._params for t in layer.tensors)

    def only_consumer(self, node: Node) -> Node | None:
        """What consumes a node, if one thing does."""
        users = self.consumers.get(node, [])
        return users[0] if len(users) == 1 else None

    def depends(self, node: Node | None) -> bool:
        return node in self._dependent

    def layers(self) -> dict[Node, _Layer] | None:
        """All layers, also those without a parameter; None if one is used otherwise."""
        products = [node for node, name in self.names.items() if name in _PRODUCTS]
        layers = {node: _layer(self, node) for node in products}
        found = {node: layer for node, layer in layers.items() if layer is not None}
        seen = {id(p) for layer in found.values() for p in layer.tensors}
        for node, leaf in self._leaves.items():
            if id(leaf) in self._params:
                users = [self._through_transpose(user) for user in self.consumers.get(node, [])]
                if id(leaf) not in seen or any(user not in found for user in users):
                    return None
        return found

    def _through_transpose(self, node: Node) -> Node:
        user = self.only_consumer(node) if self.names[node] == "TBackward0" else None
        return user or node


def _layer(graph: _Graph, node: Any) -> _Layer | None:
    if graph.names[node] == "MmBackward0":
        bias, ((source, _), (transposed, _)) = None, node.next_functions
    elif node._saved_alpha == 1 and node._saved_beta == 1:
        (before, _), (source, _), (transposed, _) = node.next_functions
        bias = graph.leaf(before)
        if bias is None:  # one that requires no gradient leaves no trace of its value
            return None
    else:
        return None
    if transposed is None or graph.names.get(transposed) != "TBackward0":
        return None
    weight = graph.leaf(transposed.next_functions[0][0])
    if weight is None or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return _Layer(node, weight, bias, source)


def _follow(
    graph: _Graph, layers: Mapping[Node, _Layer], first: _Layer
) -> Iterator[tuple[_Layer, Activation]]:
    """The layers from the first on, as long as each feeds the next one and nothing else.

    Each with the activation before it.
    """
    following: tuple[_Layer, Activation] | None = (first, "identity")
    while following is not None:
        yield following
        following = _next_layer(graph, layers, following[0])


def _next_layer(
    graph: _Graph, layers: Mapping[Node, _Layer], layer: _Layer
) -> tuple[_Layer, Activation] | None:
    node, user = layer.node, graph.only_consumer(layer.node)
    activation: Activation | None = None
    while user is not None and user not in layers:
        is_view = graph.names[user] in _VIEWS
        if not is_view and (activation or not (activation := _activation(graph, user))):
            return None
        node, user = user, graph.only_consumer(user)
    if user is None or layers[user].source is not node:
        return None
    # Views keep the order of the elements: rows of as many are the same rows.
    fits = layers[user].weight.shape[1] == len(layer.weight)
    return (layers[user], activation or "identity") if fits else None


def _make_chain(path: Sequence[tuple[_Layer, Activation]]) -> Chain | None:
    layers = [layer for layer, _ in path]
    first, last = layers[0], layers[-1]
    tensors = [id(t) for layer in layers for t in layer.tensors]
    entered = getattr(first.node, "_saved_self" if first.bias is None else "_saved_mat1")
    if entered is None or len(set(tensors)) < len(tensors):
        return None
    kinds = [(t.dtype, t.device, t.layout) for t in (entered, first.weight)]
    if kinds[0] != kinds[1]:
        return None
    return Chain(
        entered.detach(),
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        [activation for _, activation in path[1:]],
        GradientEdge(last.node, 0),
    )


def _activation(graph: _Graph, node: Any) -> Activation | None:
    found = _ACTIVATIONS.get(graph.names[node])
    if found is None:
        return None
    name, attribute = found
    if name == "elu" and (node._saved_scale != 1 or node._saved_input_scale != 1):
        return None  # SELU and CELU have such scales
    if name == "softplus" and node._saved_threshold < _SOFTPLUS_THRESHOLD:
        return None
    if name == "gelu" and node._saved_approximate == "tanh":
        name = "gelu_tanh"
    return (name, float(getattr(node, attribute))) if attribute else name


def _find_term(graph: _Graph, last: _Layer, rows: int) -> LossTerm | None:
    """What becomes of the last layer's outputs: sign, one activation, sign, sum or mean, sign."""
    node: Node | None = last.node
    activation: Activation | None = None
    before, after, is_sum = 1.0, 1.0, False
    while node is not None and graph.consumers.get(node):
        node = graph.only_consumer(node)
        name = "" if node is None else graph.names[node]
        if name == "NegBackward0":
            before, after = (-before, after) if activation is None else (before, -after)
        elif name in ("MeanBackward0", "SumBackward0") and not is_sum:
            activation, is_sum = activation or "identity", True
            after /= rows * len(last.weight) if name == "MeanBackward0" else 1
        elif name not in (*_VIEWS, *_SQUEEZES) and not (is_sum and _is_addition(node, name)):
            activation = None if node is None or activation else _activation(graph, node)
            if activation is None:
                return None
    return LossTerm(activation, before, after) if activation and is_sum else None


def _is_addition(node: Any, name: str) -> bool:
    return name == "AddBackward0" and bool(node._saved_alpha == 1)
