"""Networks in half and in double precision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hessreg.gan import (
    InstanceNoiseConfig,
    NonFiniteError,
    Orthogonal,
    Procedure,
)
from hessreg.gan.precision import LossScale
from hessreg.regularizers import HSN1R, R1, BaseRegularizer, GaussianKernel
from tests.small_trainers import small_trainer, weights
from tests.states import equal


def output_types(network):
    """The types in which a network's first layer is evaluated, as they come."""
    types = []
    layer = next(each for each in network.modules() if isinstance(each, nn.Linear))
    layer.register_forward_hook(lambda layer, inputs, output: types.append(output.dtype))
    return types


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_networks_are_evaluated_in_half_precision_and_penalties_in_single(precision, dtype):
    exact, half = (
        small_trainer([R1()]),
        small_trainer([R1()], procedure=Procedure(precision=precision)),
    )
    types = output_types(half.discriminator)
    for trainer in (exact, half):
        trainer.step()
    assert types == [dtype, dtype, torch.float32, dtype]
    assert {p.dtype for p in half.discriminator.parameters()} == {torch.float32}
    wanted, found = exact.metrics(), half.metrics()
    assert found["r1"] == wanted["r1"]  # the first penalty is at the same weights
    for name in ("loss_g", "loss_d", "grad_norm_g", "grad_norm_d"):
        assert found[name] == pytest.approx(wanted[name], rel=0.03)
        assert found[name] != wanted[name]
    gradients = [
        torch.cat([p.grad.flatten() for p in trainer.discriminator.parameters()])
        for trainer in (exact, half)
    ]
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


class Apart(R1):
    """Evaluates the discriminator once more for its slopes."""

    def loss_terms(self, ctx):
        return super().loss_terms(replace(ctx, outputs=None))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"orthogonal": Orthogonal("terms", "real_fake")},
        {"procedure": Procedure(instance_noise=InstanceNoiseConfig(std=0.1, steps=9))},
        {"procedure": Procedure(precision="float64", accumulate=2, discriminator_steps=2)},
    ],
)
def test_slopes_of_the_outputs_of_the_loss_are_those_of_others(options):
    trainers = [small_trainer([kind(gamma=2.0)], **options) for kind in (R1, Apart)]
    calls = [], []
    for trainer, seen in zip(trainers, calls, strict=True):
        trainer.discriminator.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        for _ in range(3):
            trainer.step()
    for a, b in zip(*map(weights, trainers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    procedure = trainers[0].procedure
    assert len(calls[1]) - len(calls[0]) == 3 * procedure.discriminator_steps * procedure.accumulate


def test_steps_with_hessian_norms_are_in_single_precision():
    norms = HSN1R(norm="fro", weight=0.1, every=2)
    trainer = small_trainer([norms], procedure=Procedure(precision="bf16"))
    exact = small_trainer([HSN1R(norm="fro", weight=0.1, every=2)])
    types = output_types(trainer.discriminator)
    for each in (trainer, exact):
        each.step()
    assert equal(trainer.state_dict(), exact.state_dict())
    assert set(types) == {torch.float32}
    types.clear()
    trainer.step()
    assert set(types) == {torch.bfloat16}


def test_kernels_take_what_half_precision_generates():
    trainer = small_trainer([GaussianKernel()], procedure=Procedure(precision="bf16"))
    trainer.step()
    assert trainer.metrics()["mmd2"] > 0


def test_double_precision_is_everywhere():
    single, double = (
        small_trainer([R1()]),
        small_trainer([R1()], procedure=Procedure(precision="float64")),
    )
    for trainer in (single, double):
        for _ in range(3):
            trainer.step()
    assert {p.dtype for p in [*weights(double), *double.ema.parameters()]} == {torch.float64}
    for a, b in zip(weights(single), weights(double), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


class Burst(BaseRegularizer):
    """Gradients of the discriminator that are infinite while the loss is scaled by more."""

    def __init__(self):
        self.limit, self.trainer = math.inf, None

    def precondition(self, network, grads, ctx):
        scale = self.trainer.players[1].scale.value
        bursts = network is ctx.discriminator and scale > self.limit
        return [g * math.inf for g in grads] if bursts else grads


def test_a_step_that_overflows_is_left_out_and_the_scale_halved():
    burst = Burst()
    burst.trainer = trainer = small_trainer([burst], procedure=Procedure(precision="fp16"))
    burst.limit = 2.0**14
    before = weights(trainer)
    trainer.step()
    trainer.step()
    after = weights(trainer)
    sides = [len(list(trainer.generator.parameters())), len(before)]
    assert not any(map(torch.equal, before[: sides[0]], after[: sides[0]]))
    assert equal(before[sides[0] :], after[sides[0] :])
    trainer.step()
    assert not any(map(torch.equal, before[sides[0] :], weights(trainer)[sides[0] :]))
    metrics = trainer.metrics()
    assert (metrics["loss_scale_g"], metrics["loss_scale_d"]) == (2.0**16, 2.0**14)
    burst.limit = 0.0
    for _ in range(14):
        trainer.step()
    with pytest.raises(NonFiniteError, match=r"discriminator gradient of layers\.1\.weight"):
        trainer.step()


def test_the_scale_of_the_loss_doubles_after_2000_good_steps():
    scale = LossScale()
    assert [scale.accepts(is_finite=True) for _ in range(1999)] == [True] * 1999
    assert scale.value == 2.0**16
    scale.accepts(is_finite=True)
    assert scale.value == 2.0**17
    again = LossScale()
    again.load_state_dict(scale.state_dict())
    assert again.state_dict() == scale.state_dict() == {"value": 2.0**17, "good": 0}
    for state in ({"value": 3.0, "good": 0}, {"value": 2.0, "good": -1}, {"value": 0, "good": 0}):
        with pytest.raises(ValueError, match="the loss scale"):
            again.load_state_dict(state)
