"""What the trainer hands to a regulariser, and the hooks through which a regulariser acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from hessreg.distributed import WHOLE, Shard

__all__ = ["BaseRegularizer", "Gradients", "Regularizer", "StepContext"]

Gradients = Sequence[Tensor | None]


@dataclass
class StepContext:
    """One phase of a training step.

    Attributes:
        step: generator/discriminator rounds so far, from 0.
        generator: the generator.
        discriminator: the discriminator.
        generator_loss: scalar with its graph in the generator's phase, else None.
        discriminator_loss: scalar with its graph in the discriminator's phase, else None.
        real: the batch of data, if there is one.
        fake: the generated batch, if there is one.
        noise: what the generator made the generated batch from, if it is known.
        shard: which rows of the batches these are, where several processes share them.
        outputs: of the discriminator for ``real`` and ``fake``, where both require gradients: their
            slopes need no second evaluation then.
    """

    step: int
    generator: nn.Module
    discriminator: nn.Module
    generator_loss: Tensor | None
    discriminator_loss: Tensor | None
    real: Tensor | None = None
    fake: Tensor | None = None
    noise: Tensor | None = None
    shard: Shard = WHOLE
    outputs: tuple[Tensor, Tensor] | None = None


@runtime_checkable
class Regularizer(Protocol):
    """The hooks a trainer calls, in this order, in every phase of a step."""

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """Terms to add to the generator's and the discriminator's loss, None for nothing."""
        ...

    def transform_grads(
        self, g_grads: Gradients | None, d_grads: Gradients | None, ctx: StepContext
    ) -> tuple[Gradients | None, Gradients | None]:
        """The gradients to use in place of the generator's and the discriminator's."""
        ...

    def precondition(self, network: nn.Module, grads: Gradients, ctx: StepContext) -> Gradients:
        """The direction to step along in place of the network's gradients."""
        ...

    def needs_third_order(self, step: int) -> bool:
        """True if this step's losses are for ``hessreg.curvature.third_order_safe``."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers to log for the last step; waits for the device."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit: tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        ...


class BaseRegularizer:
    """A regulariser that does nothing, to derive from."""

    def loss_terms(self, ctx: StepContext) -> tuple[Tensor | None, Tensor | None]:
        """Adds nothing."""
        return None, None

    def transform_grads(
        self, g_grads: Gradients | None, d_grads: Gradients | None, ctx: StepContext
    ) -> tuple[Gradients | None, Gradients | None]:
        """Leaves the gradients as they are."""
        return g_grads, d_grads

    def precondition(self, network: nn.Module, grads: Gradients, ctx: StepContext) -> Gradients:
        """Leaves the gradients as they are."""
        return grads

    def needs_third_order(self, step: int) -> bool:
        """False: no loss is differentiated three times."""
        return False

    def metrics(self) -> dict[str, float]:
        """Nothing to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts the empty state only.

        Raises:
            ValueError: the state is not empty.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {sorted(state)}")
