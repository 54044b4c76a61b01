"""What a style transfer is asked for: plain dataclasses, which become flags and checks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from hessreg.gan.checks import check_types, require, require_at_least, require_positive
from hessreg.style.features import Pooling
from hessreg.style.images import MAX_SIZE

__all__ = ["CorrectionConfig", "StyleConfig", "TrainingConfig", "parse_blend"]

_RATES = {"lbfgs": 1.0, "adam": 0.1, "network": 3e-3}
# A network that is made to drop more of the content than this becomes blurred.
_BY_METHOD = {
    "image": {"steps": 150, "style_weight": 300.0},
    "network": {"steps": 600, "style_weight": 5.0},
}


def parse_blend(text: str, count: int) -> list[float]:
    """Return the weights of several styles: numbers with commas, or all the same for no text.

    Raises:
        ValueError: If they are not as many as styles, negative, not finite or all 0.

    Example:
        >>> parse_blend("0.7, 0.3", 2), parse_blend("", 2)
        ([0.7, 0.3], [1.0, 1.0])
    """
    try:
        values = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        values = []
    valid = len(values) == count and all(0 <= v < float("inf") for v in values) and sum(values) > 0
    wanted = f"{count} numbers with commas, one a style, at least 0 and not all 0"
    require(valid, "blend", wanted, text)
    return values


@dataclass
class CorrectionConfig:
    """Options of Hessian Singularity Correction.

    Args:
        eps: How small an eigenvalue is taken for singular, relative to the largest at the start.
        mu: What the kernel of the Hessian gets of the gradient, in units of 1 / eps; 0 is the
            article's formula.
        saddle_free: Take |H| for H, so that every step is a descent direction.
        num_steps: Hessian-vector products for one correction.
        every: Steps from one Krylov space to the next.
        trust_radius: Longest correction; none by default.
    """

    eps: float = 0.3
    mu: float = 1.0
    saddle_free: bool = True
    num_steps: int = 5
    every: int = 30
    trust_radius: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "eps")
        require_at_least(self, 0, "mu")
        require_at_least(self, 1, "num_steps", "every")
        if self.trust_radius is not None:
            require_positive(self, "trust_radius")


@dataclass
class TrainingConfig:
    """Options of a feed-forward network and of its training.

    Args:
        pictures: Folder of photographs to train on, or one; by default only the content.
        crop: Pixels of the sides of the parts of photographs it is trained on; no more than those
            have.
        batch_size: Such parts in a batch.
        width: Channels of its first convolution.
        num_blocks: Its residual blocks.
        activation: Of its hidden layers.
    """

    pictures: str = ""
    crop: int = 128
    batch_size: int = 2
    width: int = 12
    num_blocks: int = 3
    activation: Literal["silu", "softplus", "tanh", "leaky_relu"] = "silu"

    def __post_init__(self) -> None:
        check_types(self)
        require(16 <= self.crop <= MAX_SIZE, "crop", f"in [16, {MAX_SIZE}]", self.crop)
        require(1 <= self.batch_size <= 256, "batch_size", "in [1, 256]", self.batch_size)
        require(1 <= self.width <= 256, "width", "in [1, 256]", self.width)
        require(0 <= self.num_blocks <= 64, "num_blocks", "in [0, 64]", self.num_blocks)


@dataclass
class StyleConfig:
    """One transfer of style.

    Args:
        method: Optimise the picture, or train a network that draws it, and any other, at once.
        network: File of a network that was trained before, to draw with it at once.
        size: Pixels of the longer side; smaller photographs are not enlarged.
        steps: Of the optimiser; 0 for no limit. By default 150, of a network 600.
        seconds: Of wall clock; 0 for no limit.
        optimizer: What moves the pixels; a network is trained with Adam.
        learning_rate: Of the optimiser; by default what does well.
        correction: Hessian Singularity Correction of its gradients, or none.
        content_weight: Of the content loss.
        style_weight: Of the style loss; by default 300, of a network 5.
        tv_weight: Of total variation, the squared differences of neighbouring pixels.
        blend: Weights of several styles with commas; equal by default.
        keep_colors: Give the picture the colours of the content.
        features: What pictures are compared by: random, or the file of VGG-19's weights.
        pooling: Of VGG-19.
        init: What the picture starts as.
        seed: Of random features and of noise.
        save_every: Steps from one picture on the way to the next; 0 for none.
        threads: Of torch; 0 for its own choice.
        hsc: Options of Hessian Singularity Correction.
        training: Options of method network.
    """

    method: Literal["image", "network"] = "image"
    network: str = ""
    size: int = 256
    steps: int | None = None
    seconds: float = 0.0
    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    learning_rate: float | None = None
    correction: Literal["none", "hsc"] = "none"
    content_weight: float = 1.0
    style_weight: float | None = None
    tv_weight: float = 2.0
    blend: str = ""
    keep_colors: bool = False
    features: str = "random"
    pooling: Pooling = "average"
    init: Literal["content", "noise", "style"] = "content"
    seed: int = 0
    save_every: int = 0
    threads: int = 0
    hsc: CorrectionConfig = field(default_factory=CorrectionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in _BY_METHOD[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        require(32 <= self.size <= MAX_SIZE, "size", f"in [32, {MAX_SIZE}]", self.size)
        require_at_least(self, 0, "steps", "seconds", "seed", "save_every", "threads")
        require_at_least(self, 0, "content_weight", "style_weight", "tv_weight")
        require(self.threads <= 1024, "threads", "at most 1024", self.threads)
        require(bool(self.steps) or self.seconds > 0, "steps", "positive without seconds", 0)
        if self.learning_rate is not None:
            require_positive(self, "learning_rate")

    @property
    def weights(self) -> dict[str, float]:
        """Those of the parts of the loss, as a `StyleObjective` takes them."""
        names = "content_weight", "style_weight", "tv_weight"
        return {name: getattr(self, name) for name in names}

    @property
    def rate(self) -> float:
        """The learning rate, chosen or by default."""
        chosen = self.learning_rate
        return _RATES[self._trained] if chosen is None else chosen

    @property
    def title(self) -> str:
        """What optimises, for headings and legends."""
        return self._trained + ("" if self.correction == "none" else " + hsc")

    @property
    def _trained(self) -> str:
        return "network" if self.method == "network" else self.optimizer

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> StyleConfig:
        """Take the fields from a dictionary that may have other keys, too."""
        return cls(**{each.name: options[each.name] for each in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values."""
        return asdict(self)
