"""Orthogonal gradients: four meanings of "orthogonal" in a game, around any torch optimiser."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from hessreg.ops import gram_matrix, pcgrad, project_orthogonal_
from hessreg.optim._angles import Angles, angles_of_pair, angles_of_terms, cosine_matrix
from hessreg.optim._vectors import (
    Vector,
    add,
    average,
    check_losses,
    differentiate,
    laid_out_like,
)

__all__ = ["MODES", "OppositeGradientsError", "OrthogonalGradients"]

Mode = Literal["terms", "previous", "game", "weights"]
Scope = Literal["global", "tensor", "row"]

MODES: tuple[str, ...] = get_args(Mode)
_SCOPES: dict[str, Scope] = {
    "terms": "global",
    "previous": "global",
    "game": "global",
    "weights": "tensor",
}
_STRENGTHS = {"previous": 0.5, "game": 1.0, "weights": 1.0}
_TAKES_SEVERAL_LOSSES = ("terms", "game")
_NEARLY_OPPOSITE = -0.8
_ROUNDING = 64  # epsilons


class OppositeGradientsError(ValueError):
    """Both players' gradients are exactly opposite, so that projection would leave nothing."""


class OrthogonalGradients:
    """Wraps one or several torch optimisers and projects gradients before they step.

    What is projected against what is the ``mode``:

    - ``"terms"``: the gradients of one network's loss terms, each against those it conflicts with
      (PCGrad, in the order of the losses), then added. ``backward([term, ...])``.
    - ``"previous"``: the joint gradient of all wrapped optimisers' parameters against that of the
      last step: y = g - strength <g, v> / <v, v> v, v being the last g as it was before projection.
      Without a last one, or with ``strength=0``, y = g.
    - ``"game"``: a player's gradient against that of the other player's loss in the same
      parameters. ``backward([own loss, other's loss])``.
    - ``"weights"``: the gradient of each tensor against the tensor itself, rescaled to the length
      it had (OrthoGrad).

    With ``"terms"`` and ``"game"``, :meth:`backward` differentiates the losses and leaves in
    ``.grad`` what the optimiser is to step along, so that gradient clipping and a
    ``torch.amp.GradScaler`` work on that as usual. With ``"previous"`` and ``"weights"``,
    :meth:`step` projects whatever is in ``.grad``; it may come from ``loss.backward()``,
    ``DistributedDataParallel``, or :meth:`backward` with one loss for each wrapped optimiser, which
    is differentiated in that optimiser's parameters only.

    Nothing waits for the device, except: :attr:`metrics`, ``mode="game"`` until its first finite
    gradient was checked, and, with a process group, parameters that a process does not reach.

    Args:
        optimizers: at least one; no parameter in two of them. Schedulers are for them, not for this
            object.
        mode: see above.
        scope: what makes up one vector: ``"global"`` all parameters, ``"tensor"`` each, ``"row"``
            each row of each. By default ``"tensor"`` for ``"weights"`` and else ``"global"``.
        strength: 1 removes the component along the direction, 0 leaves it, 2 reflects it; not for
            ``"terms"``. By default 0.5 for ``"previous"`` and 1 for the others.
        process_group: every process of the group has its own share of the batch, of equal size:
            :meth:`backward` averages the gradient of each loss over them (one flat all-reduce)
            before any projection.

    Raises:
        TypeError: an optimiser that is none, or a strength that is not a number.
        ValueError: unknown options, a strength that is not finite or not for this mode, a parameter
            in two optimisers.

    References:
        ``"terms"``: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020;
        ``"weights"``: Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> optimizer = OrthogonalGradients(torch.optim.SGD(net.parameters(), lr=0.1))
        >>> x = torch.randn(8, 3)
        >>> optimizer.zero_grad()
        >>> optimizer.backward([net(x).square().mean(), (net(x) - 1).square().mean()])
        >>> optimizer.step()
        >>> sorted(optimizer.metrics())
        ['angle', 'angle_after', 'turn']
    """

    def __init__(
        self,
        *optimizers: torch.optim.Optimizer,
        mode: Mode = "terms",
        scope: Scope | None = None,
        strength: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_optimizers(optimizers)
        _check_options(mode, scope, strength)
        self.optimizers = optimizers
        self.mode = mode
        self.scope: Scope = scope or _SCOPES[mode]
        self.strength = _STRENGTHS.get(mode, 1.0) if strength is None else float(strength)
        self.process_group = process_group
        self._pending: list[Vector] = []  # of this process, not yet averaged
        self._sums: list[Vector] = []  # the gradient of each loss since the last zero_grad
        self._written: dict[Tensor, int] = {}  # what .grad is ours, with its version
        self._previous: Vector | None = None
        self._checked = False
        self._cosines: Tensor | None = None
        self._angles: Callable[[], Angles] = dict  # on demand: a dozen small operations

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all wrapped optimisers: learning rates may be changed in them."""
        return list(chain.from_iterable(each.param_groups for each in self.optimizers))

    @property
    def cosines(self) -> Tensor | None:
        """Cosines before the last projection, float64 on the device; None before the first.

        Shape [k, k] of k terms, [] in the other modes; with a scope other than ``"global"`` one of
        each segment in front.
        """
        return self._cosines

    @property
    def angles(self) -> dict[str, Tensor]:
        """Angles of the last projection in degrees, as scalars on the device; empty before it.

        - ``angle``: between the gradients before projection: of the two terms furthest apart, or of
          the gradient and its direction (the last gradient, the other player's, the weights).
        - ``angle_after``: between the projected gradient and the term furthest from it, or the
          direction.
        - ``turn``: between the gradient before and after.

        Means over the segments of the scope. A zero vector is at 90 degrees to everything.
        """
        return self._angles()

    def metrics(self) -> dict[str, float]:
        """The :attr:`angles` as numbers; waits for the device."""
        return {name: value.item() for name, value in self.angles.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of all wrapped optimisers' parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)
        self._pending, self._sums = [], []
        self._remember_written()

    def backward(
        self, losses: Sequence[Tensor], accumulate: bool = False, retain_graph: bool = False
    ) -> None:
        """Differentiates the losses in the wrapped parameters and writes ``.grad``.

        Gradients of further calls are added to those of each loss, until :meth:`zero_grad`, and the
        sums are projected. Parameters of other networks are not touched. Gradients of the same
        parameters must not come from ``loss.backward()`` as well.

        Args:
            losses: scalars. ``"terms"``: the terms of one loss, as many in every call; ``"game"``:
                the player's own loss and the other's; ``"previous"``, ``"weights"``: one for each
                wrapped optimiser.
            accumulate: more calls follow before the step: only add up, and leave averaging over
                processes and projection to the last one.
            retain_graph: keep the graphs of the losses for another use.

        Raises:
            OppositeGradientsError: ``mode="game"`` and exactly opposite gradients.
            RuntimeError: ``.grad`` was changed by something else since :meth:`zero_grad`.
            TypeError: losses that are not tensors.
            ValueError: the wrong number of losses, or one that is not a scalar or has no graph.
        """
        self._check_written()
        scalars = self._check_losses(losses)
        vectors = self._differentiate(scalars, retain_graph)
        self._pending = add(self._pending, vectors)
        if accumulate:
            return
        if self.process_group is not None:
            self._pending = average(self._pending, self._parameters(), self.process_group)
        self._sums, self._pending = add(self._sums, self._pending), []
        for parameter, gradient in zip(self._parameters(), self._combine(), strict=True):
            parameter.grad = None if gradient is None else laid_out_like(parameter, gradient)
        self._remember_written()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Steps all wrapped optimisers; ``"previous"`` and ``"weights"`` project ``.grad`` first.

        Raises:
            RuntimeError: no :meth:`backward` came before, where the mode needs one, or its last
                call was with ``accumulate=True``.
            ValueError: there is a closure: several evaluations have no one gradient to project.
        """
        if closure is not None:
            raise ValueError("closure must be None: OrthogonalGradients cannot step with a closure")
        if self._pending:
            raise RuntimeError("the last backward() before a step must be without accumulate=True")
        if self.mode in _TAKES_SEVERAL_LOSSES and not self._sums:
            raise RuntimeError(
                f"mode {self.mode!r} needs the gradient of each loss: call backward(losses) of this"
                " object, not loss.backward(), before step()"
            )
        if self.mode == "previous":
            self._project_on_previous()
        if self.mode == "weights":
            weights = [p.detach() for p in self._parameters()]
            self._project(self._gradients(), list(weights), rescale=True)
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimisers' states and what the mode remembers between steps.

        Like torch's optimisers, not the gradients accumulated for a step that was not made yet.
        """
        return {
            "mode": self.mode,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "previous": None if self._previous is None else list(self._previous),
            "checked": self._checked,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, so that training goes on exactly.

        Raises:
            ValueError: the state of another mode, of another number of optimisers, or of parameters
                of other shapes, or missing or unknown entries; and what the optimisers refuse.
        """
        self._check_state(state)
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self._checked = state["checked"]
        self._previous = state["previous"]
        if self._previous is not None:
            pairs = zip(self._previous, self._parameters(), strict=True)
            self._previous = [v if v is None else v.to(p.device, copy=True) for v, p in pairs]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients(self) -> Vector:
        return [p.grad for p in self._parameters()]

    def _check_losses(self, losses: Any) -> list[Tensor]:
        if self.mode == "terms":
            terms = check_losses(losses, None, "one or more terms")
            count = len(self._pending or self._sums or terms)
            return check_losses(terms, count, f"{count}, as in the last call")
        if self.mode == "game":
            return check_losses(losses, 2, "the player's own loss and the other player's")
        return check_losses(losses, len(self.optimizers), "one for each wrapped optimiser")

    def _differentiate(self, losses: Sequence[Tensor], retain_graph: bool) -> list[Vector]:
        several = self.mode in _TAKES_SEVERAL_LOSSES
        own = [_parameters(optimizer) for optimizer in self.optimizers]
        targets = [self._parameters()] * len(losses) if several else own
        last = len(losses) - 1
        vectors = [
            differentiate(loss, parameters, retain_graph or i < last)
            for i, (loss, parameters) in enumerate(zip(losses, targets, strict=True))
        ]
        return vectors if several else [list(chain.from_iterable(vectors))]

    def _check_written(self) -> None:
        """Refuses to write over a gradient that came from elsewhere."""
        gradients = [gradient for gradient in self._gradients() if gradient is not None]
        if not gradients:
            self._sums = []  # whoever dropped them meant to start again
        if any(self._written.get(g) != g._version for g in gradients):
            raise RuntimeError(
                ".grad was written or changed by something else since zero_grad(): give all losses"
                " to backward(), and clip or unscale gradients only after the last one"
            )

    def _remember_written(self) -> None:
        gradients = [gradient for gradient in self._gradients() if gradient is not None]
        self._written = {gradient: gradient._version for gradient in gradients}

    @torch.no_grad()
    def _combine(self) -> Vector:
        """What the optimisers are to find in ``.grad``."""
        reached = any(g is not None for vector in self._sums for g in vector)
        if self.mode == "terms" and reached:
            combined = pcgrad(self._sums, scope=self.scope)
            gram = gram_matrix([*self._sums, combined], self.scope)
            self._cosines = cosine_matrix(gram[..., :-1, :-1])
            self._angles = partial(angles_of_terms, gram)
            return combined
        gradient = [None if g is None else g.clone() for g in self._sums[0]]
        if self.mode == "game" and reached:
            finite = gram_matrix(self._sums, self.scope).isfinite().all()
            cosines = self._project(gradient, self._sums[1])
            self._check_game(torch.where(finite, cosines.max(), torch.nan))
            _poison(gradient, torch.where(finite, 1.0, torch.nan))
        return gradient

    def _project(self, gradient: Vector, against: Vector, rescale: bool = False) -> Tensor:
        """Projects in place and keeps the angles."""
        self._cosines = project_orthogonal_(
            gradient, against, "always", self.scope, self.strength, rescale
        )
        self._angles = partial(angles_of_pair, self._cosines, self.strength)
        return self._cosines

    def _project_on_previous(self) -> None:
        gradient = self._gradients()
        raw = [None if g is None else g.clone() for g in gradient]
        # At first there is nothing to project against, which is what a zero vector is.
        self._project(gradient, self._previous or [None] * len(gradient))
        self._previous = raw

    def _check_game(self, largest: Tensor) -> None:
        """Looks at the first finite gradients, and waits for the device to do so."""
        if self._checked:
            return
        cosine = largest.item()
        if not math.isfinite(cosine):
            return
        self._checked = True
        eps = max(torch.finfo(p.dtype).eps for p in self._parameters())
        if 1 + cosine <= (_ROUNDING * eps) ** 2 / 2:
            raise OppositeGradientsError(_OPPOSITE)
        if cosine < _NEARLY_OPPOSITE:
            warnings.warn(
                f"mode 'game': both players' gradients are nearly opposite (cosine {cosine:.3f}):"
                " projection leaves little of them",
                stacklevel=5,
            )

    def _check_state(self, state: Mapping[str, Any]) -> None:
        names = {"mode", "optimizers", "previous", "checked"}
        if set(state) != names:
            raise ValueError(f"state must have entries {sorted(names)}, got {sorted(state)}")
        if state["mode"] != self.mode:
            raise ValueError(f"state is of mode {state['mode']!r}, this object's is {self.mode!r}")
        states, wanted = state["optimizers"], len(self.optimizers)
        if not isinstance(states, list) or len(states) != wanted:
            raise ValueError(f"optimizers must be a list of {wanted} states, got {states!r:.40}")
        if not isinstance(state["checked"], bool):
            raise ValueError(f"checked must be True or False, got {state['checked']!r}")
        self._check_previous(state["previous"])

    def _check_previous(self, previous: Any) -> None:
        if previous is None:
            return
        parameters = self._parameters()
        if not isinstance(previous, list) or len(previous) != len(parameters):
            raise ValueError(f"previous must be a list of {len(parameters)} gradients or None")
        for i, (v, p) in enumerate(zip(previous, parameters, strict=True)):
            if v is not None and not (
                isinstance(v, Tensor) and v.shape == p.shape and v.dtype == p.dtype
            ):
                wanted = f"a tensor of shape {tuple(p.shape)} and {p.dtype}"
                raise ValueError(f"previous[{i}] must be None or {wanted}")


_OPPOSITE = (
    "mode 'game' is impossible here: both players' gradients are exactly opposite (cosine -1), as"
    " they always are for minimax and Wasserstein losses, so that projecting one against the other"
    " leaves nothing to learn from. Use a non-saturating loss, or mode 'previous' or 'terms'"
)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _poison(gradient: Vector, factor: Tensor) -> None:
    """Makes a gradient NaN whose direction is not finite, so that a GradScaler notices."""
    for tensor in gradient:
        if tensor is not None:
            tensor.mul_(factor.to(tensor.dtype))


def _check_optimizers(optimizers: Sequence[Any]) -> None:
    if not optimizers:
        raise ValueError("optimizers must be at least one, got none")
    for i, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer)
            raise TypeError(f"optimizers[{i}] must be a torch.optim.Optimizer, got {kind}")
    parameters = [p for optimizer in optimizers for p in _parameters(optimizer)]
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError("optimizers must not share parameters")


def _check_options(mode: Any, scope: Any, strength: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if scope is not None and scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, got {scope!r}")
    if strength is None:
        return
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"strength must be a number, got {type(strength)}")
    if mode == "terms":
        raise ValueError(f"strength is not for mode 'terms', got {strength}")
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")
