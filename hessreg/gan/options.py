"""The groups of options of a run: of its data sets, its regularisers and its corrections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hessreg.gan.checks import (
    check_types,
    require,
    require_at_least,
    require_finite,
    require_positive,
)
from hessreg.gan.optimizers import check_optimizer
from hessreg.gan.schedules import Schedule
from hessreg.ops.gaussian import _gamma_of

__all__ = [
    "ArraysConfig",
    "DRAGANConfig",
    "FIDConfig",
    "GaussianConfig",
    "GridConfig",
    "GrowthConfig",
    "HSCConfig",
    "HSN1RConfig",
    "HessianPenaltyConfig",
    "ImagesConfig",
    "InfoGANConfig",
    "InstanceNoiseConfig",
    "IterativeConfig",
    "PlayerConfig",
    "ProjectionConfig",
    "R1Config",
    "R2Config",
    "RingConfig",
    "WGANGPConfig",
    "parse_sigma",
]

_POLICIES = ("median", "ema", "learned")
_USUAL_BETAS = (0.5, 0.999), (0.5, 0.95)  # those of data sets' defaults: nobody chose them


def parse_sigma(text: str | float, policies: Sequence[str] = _POLICIES) -> str | list[float]:
    """Return what a bandwidth on the command line means: a policy, or numbers between commas.

    Raises:
        ValueError: If it is neither, or a number is not positive and finite.

    Example:
        >>> parse_sigma("0.5, 1")
        [0.5, 1.0]
    """
    if isinstance(text, str) and text in policies:
        return text
    wanted = f"{', '.join(policies)} or positive numbers with commas"
    try:
        values = [float(part) for part in str(text).split(",")]
    except ValueError:
        values = []
    require(bool(values) and all(map(_is_bandwidth, values)), "sigma", wanted, text)
    return values


def _is_bandwidth(value: float) -> bool:
    try:
        return _gamma_of(value) > 0
    except ValueError:
        return False


@dataclass
class FIDConfig:
    """Options of FID and KID by torchmetrics.

    Args:
        features: What to compare samples in: judge, or module:factory of a torch module that maps
            them to features; empty for neither metric.
    """

    features: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        is_known = self.features in ("", "judge") or ":" in self.features
        require(is_known, "features", "judge, module:factory or empty", self.features)


@dataclass
class PlayerConfig:
    """Options of the training of one network.

    Args:
        lr: Learning rate.
        optimizer: One of torch.optim in lower case, such as adam, adamw, radam, nadam, rmsprop, sgd
            or adagrad, or module:factory, which is called with the parameters and those of lr,
            betas, momentum and weight_decay that it takes.
        beta1: Decay of the optimiser's mean gradient.
        beta2: Decay of its mean square.
        momentum: Of optimisers that have one.
        weight_decay: L2 regularisation in the optimiser; with adamw, decay apart from the gradient.
        l1: Weight of the sum of absolute parameters, added to the loss.
        clip: Greatest norm of the gradient; 0 for none.
        schedule: How the rate falls until the end of the run.
        end_factor: What is left of it then.
        warmup: Steps over which it rises from nothing.
        batch_size: Samples in a batch; 0 for those of the run.
        dropout: Share of hidden units that training leaves out.
        spectral_norm: Divide every weight by its spectral norm.
    """

    lr: float = 5e-4
    optimizer: str = "adam"
    beta1: float = 0.5
    beta2: float = 0.999
    momentum: float = 0.0
    weight_decay: float = 0.0
    l1: float = 0.0
    clip: float = 0.0
    schedule: Literal["constant", "linear", "exponential", "cosine"] = "constant"
    end_factor: float = 0.01
    warmup: int = 0
    batch_size: int = 0
    dropout: float = 0.0
    spectral_norm: bool = False

    def check(self, name: str) -> None:
        """Refuse bad values; ``name`` is what the group is called.

        Raises:
            ValueError: If there are any.
        """
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None

    def _check(self) -> None:
        check_types(self)
        require_at_least(self, 0, "lr", "momentum", "weight_decay", "l1", "clip", "end_factor")
        require_at_least(self, 0, "warmup", "batch_size")
        for name in ("beta1", "beta2", "momentum", "dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, name, "in [0, 1)", value)
        require(self.end_factor <= 1, "end_factor", "at most 1", self.end_factor)
        falls_to_nothing = self.schedule == "exponential" and self.end_factor == 0
        require(not falls_to_nothing, "end_factor", "positive with exponential", self.end_factor)
        check_optimizer(self.optimizer, self.chosen_options())

    def optimizer_options(self) -> dict[str, Any]:
        """Return what an optimiser may take."""
        betas = self.beta1, self.beta2
        return {
            "lr": self.lr,
            "betas": betas,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }

    def chosen_options(self) -> dict[str, bool]:
        """Return which of them an optimiser must have, as they are not at their defaults."""
        return {
            "betas": (self.beta1, self.beta2) not in _USUAL_BETAS,
            "momentum": self.momentum != 0,
            "weight_decay": self.weight_decay != 0,
        }

    def rate_schedule(self) -> Schedule:
        """Return the factor of the rate."""
        return Schedule(self.schedule, self.end_factor, self.warmup)


@dataclass
class InfoGANConfig:
    """Options of InfoGAN: a code that is part of the noise and can be told from the samples.

    Args:
        codes: How many values it has; 0 for no code.
        weight: Of the cross entropy of telling it.
    """

    codes: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.codes == 0 or 2 <= self.codes <= 1000, "codes", "0 or in [2, 1000]", self.codes
        )
        require_at_least(self, 0, "weight")


@dataclass
class GrowthConfig:
    """Options of batches that grow during a run.

    Args:
        factor: By which both networks' batches are multiplied each time; 1 for never.
        every: Steps between one time and the next.
        maximum: Largest batch.
    """

    factor: int = 1
    every: int = 1000
    maximum: int = 1024

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 1, "factor", "every", "maximum")

    def size(self, first: int, step: int) -> int:
        """Return the size of the batch at a step, from 0.

        Example:
            >>> growth = GrowthConfig(factor=2, every=10, maximum=100)
            >>> [growth.size(32, step) for step in (0, 9, 10, 1000)]
            [32, 32, 64, 100]
        """
        size = first
        for _ in range(step // self.every if self.factor > 1 else 0):
            size = min(size * self.factor, self.maximum)
            if size == self.maximum:
                break
        return size


@dataclass
class InstanceNoiseConfig:
    """Options of the noise on all that the discriminator sees.

    Args:
        std: Its standard deviation at the start; 0 for none.
        steps: It falls to nothing in a line over so many.
    """

    std: float = 0.0
    steps: int = 10_000

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "std")
        require_at_least(self, 1, "steps")

    def at(self, step: int) -> float:
        """Return the standard deviation at a step, from 0.

        Example:
            >>> [InstanceNoiseConfig(std=0.2, steps=10).at(step) for step in (0, 5, 10, 11)]
            [0.2, 0.1, 0.0, 0.0]
        """
        return self.std * max(0.0, 1.0 - step / self.steps)


@dataclass
class RingConfig:
    """Options of data set ring.

    Args:
        modes: Gaussians on the circle.
        radius: Of the circle.
        std: Standard deviation of each.
        rotation: Angle of the first in degrees.
    """

    modes: int = 8
    radius: float = 2.0
    std: float = 0.02
    rotation: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require(1 <= self.modes <= 1000, "modes", "in [1, 1000]", self.modes)
        require_positive(self, "radius", "std")
        require_finite(self, "rotation")


@dataclass
class GridConfig:
    """Options of data set grid.

    Args:
        side: Gaussians in each row and in each column.
        spacing: Distance of neighbours.
        std: Standard deviation of each.
    """

    side: int = 5
    spacing: float = 2.0
    std: float = 0.05

    def __post_init__(self) -> None:
        check_types(self)
        require(2 <= self.side <= 30, "side", "in [2, 30]", self.side)
        require_positive(self, "spacing", "std")


@dataclass
class ImagesConfig:
    """Options of data set images.

    Args:
        size: Pixels in each direction, after the middle of an image is cut out and scaled.
        channels: 3 for colours, 1 for grey.
    """

    size: int = 32
    channels: int = 3

    def __post_init__(self) -> None:
        check_types(self)
        require(4 <= self.size <= 512, "size", "in [4, 512]", self.size)
        require(self.channels in (1, 3), "channels", "1 or 3", self.channels)


@dataclass
class ArraysConfig:
    """Options of data set arrays.

    Args:
        key: Name of the array in an .npz; not needed if it holds no other but the labels.
        labels_key: Name of the labels in an .npz, one integer for each sample.
    """

    key: str = ""
    labels_key: str = ""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class R1Config:
    """Options of the gradient penalty on real images.

    Args:
        gamma: Its weight.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "gamma")


