"""What both players of a GAN minimise, as functions of the discriminator's outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from hessreg.kernels import mmd2

__all__ = [
    "LOSSES",
    "AdversarialLoss",
    "Hinge",
    "LeastSquares",
    "MMDLoss",
    "Minimax",
    "NonSaturating",
    "Relativistic",
    "Wasserstein",
    "make_loss",
]


Discriminator = Callable[[Tensor], Tensor]


class AdversarialLoss(ABC):
    """The two losses of a game.

    Attributes:
        outputs: How many numbers the discriminator gives for a sample.
        has_parts: Whether the discriminator's loss is a sum over real and over generated samples.
        compares: Whether the generator's loss depends on real samples too.
        mixes_rows: Whether the losses are more than means over samples, or pairs of them.
    """

    outputs: int = 1
    has_parts: bool = True
    compares: bool = False
    mixes_rows: bool = False

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        """Return the scalars that the discriminator's loss is the sum of.

        Args:
            real: Outputs for real samples, ``[n]``, or ``[n, outputs]`` if there are several.
            fake: Outputs for generated samples, likewise.
        """

    @abstractmethod
    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """Return the generator's loss, a scalar; it may ignore ``real`` unless it `compares`."""

    def of_discriminator(self, discriminator: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        """Return the discriminator's loss on samples: the sum of its parts."""
        first, *others = self.discriminator(discriminator(real), discriminator(fake))
        return sum(others, first)

    def of_generator(self, discriminator: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        """Return the generator's loss on samples, for which outputs for real ones are constant."""
        return self.generator(*self.outputs_for_generator(discriminator, real, fake))

    def outputs_for_generator(
        self, discriminator: Discriminator, real: Tensor, fake: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `generator` takes; without need the real samples are not looked at."""
        outputs = discriminator(fake)
        if not self.compares:
            return outputs, outputs
        with torch.no_grad():
            return outputs, discriminator(real)


@dataclass(frozen=True)
class NonSaturating(AdversarialLoss):
    """Cross entropy; the generator maximises log s(D(G(z))) (Goodfellow and others, 2014).

    Args:
        real_target: Label of real samples; below 1, one-sided smoothing (Salimans and others,
            2016).
        fake_target: Label of generated samples.

    Example:
        >>> loss = NonSaturating()
        >>> [round(part.item(), 4) for part in loss.discriminator(torch.ones(2), torch.ones(2))]
        [0.3133, 1.3133]
    """

    real_target: float = 1.0
    fake_target: float = 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        """Cross entropy with the labels, on real and on generated samples."""
        return _cross_entropy(real, self.real_target), _cross_entropy(fake, self.fake_target)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """mean(-log s(fake))."""
        return softplus(-fake).mean()


class Minimax(NonSaturating):
    """The zero-sum game itself: the generator minimises log(1 - s(D(G(z)))).

    Its gradient vanishes where the discriminator is sure (Goodfellow and others, 2014).
    """

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """mean(log(1 - s(fake)))."""
        return -softplus(fake).mean()


@dataclass(frozen=True)
class LeastSquares(AdversarialLoss):
    """Half the mean square of the distance to the labels (Mao and others, 2017).

    Args:
        real_target: Label of real samples, and what the generator wants its own to be.
        fake_target: Label of generated samples.
    """

    real_target: float = 1.0
    fake_target: float = 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        """Squared distances on real and on generated samples."""
        return _half_square(real - self.real_target), _half_square(fake - self.fake_target)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """Squared distance to the label of real samples."""
        return _half_square(fake - self.real_target)


class Hinge(AdversarialLoss):
    """Margins of the discriminator count up to 1 (Lim and Ye, 2017)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        """mean(max(0, 1 - real)) and mean(max(0, 1 + fake))."""
        return relu(1 - real).mean(), relu(1 + fake).mean()

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """mean(-fake)."""
        return -fake.mean()


class Wasserstein(AdversarialLoss):
    """The difference of means, which needs a penalty on the slope (Arjovsky and others, 2017)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        """mean(-real) and mean(fake)."""
        return -real.mean(), fake.mean()

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """mean(-fake)."""
        return -fake.mean()


class Relativistic(AdversarialLoss):
    """Which sample of a pair is the real one? From Jolicoeur-Martineau, 2019.

    With R1 and R2 it is the loss of R3GAN (Huang and others, 2024).
    """

    has_parts = False
    compares = True

    def discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        """mean(-log s(real - fake)) of pairs."""
        return (softplus(fake - real).mean(),)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """mean(-log s(fake - real)) of pairs."""
        return softplus(real - fake).mean()


@dataclass(frozen=True)
class MMDLoss(AdversarialLoss):
    """MMD^2 of several outputs of the discriminator for each sample (Li and others, 2017).

    The unbiased estimate in the mean of Gaussian kernels. Like `Wasserstein`, it needs a penalty
    on the slope (Binkowski and others, 2018).

    Args:
        sigmas: Bandwidths.
        outputs: Of the discriminator.
    """

    sigmas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    outputs: int = 16

    has_parts = False
    compares = True
    mixes_rows = True

    def discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        """-MMD^2."""
        return (-mmd2(real, fake, self.sigmas),)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """MMD^2."""
        return mmd2(real, fake, self.sigmas)


def _cross_entropy(logits: Tensor, target: float) -> Tensor:
    """Of the label ``target`` with s(logits), in mean; at 1 and 0 one function of the logits."""
    if target in (0.0, 1.0):
        return softplus(logits if target == 0.0 else -logits).mean()
    return (softplus(logits) - target * logits).mean()


def _half_square(x: Tensor) -> Tensor:
    return 0.5 * x.square().mean()


LOSSES: dict[str, Callable[..., AdversarialLoss]] = {
    "nonsaturating": NonSaturating,
    "minimax": Minimax,
    "least_squares": LeastSquares,
    "hinge": Hinge,
    "wasserstein": Wasserstein,
    "relativistic": Relativistic,
    "mmd": MMDLoss,
}
_WITH_LABELS = "nonsaturating", "minimax", "least_squares"


def make_loss(name: str, label_smoothing: float = 0.0, both: bool = False) -> AdversarialLoss:
    """Return a loss by name.

    Args:
        name: A key of `LOSSES`.
        label_smoothing: How far the label of real samples is below 1, in [0, 0.5).
        both: Whether that of generated samples is as far above 0; one-sided otherwise.

    Raises:
        ValueError: If there is no such loss, or label_smoothing is out of range or for a loss that
            has no labels.

    Example:
        >>> make_loss("least_squares", label_smoothing=0.1)
        LeastSquares(real_target=0.9, fake_target=0.0)
    """
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing == 0:
        return LOSSES[name]()
    if name not in _WITH_LABELS:
        labelled = ", ".join(_WITH_LABELS)
        raise ValueError(f"label_smoothing is for losses with labels, {labelled}; {name} has none")
    return LOSSES[name](1 - label_smoothing, label_smoothing if both else 0.0)
