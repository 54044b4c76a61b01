"""What ``hessreg spectrum`` measures: the networks of a run, or an operator of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessreg.curvature import HessianOperator, LinearOperator, NonFiniteError, SumOperator
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import load_state
from hessreg.gan.checks import require
from hessreg.gan.config import TrainConfig
from hessreg.gan.factories import find_factory, is_factory
from hessreg.gan.run import fitting
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.tasks import make_task
from hessreg.gan.trainer import Trainer

__all__ = ["NETWORKS", "RunTarget", "TargetError", "load_factory", "load_run", "naming_target"]

NETWORKS = ("generator", "discriminator")

Batch = tuple[Tensor, Tensor]  # real samples and noise


class TargetError(ValueError):
    """There is nothing at the target that has a spectrum."""


@contextmanager
def naming_target(name: str) -> Iterator[None]:
    """Let what goes wrong with an operator say which one it was.

    Raises:
        NonFiniteError: NaN or infinity.
        TargetError: Anything else that an operator refuses.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(f"{name}: {error}") from None


@dataclass(frozen=True)
class RunTarget:
    """The networks of a checkpoint at a few rows of data.

    Args:
        checkpoint: Where they come from.
        config: What the run is made of.
        trainer: With the networks of that moment.
        rows: How many rows of data, and as many of noise.
        seed: Of the choice of both.
    """

    checkpoint: Path
    config: TrainConfig
    trainer: Trainer
    rows: int
    seed: int

    def operator(self, network: str) -> LinearOperator:
        """Return the Hessian of a network's own loss in its own parameters.

        The loss is the one it is trained on without the regularisers' terms, in mean over batches
        of the size it is trained with. Memory: a graph for each of them.

        Raises:
            TargetError: If the loss cannot be differentiated.
            NonFiniteError: If the loss or its gradient is not finite.
        """
        losses = {"generator": self._generator_loss, "discriminator": self._discriminator_loss}
        parameters = list(getattr(self.trainer, network).parameters())
        batches = self._batches()
        with naming_target(network):
            # Each batch keeps its graph: a product costs half as much as with data to go through.
            operators = [
                HessianOperator(partial(losses[network], batch), parameters) for batch in batches
            ]
            return SumOperator(operators, [len(real) / self.rows for real, _ in batches])

    def _generator_loss(self, batch: Batch) -> Tensor:
        trainer, (real, noise) = self.trainer, batch
        return trainer.loss.of_generator(trainer.discriminator, real, trainer.generator(noise))

    def _discriminator_loss(self, batch: Batch) -> Tensor:
        trainer, (real, noise) = self.trainer, batch
        with torch.no_grad():
            fake = trainer.generator(noise)
        return trainer.loss.of_discriminator(trainer.discriminator, real, fake)

    def _batches(self) -> list[Batch]:
        random = torch.Generator().manual_seed(self.seed)
        data = self.trainer.data
        chosen = torch.randperm(len(data), generator=random)[: self.rows].to(data.device)
        noise = torch.randn(self.rows, self.config.latent_dim, generator=random)
        size = self.config.batch_size
        if self.config.loss == "mmd":  # which compares a batch's samples with each other
            wanted = f"no multiple of {size} and 1 more, with loss mmd"
            require(self.rows % size != 1, "rows", wanted, self.rows)
        real, noise = (each.to(data.device, self.trainer.dtype) for each in (data[chosen], noise))
        return list(zip(real.split(size), noise.split(size), strict=True))


def load_run(path: Path, rows: int, seed: int, evaluate: bool) -> RunTarget:
    """Read the networks of a run folder's newest checkpoint, or of one of its checkpoints.

    Nothing in the folder is changed, so the run may be going on.

    Args:
        path: The folder or the file.
        rows: Rows of data, chosen at random.
        seed: Of the choice, and of the noise.
        evaluate: Whether the networks are in evaluation mode.

    Raises:
        RunFolderError: If the folder is none of a run, or its configuration is damaged.
        CheckpointError: If there is no readable checkpoint that fits the configuration.
        ValueError: If there are not so many rows, or the device is missing.
    """
    folder = RunFolder(path.parent.parent if path.is_file() else path)
    config = folder.read_config()
    checkpoint = path if path.is_file() else folder.last_checkpoint()
    state = load_state(checkpoint)
    torch.set_num_threads(config.threads)
    dataset = make_task(config).load()
    if not 1 <= rows <= len(dataset.train_samples):
        count = len(dataset.train_samples)
        raise ValueError(f"rows must be in [1, {count}] for {config.dataset}, got {rows}")
    trainer = build_trainer(config, dataset)
    with fitting(checkpoint):
        trainer.load_state_dict(state["trainer"])
    _set_mode(trainer.generator, trainer.discriminator, training=not evaluate)
    return RunTarget(checkpoint, config, trainer, rows, seed)


def _set_mode(*networks: nn.Module, training: bool) -> None:
    for network in networks:
        network.train(training)


def load_factory(target: str) -> LinearOperator:
    """Call ``module:factory``, with the current folder among those of modules.

    Args:
        target: A module and, after a colon, a callable in it that takes nothing and returns a
            `LinearOperator`, or the arguments of a `HessianOperator`: ``(loss, params)`` or
            ``(loss, params, data)``.

    Raises:
        TargetError: If there is no such callable, or it raises or returns something else.
        NonFiniteError: If the loss or its gradient is not finite.
    """
    made = _call(_find(target), target)
    if isinstance(made, LinearOperator):
        return made
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        wanted = "a LinearOperator, (loss, params) or (loss, params, data)"
        kind = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise TargetError(f"{target} must return {wanted}, got {kind}")
    return _call(lambda: HessianOperator(*made), target)


def _find(target: str) -> Callable[[], Any]:
    if not is_factory(target):
        raise TargetError(
            f"there is no {target}: name a run folder, a checkpoint in one, or module:factory"
        )
    try:
        return find_factory(target)
    except ValueError as error:
        raise TargetError(str(error)) from None


def _call(function: Callable[[], Any], name: str) -> Any:
    """Call what is not ours: it may raise anything."""
    try:
        return function()
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}") from None
    except Exception as error:
        raise TargetError(f"{name}: {type(error).__name__}: {error}") from None
