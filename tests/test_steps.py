"""What steps are made of: batches, noise and parts of batches, all of it resumed."""

from __future__ import annotations

import copy

import pytest
import torch

from hessreg.gan import (
    GrowthConfig,
    InstanceNoiseConfig,
    NonFiniteError,
    NonSaturating,
    Orthogonal,
    PlayerConfig,
    Procedure,
    make_loss,
)
from hessreg.kernels import mmd2
from hessreg.optim import MODES
from hessreg.regularizers import HSN1R, R1, R2, WGANGP, BaseRegularizer
from tests.small_trainers import Noted, check_resume, small_trainer, weights
from tests.states import equal

PROCEDURES = {
    "discriminator steps": Procedure(discriminator_steps=3),
    "growth": Procedure(growth=GrowthConfig(factor=2, every=2, maximum=20)),
    "instance noise": Procedure(instance_noise=InstanceNoiseConfig(std=0.5, steps=5)),
    "float64": Procedure(precision="float64"),
    "bf16": Procedure(precision="bf16"),
    "fp16": Procedure(precision="fp16"),
    "accumulate": Procedure(accumulate=3),
    "all": Procedure(
        discriminator_steps=2,
        accumulate=2,
        precision="fp16",
        growth=GrowthConfig(factor=2, every=2, maximum=20),
        instance_noise=InstanceNoiseConfig(std=0.5, steps=5),
    ),
}


@pytest.mark.parametrize("name", PROCEDURES)
def test_every_procedure_is_resumed_bit_for_bit(tmp_path, name):
    def make(seed):
        regularizers = [R1(), WGANGP(seed=seed)]
        g, d = PlayerConfig(batch_size=6), PlayerConfig(lr=2e-3, optimizer="rmsprop")
        return small_trainer(regularizers, seed, g=g, d=d, procedure=PROCEDURES[name])

    check_resume(tmp_path, make)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_hessian_norms_beside_half_precision_are_resumed_bit_for_bit(tmp_path, precision):
    def make(seed):
        norms = HSN1R(norm="spectral", weight=0.1, every=2, num_steps=2)
        return small_trainer([norms], seed, procedure=Procedure(precision=precision))

    check_resume(tmp_path, make)


def test_networks_have_batches_of_their_own_and_as_many_steps_as_wanted():
    noted = Noted()
    g, d = PlayerConfig(batch_size=12), PlayerConfig(batch_size=5)
    trainer = small_trainer([noted], g=g, d=d, procedure=Procedure(discriminator_steps=3))
    trainer.step()
    trainer.step()
    assert noted.sizes("g") == [(12, 12, 12)] * 2
    assert noted.sizes("d") == [(5, 5, 5)] * 6
    rows = torch.cat([batch[0] for batch in noted.batches["d"][:3] + noted.batches["g"][:1]])
    assert len(rows.unique(dim=0)) == 27  # all samples are new until a pass is over


def test_with_batches_of_one_size_the_generator_meets_the_last_real_one_again():
    noted = Noted()
    small_trainer([noted], procedure=Procedure(discriminator_steps=2)).step()
    first, second = noted.batches["d"]
    assert torch.equal(noted.batches["g"][0][0], second[0])
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[2], second[2])


def test_batches_grow_up_to_a_maximum():
    noted = Noted()
    growth = GrowthConfig(factor=2, every=2, maximum=20)
    g = PlayerConfig(batch_size=4)
    trainer = small_trainer([noted], g=g, procedure=Procedure(growth=growth))
    for _ in range(7):
        trainer.step()
    assert [sizes[0] for sizes in noted.sizes("d")] == [8, 8, 16, 16, 20, 20, 20]
    assert [sizes[0] for sizes in noted.sizes("g")] == [4, 4, 8, 8, 16, 16, 20]


