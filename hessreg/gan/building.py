"""From a configuration to a trainer: networks, loss, regularisers and what changes gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hessreg.distributed import WHOLE, Shard
from hessreg.gan.config import TrainConfig
from hessreg.gan.correction import HessianCorrectedGradients
from hessreg.gan.data import Dataset
from hessreg.gan.distributed import check_device
from hessreg.gan.losses import AdversarialLoss, make_loss
from hessreg.gan.networks import Discriminator, Generator
from hessreg.gan.options import parse_sigma
from hessreg.gan.orthogonal import Orthogonal
from hessreg.gan.players import Procedure
from hessreg.gan.trainer import Trainer
from hessreg.regularizers import (
    DRAGAN,
    HSN1R,
    R1,
    R2,
    WGANGP,
    GaussianKernel,
    HessianPenalty,
    IterativeGradientPenalty,
    Regularizer,
)

__all__ = ["build_trainer", "resolve_device"]


def resolve_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available: torch finds no GPU")
    return torch.device(name)


def build_trainer(config: TrainConfig, dataset: Dataset, shard: Shard = WHOLE) -> Trainer:
    """Return a trainer with new networks; seeds torch's global random state."""
    device = resolve_device(config.device)
    check_device(device, shard)
    torch.manual_seed(config.seed)
    loss = _build_loss(config)
    style: dict[str, Any] = {
        "architecture": config.architecture,
        "width": config.width,
        "activation": config.activation,
        "shape": dataset.train_samples.shape[1:],
    }
    players = config.players()
    return Trainer(
        Generator(latent_dim=config.latent_dim, **style),
        Discriminator(**style, outputs=loss.outputs),
        dataset.train_samples.to(device),
        [*_build_regularizers(config), *_build_correction(config)],
        batch_size=config.batch_size,
        g=players[0],
        d=players[1],
        procedure=_build_procedure(config),
        ema_decay=config.ema_decay,
        seed=config.seed,
        loss=loss,
        orthogonal=_build_orthogonal(config),
        shard=shard,
    )


def _build_procedure(config: TrainConfig) -> Procedure:
    return Procedure(
        config.discriminator_steps,
        config.accumulate,
        config.precision,
        config.schedule_steps or config.steps,
        config.growth,
        config.instance_noise,
    )


def _build_loss(config: TrainConfig) -> AdversarialLoss:
    return make_loss(config.loss, config.label_smoothing, config.smoothing == "both")


def _build_orthogonal(config: TrainConfig) -> Orthogonal | None:
    if config.orthogonal == "none":
        return None
    chosen = config.projection
    scope = None if chosen.scope == "auto" else chosen.scope
    return Orthogonal(config.orthogonal, chosen.pair, chosen.strength, scope)


def _build_regularizers(config: TrainConfig) -> list[Regularizer]:
    chosen = config.regularizer.split("+")
    return [build(config) for name, build in _BUILD.items() if name in chosen]


def _build_correction(config: TrainConfig) -> list[Regularizer]:
    """Return what corrects gradients, which is the last to change them."""
    return (
        []
        if config.correction == "none"
        else [HessianCorrectedGradients(loss=_build_loss(config), **vars(config.hsc))]
    )


def _gaussian(config: TrainConfig) -> Regularizer:
    return GaussianKernel(**(vars(config.gaussian) | {"sigma": parse_sigma(config.gaussian.sigma)}))


def _iterative(config: TrainConfig) -> Regularizer:
    sigma = parse_sigma(config.iterative.sigma, ["median"])
    return IterativeGradientPenalty(**(vars(config.iterative) | {"sigma": sigma}), seed=config.seed)


_BUILD: dict[str, Callable[[TrainConfig], Regularizer]] = {
    "hsn1r": lambda config: HSN1R(**vars(config.hsn1r), seed=config.seed),
    "r1": lambda config: R1(**vars(config.r1)),
    "r2": lambda config: R2(**vars(config.r2)),
    "wgan_gp": lambda config: WGANGP(**vars(config.wgan_gp), seed=config.seed),
    "iterative": _iterative,
    "dragan": lambda config: DRAGAN(**vars(config.dragan), seed=config.seed),
    "gaussian": _gaussian,
    "hessian_penalty": lambda config: HessianPenalty(
        **vars(config.hessian_penalty), seed=config.seed
    ),
}
