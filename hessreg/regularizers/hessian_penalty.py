"""The Hessian Penalty: off-diagonal input curvature of a generator, for disentanglement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hessreg.curvature._checks import check_at_least, check_not_negative
from hessreg.curvature.evaluation import RandomState, evaluate
from hessreg.distributed import WHOLE, Shard
from hessreg.regularizers._protocol import BaseRegularizer, StepContext

__all__ = ["HessianPenalty"]

Reduction = Literal["max", "mean"]


class HessianPenalty(BaseRegularizer):
    r"""Hessian Penalty on a generator: noise components should act independently on its outputs.

    For one output g of G(z), with Hessian H in z, the variance of v' H v over random signs v is
    ``2 sum_{i != j} H_ij^2``: zero if and only if no two components of z interact. The penalty is
    the unbiased estimate of that variance from ``num_probes`` directions, its maximum or mean over
    the outputs, and the mean over the batch. v' H v is an exact second derivative of all outputs at
    once, from reverse passes only, and differentiable to every order the generator is; the
    authors take finite differences with a step of 0.1. Like theirs, all samples move together:
    where the generator normalises over the batch, the derivative goes through the statistics.

    The generator is evaluated once more for it, without a trace in its buffers or the random state.
    Piecewise linear activations (relu, leaky_relu) have zero curvature almost everywhere, and so
    has the penalty: use smooth ones.

    Args:
        weight: of the penalty in the generator's loss.
        num_probes: directions v, at least 2; the authors take 2. Each costs about as much as the
            gradient of the generator's loss again.
        reduction: "max" or "mean" over the outputs of a sample. (The authors' code takes the
            maximum over the batch too; the mean follows their objective, an expectation over z.)
        every: apply it in steps 0, every, 2 every, ... only, with ``every`` times the weight.
        seed: of the directions, which come from a generator of their own on the CPU.

    Raises:
        TypeError: a count that is not an int, or a weight that is not a number.
        ValueError: an unknown reduction, a count below its minimum, or a weight that is negative or
            not finite.

    References:
        Peebles, Peebles, Zhu, Efros and Torralba, "The Hessian Penalty: A Weak Prior for
        Unsupervised Disentanglement", ECCV 2020.

    Example:
        >>> z = torch.randn(4, 2)
        >>> reg = HessianPenalty(weight=1.0, num_probes=64)
        >>> reg.penalty(lambda z: z.square(), z).item()  # H is diagonal
        0.0
        >>> reg.penalty(lambda z: z[:, 0] * z[:, 1], z).item() > 1  # about 4 = 2 (1 + 1)
        True
    """

    def __init__(
        self,
        weight: float = 0.1,
        num_probes: int = 2,
        reduction: Reduction = "max",
        every: int = 1,
        seed: int = 0,
    ) -> None:
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
        check_not_negative(weight=weight)
        check_at_least(2, num_probes=num_probes)
        check_at_least(1, every=every)
        self.weight = weight
        self.num_probes = num_probes
        self.reduction = reduction
        self.every = every
        self._random = torch.Generator().manual_seed(seed)
        self._value: Tensor | None = None

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """The penalty, in the generator's phase of the steps that ``every`` picks.

        Raises:
            ValueError: there is no noise in ``ctx``; as :meth:`penalty`.
        """
        if ctx.generator_loss is None or self.weight == 0 or ctx.step % self.every:
            return None, None
        if ctx.noise is None:
            raise ValueError("HessianPenalty needs the generator's input in ctx.noise, got None")
        return self.every * self.penalty(ctx.generator, ctx.noise, ctx.shard), None

    def penalty(
        self, function: Callable[[Tensor], Tensor], z: Tensor, shard: Shard = WHOLE
    ) -> Tensor:
        """The term to add to a loss: weight * penalty of any function of a batch.

        Args:
            function: a module or another callable, z [n, ...] -> outputs [n, ...].
            z: [n, ...], where to take the curvature.
            shard: which rows of a batch these are, where several processes share it.

        Returns:
            Scalar [], differentiable in what the function depends on and, if it requires a
            gradient, in z. ``every`` does not apply.

        Raises:
            TypeError: z is no floating-point tensor, or the function returns no tensor.
            ValueError: an empty batch, outputs that are not one for each row of z, a module
                compiled by torch, or inference mode.
        """
        _check_batch("z", z)
        if torch.is_inference_mode_enabled():
            raise ValueError("a penalty needs gradients: use no_grad instead of inference_mode")
        with torch.enable_grad():
            point = z if z.requires_grad else z.detach().requires_grad_(True)
            outputs = evaluate(function, point, state=RandomState(z.device))
            _check_batch("function's output", outputs, len(z))
            signs = [self._random_signs(z, shard) for _ in range(self.num_probes)]
            curvatures = torch.stack(_second_derivatives(outputs, point, signs))
            variances = curvatures.var(0).reshape(len(z), -1)  # [n, outputs]
            value = (variances.amax(1) if self.reduction == "max" else variances.mean(1)).mean()
            if not value.requires_grad:  # no curvature at all, of which the gradient is zero
                value = value + torch.where(outputs.isnan(), outputs, 0).sum()
        self._value = shard.mean(value.detach())
        return self.weight * (value if torch.is_grad_enabled() else value.detach())

    def metrics(self) -> dict[str, float]:
        """``hessian_penalty``: what was last computed, without its weight."""
        return {} if self._value is None else {"hessian_penalty": self._value.item()}

    def state_dict(self) -> dict[str, Any]:
        """The state of the directions, and the last value."""
        state: dict[str, Any] = {"random": self._random.get_state()}
        return state if self._value is None else state | {"value": self._value.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, so that a resumed run is the same bit for bit.

        Raises:
            ValueError: missing or unknown entries; the regulariser is as it was.
        """
        if not {"random"} <= state.keys() <= {"random", "value"}:
            raise ValueError(f"state must have random and perhaps value, got {sorted(state)}")
        self._random.set_state(state["random"].cpu())
        self._value = state["value"].clone() if "value" in state else None

    def _random_signs(self, z: Tensor, shard: Shard) -> Tensor:
        shape = len(z) * shard.size, *z.shape[1:]
        bits = torch.randint(0, 2, shape, generator=self._random, device="cpu")
        return shard.take(bits).to(z.device, z.dtype) * 2 - 1


def _second_derivatives(outputs: Tensor, z: Tensor, directions: list[Tensor]) -> list[Tensor]:
    """d^2/dt^2 G(z + t v) at t = 0 for every v, shaped like the outputs, with graphs.

    With u free, J'u is linear in u, and so is what is made of it: p = J'u, q = (dp/dz)' v, and the
    derivative of <q, v> in u is D^2 G [v, v]. Nested forward mode would take fewer passes, but
    silently drops terms where a ``torch.autograd.Function`` is involved.
    """
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = _pull(outputs, z, u)
    return [_pull((_pull(pulled, z, v) * v).sum(), u) for v in directions]


def _pull(output: Tensor, at: Tensor, cotangent: Tensor | None = None) -> Tensor:
    """The derivative of <output, cotangent>, with its graph; zero where there is none."""
    if not output.requires_grad:
        return torch.zeros_like(at)
    options = {"create_graph": True, "allow_unused": True}
    (result,) = torch.autograd.grad(output, at, cotangent, **options)
    return torch.zeros_like(at) if result is None else result


def _check_batch(name: str, batch: Any, rows: int | None = None) -> None:
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if batch.dim() < 1 or batch.numel() == 0 or rows not in (None, len(batch)):
        wanted = "[n, ...], not empty" if rows is None else f"[{rows}, ...], a row for each of z's"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(batch.shape)}")
