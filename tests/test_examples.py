"""The examples train as the trainer does, whatever the framework around them."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.data import DataLoader

from hessreg.gan import Discriminator, Generator, PlayerConfig, Trainer, load_dataset
from hessreg.regularizers import HSN1R, R1

pytest.importorskip("sklearn")

STEPS = 20  # a second Hessian norm among them; every framework orders a second pass in its own way
FRAMEWORKS = {
    "plain_torch": None,
    "lightning_module": "lightning",
    "accelerate_script": "accelerate",
}


def example(name):
    """The module of an example; skipped where its framework does not import."""
    if FRAMEWORKS[name] is not None:
        try:
            importlib.import_module(FRAMEWORKS[name])
        except ModuleNotFoundError:
            pytest.skip(f"{FRAMEWORKS[name]} is not installed: pip install 'hessreg[examples]'")
        except RuntimeError as error:  # a torchvision of another build of torch
            pytest.skip(f"{FRAMEWORKS[name]} does not import here: {error}")
    return importlib.import_module(f"examples.{name}")


class InOrder:
    """A sampler of the trainer: one sample after the other."""

    def __init__(self) -> None:
        self.done = 0

    def take(self, count):
        self.done += count
        return torch.arange(self.done - count, self.done)


def trained_by_the_trainer():
    torch.manual_seed(0)
    networks = Generator(width=64), Discriminator(width=64)
    images, order = load_dataset("digits").train_samples, torch.Generator().manual_seed(0)
    loader = DataLoader(images, batch_size=64, shuffle=True, drop_last=True, generator=order)
    batches = list(loader)
    regularizers = [HSN1R(weight=1e-4, every=16, num_steps=3, seed=0), R1(gamma=1.0)]
    player = PlayerConfig(lr=5e-4)
    trainer = Trainer(*networks, torch.cat(batches), regularizers, g=player, d=player, seed=0)
    trainer.batches.sampler = InOrder()
    for _ in range(STEPS):
        trainer.step()
    return networks


@pytest.mark.filterwarnings("ignore")  # of the frameworks about what they find around them
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_examples_make_the_steps_of_the_trainer(name):
    module = example(name)
    made = module.train(STEPS)
    networks = made if isinstance(made, tuple) else (made.generator, made.discriminator)
    for ours, theirs in zip(trained_by_the_trainer(), networks, strict=True):
        for (title, wanted), found in zip(
            ours.named_parameters(), theirs.parameters(), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=title)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_examples_draw(name, tmp_path, capsys):
    module, picture = example(name), tmp_path / "digits.png"
    module.main(["--steps=2", f"--picture={picture}"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "64 images after 2 steps" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_checkpoint_keeps_what_regularisers_remember(tmp_path):
    module = example("lightning_module")
    file = tmp_path / "last.ckpt"
    gan = module.train(3)
    gan.trainer.save_checkpoint(file)
    other = module.RegularizedGAN([HSN1R(every=16, num_steps=3, seed=5), R1()], seed=5)
    saved = torch.load(file, weights_only=True)
    other.on_load_checkpoint(saved)
    assert other.rounds == 3
    assert torch.equal(other.random.get_state(), gan.random.get_state())
    first, second = (each.regularizers[0].state_dict() for each in (gan, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(second[name], value) if torch.is_tensor(value) else second[name] == value
        assert same, name