@dataclass
class R2Config(R1Config):
    """Options of the gradient penalty on generated images.

    Args:
        gamma: Its weight.
    """


@dataclass
class WGANGPConfig:
    """Options of the gradient penalty between real and generated images.

    Args:
        weight: Its weight.
    """

    weight: float = 10.0

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "weight")


@dataclass
class IterativeConfig:
    """Options of the gradient penalty whose points and weight follow the distance to the data.

    Args:
        weight: Its weight at the start.
        distance: Root of MMD^2, energy distance, or difference of the discriminator's mean outputs.
        power: Of the share of the distance that is left, in the weight; 0 for a constant weight.
        point_power: Of the same, in the place of the points between data and generated samples.
        lam_min: Smallest weight; null for a tenth of the first.
        jitter: Share of a random place in that of the points; 1 for wgan_gp's.
        num_points: Points on the way from each real sample, whose mean counts.
        decay: Of the moving average of the distance's estimate.
        schedule: Places by the distance, or random as wgan_gp's.
        sigma: Bandwidth of MMD^2: median, or numbers with commas for the mean of their kernels.
    """

    weight: float = 10.0
    distance: Literal["mmd", "energy", "critic"] = "mmd"
    power: float = 1.0
    point_power: float = 1.0
    lam_min: float | None = None
    jitter: float = 0.0
    num_points: int = 1
    decay: float = 0.99
    schedule: Literal["distance", "uniform"] = "distance"
    sigma: float | str = "median"

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "weight", "power", "point_power")
        require_at_least(self, 1, "num_points")
        require(0 <= self.jitter <= 1, "jitter", "in [0, 1]", self.jitter)
        require(0 <= self.decay < 1, "decay", "in [0, 1)", self.decay)
        if self.lam_min is not None:
            wanted = f"null or in [0, {self.weight}]"
            require(0 <= self.lam_min <= self.weight, "lam_min", wanted, self.lam_min)
        parse_sigma(self.sigma, ["median"])


