"""From a configuration to the two networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessreg.gan.config import TrainConfig
from hessreg.gan.data import Dataset
from hessreg.gan.factories import FactoryError, call_safely, find_factory, is_factory
from hessreg.gan.networks import (
    Discriminator,
    Generator,
    WrappedDiscriminator,
    WrappedGenerator,
    initialize,
    normalize_spectrally,
)

__all__ = ["build_networks"]

_PROBES = 2


def build_networks(
    config: TrainConfig, dataset: Dataset, outputs: int
) -> tuple[Generator, nn.Module]:
    """Return new networks for a data set.

    Args:
        config: What they are like.
        dataset: With the samples that they are for.
        outputs: Of the discriminator for a sample.

    Raises:
        ValueError: If they are not for such samples, or the data have no classes to tell apart.
    """
    conditional = config.conditional != "none"
    if conditional and dataset.num_classes < 2:
        raise ValueError(
            f"conditional must be none for data without classes, got {config.conditional}"
        )
    classes = dataset.num_classes if conditional else 0
    shape = tuple(dataset.train_samples.shape[1:])
    make = _own_networks if is_factory(config.architecture) else _networks
    generator, discriminator = make(config, shape, classes, outputs)
    for network, options in ((generator, config.g), (discriminator, config.d)):
        initialize(network, config.initialization)
        if options.spectral_norm:
            normalize_spectrally(network)
    return generator, discriminator


def _networks(
    config: TrainConfig, shape: Sequence[int], classes: int, outputs: int
) -> tuple[Generator, nn.Module]:
    style = config.architecture
    generator = Generator(
        style,
        config.latent_dim,
        config.width,
        config.activation,
        shape,
        dropout=config.g.dropout,
        latent=config.latent,
        num_classes=classes,
        num_codes=config.infogan.codes,
    )
    discriminator = Discriminator(
        style,
        config.width,
        config.activation,
        shape,
        outputs,
        dropout=config.d.dropout,
        conditional=config.conditional,
        num_classes=classes,
        num_codes=config.infogan.codes,
    )
    return generator, discriminator


def _own_networks(
    config: TrainConfig, shape: Sequence[int], classes: int, outputs: int
) -> tuple[Generator, nn.Module]:
    name = config.architecture
    factory = find_factory(name)
    options = {"latent_dim": config.latent_dim + classes, "shape": shape, "num_classes": classes}
    made = call_safely(lambda: factory(**options, outputs=outputs), name)
    networks = made if isinstance(made, tuple) else ()
    if len(networks) != 2 or not all(isinstance(each, nn.Module) for each in networks):
        kind = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise FactoryError(f"{name} must return (generator, discriminator) modules, got {kind}")
    generator = WrappedGenerator(networks[0], config.latent_dim, config.latent, classes)
    discriminator = WrappedDiscriminator(networks[1])
    _probe(name, generator, discriminator, shape, outputs)
    return generator, discriminator


@torch.no_grad()
def _probe(
    name: str,
    generator: Generator,
    discriminator: nn.Module,
    shape: Sequence[int],
    outputs: int,
) -> None:
    """Refuse networks that do not give what the trainer takes."""
    labels = [torch.zeros(_PROBES, dtype=torch.int64)] if generator.num_classes else []
    noise = generator.draw_latent(_PROBES, torch.Generator())
    samples = _try(f"{name}: generator", generator, noise)
    _check_shape(f"{name}: generator", samples, (_PROBES, *shape))
    judged = _try(f"{name}: discriminator", discriminator, samples, *labels)
    wanted = (_PROBES,) if outputs == 1 else (_PROBES, outputs)
    _check_shape(f"{name}: discriminator", judged, wanted)
    for side, network in (("generator", generator), ("discriminator", discriminator)):
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise FactoryError(
                f"{name}: {side} must have a parameter that requires a gradient, got none"
            )


def _try(name: str, network: nn.Module, *inputs: Tensor) -> Tensor:
    """Use a network in evaluation mode: what it remembers of batches stays as it is."""
    network.eval()
    result = call_safely(lambda: network(*inputs), name)
    network.train()
    return result


def _check_shape(name: str, found: object, wanted: tuple[int, ...]) -> None:
    got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if got != wanted:
        raise FactoryError(f"{name} must return a tensor of shape {wanted}, got {got}")
