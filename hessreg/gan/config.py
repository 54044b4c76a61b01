"""What a run is made of: plain dataclasses, which become flags, YAML and checks."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_type_hints

from hessreg.ops.gaussian import _gamma_of

__all__ = [
    "DEFAULTS",
    "REGULARIZERS",
    "GaussianConfig",
    "HSCConfig",
    "HSN1RConfig",
    "HessianPenaltyConfig",
    "ProjectionConfig",
    "R1Config",
    "TrainConfig",
    "parse_sigma",
]

REGULARIZERS = ("r1", "hsn1r", "gaussian", "hessian_penalty")
_POLICIES = ("median", "ema", "learned")


def _require(condition: bool, name: str, wanted: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {reprlib.repr(value)}")


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
    _require(bool(values) and all(map(_is_bandwidth, values)), "sigma", wanted, text)
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
    _require(name == "none" or known, "regularizer", wanted, name)


def _require_finite(config: Any, *names: str) -> None:
    for name in names:
        _require(math.isfinite(getattr(config, name)), name, "finite", getattr(config, name))


def _require_at_least(config: Any, minimum: float, *names: str) -> None:
    _require_finite(config, *names)
    for name in names:
        value = getattr(config, name)
        _require(value >= minimum, name, f"at least {minimum:g}", value)


def _require_positive(config: Any, *names: str) -> None:
    _require_finite(config, *names)
    for name in names:
        _require(getattr(config, name) > 0, name, "positive", getattr(config, name))


def _check_types(config: Any) -> None:
    """Refuse values that are not of the annotated types: YAML and Python give anything."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        wanted = _WANTED.get(hint) or f"one of {', '.join(get_args(hint))}"
        if is_dataclass(hint):
            wanted = "a mapping of names to values"
        _require(_fits(value, hint), name, wanted, value)
        if isinstance(value, int):
            _require(abs(value) < 2**63, name, "in (-2**63, 2**63)", value)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if choices := get_args(hint):
        return isinstance(value, str) and value in choices
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(
            value, bool
        )
    return isinstance(value, hint)


_WANTED: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    float | str: "a number or text",
    float | None: "a number or null",
    int | None: "an integer or null",
    bool: "true or false",
}


@dataclass
class R1Config:
    """Options of the gradient penalty on real images.

    Args:
        gamma: Its weight.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_types(self)
        _require_at_least(self, 0, "gamma")


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
        _check_types(self)
        _require_at_least(self, 0, "weight", "discriminator_weight", "target")
        _require_at_least(self, 1, "every", "num_steps", "num_probes")


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
        _check_types(self)
        weights = "interaction_weight", "generator_weight", "discriminator_weight"
        _require_finite(self, *weights)
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
        _check_types(self)
        _require_at_least(self, 0, "weight")
        _require_at_least(self, 1, "every")
        _require_at_least(self, 2, "num_probes")


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
        _check_types(self)
        if self.strength is not None:
            _require_finite(self, "strength")


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
        _check_types(self)
        _require_at_least(self, 0, "mu", "damping", "rows")
        _require_at_least(self, 1, "num_steps", "every")
        _require_finite(self, "eps")
        _require(self.eps > 0, "eps", "positive", self.eps)
        if self.trust_radius is not None:
            _require_finite(self, "trust_radius")
            _require(self.trust_radius > 0, "trust_radius", "positive or null", self.trust_radius)


@dataclass
class TrainConfig:
    """Everything that determines a run.

    Args:
        dataset: What to train on.
        regularizer: none, or any of r1, hsn1r, gaussian and hessian_penalty joined by +.
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
        r1: Options of regulariser r1.
        hsn1r: Options of regulariser hsn1r.
        gaussian: Options of regulariser gaussian.
        hessian_penalty: Options of regulariser hessian_penalty.
        projection: Options of orthogonal.
        hsc: Options of correction hsc.
    """

    dataset: Literal["digits", "ring"] = "digits"
    regularizer: str = "hsn1r"
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
    r1: R1Config = field(default_factory=R1Config)
    hsn1r: HSN1RConfig = field(default_factory=HSN1RConfig)
    gaussian: GaussianConfig = field(default_factory=GaussianConfig)
    hessian_penalty: HessianPenaltyConfig = field(default_factory=HessianPenaltyConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    hsc: HSCConfig = field(default_factory=HSCConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        _check_regularizer(self.regularizer)
        self._check_orthogonal()
        _require_at_least(self, 0, "steps", "seconds", "seed", "generator_lr", "discriminator_lr")
        _require_at_least(self, 1, "threads", "latent_dim", "batch_size")
        _require_at_least(self, 1, "log_every", "eval_every", "save_every")
        if "gaussian" in self.regularizer.split("+"):
            _require(
                self.batch_size >= 2, "batch_size", "at least 2 with gaussian", self.batch_size
            )
        _require(self.threads <= 1024, "threads", "at most 1024", self.threads)
        _require(2 <= self.width <= 8192, "width", "in [2, 8192]", self.width)
        _require(self.latent_dim <= 8192, "latent_dim", "at most 8192", self.latent_dim)
        _require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        if not self.steps and not self.seconds:
            self.seconds = 40.0

    def _check_orthogonal(self) -> None:
        if self.orthogonal != "terms":
            return
        strength, pair = self.projection.strength, self.projection.pair
        _require(strength is None, "projection.strength", "null with orthogonal terms", strength)
        alone = self.regularizer == "none" and pair == "adversarial_regularizer"
        wanted = "real_fake with orthogonal terms and no regularizer"
        _require(not alone, "projection.pair", wanted, pair)

    @property
    def title(self) -> str:
        """What is trained with, for headings and legends."""
        chosen = [] if self.orthogonal == "none" else [f"orthogonal {self.orthogonal}"]
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
            "r1": R1Config,
            "hsn1r": HSN1RConfig,
            "gaussian": GaussianConfig,
            "hessian_penalty": HessianPenaltyConfig,
            "projection": ProjectionConfig,
            "hsc": HSCConfig,
        }
        plain = {k: _build(nested[k], v) if k in nested else v for k, v in _mapping(values).items()}
        return _build(cls, plain)


def _mapping(values: Any) -> dict[str, Any]:
    _require(isinstance(values, dict), "a configuration", "a mapping of names to values", values)
    return values


def _build(kind: type[Any], values: Any) -> Any:
    names = [f.name for f in fields(kind)]
    unknown = sorted(map(str, _mapping(values).keys() - set(names)))
    _require(not unknown, "names", f"among {', '.join(names)}", ", ".join(unknown))
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None


_RING = TrainConfig(
    dataset="ring",
    regularizer="gaussian",
    activation="leaky_relu",
    latent_dim=2,
    batch_size=256,
    generator_lr=1e-3,
    discriminator_lr=1e-3,
    r1=R1Config(gamma=0.1),
    gaussian=GaussianConfig(interaction_weight=100.0, sigma="0.25,0.5,1,2"),
)
DEFAULTS: dict[str, TrainConfig] = {config.dataset: config for config in (TrainConfig(), _RING)}
