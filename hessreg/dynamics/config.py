"""What the lab is asked for: plain dataclasses, which become flags and checks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from hessreg.dynamics.games import AdversarialLoss
from hessreg.gan.checks import (
    check_types,
    require,
    require_at_least,
    require_finite,
    require_positive,
)

__all__ = ["DynamicsConfig"]


@dataclass
class BilinearConfig:
    """Options of the bilinear game f = x'B y.

    Args:
        dim: Size of x and of y; f = xy if it is 1.
    """

    dim: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        require(1 <= self.dim <= 64, "bilinear.dim", "in [1, 64]", self.dim)


@dataclass
class QuadraticConfig:
    """Options of the quadratic game f = a/2 x^2 + b xy - c/2 y^2.

    Args:
        a: Curvature of the first player's loss.
        b: Interaction.
        c: Curvature of the second player's loss.
    """

    a: float = 0.5
    b: float = 1.0
    c: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        require_finite(self, "a", "b", "c")


@dataclass
class RingConfig:
    """Options of the ring.

    Args:
        seconds: CPU time of each method.
        loss: Of both networks.
        eta: Learning rate.
        optimizer: What takes the methods' moves: Adam, as if each were a gradient, or nothing.
        width: Units of a hidden layer.
        batch_size: Points in a batch.
    """

    seconds: float = 20.0
    loss: AdversarialLoss = "non_saturating"
    eta: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    width: int = 64
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "seconds")
        require(0 < self.eta < math.inf, "ring.eta", "positive", self.eta)
        require(2 <= self.width <= 8192, "width", "in [2, 8192]", self.width)
        require_at_least(self, 1, "batch_size")


@dataclass
class MomentumConfig:
    """Options of negative momentum.

    Args:
        beta: Momentum.
    """

    beta: float = -0.5

    def __post_init__(self) -> None:
        check_types(self)
        require_finite(self, "beta")


@dataclass
class WeightConfig:
    """Options of an adjustment of the gradient.

    Args:
        weight: The lambda of the article.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        require_finite(self, "weight")


@dataclass
class R1Config:
    """Options of the gradient penalty on real samples.

    Args:
        gamma: Its weight; half of it counts.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "gamma")


@dataclass
class WGANGPConfig:
    """Options of the gradient penalty between real and generated samples.

    Args:
        gamma: Its weight; half of it counts.
        target: The norm that the gradient should have.
    """

    gamma: float = 1.0
    target: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "gamma", "target")


@dataclass
class ClippingConfig:
    """Options of weight clipping.

    Args:
        bound: Largest absolute value of the discriminator's parameters.
    """

    bound: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "bound")


@dataclass
class HSN1RConfig:
    """Options of the penalty on the norm of each player's Hessian.

    Args:
        norm: Sum of absolute eigenvalues, largest absolute eigenvalue, largest column sum, or root
            of the sum of squares.
        weight: Its weight for both players.
        num_steps: Lanczos or power iterations for one norm, where it is estimated.
    """

    norm: Literal["nuclear", "spectral", "one", "fro"] = "nuclear"
    weight: float = 1e-3
    num_steps: int = 3

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 0, "weight")
        require_at_least(self, 1, "num_steps")


@dataclass
class HSCConfig:
    """Options of Hessian Singularity Correction.

    Args:
        eps: How small an eigenvalue is taken for singular.
        mu: Gradient step for what is singular; the formula has none.
    """

    eps: float = 1.0
    mu: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "eps")
        require_at_least(self, 0, "mu")


@dataclass
class OrthogonalConfig:
    """Options of the projection against the last joint gradient.

    Args:
        strength: The share of the projection that is taken away.
        reference: The last gradient, or the last update that was made of one.
    """

    strength: float = 0.5
    reference: Literal["gradient", "update"] = "gradient"

    def __post_init__(self) -> None:
        check_types(self)
        require_finite(self, "strength")


@dataclass
class DynamicsConfig:
    """Games, methods and their parameters.

    Args:
        games: Names with commas: bilinear, quadratic, dirac, dirac_wasserstein, ring; all is all
            but the ring, which takes its time.
        methods: Names with commas; all is all that apply to a game.
        eta: Learning rate of both players in the small games.
        steps: Of the small games.
        seed: Of starting points, matrices, weights, batches and noise.
        updates: Of the methods that add something to a game (r1, wgan_gp, weight_clipping, hsn1r):
            both players at once, or the second after the first.
        bilinear: Options of the bilinear game.
        quadratic: Options of the quadratic game.
        ring: Options of the ring.
        negative_momentum: Options of negative momentum.
        consensus: Options of consensus optimisation.
        symplectic: Options of symplectic gradient adjustment.
        r1: Options of the gradient penalty on real samples.
        wgan_gp: Options of the gradient penalty between real and generated samples.
        weight_clipping: Options of weight clipping.
        hsn1r: Options of the penalty on Hessian norms.
        hsc: Options of Hessian Singularity Correction.
        orthogonal: Options of the projection against the last gradient.
    """

    games: str = "all"
    methods: str = "all"
    eta: float = 0.3
    steps: int = 500
    seed: int = 0
    updates: Literal["simultaneous", "alternating"] = "simultaneous"
    bilinear: BilinearConfig = field(default_factory=BilinearConfig)
    quadratic: QuadraticConfig = field(default_factory=QuadraticConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    negative_momentum: MomentumConfig = field(default_factory=MomentumConfig)
    consensus: WeightConfig = field(default_factory=WeightConfig)
    symplectic: WeightConfig = field(default_factory=WeightConfig)
    r1: R1Config = field(default_factory=R1Config)
    wgan_gp: WGANGPConfig = field(default_factory=WGANGPConfig)
    weight_clipping: ClippingConfig = field(default_factory=ClippingConfig)
    hsn1r: HSN1RConfig = field(default_factory=HSN1RConfig)
    hsc: HSCConfig = field(default_factory=HSCConfig)
    orthogonal: OrthogonalConfig = field(default_factory=OrthogonalConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "eta")
        require(10 <= self.steps <= 10**5, "steps", "in [10, 100000]", self.steps)
        require_at_least(self, 0, "seed")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> DynamicsConfig:
        """Take the fields from a dictionary that may have other keys, too."""
        return cls(**{each.name: options[each.name] for each in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values."""
        return asdict(self)
