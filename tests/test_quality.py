"""The defaults draw well, after a minute of training."""

from dataclasses import replace

import pytest
import torch

from hessreg.gan import DEFAULTS, make_task
from hessreg.gan.building import build_trainer
from hessreg.gan.options import RingConfig

pytestmark = pytest.mark.slow


def train(config):
    task = make_task(config)
    dataset = task.load()
    trainer = build_trainer(config, dataset)
    for _ in range(config.steps):
        trainer.step()
    judge = task.judge(dataset)
    return judge.evaluate(trainer.ema.sample(judge.num_samples, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "mixture",
    [{}, {"modes": 5, "radius": 10.0, "std": 0.3, "rotation": 30.0}],
    ids=["as it is", "wider and turned"],
)
def test_all_modes_of_the_ring_are_drawn_and_sharp(mixture):
    ring = RingConfig(**mixture)
    found = train(replace(DEFAULTS["ring"], steps=3000, seed=5, ring=ring))
    assert found["modes"] == ring.modes
    assert found["quality"] > 0.8
    assert found["tv"] < 0.05


def test_digits_are_drawn():
    found = train(replace(DEFAULTS["digits"], steps=3000, seed=5))
    assert found["fdd"] < 10
    assert found["classes"] == 10
    assert found["recall"] > 0.5
    assert found["coverage"] > 0.85
    assert found["copies"] < 0.02
