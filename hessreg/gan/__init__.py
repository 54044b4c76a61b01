"""A thin GAN training module around the regularisers.

`Trainer` alternates the two networks' steps; `Run` adds a folder with checkpoints, metrics and
pictures; `Comparison` trains with several regularisers at equal cost.
"""

from hessreg.gan.compare import Comparison
from hessreg.gan.config import (
    DEFAULTS,
    REGULARIZERS,
    GaussianConfig,
    HessianPenaltyConfig,
    HSCConfig,
    HSN1RConfig,
    ProjectionConfig,
    R1Config,
    TrainConfig,
)
from hessreg.gan.correction import HessianCorrectedGradients
from hessreg.gan.data import Dataset, ShuffledSampler
from hessreg.gan.losses import discriminator_loss, discriminator_losses, generator_loss
from hessreg.gan.metrics import ImageJudge, Judge
from hessreg.gan.networks import Discriminator, Generator
from hessreg.gan.orthogonal import Orthogonal
from hessreg.gan.ring import RingJudge
from hessreg.gan.run import Run
from hessreg.gan.tasks import TASKS, Task, load_dataset
from hessreg.gan.trainer import NonFiniteError, Trainer

__all__ = [
    "DEFAULTS",
    "REGULARIZERS",
    "TASKS",
    "Comparison",
    "Dataset",
    "Discriminator",
    "GaussianConfig",
    "Generator",
    "HSCConfig",
    "HSN1RConfig",
    "HessianCorrectedGradients",
    "HessianPenaltyConfig",
    "ImageJudge",
    "Judge",
    "NonFiniteError",
    "Orthogonal",
    "ProjectionConfig",
    "R1Config",
    "RingJudge",
    "Run",
    "ShuffledSampler",
    "Task",
    "TrainConfig",
    "Trainer",
    "discriminator_loss",
    "discriminator_losses",
    "generator_loss",
    "load_dataset",
]
