"""Torch's optimisers by name, the user's own, and their state to a checkpoint and back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessreg.gan.factories import find_factory, is_factory

__all__ = ["OPTIMIZERS", "check_optimizer", "make_optimizer", "optimizer_state", "state_loader"]

_LEFT_OUT = "Optimizer", "LBFGS", "SparseAdam", "Muon"  # closures, sparse gradients, matrices only
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    name.lower(): kind
    for name, kind in sorted(vars(torch.optim).items(), key=lambda item: item[0].lower())
    if isinstance(kind, type) and issubclass(kind, Optimizer) and name not in _LEFT_OUT
}
_FUSED = "adam", "adamw", "sgd"  # one kernel for all parameters, on every device


def check_optimizer(name: str, optional: Mapping[str, bool]) -> None:
    """Refuse a name that is none, and options that the optimiser does not have.

    Args:
        name: A key of `OPTIMIZERS`, or ``module:factory``, of which only the form is checked.
        optional: Of names of options whether they were chosen.

    Raises:
        ValueError: If there is anything to refuse.

    Example:
        >>> check_optimizer("sgd", {"momentum": True, "betas": False})
        >>> check_optimizer("sgd", {"betas": True})
        Traceback (most recent call last):
        ValueError: optimizer sgd has no betas
    """
    if is_factory(name):
        return
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"optimizer must be {known} or module:factory, got {name!r}")
    _check_taken(name, OPTIMIZERS[name], optional)


def _check_taken(name: str, factory: Callable[..., Any], optional: Mapping[str, bool]) -> None:
    for option, chosen in optional.items():
        if chosen and option not in _taken(factory):
            raise ValueError(f"optimizer {name} has no {option}")


def _taken(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    options: Mapping[str, Any],
    optional: Mapping[str, bool],
) -> Optimizer:
    """Return a new optimiser.

    Args:
        name: As for `check_optimizer`.
        parameters: What it steps.
        options: By name; those that it does not take are left out.
        optional: As for `check_optimizer`.

    Raises:
        ValueError: If there is no such optimiser, or it has not what was chosen.
    """
    factory = OPTIMIZERS.get(name) or find_factory(name)
    _check_taken(name, factory, optional)
    given = {option: value for option, value in options.items() if option in _taken(factory)}
    if name in _FUSED:
        given["fused"] = True
    made = factory(parameters, **given)
    if not isinstance(made, Optimizer):
        raise ValueError(
            f"optimizer {name} must be a torch.optim.Optimizer, got {type(made).__name__}"
        )
    return made


def optimizer_state(optimizer: Optimizer) -> dict[Any, Any]:
    """Return the state of every parameter, empty for those that never had a gradient.

    Of an optimiser that is not torch's it is whatever its own ``state_dict`` returns.
    """
    whole = optimizer.state_dict()
    if not _is_torchs(optimizer):
        return whole
    state = whole["state"]
    return {index: state.get(index, {}) for index in range(len(_parameters(optimizer)))}


def state_loader(optimizer: Optimizer, state: Any) -> Callable[[], None]:
    """Check what `optimizer_state` returned, also after a file, and return what restores it.

    Rates and other options stay the optimiser's own.

    Raises:
        ValueError: If an entry lacks or has another shape or type; torch itself does not look, and
            fused kernels would write beyond its end. Optimisers that are not torch's check their
            state themselves, when it is restored.
    """
    if not _is_torchs(optimizer):
        return lambda: optimizer.load_state_dict(_with_numbers(state))
    parameters, fresh = _parameters(optimizer), _fresh_state(optimizer)
    if {str(index) for index in state} != {str(index) for index in range(len(parameters))}:
        raise ValueError(f"the optimizer's state is not that of {len(parameters)} parameters")
    loaded = {}
    for index, values in state.items():
        wanted = fresh[int(index)]
        if values and not _is_alike(values, wanted):
            raise ValueError(
                f"the optimizer's state of parameter {index} has a wrong shape, type or name"
            )
        if values:
            loaded[parameters[int(index)]] = {k: _placed(values[k], wanted[k]) for k in wanted}

    def load() -> None:
        optimizer.state.clear()
        optimizer.state.update(loaded)

    return load


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "torch"


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _fresh_state(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a copy of the optimiser has for every parameter after a step."""
    twin = copy.deepcopy(optimizer)
    parameters = _parameters(twin)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    return [twin.state[parameter] for parameter in parameters]


def _is_alike(values: Any, wanted: Mapping[str, Any]) -> bool:
    if not isinstance(values, dict) or values.keys() != wanted.keys():
        return False
    return all(_is_alike_value(values[name], wanted[name]) for name in wanted)


def _is_alike_value(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor) and isinstance(value, Tensor):
        return value.shape == wanted.shape and value.dtype == wanted.dtype
    return type(value) is type(wanted)


def _placed(value: Any, wanted: Any) -> Any:
    """A tensor of the optimiser's own, where it wants it."""
    return value.detach().to(wanted.device, copy=True) if isinstance(value, Tensor) else value


def _with_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """Indices of parameters are numbers again, which a file has as text."""
    by_index = {int(k) if str(k).isdigit() else k: v for k, v in state["state"].items()}
    return {**state, "state": by_index}