@dataclass
class DRAGANConfig:
    """Options of the gradient penalty around real images.

    Args:
        weight: Its weight.
        spread: Width of the noise on the images in their standard deviations.
    """

    weight: float = 10.0
    spread: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "weight", "spread")


@dataclass
class HSN1RConfig:
    """Options of the penalty on the norms of both networks' loss Hessians.

    Args:
        norm: Sum of absolute eigenvalues, largest absolute eigenvalue, largest column sum, or root
            of the sum of squares.
        weight: Weight of the generator's norm; what is a good one depends on the norm: 1e-4 for
            nuclear is like 0.1 for spectral.
        discriminator_weight: Weight of the discriminator's norm.
        every: Apply it in every k-th step.
        num_steps: Lanczos or power iterations for one norm.
        num_probes: Random vectors for one norm, where it is estimated.
        target: Penalise only what exceeds this norm.
    """

    norm: Literal["nuclear", "spectral", "one", "fro"] = "nuclear"
    weight: float = 1e-4
    discriminator_weight: float = 3e-4
    every: int = 16
    num_steps: int = 3
    num_probes: int = 1
    target: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "weight", "discriminator_weight", "target")
        require_at_least(self, 1, "every", "num_steps", "num_probes")


@dataclass
class GaussianConfig:
    """Options of the Gaussian-kernel terms.

    Args:
        interaction_weight: Weight of MMD^2 between generated and real samples, in the generator's
            loss.
        generator_weight: Weight of the mean kernel of each generated sample and the real one it
            is paired with; positive repels.
        discriminator_weight: Weight of the mean kernels of the discriminator's outputs and 1/2;
            positive pushes them away from 1/2.
        sigma: Bandwidth: median, ema, learned, or numbers with commas for the mean of their
            kernels.
        space: Compare samples, or the discriminator's last hidden layer.
    """

    interaction_weight: float = 10.0
    generator_weight: float = 0.0
    discriminator_weight: float = 0.0
    sigma: float | str = "median"
    space: Literal["samples", "features"] = "samples"

    def __post_init__(self) -> None:
        check_types(self)
        weights = "interaction_weight", "generator_weight", "discriminator_weight"
        require_finite(self, *weights)
        parse_sigma(self.sigma)


