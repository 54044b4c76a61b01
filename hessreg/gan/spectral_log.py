"""Spectral densities of both networks' Hessians in the course of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessreg.curvature import SpectralDensity, spectral_density
from hessreg.gan.config import TrainConfig
from hessreg.gan.curvature_targets import NETWORKS, RunTarget
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.trainer import Trainer

__all__ = ["measure_spectra"]

_ROWS = 256  # or the next multiple of the batch size below, or one batch, or all data
_STEPS, _PROBES = 30, 2
_STRIDE = 4  # of the default grid, which is fine for this many steps


def measure_spectra(folder: RunFolder, config: TrainConfig, trainer: Trainer) -> dict[str, float]:
    """Append the density of each network's Hessian to ``spectra.jsonl``.

    The Hessian is that of the network's own loss in its own parameters, as ``hessreg spectrum``
    has it. Weights, buffers, gradients and random states of the trainer stay as they are.

    Returns:
        For the metrics: the ends of each spectrum as far as the Lanczos steps show them.

    Raises:
        NonFiniteError: If a product is not finite.
        TargetError: If a loss cannot be differentiated twice.
    """
    values: dict[str, float] = {}
    target = _target(folder, config, trainer)
    networks = trainer.generator, trainer.discriminator
    device = trainer.data.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _unchanged(*networks):
        for network in NETWORKS:
            start = time.process_time()
            density = _measure(target, network)
            seconds = time.process_time() - start
            row = {"step": trainer.steps_done, "network": network, "cpu_seconds": seconds}
            folder.append_spectrum(row | _plain(density))
            nodes, side = density.rule.nodes, network[0]
            values[f"hessian_smallest_{side}"] = float(nodes.min())
            values[f"hessian_largest_{side}"] = float(nodes.max())
    return values


def _target(folder: RunFolder, config: TrainConfig, trainer: Trainer) -> RunTarget:
    size = min(config.batch_size, len(trainer.data))
    rows = size * max(1, min(_ROWS, len(trainer.data)) // size)
    return RunTarget(folder.path, config, trainer, rows, config.seed)


@contextmanager
def _unchanged(*networks: nn.Module) -> Iterator[None]:
    """Put back what evaluations change: batch normalisation and spectral norms remember them."""
    buffers = [buffer for network in networks for buffer in network.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.data.copy_(before)


def _measure(target: RunTarget, network: str) -> SpectralDensity:
    op = target.operator(network)
    steps, random = min(_STEPS, op.shape[0]), torch.Generator().manual_seed(target.seed)
    return spectral_density(op, num_steps=steps, num_probes=_PROBES, generator=random)


def _plain(density: SpectralDensity) -> dict[str, Any]:
    curves = {name: _rounded(getattr(density, name)) for name in ("grid", "density", "error")}
    return {"n": density.n, "bandwidth": density.bandwidth, **curves}


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values[::_STRIDE].tolist()]
