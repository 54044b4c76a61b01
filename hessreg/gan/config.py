"""What a run is made of: plain dataclasses, which become flags, YAML and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from hessreg.gan.checks import (
    check_types,
    require,
    require_at_least,
    require_finite,
    require_positive,
)
from hessreg.gan.losses import LOSSES, make_loss
from hessreg.ops.gaussian import _gamma_of

__all__ = [
    "DEFAULTS",
    "REGULARIZERS",
    "DRAGANConfig",
    "GaussianConfig",
    "GridConfig",
    "HSCConfig",
    "HSN1RConfig",
    "HessianPenaltyConfig",
    "ProjectionConfig",
    "R1Config",
    "R2Config",
    "RingConfig",
    "TrainConfig",
    "WGANGPConfig",
    "parse_sigma",
    "with_method",
]

REGULARIZERS = ("r1", "r2", "wgan_gp", "dragan", "hsn1r", "gaussian", "hessian_penalty")
_MODES = ("terms", "previous", "game", "weights")
_POLICIES = ("median", "ema", "learned")


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


def _check_regularizer(name: str) -> None:
    parts = name.split("+")
    known = all(part in REGULARIZERS for part in parts) and len(set(parts)) == len(parts)
    wanted = f"none, or {', '.join(REGULARIZERS)} joined by +"
    require(name == "none" or known, "regularizer", wanted, name)


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
        weight: Weight of the generator's norm.
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


@dataclass
class TrainConfig:
    """Everything that determines a run.

    Args:
        dataset: What to train on.
        regularizer: none, or any of r1, r2, wgan_gp, dragan, hsn1r, gaussian and hessian_penalty
            joined by +.
        loss: What the networks play for.
        label_smoothing: Distance of the label of real samples from 1, for losses with labels.
        smoothing: Whether that is one-sided, or generated samples have a label above 0 too.
        orthogonal: Project gradients: of the terms of a network's loss, on the previous one, on the
            other player's, or on the weights.
        correction: Multiply gradients by the corrected inverse of the Hessian of the network's own
            loss.
        steps: Stop after this many steps; 0 for no limit.
        seconds: Stop when the training steps have used this much CPU time; 0 for no limit.
            With neither limit a run takes 40 seconds.
        seed: Seed of everything random.
        device: Where to train; auto takes a GPU if there is one.
        threads: CPU threads.
        architecture: Kind of networks.
        activation: Activation of the hidden layers.
        width: Units of a hidden layer, or channels of the widest feature map.
        latent_dim: Number of noise components.
        batch_size: Samples in a batch.
        generator_lr: Adam's learning rate for the generator.
        discriminator_lr: Adam's learning rate for the discriminator.
        ema_decay: Decay of the averaged generator that makes the samples.
        log_every: Steps between rows of metrics.jsonl.
        eval_every: Steps between evaluations by the judge.
        save_every: Steps between checkpoints.
        tensorboard: Write TensorBoard events as well.
        ring: Options of data set ring.
        grid: Options of data set grid.
        r1: Options of regulariser r1.
        r2: Options of regulariser r2.
        wgan_gp: Options of regulariser wgan_gp.
        dragan: Options of regulariser dragan.
        hsn1r: Options of regulariser hsn1r.
        gaussian: Options of regulariser gaussian.
        hessian_penalty: Options of regulariser hessian_penalty.
        projection: Options of orthogonal.
        hsc: Options of correction hsc.
    """

    dataset: Literal["digits", "ring", "grid"] = "digits"
    regularizer: str = "hsn1r"
    loss: Literal[
        "nonsaturating",
        "minimax",
        "least_squares",
        "hinge",
        "wasserstein",
        "relativistic",
        "mmd",
    ] = "nonsaturating"
    label_smoothing: float = 0.0
    smoothing: Literal["one_sided", "both"] = "one_sided"
    orthogonal: Literal["none", "terms", "previous", "game", "weights"] = "none"
    correction: Literal["none", "hsc"] = "none"
    steps: int = 0
    seconds: float = 0.0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    architecture: Literal["mlp", "dcgan"] = "mlp"
    activation: Literal["silu", "softplus", "tanh", "leaky_relu"] = "silu"
    width: int = 128
    latent_dim: int = 32
    batch_size: int = 64
    generator_lr: float = 5e-4
    discriminator_lr: float = 5e-4
    ema_decay: float = 0.999
    log_every: int = 100
    eval_every: int = 2000
    save_every: int = 1000
    tensorboard: bool = True
    ring: RingConfig = field(default_factory=RingConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    r1: R1Config = field(default_factory=R1Config)
    r2: R2Config = field(default_factory=R2Config)
    wgan_gp: WGANGPConfig = field(default_factory=WGANGPConfig)
    dragan: DRAGANConfig = field(default_factory=DRAGANConfig)
    hsn1r: HSN1RConfig = field(default_factory=HSN1RConfig)
    gaussian: GaussianConfig = field(default_factory=GaussianConfig)
    hessian_penalty: HessianPenaltyConfig = field(default_factory=HessianPenaltyConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    hsc: HSCConfig = field(default_factory=HSCConfig)

    def __post_init__(self) -> None:
        check_types(self)
        _check_regularizer(self.regularizer)
        make_loss(self.loss, self.label_smoothing, self.smoothing == "both")
        self._check_orthogonal()
        require_at_least(self, 0, "steps", "seconds", "seed", "generator_lr", "discriminator_lr")
        require_at_least(self, 1, "threads", "latent_dim", "batch_size")
        require_at_least(self, 1, "log_every", "eval_every", "save_every")
        self._check_pairs()
        require(self.threads <= 1024, "threads", "at most 1024", self.threads)
        require(2 <= self.width <= 8192, "width", "in [2, 8192]", self.width)
        require(self.latent_dim <= 8192, "latent_dim", "at most 8192", self.latent_dim)
        require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        if not self.steps and not self.seconds:
            self.seconds = 40.0

    def _check_pairs(self) -> None:
        """MMD^2 without bias takes two samples of each kind."""
        chosen = [*self.regularizer.split("+"), self.loss]
        for name in ("gaussian", "mmd"):
            enough = self.batch_size >= 2 or name not in chosen
            require(enough, "batch_size", f"at least 2 with {name}", self.batch_size)
        is_alone = self.loss == "mmd" and self.correction == "hsc" and self.hsc.rows == 1
        require(not is_alone, "hsc.rows", "0 or at least 2 with mmd", self.hsc.rows)

    def _check_orthogonal(self) -> None:
        if self.orthogonal != "terms":
            return
        strength, pair = self.projection.strength, self.projection.pair
        require(strength is None, "projection.strength", "null with orthogonal terms", strength)
        alone = self.regularizer == "none" and pair == "adversarial_regularizer"
        has_parts = make_loss(self.loss).has_parts
        wanted = f"adversarial_regularizer: loss {self.loss} has no part on real samples alone"
        require(has_parts or pair != "real_fake", "projection.pair", wanted, pair)
        wanted = "real_fake with orthogonal terms and no regularizer"
        require(not alone, "projection.pair", wanted, pair)

    @property
    def title(self) -> str:
        """What is trained with, for headings and legends."""
        chosen: list[str] = [] if self.loss == "nonsaturating" else [self.loss]
        if self.orthogonal != "none":
            chosen.append(f"orthogonal {self.orthogonal}")
        if self.correction != "none":
            side = "" if self.hsc.network == "both" else f" {self.hsc.network}"
            chosen.append(f"{self.correction}{side}")
        return ", ".join([self.regularizer, *chosen])

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries, as they are written to YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> TrainConfig:
        """Build a configuration from what `to_dict` returned, refusing anything else.

        Raises:
            ValueError: If a name is unknown, or a value is missing or of the wrong kind.
        """
        nested = {
            "ring": RingConfig,
            "grid": GridConfig,
            "r1": R1Config,
            "r2": R2Config,
            "wgan_gp": WGANGPConfig,
            "dragan": DRAGANConfig,
            "hsn1r": HSN1RConfig,
            "gaussian": GaussianConfig,
            "hessian_penalty": HessianPenaltyConfig,
            "projection": ProjectionConfig,
            "hsc": HSCConfig,
        }
        plain = {k: _build(nested[k], v) if k in nested else v for k, v in _mapping(values).items()}
        return _build(cls, plain)


def _mapping(values: Any) -> dict[str, Any]:
    require(isinstance(values, dict), "a configuration", "a mapping of names to values", values)
    return values


def _build(kind: type[Any], values: Any) -> Any:
    names = [f.name for f in fields(kind)]
    unknown = sorted(map(str, _mapping(values).keys() - set(names)))
    require(not unknown, "names", f"among {', '.join(names)}", ", ".join(unknown))
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None


_ORTHOGONAL = {f"orthogonal_{mode}": mode for mode in _MODES}  # by what methods call them


def with_method(config: TrainConfig, name: str) -> TrainConfig:
    """Return a configuration with the methods that a name joins by +, and no others.

    Args:
        config: Everything else.
        name: ``none``, or any of the regularisers, one loss, ``hsc``, and one of
            ``orthogonal_terms`` and its kin: ``relativistic+r1+r2``.

    Raises:
        ValueError: If a part is unknown or there twice, or they cannot be used together.

    Example:
        >>> chosen = with_method(TrainConfig(), "relativistic+r1+r2")
        >>> chosen.loss, chosen.regularizer, chosen.correction
        ('relativistic', 'r1+r2', 'none')
    """
    parts = [] if name == "none" else name.split("+")
    losses = [part for part in parts if part in LOSSES]
    modes = [_ORTHOGONAL[part] for part in parts if part in _ORTHOGONAL]
    corrections = [part for part in parts if part == "hsc"]
    regularizers = [part for part in parts if part in REGULARIZERS]
    known = len({*losses, *modes, *corrections, *regularizers}) == len(parts)
    unique = len(losses) < 2 and len(modes) < 2
    every = [*LOSSES, "hsc", *_ORTHOGONAL, *REGULARIZERS]
    wanted = f"none, or {', '.join(every)} joined by +, at most one loss and one projection"
    require(known and unique, "method", wanted, name)
    chosen: dict[str, Any] = {"loss": losses[0]} if losses else {}
    chosen["orthogonal"] = modes[0] if modes else "none"
    chosen["correction"] = "hsc" if corrections else "none"
    return replace(config, regularizer="+".join(regularizers) or "none", **chosen)


_RING = TrainConfig(
    dataset="ring",
    regularizer="gaussian",
    activation="leaky_relu",
    latent_dim=2,
    batch_size=256,
    generator_lr=1e-3,
    discriminator_lr=1e-3,
    r1=R1Config(gamma=0.1),
    r2=R2Config(gamma=0.1),
    gaussian=GaussianConfig(interaction_weight=100.0, sigma="0.25,0.5,1,2"),
)
_GRID = replace(_RING, dataset="grid")
DEFAULTS: dict[str, TrainConfig] = {
    config.dataset: config for config in (TrainConfig(), _RING, _GRID)
}
