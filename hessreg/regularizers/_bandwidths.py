"""Where a regulariser's bandwidth comes from: given, measured in each batch, or adapting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hessreg.kernels import AdaptiveBandwidth, median_bandwidth, mmd2
from hessreg.ops.gaussian import _gamma_of, _values

__all__ = ["Bandwidth", "make_bandwidth"]

_MEDIAN_POINTS = 256  # of both batches together: more would cost more than the kernel itself
_RATE = 0.01  # a step changes the learned bandwidth by about this share


class Bandwidth:
    """Fixed bandwidths; the base of the others.

    Args:
        policy: its name.
        sigmas: the bandwidths.
    """

    def __init__(self, policy: str, sigmas: Sequence[float] = ()) -> None:
        self.policy = policy
        self._sigmas = torch.tensor(sigmas, dtype=torch.float64, device="cpu")

    def now(self, fake: Tensor, real: Tensor) -> Tensor:
        """The bandwidths for points ``[n, d]`` and ``[m, d]``, constants for autograd."""
        return self._sigmas.to(fake.device)

    def adapt(self, fake: Tensor, real: Tensor) -> None:
        """Takes note of the points of a step."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`now` and :meth:`adapt` depend on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it.

        Raises:
            ValueError: missing or unknown entries, or wrong shapes.
        """
        if state:
            raise ValueError(f"bandwidth {self.policy} has no state, got {sorted(state)}")


class _Median(Bandwidth):
    """The median distance within the batches at hand."""

    def now(self, fake: Tensor, real: Tensor) -> Tensor:
        return median_bandwidth(fake, real, _MEDIAN_POINTS)


class _Average(Bandwidth):
    """An exponential moving average of the medians."""

    _KIND: Literal["ema", "learned"] = "ema"

    def __init__(self, policy: str) -> None:
        super().__init__(policy)
        with torch.device("cpu"):
            self._module = AdaptiveBandwidth(self._KIND, max_points=_MEDIAN_POINTS)

    def now(self, fake: Tensor, real: Tensor) -> Tensor:
        return self._on(fake.device)().detach()

    def adapt(self, fake: Tensor, real: Tensor) -> None:
        self._on(fake.device).update(fake, real)

    def state_dict(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self._module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wanted = self._module.state_dict()
        if state.keys() != wanted.keys():
            raise ValueError(f"bandwidth's state must be {sorted(wanted)}, got {sorted(state)}")
        for name, value in wanted.items():
            if not isinstance(state[name], Tensor) or state[name].shape != value.shape:
                raise ValueError(f"bandwidth's {name} must be a tensor of shape {value.shape}")
        self._module.load_state_dict(dict(state))

    def _on(self, device: torch.device) -> AdaptiveBandwidth:
        if self._module.is_fresh.device != device:
            self._module.to(device)
        return self._module


class _Learned(_Average):
    """Ascends MMD^2 by Adam, from the median of the first batches on."""

    _KIND = "learned"

    def __init__(self, policy: str) -> None:
        super().__init__(policy)
        self._optimizer = torch.optim.Adam(self._module.parameters(), lr=_RATE, maximize=True)

    def adapt(self, fake: Tensor, real: Tensor) -> None:
        super().adapt(fake, real)
        with torch.enable_grad():
            value = mmd2(fake, real, self._module())
        parameter = self._module.log_sigma
        (parameter.grad,) = torch.autograd.grad(value, [parameter])
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        moments = self._optimizer.state_dict()["state"].get(0, {})
        return super().state_dict() | {f"adam_{k}": v.clone() for k, v in moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        moments = {k.removeprefix("adam_"): v for k, v in state.items() if k.startswith("adam_")}
        if moments and moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"Adam's state of the bandwidth is not {sorted(moments)}")
        if not all(isinstance(v, Tensor) and v.dim() == 0 for v in moments.values()):
            raise ValueError("Adam's state of the bandwidth must be tensors without dimensions")
        super().load_state_dict({k: v for k, v in state.items() if not k.startswith("adam_")})
        self._load_moments({0: moments} if moments else {})

    def _on(self, device: torch.device) -> AdaptiveBandwidth:
        if self._module.is_fresh.device != device:
            super()._on(device)
            self._load_moments(self._optimizer.state_dict()["state"])  # casts to the new device
        return self._module

    def _load_moments(self, moments: dict[int, Any]) -> None:
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


_POLICIES = {"median": _Median, "ema": _Average, "learned": _Learned}


def make_bandwidth(sigma: float | Sequence[float] | str) -> Bandwidth:
    """Returns the bandwidth that a user's ``sigma`` means.

    Raises:
        TypeError: neither a policy nor numbers.
        ValueError: an unknown policy, or a number that is not positive and finite.
    """
    if isinstance(sigma, str):
        if sigma not in _POLICIES:
            wanted = ", ".join(_POLICIES)
            raise ValueError(f"sigma must be numbers or one of {wanted}, got {sigma!r}")
        return _POLICIES[sigma](sigma)
    values = _values(sigma)
    for value in values:
        _gamma_of(value)
    return Bandwidth("fixed", [float(value) for value in values])
