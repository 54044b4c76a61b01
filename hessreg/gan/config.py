"""What a run is made of: plain dataclasses, which become flags, YAML and checks."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from hessreg.gan.architectures import ARCHITECTURES
from hessreg.gan.checks import check_types, require, require_at_least
from hessreg.gan.factories import is_factory
from hessreg.gan.losses import make_loss
from hessreg.gan.options import (
    ArraysConfig,
    DRAGANConfig,
    FIDConfig,
    GaussianConfig,
    GridConfig,
    GrowthConfig,
    HessianPenaltyConfig,
    HSCConfig,
    HSN1RConfig,
    ImagesConfig,
    InfoGANConfig,
    InstanceNoiseConfig,
    IterativeConfig,
    PlayerConfig,
    ProjectionConfig,
    R1Config,
    R2Config,
    RingConfig,
    WGANGPConfig,
)

__all__ = ["DEFAULTS", "FROM_FILES", "REGULARIZERS", "TrainConfig", "flatten", "with_values"]

REGULARIZERS = (
    *("r1", "r2", "wgan_gp", "iterative", "dragan"),
    *("hsn1r", "gaussian", "hessian_penalty"),
)
FROM_FILES = ("mnist", "images", "arrays")  # data sets that the user has


def _check_regularizer(name: str) -> None:
    parts = name.split("+")
    known = all(part in REGULARIZERS for part in parts) and len(set(parts)) == len(parts)
    wanted = f"none, or {', '.join(REGULARIZERS)} joined by +"
    require(name == "none" or known, "regularizer", wanted, name)


@dataclass
class TrainConfig:
    """Everything that determines a run.

    Args:
        dataset: What to train on.
        data: File or folder of data sets mnist, images and arrays.
        regularizer: none, or any of r1, r2, wgan_gp, iterative, dragan, hsn1r, gaussian and
            hessian_penalty joined by +.
        loss: What the networks play for.
        label_smoothing: Distance of the label of real samples from 1, for losses with labels.
        smoothing: Whether that is one-sided, or generated samples have a label above 0 too.
        orthogonal: Project gradients: of the terms of a network's loss, on the previous one, on the
            other player's, or on the weights.
        correction: Multiply gradients by the corrected inverse of the Hessian of the network's own
            loss.
        steps: Stop after this many steps; 0 for no limit.
        seconds: Stop when the training steps have used this much CPU time; 0 for no limit.
            With neither limit a run takes 40 seconds, and on more than eight Gaussians 5 for
            each, at most 90.
        seed: Seed of everything random.
        device: Where to train; auto takes a GPU if there is one.
        threads: CPU threads.
        architecture: Kind of networks: mlp, dcgan, resnet, orthogonal_mlp, gaussian_dcgan, or
            module:factory for your own.
        activation: Activation of the hidden layers.
        initialization: Of the weights; default is torch's, normal the DCGAN's.
        conditional: Whether both networks are told the classes of the data, and how the
            discriminator takes them.
        latent: Distribution of the noise; uniform is on [-1, 1].
        width: Units of a hidden layer, or channels of the widest feature map.
        latent_dim: Number of noise components.
        batch_size: Samples in a batch.
        discriminator_steps: Steps of the discriminator for one of the generator.
        ttur: Two time scales: double the rate of the generator or of the discriminator.
        schedule_steps: Steps after which rates have fallen; 0 for steps or, without, seconds.
        precision: Numbers; with bf16 and fp16 torch's autocast chooses where they are used.
        accumulate: Parts of a batch that are differentiated one after the other.
        ema_decay: Decay of the averaged generator that makes the samples.
        log_every: Steps between rows of metrics.jsonl.
        eval_every: Steps between evaluations by the judge.
        save_every: Steps between checkpoints.
        spectrum_every: Steps between spectral densities of both networks' Hessians; one more is at
            the end. 0 for none.
        tensorboard: Write TensorBoard events as well.
        wandb: Log to this project of Weights & Biases as well.
        fid: Options of FID and KID by torchmetrics.
        images: Options of data set images.
        arrays: Options of data set arrays.
        growth: Options of growing batches.
        instance_noise: Options of the noise on what the discriminator sees.
        g: Options of the generator's training.
        d: Options of the discriminator's training.
        infogan: Options of InfoGAN.
        ring: Options of data set ring.
        grid: Options of data set grid.
        r1: Options of regulariser r1.
        r2: Options of regulariser r2.
        wgan_gp: Options of regulariser wgan_gp.
        iterative: Options of regulariser iterative.
        dragan: Options of regulariser dragan.
        hsn1r: Options of regulariser hsn1r.
        gaussian: Options of regulariser gaussian.
        hessian_penalty: Options of regulariser hessian_penalty.
        projection: Options of orthogonal.
        hsc: Options of correction hsc.
    """

    dataset: Literal["digits", "ring", "grid", "mnist", "images", "arrays"] = "digits"
    data: str = ""
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
    architecture: str = "mlp"
    activation: Literal["silu", "softplus", "tanh", "leaky_relu", "relu", "gelu", "mish"] = "silu"
    initialization: Literal["default", "normal", "xavier", "orthogonal"] = "default"
    conditional: Literal["none", "concat", "projection"] = "none"
    latent: Literal["normal", "uniform"] = "normal"
    width: int = 128
    latent_dim: int = 32
    batch_size: int = 64
    discriminator_steps: int = 1
    ttur: Literal["none", "g2", "d2"] = "none"
    schedule_steps: int = 0
    precision: Literal["float32", "float64", "bf16", "fp16"] = "float32"
    accumulate: int = 1
    ema_decay: float = 0.999
    log_every: int = 100
    eval_every: int = 2000
    save_every: int = 1000
    spectrum_every: int = 0
    tensorboard: bool = True
    wandb: str = ""
    fid: FIDConfig = field(default_factory=FIDConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    arrays: ArraysConfig = field(default_factory=ArraysConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    instance_noise: InstanceNoiseConfig = field(default_factory=InstanceNoiseConfig)
    g: PlayerConfig = field(default_factory=PlayerConfig)
    d: PlayerConfig = field(default_factory=PlayerConfig)
    infogan: InfoGANConfig = field(default_factory=InfoGANConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    r1: R1Config = field(default_factory=R1Config)
    r2: R2Config = field(default_factory=R2Config)
    wgan_gp: WGANGPConfig = field(default_factory=WGANGPConfig)
    iterative: IterativeConfig = field(default_factory=IterativeConfig)
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
        require_at_least(self, 0, "steps", "seconds", "seed", "spectrum_every")
        require_at_least(self, 1, "threads", "latent_dim", "batch_size")
        require_at_least(self, 1, "log_every", "eval_every", "save_every")
        require_at_least(self, 1, "discriminator_steps", "accumulate")
        require_at_least(self, 0, "schedule_steps")
        self._check_players()
        self._check_pairs()
        self._check_architecture()
        require(self.threads <= 1024, "threads", "at most 1024", self.threads)
        require(2 <= self.width <= 8192, "width", "in [2, 8192]", self.width)
        require(self.latent_dim <= 8192, "latent_dim", "at most 8192", self.latent_dim)
        require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        if not self.steps and not self.seconds:
            self.seconds = self._usual_seconds()
        wanted = f"empty: data set {self.dataset} has no files"
        require(not self.data or self.dataset in FROM_FILES, "data", wanted, self.data)
        if self.data:  # a run may be resumed from another folder
            self.data = str(Path(self.data).expanduser().absolute())

    def _usual_seconds(self) -> float:
        modes = {"ring": self.ring.modes, "grid": self.grid.side**2}.get(self.dataset, 0)
        return float(min(max(40, 5 * modes), 90))

    def _check_players(self) -> None:
        self.g.check("g")
        self.d.check("d")
        wanted = f"equal to d.lr with ttur {self.ttur}, which doubles one of them"
        require(self.ttur == "none" or self.g.lr == self.d.lr, "g.lr", wanted, self.g.lr)

    def players(self) -> tuple[PlayerConfig, PlayerConfig]:
        """Return how the generator and the discriminator are trained, at their own rates."""
        rates = {"g2": (2.0, 1.0), "d2": (1.0, 2.0)}.get(self.ttur, (1.0, 1.0))
        g, d = replace(self.g, lr=rates[0] * self.g.lr), replace(self.d, lr=rates[1] * self.d.lr)
        return g, d

    def _check_pairs(self) -> None:
        """MMD^2 without bias takes two samples of each kind."""
        chosen = [*self.regularizer.split("+"), self.loss]
        smallest, option = min(
            (player.batch_size, f"{name}.batch_size")
            if player.batch_size
            else (self.batch_size, "batch_size")
            for name, player in (("g", self.g), ("d", self.d))
        )
        estimators = {"gaussian", "mmd", "iterative"}
        if self.iterative.distance == "critic":
            estimators.remove("iterative")
        for name in estimators & {*chosen}:
            require(smallest >= 2, option, f"at least 2 with {name}", smallest)
            wanted = f"at most {smallest // 2} with {name}, for parts of two samples"
            require(self.accumulate <= smallest // 2, "accumulate", wanted, self.accumulate)
        is_alone = self.loss == "mmd" and self.correction == "hsc" and self.hsc.rows == 1
        require(not is_alone, "hsc.rows", "0 or at least 2 with mmd", self.hsc.rows)

    def _check_architecture(self) -> None:
        own, name = is_factory(self.architecture), self.architecture
        known = f"one of {', '.join(ARCHITECTURES)}, or module:factory"
        require(own or name in ARCHITECTURES, "architecture", known, name)
        for side, options in (("g", self.g), ("d", self.d)):
            fits = not own or options.dropout == 0
            require(fits, f"{side}.dropout", f"0 with networks from {name}", options.dropout)
        fits = not own or "gaussian" not in self.regularizer or self.gaussian.space == "samples"
        require(fits, "gaussian.space", f"samples with networks from {name}", self.gaussian.space)
        codes = self.infogan.codes
        require(not (own and codes), "infogan.codes", f"0 with networks from {name}", codes)

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
        if self.conditional != "none":
            chosen.append(f"conditional {self.conditional}")
        if self.infogan.codes:
            chosen.append(f"infogan {self.infogan.codes}")
        return ", ".join([self.regularizer, *chosen])

    @property
    def name(self) -> str:
        """What a folder of a run is called."""
        chosen = [] if self.correction == "none" else [self.correction]
        return "-".join([self.dataset, self.regularizer, *chosen])

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries, as they are written to YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> TrainConfig:
        """Build a configuration from what `to_dict` returned, refusing anything else.

        Raises:
            ValueError: If a name is unknown, or a value is missing or of the wrong kind.
        """
        groups: dict[str, Any] = {
            f.name: f.default_factory for f in fields(cls) if f.default_factory is not MISSING
        }
        plain = dict(_mapping(values))
        for name in groups.keys() & plain.keys():
            try:
                plain[name] = _build(groups[name], plain[name])
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from None
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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dots in the names.

    Example:
        >>> flatten({"seed": 0, "r1": {"gamma": 1.0}})
        {'seed': 0, 'r1.gamma': 1.0}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        flat.update({prefix + name: value} if inner is None else inner)
    return flat


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a configuration with other values of some fields.

    Args:
        config: Everything else.
        values: By name, with dots: ``{"g.lr": 1e-3}``.

    Raises:
        ValueError: If a name is unknown or a value cannot be used.

    Example:
        >>> with_values(TrainConfig(), {"batch_size": 32, "r1.gamma": 0.5}).r1.gamma
        0.5
    """
    nested = config.to_dict()
    known = flatten(nested)
    for name, value in values.items():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"an option such as {near[0]}" if near else "a name of an option"
        require(name in known, "setting", hint, name)
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return TrainConfig.from_dict(nested)


