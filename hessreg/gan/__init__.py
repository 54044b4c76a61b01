"""A thin GAN training module around the regularisers.

`Trainer` alternates the two networks' steps; `Run` adds a folder with checkpoints, metrics and
pictures; `Comparison` trains with several regularisers at equal cost.
"""

from hessreg.gan.architectures import ACTIVATIONS, ARCHITECTURES
from hessreg.gan.article import train
from hessreg.gan.compare import Comparison
from hessreg.gan.config import DEFAULTS, REGULARIZERS, TrainConfig
from hessreg.gan.correction import HessianCorrectedGradients
from hessreg.gan.data import Dataset, ItemSamples, Samples, ScaledSamples, ShuffledSampler
from hessreg.gan.file_datasets import load_arrays, load_images, load_mnist
from hessreg.gan.infogan import InfoGAN
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
from hessreg.gan.metrics import ImageJudge, Judge, PrincipalJudge
from hessreg.gan.mixtures import Mixture, MixtureJudge, grid_mixture, load_mixture, ring_mixture
from hessreg.gan.networks import Conditioned, Discriminator, Generator
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
from hessreg.gan.orthogonal import Orthogonal
from hessreg.gan.players import Procedure
from hessreg.gan.run import Run
from hessreg.gan.tasks import Task, load_dataset, make_task
from hessreg.gan.trainer import NonFiniteError, Trainer

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "DEFAULTS",
    "LOSSES",
    "REGULARIZERS",
    "AdversarialLoss",
    "ArraysConfig",
    "Comparison",
    "Conditioned",
    "DRAGANConfig",
    "Dataset",
    "Discriminator",
    "FIDConfig",
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
    "ImagesConfig",
    "InfoGAN",
    "InfoGANConfig",
    "InstanceNoiseConfig",
    "ItemSamples",
    "IterativeConfig",
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
    "PrincipalJudge",
    "Procedure",
    "ProjectionConfig",
    "R1Config",
    "R2Config",
    "Relativistic",
    "RingConfig",
    "Run",
    "Samples",
    "ScaledSamples",
    "ShuffledSampler",
    "Task",
    "TrainConfig",
    "Trainer",
    "WGANGPConfig",
    "Wasserstein",
    "grid_mixture",
    "load_arrays",
    "load_dataset",
    "load_images",
    "load_mixture",
    "load_mnist",
    "make_loss",
    "make_task",
    "ring_mixture",
    "train",
]