def test_the_discriminator_sees_noise_that_fades():
    noted, plain = Noted(), Noted()
    procedure = Procedure(instance_noise=InstanceNoiseConfig(std=0.5, steps=4))
    frozen = {"g": PlayerConfig(lr=0.0), "d": PlayerConfig(lr=0.0), "batch_size": 40}
    blurred = small_trainer([noted], procedure=procedure, **frozen)
    seen = []
    blurred.discriminator.register_forward_hook(lambda net, inputs, out: seen.append(inputs[0]))
    clean = small_trainer([plain], **frozen)
    for _ in range(5):
        blurred.step()
        clean.step()
    for step in range(5):
        (real, fake, noise), wanted = noted.batches["d"][step], 0.5 * max(0, 1 - step / 4)
        order = plain.batches["d"][step][0]
        assert (real - order).std().item() == pytest.approx(wanted, rel=0.05)
        drawn = fake - blurred.generator(noise).detach()
        assert drawn.std().item() == pytest.approx(wanted, rel=0.05, abs=1e-6)
        # Regularisers of the generator have its own samples, and the data as they are.
        assert torch.equal(noted.batches["g"][step][0], order)
        made, latent = noted.batches["g"][step][1:]
        assert torch.equal(made, blurred.generator(latent).detach())
        difference = seen[3 * step + 2].detach() - made
        assert difference.std().item() == pytest.approx(wanted, rel=0.05, abs=1e-6)


class Shaken(BaseRegularizer):
    """Draws from torch's own random numbers, as dropout does."""

    def precondition(self, network, grads, ctx):
        return [grad + torch.randn_like(grad) for grad in grads]


def test_the_random_numbers_of_torch_are_resumed():
    first, second = small_trainer([Shaken()]), small_trainer([Shaken()])
    first.step()
    state = copy.deepcopy(first.state_dict())
    first.step()
    torch.set_rng_state(torch.Generator().manual_seed(9).get_state())
    second.load_state_dict(state)
    second.step()
    assert equal(weights(first), weights(second))


class Endless(NonSaturating):
    """The gradient is finite, the loss is not."""

    def generator(self, fake, real):
        return super().generator(fake, real) + torch.inf


def test_an_infinite_loss_with_a_finite_gradient_stops_the_training():
    trainer = small_trainer(loss=Endless())
    before = [p.clone() for p in trainer.generator.parameters()]
    with pytest.raises(NonFiniteError, match="step 1: generator loss is not finite"):
        trainer.step()
    assert all(map(torch.equal, before, trainer.generator.parameters()))


# Accumulation


@pytest.mark.parametrize("mode", ["none", *MODES])
@pytest.mark.parametrize("loss", ["nonsaturating", "relativistic"])
@pytest.mark.filterwarnings("ignore:mode 'game'")
def test_accumulated_gradients_are_those_of_the_whole_batch(mode, loss):
    def make(accumulate):
        orthogonal = None if mode == "none" else Orthogonal(mode)
        options = {"loss": make_loss(loss), "orthogonal": orthogonal, "dtype": torch.float64}
        player = PlayerConfig(lr=0.1, optimizer="sgd", l1=1e-3, clip=0.5)
        procedure = Procedure(accumulate=accumulate)
        return small_trainer([R1(), R2()], g=player, d=player, procedure=procedure, **options)

    whole, parts = make(1), make(3)  # of 3, 3 and 2 rows
    rows = []
    parts.discriminator.register_forward_hook(lambda net, inputs, out: rows.append(len(out)))
    for _ in range(3):
        whole.step()
        parts.step()
    assert set(rows) == {2, 3}
    for a, b in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    wanted, found = whole.metrics(), parts.metrics()
    for name in ("loss_g", "loss_d", "penalty_d", "grad_norm_g", "grad_norm_d"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-9)


def test_an_accumulated_mmd_is_the_mean_of_the_parts():
    loss = make_loss("mmd")
    trainer = small_trainer(
        loss=loss, outputs=16, dtype=torch.float64, procedure=Procedure(accumulate=2)
    )
    twin = small_trainer(outputs=16, dtype=torch.float64)
    real = twin.data[next(twin.batches.sampler)]
    noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        outputs = twin.discriminator(real), twin.discriminator(twin.generator(noise))
        wanted = [
            mmd2(a, b, loss.sigmas)
            for a, b in zip(*(each.split(4) for each in outputs), strict=True)
        ]
    trainer.step()
    assert trainer.metrics()["loss_d"] == pytest.approx(-sum(wanted).item() / 2)
