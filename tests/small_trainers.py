"""A small training, and what tests of exact resuming do with it."""

from __future__ import annotations

import torch

from hessreg.gan import (
    Discriminator,
    Generator,
    Trainer,
)
from hessreg.gan.checkpoint import load_state, save_state
from hessreg.regularizers import BaseRegularizer
from tests.states import equal


def small_trainer(regularizers=(), seed=0, dtype=torch.float32, count=40, **options):
    """A generator and a discriminator of 8 x 8 images, with batches of 8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = (
            Generator("mlp", 4, 8),
            Discriminator("mlp", 8, outputs=options.pop("outputs", 1)),
        )
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    networks = [network.to(dtype) for network in networks]
    options = {"batch_size": 8, "seed": seed} | options
    return Trainer(*networks, images.to(dtype), regularizers, **options)


def weights(trainer):
    both = trainer.generator, trainer.discriminator
    return [p.detach().clone() for network in both for p in network.parameters()]


def check_resume(tmp_path, make):
    """Seven steps, and three and four of another trainer: the same, bit for bit."""
    straight, first, second = make(seed=0), make(seed=0), make(seed=1)
    start = weights(straight)
    for _ in range(7):
        straight.step()
    for _ in range(3):
        first.step()
    save_state(tmp_path / "first", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "first"))
    for _ in range(4):
        second.step()
    for name, trainer in (("straight", straight), ("second", second)):
        save_state(tmp_path / name, trainer.state_dict())
    assert equal(load_state(tmp_path / "straight"), load_state(tmp_path / "second"))
    assert straight.metrics() == second.metrics()
    assert not any(map(torch.equal, start, weights(straight)))


class Noted(BaseRegularizer):
    """Keeps the batches of every phase, by network."""

    def __init__(self):
        self.batches = {"g": [], "d": []}

    def loss_terms(self, ctx):
        side = "g" if ctx.discriminator_loss is None else "d"
        self.batches[side].append((ctx.real, ctx.fake.detach(), ctx.noise))
        return None, None

    def sizes(self, side):
        return [tuple(map(len, batch)) for batch in self.batches[side]]
