"""A thin GAN training module around the regularisers.

`Trainer` alternates the two networks' steps; `Run` adds a folder with checkpoints, metrics and
pictures; `Comparison` trains with several regularisers at equal cost.
"""

from hessreg.gan.compare import Comparison
from hessreg.gan.config import DEFAULTS, REGULARIZERS, TrainConfig
from hessreg.gan.correction import HessianCorrectedGradients
from hessreg.gan.data import Dataset, ShuffledSampler
from hessreg.gan.losses import (
    LOSSES,
    AdversarialLoss,
    Hinge,
    LeastSquares,
    Minimax,
    MMDLoss,
    NonSaturating,
    Relativistic,
    Wasserstein,
    make_loss,
)
from hessreg.gan.metrics import ImageJudge, Judge
from hessreg.gan.mixtures import Mixture, MixtureJudge, grid_mixture, load_mixture, ring_mixture
from hessreg.gan.networks import Discriminator, Generator
from hessreg.gan.options import (
    DRAGANConfig,
    GaussianConfig,
    GridConfig,
    GrowthConfig,
    HessianPenaltyConfig,
    HSCConfig,
    HSN1RConfig,
    InstanceNoiseConfig,
    PlayerConfig,
    ProjectionConfig,
    R1Config,
    R2Config,
    RingConfig,
    WGANGPConfig,
)
from hessreg.gan.orthogonal import Orthogonal
from hessreg.gan.players import Procedure
from hessreg.gan.run import Run
from hessreg.gan.tasks import Task, load_dataset, make_task
from hessreg.gan.trainer import NonFiniteError, Trainer

__all__ = [
    "DEFAULTS",
    "LOSSES",
    "REGULARIZERS",
    "AdversarialLoss",
    "Comparison",
    "DRAGANConfig",
    "Dataset",
    "Discriminator",
    "GaussianConfig",
    "Generator",
    "GridConfig",
    "GrowthConfig",
    "HSCConfig",
    "HSN1RConfig",
    "HessianCorrectedGradients",
    "HessianPenaltyConfig",
    "Hinge",
    "ImageJudge",
    "InstanceNoiseConfig",
    "Judge",
    "LeastSquares",
    "MMDLoss",
    "Minimax",
    "Mixture",
    "MixtureJudge",
    "NonFiniteError",
    "NonSaturating",
    "Orthogonal",
    "PlayerConfig",
    "Procedure",
    "ProjectionConfig",
    "R1Config",
    "R2Config",
    "Relativistic",
    "RingConfig",
    "Run",
    "ShuffledSampler",
    "Task",
    "TrainConfig",
    "Trainer",
    "WGANGPConfig",
    "Wasserstein",
    "grid_mixture",
    "load_dataset",
    "load_mixture",
    "make_loss",
    "make_task",
    "ring_mixture",
]
