"""A thin GAN training module around the regularisers.

`Trainer` alternates the two networks' steps; `Run` adds a folder with checkpoints, metrics and
pictures; `Comparison` trains with several regularisers at equal cost.
"""

from hessreg.gan.compare import Comparison
from hessreg.gan.config import (
    DEFAULTS,
    REGULARIZERS,
    DRAGANConfig,
    GaussianConfig,
    HessianPenaltyConfig,
    HSCConfig,
    HSN1RConfig,
    ProjectionConfig,
    R1Config,
    R2Config,
    TrainConfig,
    WGANGPConfig,
)
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
from hessreg.gan.networks import Discriminator, Generator
from hessreg.gan.orthogonal import Orthogonal
from hessreg.gan.ring import RingJudge
from hessreg.gan.run import Run
from hessreg.gan.tasks import TASKS, Task, load_dataset
from hessreg.gan.trainer import NonFiniteError, Trainer

__all__ = [
    "DEFAULTS",
    "LOSSES",
    "REGULARIZERS",
    "TASKS",
    "AdversarialLoss",
    "Comparison",
    "DRAGANConfig",
    "Dataset",
    "Discriminator",
    "GaussianConfig",
    "Generator",
    "HSCConfig",
    "HSN1RConfig",
    "HessianCorrectedGradients",
    "HessianPenaltyConfig",
    "Hinge",
    "ImageJudge",
    "Judge",
    "LeastSquares",
    "MMDLoss",
    "Minimax",
    "NonFiniteError",
    "NonSaturating",
    "Orthogonal",
    "ProjectionConfig",
    "R1Config",
    "R2Config",
    "Relativistic",
    "RingJudge",
    "Run",
    "ShuffledSampler",
    "Task",
    "TrainConfig",
    "Trainer",
    "WGANGPConfig",
    "Wasserstein",
    "load_dataset",
    "make_loss",
]