_DIGITS = TrainConfig(
    regularizer="r1",
    g=PlayerConfig(lr=1e-3, schedule="linear"),
    d=PlayerConfig(lr=1e-3, schedule="linear"),
    hsn1r=HSN1RConfig(norm="spectral", weight=0.1, discriminator_weight=0.2, num_steps=2),
)
_RING = TrainConfig(
    dataset="ring",
    regularizer="r1",
    activation="relu",  # the generator has to jump between modes
    latent_dim=2,
    batch_size=256,
    g=PlayerConfig(lr=2e-3, beta2=0.95),
    d=PlayerConfig(lr=2e-3, beta2=0.95),
    r1=R1Config(gamma=0.03),
    r2=R2Config(gamma=0.03),
    hsn1r=HSN1RConfig(weight=1e-5, discriminator_weight=3e-5),
    gaussian=GaussianConfig(interaction_weight=100.0, sigma="0.25,0.5,1,2"),
)
_GRID = replace(_RING, dataset="grid")
_MNIST = TrainConfig(
    dataset="mnist", regularizer="r1", architecture="dcgan", width=64, latent_dim=64
)
_IMAGES = replace(_MNIST, dataset="images", width=32)
_ARRAYS = TrainConfig(dataset="arrays", regularizer="r1")
DEFAULTS: dict[str, TrainConfig] = {
    config.dataset: config for config in (_DIGITS, _RING, _GRID, _MNIST, _IMAGES, _ARRAYS)
}
