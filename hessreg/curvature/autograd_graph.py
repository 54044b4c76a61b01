"""The nodes that torch recorded behind a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["AutogradGraph"]


class AutogradGraph:
    """The nodes behind some tensors, walked once for all who look at them.

    Args:
        roots: tensors with their graphs.
        inputs: nodes that made these, and what is behind them, are left out.

    Attributes:
        names: what torch calls each node; inputs come before what is made from them.
        parents: what each node takes, as often as it takes it.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> graph = AutogradGraph([x.exp().sum()])
        >>> list(graph.names.values())
        ['torch::autograd::AccumulateGrad', 'ExpBackward0', 'SumBackward0']
        >>> [leaf is x for leaf in graph.leaves.values()]
        [True]
    """

    def __init__(self, roots: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> None:
        self.names: dict[Node, str] = {}
        self.parents: dict[Node, list[Node]] = {}
        left_out = {x.grad_fn for x in inputs}
        pending = [root.grad_fn for root in roots]
        while pending:
            node = pending.pop()
            if node is None or node in self.names or node in left_out:
                continue
            if node in self.parents:  # for the second time: all that is behind it has its name
                self.names[node] = node.name()
                continue
            found = [parent for parent, _ in node.next_functions if parent is not None]
            self.parents[node] = found
            pending.append(node)
            pending.extend(found)

    @property
    def leaves(self) -> dict[Node, Tensor]:
        """The tensors that require gradients, by their nodes."""
        ends: list[Any] = [n for n, name in self.names.items() if name.endswith("AccumulateGrad")]
        return {node: node.variable for node in ends}
