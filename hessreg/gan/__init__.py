"""A thin GAN training module around the regularisers.

`Trainer` alternates the two networks' steps; `Run` adds a folder with checkpoints, metrics and
pictures; `Comparison` trains several methods at equal cost.
"""

from hessreg.gan.compare import Comparison
from hessreg.gan.config import METHODS, HSN1RConfig, R1Config, TrainConfig
from hessreg.gan.data import Dataset, ShuffledSampler, load_dataset
from hessreg.gan.losses import discriminator_loss, generator_loss
from hessreg.gan.metrics import Judge, reference_rows
from hessreg.gan.networks import Discriminator, Generator
from hessreg.gan.run import Run
from hessreg.gan.trainer import NonFiniteError, Trainer

__all__ = [
    "METHODS",
    "Comparison",
    "Dataset",
    "Discriminator",
    "Generator",
    "HSN1RConfig",
    "Judge",
    "NonFiniteError",
    "R1Config",
    "Run",
    "ShuffledSampler",
    "TrainConfig",
    "Trainer",
    "discriminator_loss",
    "generator_loss",
    "load_dataset",
    "reference_rows",
]