@dataclass
class HessianPenaltyConfig:
    """Options of the penalty on interactions of noise components.

    Args:
        weight: Its weight in the generator's loss.
        num_probes: Random directions, at least 2.
        reduction: Largest or mean value over the outputs of a sample.
        every: Apply it in every k-th step.
    """

    weight: float = 0.1
    num_probes: int = 2
    reduction: Literal["max", "mean"] = "max"
    every: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "weight")
        require_at_least(self, 1, "every")
        require_at_least(self, 2, "num_probes")


@dataclass
class ProjectionConfig:
    """Options of orthogonal gradients.

    Args:
        pair: What terms projects: the adversarial loss against what the regularisers add, or also
            the discriminator's loss on real samples against that on generated ones.
        strength: Share of the component that previous, game and weights remove; by default 0.5 for
            previous and 1 for the others.
        scope: What makes up one vector: all parameters, each tensor, or each row; auto is tensor
            for weights and else global.
    """

    pair: Literal["adversarial_regularizer", "real_fake"] = "adversarial_regularizer"
    strength: float | None = None
    scope: Literal["auto", "global", "tensor", "row"] = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        if self.strength is not None:
            require_finite(self, "strength")


@dataclass
class HSCConfig:
    """Options of the Hessian correction.

    Args:
        network: Whose gradients are corrected.
        eps: Curvatures below it count as none: a gradient along an eigenvalue l of the Hessian is
            multiplied by (l + mu eps^2) / (l^2 + eps^2).
        mu: Factor of the gradient where there is no curvature; 0 is the article's formula.
        saddle_free: Divide by the size of the curvature, so that every step leads downhill.
        num_steps: Hessian-vector products for the curvature of one network.
        damping: Added to the Hessian's diagonal beforehand.
        trust_radius: Greatest length of a corrected gradient; null for none.
        every: Renew the curvature in every k-th step; in between the last one serves.
        rows: Rows of the batch for the curvature; 0 for all.
    """

    network: Literal["generator", "discriminator", "both"] = "generator"
    eps: float = 1.0
    mu: float = 1.0
    saddle_free: bool = False
    num_steps: int = 10
    damping: float = 0.0
    trust_radius: float | None = None
    every: int = 10
    rows: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "mu", "damping", "rows")
        require_at_least(self, 1, "num_steps", "every")
        require_finite(self, "eps")
        require(self.eps > 0, "eps", "positive", self.eps)
        if self.trust_radius is not None:
            require_finite(self, "trust_radius")
            require(self.trust_radius > 0, "trust_radius", "positive or null", self.trust_radius)
