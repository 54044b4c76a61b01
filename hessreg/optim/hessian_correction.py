"""Hessian Singularity Correction around any torch optimiser: corrected steps for its gradients."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hessreg.curvature._checks import NonFiniteError, check_at_least, check_not_negative
from hessreg.curvature.operators import LinearOperator, SumOperator
from hessreg.curvature.parameters import FlatParameters
from hessreg.optim._krylov_curvature import KrylovCurvature, check_damping, corrected_inverse

__all__ = ["CorrectionWarning", "HessianCorrection", "HessianPreconditioner"]

_METRICS = (
    "condition",
    "condition_corrected",
    "smallest",
    "smallest_corrected",
    "residual",
    "turn",
)
_TINY = torch.finfo(torch.float64).tiny
_CURVATURE = tuple(field.name for field in fields(KrylovCurvature))


class CorrectionWarning(UserWarning):
    """A gradient could not be corrected and was used as it is."""


class HessianPreconditioner:
    """Maps gradients to corrected steps, and remembers the curvature between them.

    The step for the gradient g is p = f(H) g with f(l) = (l + mu eps^2) / (l^2 + eps^2), H the
    operator's matrix plus ``damping`` times the identity. It is the damped least squares solution
    of the Newton equation, the minimum of |H p - g|^2 + eps^2 |p - mu g|^2; finite for every H, and
    never longer than (mu + sqrt(mu^2 + 1 / eps^2)) / 2 times g. With ``mu=0`` it is the article's
    (H + eps^2 H^-1)^-1 g. It is computed on the Krylov space of H and g, and costs the products
    that it takes.

    Where the curvature has NaN or infinity, or the step would, or it solves its equation worse than
    ``max_residual``, the gradient is used as it is, within the trust radius, and a
    :class:`CorrectionWarning` says why: once, until a correction succeeds again.

    Waits for the device at every gradient.

    Args:
        eps: curvatures that are smaller count as none; positive.
        mu: what the gradient is multiplied by where there is no curvature. 0 is the article's
            formula, which makes no step there.
        saddle_free: |H| in place of H: every step is a descent direction.
        num_steps: products with the operator for one curvature, at most.
        damping: added to the diagonal of H (Levenberg-Marquardt), at least 0.
        trust_radius: a longer step is shortened to this; None for no limit.
        every: renew the curvature at the gradients 0, every, 2 every, ... In between the last
            Krylov space serves, outside of which H counts as zero.
        max_residual: greatest residual of (H + i eps) z = (1 + i mu eps) g, whose real part is the
            step, relative to the right-hand side, at a renewal. z = 0 has 1. ``math.inf`` for no
            limit: what is made then is the right step for H restricted to the Krylov space, no
            longer than said above and downhill if ``saddle_free``.
        label: what warnings call what is corrected.

    Raises:
        TypeError: an option that is not a number.
        ValueError: an option out of its range.

    References:
        Article "HSC", with Levenberg, Quarterly of Applied Mathematics 2, 1944, for the damping and
        Dauphin et al., "Identifying and attacking the saddle point problem", NeurIPS 2014, for |H|.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([100.0, 0.0, -100.0])))
        >>> HessianPreconditioner(eps=1e-3).correct(torch.ones(3), lambda: H).round(decimals=4)
        tensor([ 0.0100,  1.0000, -0.0100])
    """

    def __init__(
        self,
        *,
        eps: float = 1.0,
        mu: float = 1.0,
        saddle_free: bool = False,
        num_steps: int = 10,
        damping: float = 0.0,
        trust_radius: float | None = None,
        every: int = 1,
        max_residual: float = 1.0,
        label: str = "the gradient",
    ) -> None:
        check_damping(eps, mu)
        check_at_least(1, num_steps=num_steps, every=every)
        check_not_negative(damping=damping)
        if max_residual != math.inf:
            check_not_negative(max_residual=max_residual)
        if trust_radius is not None:
            check_not_negative(trust_radius=trust_radius)
            if trust_radius == 0:
                raise ValueError(f"trust_radius must be positive or None, got {trust_radius}")
        self.eps = eps
        self.mu = mu
        self.saddle_free = saddle_free
        self.num_steps = num_steps
        self.damping = damping
        self.trust_radius = trust_radius
        self.every = every
        self.max_residual = max_residual
        self.label = label
        self._count = 0
        self._fallbacks = 0
        self._is_failing = False
        self._curvature: KrylovCurvature | None = None
        self._metrics: dict[str, float] = {}
        self._last: tuple[Tensor, Tensor] | None = None  # gradient and step, not yet measured

    def correct(self, g: Tensor, operator_factory: Callable[[], LinearOperator]) -> Tensor:
        """The step in place of a gradient.

        Args:
            g: [n], float32 or float64.
            operator_factory: returns the symmetric operator H of g's vectors; called, with
                gradients enabled, when the curvature is to be renewed.

        Returns:
            [n].

        Raises:
            TypeError: operator_factory returns no operator.
            ValueError: it returns one of another shape, dtype or device, or one that is not
                symmetric; g is not like the gradients before it.
            NonFiniteError: NaN or infinity in g.
        """
        g = g.detach()
        if not torch.isfinite(g).all():
            raise NonFiniteError("g has NaN or infinity")
        try:
            step, reason = self._try(g, operator_factory), None
        except (NonFiniteError, _Unusable) as error:
            step, reason = g, str(error)
            self._curvature = None  # to be renewed at the next gradient
        self._count += 1
        self._note(reason)
        step = self._limited(step)
        self._last = g, step
        if self.every == 1 or not g.any():
            self._curvature = None  # a few vectors as long as g, or what zero tells: nothing
        return step

    def metrics(self) -> dict[str, float]:
        """Numbers about the last gradient; empty before the first. All are finite.

        - ``condition``, ``smallest``: the condition number and the smallest |eigenvalue| of H, as
          far as its last Krylov space shows them: of the Ritz values. 1 / machine epsilon stands
          for all condition numbers above it.
        - ``condition_corrected``, ``smallest_corrected``: the same of what these eigenvalues count
          as in the step, 1 / f(l).
        - ``residual``: see ``max_residual``, when the curvature was last renewed. With H itself,
          also where the step is made with |H|.
        - ``turn``: the angle between the gradient and the step in degrees.
        - ``fallbacks``: gradients so far that were used as they are.
        """
        if not self._count:
            return {}
        self._measure_turn()
        known = {name: self._metrics[name] for name in _METRICS if name in self._metrics}
        return known | {"fallbacks": self._fallbacks}

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on: counts, the curvature between renewals, metrics."""
        curvature = self._curvature
        self._measure_turn()
        return {
            "count": self._count,
            "fallbacks": self._fallbacks,
            "metrics": dict(self._metrics),
            "curvature": curvature and {name: getattr(curvature, name) for name in _CURVATURE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, so that steps go on exactly.

        Raises:
            ValueError: missing or unknown entries, or values that no state has.
        """
        _check_state(state)
        self._count, self._fallbacks = state["count"], state["fallbacks"]
        self._metrics = dict(state["metrics"])
        curvature = state["curvature"]
        if curvature is not None:
            basis, *small = (curvature[name] for name in _CURVATURE)
            curvature = KrylovCurvature(basis, *(each.cpu() for each in small))
        self._curvature = curvature
        self._is_failing = False
        self._last = None

    def _try(self, g: Tensor, operator_factory: Callable[[], LinearOperator]) -> Tensor:
        """The step within no radius.

        Raises:
            _Unusable: there is none worth making.
            NonFiniteError: NaN or infinity in a loss, a gradient of its, or a product.
        """
        if self._curvature is None or self._count % self.every == 0:
            self._curvature = self._renewed(g, operator_factory)
            self._measure(self._curvature)
            residual = self._metrics["residual"]
            if not residual <= self.max_residual:
                raise _Unusable(f"its residual {residual:.3g} is above {self.max_residual:.3g}")
        self._curvature = _like(self._curvature, g)
        step = self._curvature.correct(g, self.eps, self.mu, self.saddle_free)
        if not torch.isfinite(step).all():
            raise _Unusable("the corrected step has NaN or infinity")
        return step

    def _renewed(
        self, g: Tensor, operator_factory: Callable[[], LinearOperator]
    ) -> KrylovCurvature:
        with torch.enable_grad():
            op = operator_factory()
        _check_operator(op, g)
        if self.damping:
            op = SumOperator([op], [1.0], self.damping)
        try:
            return KrylovCurvature.build(op, g, self.num_steps, eps=self.eps)
        except NonFiniteError:
            raise
        except ValueError as error:
            raise ValueError(f"the operator of operator_factory: {error}") from None

    def _measure(self, curvature: KrylovCurvature) -> None:
        values = curvature.values.abs()
        inverse = corrected_inverse(curvature.values, self.eps, self.mu, self.saddle_free)
        inverse = inverse.abs().nan_to_num(0.0)  # of an eps whose square is nothing
        cap = 1 / torch.finfo(curvature.basis.dtype).eps
        if not len(values):  # of the space of zero
            values = inverse = torch.zeros(1, dtype=torch.float64, device="cpu")
        largest = inverse.max().item()
        residual = curvature.residual(self.eps)
        self._metrics = {
            "condition": _ratio(values, cap),
            "condition_corrected": _ratio(inverse, cap),
            "smallest": values.min().item(),
            "smallest_corrected": 1 / largest if largest else 0.0,
            "residual": residual if math.isfinite(residual) else sys.float_info.max,
        }

    def _measure_turn(self) -> None:
        if self._last is not None:
            self._metrics["turn"] = _degrees(*self._last)
            self._last = None

    def _note(self, reason: str | None) -> None:
        """Counts a fallback, and warns of the first of several."""
        if reason is not None:
            self._fallbacks += 1
            if not self._is_failing:
                warnings.warn(
                    f"step {self._count}: {self.label} is used as it is, uncorrected: {reason}",
                    CorrectionWarning,
                    stacklevel=5,  # who calls HessianCorrection.step
                )
        self._is_failing = reason is not None

    def _limited(self, step: Tensor) -> Tensor:
        if self.trust_radius is None:
            return step
        norm = torch.linalg.vector_norm(step, dtype=torch.float64)
        return step * (self.trust_radius / norm).clamp(max=1).to(step.dtype)


class HessianCorrection:
    """Wraps a torch optimiser and corrects gradients by the Hessian before it steps.

    :meth:`step` replaces what is in ``.grad`` by p = f(H) g, see :class:`HessianPreconditioner`,
    and steps the optimiser, of any kind, along that. What is in ``.grad`` may come from
    ``loss.backward()``, a ``torch.amp.GradScaler`` (whose ``step`` unscales first) or
    ``DistributedDataParallel``. Clipping before the step clips the gradient; ``trust_radius`` clips
    the step.

    The operator may be the Hessian of another loss than the gradient's, such as without
    regularisation, or of the same loss on a few rows of the batch (curvature sub-sampling), as its
    ``num_steps`` products are what a step costs.

    Several processes: with averaged gradients (``DistributedDataParallel``) and
    ``HessianOperator(..., process_group=group)`` all processes make the same step, bit for bit.

    Closures: every gradient that the optimiser evaluates is corrected, and counts for ``every``.
    The line search of ``torch.optim.LBFGS`` compares slopes with losses, which corrected gradients
    do not match: leave it off.

    Args:
        optimizer: what steps. Schedulers are for it, not for this object.
        operator_factory: returns the operator H on the flat concatenation of the parameters that
            require a gradient, in the order of ``param_groups``, such as
            ``lambda: HessianOperator(loss_function, parameters)``.
        eps: see :class:`HessianPreconditioner`, as for the following.
        mu: likewise.
        saddle_free: likewise.
        num_steps: likewise.
        damping: likewise.
        trust_radius: likewise. The article clips at 1; by default there is no limit, as no step is
            longer than 1.21 times the gradient with ``eps=1, mu=1``.
        every: likewise.
        max_residual: likewise.

    Raises:
        TypeError: an optimiser that is none, an operator_factory that cannot be called, parameters
            that are not float32 or float64, an option that is not a number.
        ValueError: parameters of several dtypes or devices, an option out of its range.

    Example:
        >>> from hessreg.curvature import HessianOperator
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> def loss():
        ...     return 50 * x[0] ** 2 + 0.5 * x[1] ** 2
        >>> sgd = torch.optim.SGD([x], lr=1.0)
        >>> optimizer = HessianCorrection(sgd, lambda: HessianOperator(loss, [x]), eps=0.01)
        >>> loss().backward()
        >>> optimizer.step()
        >>> x.detach().abs().round(decimals=4)
        tensor([0., 0.])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        operator_factory: Callable[[], LinearOperator],
        *,
        eps: float = 1.0,
        mu: float = 1.0,
        saddle_free: bool = False,
        num_steps: int = 10,
        damping: float = 0.0,
        trust_radius: float | None = None,
        every: int = 1,
        max_residual: float = 1.0,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer)}")
        if not callable(operator_factory):
            kind = type(operator_factory).__name__
            raise TypeError(f"operator_factory must be callable and return an operator, got {kind}")
        self.optimizer = optimizer
        self.operator_factory = operator_factory
        self.preconditioner = HessianPreconditioner(
            eps=eps,
            mu=mu,
            saddle_free=saddle_free,
            num_steps=num_steps,
            damping=damping,
            trust_radius=trust_radius,
            every=every,
            max_residual=max_residual,
        )
        self._flat()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the wrapped optimiser: learning rates may be changed in them."""
        return self.optimizer.param_groups

    def metrics(self) -> dict[str, float]:
        """Conditioning before and after, and more: :meth:`HessianPreconditioner.metrics`."""
        return self.preconditioner.metrics()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the wrapped optimiser's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Corrects ``.grad`` and steps the wrapped optimiser.

        Parameters without a gradient count as zeros and stay without. Where all are, the optimiser
        steps and nothing else happens.

        Args:
            closure: evaluates the loss and its gradients, as the optimiser takes it.

        Returns:
            What the optimiser returns.

        Raises:
            NonFiniteError: NaN or infinity in a gradient; names the parameter.
            TypeError: a sparse gradient, or an operator that is none.
            ValueError: an operator of another shape, dtype or device, or one that is not symmetric.
        """
        if closure is None:
            self._correct()
            return self.optimizer.step()

        def corrected() -> Any:
            loss = closure()
            self._correct()
            return loss

        return self.optimizer.step(corrected)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimiser's state and the preconditioner's."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "preconditioner": self.preconditioner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, so that training goes on exactly.

        Raises:
            ValueError: missing or unknown entries, values that no state has, a curvature of other
                parameters; and what the optimiser refuses.
        """
        _check_names(state, {"optimizer", "preconditioner"}, "state")
        own = state["preconditioner"]
        _check_state(own)
        flat = self._flat()
        if own["curvature"] is not None and flat is not None:
            _check_size(own["curvature"]["basis"], flat.size, flat.dtype)
        self.optimizer.load_state_dict(state["optimizer"])
        self.preconditioner.load_state_dict(own)

    def _flat(self) -> FlatParameters | None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return FlatParameters(parameters) if parameters else None

    def _correct(self) -> None:
        flat = self._flat()
        if flat is None or all(p.grad is None for p in flat.tensors):
            return
        gradient = flat.flatten([_gradient(i, p) for i, p in enumerate(flat.tensors)])
        try:
            step = self.preconditioner.correct(gradient, self.operator_factory)
        except NonFiniteError:
            flat.check_finite("gradient", gradient)  # says where
            raise
        for p, part in zip(flat.tensors, flat.split(step), strict=True):
            if p.grad is not None:
                p.grad.detach().copy_(part)  # a view of DistributedDataParallel's, perhaps


class _Unusable(ArithmeticError):
    """There is no corrected step, or none worth making."""


def _gradient(i: int, parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    if parameter.grad.layout != torch.strided:
        raise TypeError(f"the gradient of params[{i}] must be dense, got {parameter.grad.layout}")
    return parameter.grad.detach()


def _like(curvature: KrylovCurvature, g: Tensor) -> KrylovCurvature:
    """A curvature that may come from a file, on the device of the gradient."""
    _check_size(curvature.basis, len(g), g.dtype)
    if curvature.basis.device == g.device:
        return curvature
    small = (getattr(curvature, name) for name in _CURVATURE[1:])
    return KrylovCurvature(curvature.basis.to(g.device), *small)


def _degrees(g: Tensor, step: Tensor) -> float:
    """The angle between two vectors; 0 if one is zero."""
    g, step = (v.double() / v.abs().max().double().clamp(min=_TINY) for v in (g, step))
    product, norms = g @ step, g.norm() * step.norm()
    return math.degrees(math.acos(min(1.0, max(-1.0, (product / norms).item())))) if norms else 0.0


def _ratio(sizes: Tensor, cap: float) -> float:
    """The largest by the smallest, but no more than the cap, which is that of zero."""
    smallest, largest = (v.item() for v in sizes.aminmax())
    return largest / smallest if largest < cap * smallest else cap


def _check_operator(op: Any, g: Tensor) -> None:
    if not isinstance(op, LinearOperator):
        raise TypeError(f"operator_factory must return a LinearOperator, got {type(op).__name__}")
    wanted, kind = ((len(g), len(g)), g.dtype, g.device), (tuple(op.shape), op.dtype, op.device)
    if kind != wanted:
        described = "{}, {} on {}".format
        raise ValueError(
            "operator_factory must return an operator like the gradient,"
            f" {described(*wanted)}, got {described(*kind)}"
        )


def _check_names(values: Any, names: set[str], what: str) -> None:
    if not isinstance(values, Mapping) or set(values) != names:
        got = sorted(values) if isinstance(values, Mapping) else type(values).__name__
        raise ValueError(f"{what} must have entries {sorted(names)}, got {got}")


def _check_state(state: Any) -> None:
    _check_names(state, {"count", "fallbacks", "metrics", "curvature"}, "state")
    for name in ("count", "fallbacks"):
        value = state[name]
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r:.40}")
    metrics = state["metrics"]
    if not isinstance(metrics, Mapping) or not set(metrics) <= set(_METRICS):
        raise ValueError(f"metrics must be numbers named {', '.join(_METRICS)}")
    for name, value in metrics.items():
        if not isinstance(value, float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r:.40}")
    if state["curvature"] is not None:
        _check_curvature(state["curvature"])


def _check_curvature(curvature: Any) -> None:
    _check_names(curvature, set(_CURVATURE), "curvature")
    basis = curvature["basis"]
    if not isinstance(basis, Tensor) or basis.dim() != 2:
        raise ValueError("curvature's basis must be a matrix")
    m = len(basis)
    for name, shape in zip(_CURVATURE[1:], [(m,), (m,), (m,), (m, m)], strict=True):
        value = curvature[name]
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (shape, torch.float64):
            raise ValueError(f"curvature's {name} must be float64 of shape {shape}")


def _check_size(basis: Tensor, size: int, dtype: torch.dtype) -> None:
    if (basis.shape[1], basis.dtype) != (size, dtype):
        raise ValueError(
            f"the curvature kept must be of gradients of {size} numbers of {dtype}, got"
            f" {basis.shape[1]} of {basis.dtype}"
        )
