"""How each network is trained: optimisers, schedules, batches, precision; all of it resumed."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from hessreg.cli import main
from hessreg.gan import (
    DEFAULTS,
    Discriminator,
    Generator,
    GrowthConfig,
    InstanceNoiseConfig,
    NonFiniteError,
    NonSaturating,
    Orthogonal,
    PlayerConfig,
    Procedure,
    Run,
    TrainConfig,
    Trainer,
    load_dataset,
    make_loss,
)
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import load_state, save_state
from hessreg.gan.optimizers import OPTIMIZERS, make_optimizer, optimizer_state, state_loader
from hessreg.gan.precision import LossScale
from hessreg.gan.schedules import Schedule
from hessreg.kernels import mmd2
from hessreg.optim import MODES
from hessreg.regularizers import HSN1R, R1, R2, WGANGP, BaseRegularizer, GaussianKernel


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


def equal(a, b):
    """Exactly, through nested dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


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


# Optimisers


def chosen(name, **options):
    return PlayerConfig(lr=1e-3, optimizer=name, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_resumed_bit_for_bit(tmp_path, name):
    check_resume(tmp_path, partial(small_trainer, g=chosen(name), d=chosen(name)))


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        {"name": "rmsprop", "momentum": 0.5},
        {"name": "adamw", "beta1": 0.0, "beta2": 0.9, "weight_decay": 0.1},
        {"name": "adam", "l1": 1e-3, "clip": 0.1},
    ],
)
def test_options_of_optimizers_are_resumed_bit_for_bit(tmp_path, options):
    check_resume(tmp_path, partial(small_trainer, g=chosen(**options), d=chosen(**options)))


@pytest.mark.parametrize("name", ["adam", "nadam", "radam", "asgd"])
def test_optimizers_in_double_precision_are_resumed_bit_for_bit(tmp_path, name):
    double = Procedure(precision="float64")
    check_resume(tmp_path, partial(small_trainer, g=chosen(name), d=chosen(name), procedure=double))


def test_options_reach_the_optimizers():
    g = PlayerConfig(lr=0.1, optimizer="sgd", momentum=0.9, weight_decay=0.01)
    d = PlayerConfig(lr=0.2, optimizer="adamw", beta1=0.1, beta2=0.8, weight_decay=0.02)
    sgd, adamw = small_trainer(g=g, d=d).optimizers.values()
    assert type(sgd) is torch.optim.SGD
    assert type(adamw) is torch.optim.AdamW
    wanted = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    assert wanted.items() <= sgd.param_groups[0].items()
    wanted = {"lr": 0.2, "betas": (0.1, 0.8), "weight_decay": 0.02}
    assert wanted.items() <= adamw.param_groups[0].items()


def test_steps_equal_hand_written_ones():
    """Two steps of the discriminator, momentum, L1, L2 and clipping, as in any torch loop."""
    options = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1}
    player = PlayerConfig(optimizer="sgd", l1=1e-3, clip=0.02, **options)
    trainer = small_trainer(g=player, d=player, procedure=Procedure(discriminator_steps=2))
    by_hand = small_trainer()
    g, d = by_hand.generator, by_hand.discriminator
    noise, loss = torch.Generator().manual_seed(0), NonSaturating()
    steppers = {n: torch.optim.SGD(n.parameters(), **options) for n in (g, d)}

    def step(network, value):
        steppers[network].zero_grad()
        (value + 1e-3 * sum(p.abs().sum() for p in network.parameters())).backward()
        assert nn.utils.clip_grad_norm_(network.parameters(), 0.02) > 0.02
        steppers[network].step()

    for _ in range(3):
        for _ in range(2):
            real = by_hand.data[next(by_hand.sampler)]
            fake = g(torch.randn(8, 4, generator=noise)).detach()
            step(d, sum(loss.discriminator(d(real), d(fake))))
        outputs = d(g(torch.randn(8, 4, generator=noise)))
        step(g, loss.generator(outputs, outputs))
        trainer.step()
    for ours, wanted in zip(weights(trainer), weights(by_hand), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_gradients_below_the_greatest_norm_are_left_alone():
    plain, clipped = small_trainer(), small_trainer(d=PlayerConfig(clip=1e3))
    for trainer in (plain, clipped):
        trainer.step()
    for a, b in zip(weights(plain), weights(clipped), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert plain.metrics() == clipped.metrics()


class Counting(torch.optim.Optimizer):
    """Sign descent that slows down, with its count in the group, as some optimisers have it."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.1)
                p.sub_(mean.sign(), alpha=group["lr"] / group["count"])


def not_an_optimizer(params):
    return 3


@pytest.fixture
def this_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_optimizers", sys.modules[__name__])


@pytest.mark.usefixtures("this_module")
def test_an_optimizer_of_the_users_own_is_made_and_resumed(tmp_path):
    own = PlayerConfig(lr=0.01, optimizer="my_optimizers:Counting", schedule="linear")
    procedure = Procedure(schedule_steps=10)
    check_resume(tmp_path, partial(small_trainer, g=own, procedure=procedure))
    optimizer = small_trainer(g=own).optimizers
    assert [type(each) for each in optimizer.values()] == [Counting, torch.optim.Adam]


@pytest.mark.parametrize("kind", [Counting, torch.optim.Adagrad])
def test_optimizers_from_python_are_used_and_resumed(tmp_path, kind):
    def make(seed):
        model = small_trainer(seed=seed)
        networks = model.generator, model.discriminator
        groups = [{"params": list(networks[0].parameters())[:2]}]
        groups += [{"params": list(networks[0].parameters())[2:], "lr": 0.02}]
        pair = kind(groups, lr=0.01), kind(networks[1].parameters(), lr=0.01)
        g = PlayerConfig(schedule="cosine", end_factor=0.1)
        options = {"g": g, "optimizers": pair, "procedure": Procedure(schedule_steps=10)}
        return Trainer(*networks, model.data, batch_size=8, seed=seed, **options)

    check_resume(tmp_path, make)
    trainer = make(seed=0)
    for _ in range(6):
        trainer.step()
    first, second = next(iter(trainer.optimizers.values())).param_groups
    assert first["lr"] == pytest.approx(0.01 * 0.55)
    assert second["lr"] == pytest.approx(0.02 * 0.55)


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "nadam", "adagrad", "asgd"])
def test_states_that_an_optimizer_does_not_have_are_refused(name):
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    options = {"lr": 0.1, **momentum}

    def make():
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        optimizer = make_optimizer(name, parameters, options, {})
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer, parameters

    optimizer, parameters = make()
    state = optimizer_state(optimizer)
    key = next(key for key, value in state[1].items() if value.dim())
    fresh = next(key for key, value in state[1].items() if value.shape == (2, 2))
    wrong = [
        {**state[1], key: torch.ones(3)},
        {**state[1], fresh: torch.ones(2, 2, dtype=torch.float64)},
        {**state[1], fresh: 1.0},
        {**state[1], "other": torch.ones(2, 2)},
        "x",
    ]
    if len(state[1]) > 1:
        wrong.append({k: v for k, v in state[1].items() if k != key})
    for values in wrong:
        with pytest.raises(ValueError, match="state of parameter 1 has a wrong shape, type or"):
            state_loader(optimizer, {0: state[0], 1: values})
    with pytest.raises(ValueError, match="the optimizer's state is not that of 2 parameters"):
        state_loader(optimizer, {0: state[0]})
    before = [p.detach().clone() for p in parameters]
    state_loader(optimizer, {0: {}, 1: state[1]})()
    assert equal(before, [p.detach() for p in parameters])
    assert [p in optimizer.state for p in parameters] == [False, True]


# Schedules


@pytest.mark.parametrize(
    ("shape", "scheduler"),
    [
        ("linear", partial(lr_scheduler.LinearLR, start_factor=1, end_factor=0.2, total_iters=20)),
        ("exponential", partial(lr_scheduler.ExponentialLR, gamma=0.2 ** (1 / 20))),
        ("cosine", partial(lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=0.2)),
        ("constant", partial(lr_scheduler.ConstantLR, factor=1, total_iters=20)),
    ],
)
def test_schedules_are_those_of_torch(shape, scheduler):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    torchs = scheduler(optimizer)
    schedule = Schedule(shape, end_factor=0.2)
    for step in range(21):
        assert schedule(step, step / 20) == pytest.approx(torchs.get_last_lr()[0])
        optimizer.step()
        torchs.step()
    assert schedule(30, 1.5) == pytest.approx(1.0 if shape == "constant" else 0.2)


def test_warmup_rises_in_equal_steps():
    schedule = Schedule(warmup=4)
    assert [schedule(step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    falling = Schedule("linear", end_factor=0.0, warmup=4)
    assert [falling(step, step / 8) for step in (0, 1, 4, 8)] == [0.25, 0.4375, 0.5, 0]


@pytest.mark.parametrize("shape", ["linear", "exponential", "cosine", "constant"])
def test_schedules_are_resumed_bit_for_bit(tmp_path, shape):
    player = PlayerConfig(schedule=shape, warmup=2)
    options = {"g": player, "d": PlayerConfig(optimizer="sgd", schedule=shape)}
    check_resume(tmp_path, partial(small_trainer, **options, procedure=Procedure(schedule_steps=9)))


def test_rates_follow_their_own_schedules_and_are_logged():
    g = PlayerConfig(lr=0.1, schedule="linear", end_factor=0.5)
    trainer = small_trainer(g=g, procedure=Procedure(schedule_steps=4))
    rates = []
    for _ in range(6):
        trainer.step()
        rates.append(trainer.metrics()["lr_g"])
    assert rates == pytest.approx([0.1, 0.0875, 0.075, 0.0625, 0.05, 0.05])
    assert "lr_d" not in trainer.metrics()
    adam_g, adam_d = trainer.optimizers.values()
    assert adam_g.param_groups[0]["lr"] == pytest.approx(0.05)
    assert adam_d.param_groups[0]["lr"] == PlayerConfig().lr


def test_a_schedule_goes_by_what_it_is_told_or_says_that_it_has_no_end():
    trainer = small_trainer(d=PlayerConfig(lr=0.1, schedule="linear", end_factor=0.0))
    with pytest.raises(
        ValueError, match=r"d\.schedule linear needs an end: set schedule_steps, or"
    ):
        trainer.step()
    for done in (0.0, 0.3, 0.9):
        trainer.step(done)
        assert trainer.metrics()["lr_d"] == pytest.approx(0.1 * (1 - done))
    warm = small_trainer(d=PlayerConfig(lr=0.1, warmup=2))  # which needs no end
    warm.step()
    assert warm.metrics()["lr_d"] == pytest.approx(0.05)


# Steps


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


# Precision


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
    real = twin.data[next(twin.sampler)]
    noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        outputs = twin.discriminator(real), twin.discriminator(twin.generator(noise))
        wanted = [
            mmd2(a, b, loss.sigmas)
            for a, b in zip(*(each.split(4) for each in outputs), strict=True)
        ]
    trainer.step()
    assert trainer.metrics()["loss_d"] == pytest.approx(-sum(wanted).item() / 2)


# Configuration


def test_two_time_scales():
    data = load_dataset("ring")
    small = TrainConfig(dataset="ring", regularizer="none", width=4, g=PlayerConfig(lr=0.1))
    small = replace(small, d=PlayerConfig(lr=0.1))
    for ttur, wanted in {"none": (0.1, 0.1), "g2": (0.2, 0.1), "d2": (0.1, 0.2)}.items():
        trainer = build_trainer(replace(small, ttur=ttur), data)
        rates = [each.param_groups[0]["lr"] for each in trainer.optimizers.values()]
        assert rates == pytest.approx(wanted)


def test_a_configuration_becomes_the_procedure_of_the_trainer():
    config = TrainConfig(
        dataset="ring",
        regularizer="none",
        steps=30,
        discriminator_steps=2,
        accumulate=3,
        precision="bf16",
        growth=GrowthConfig(factor=3, maximum=2000),
        instance_noise=InstanceNoiseConfig(std=0.1),
        g=PlayerConfig(batch_size=7, clip=3.0),
    )
    trainer = build_trainer(config, load_dataset("ring"))
    wanted = Procedure(2, 3, "bf16", 30, config.growth, config.instance_noise)
    assert trainer.procedure == wanted
    assert trainer.batch_sizes == [7, 64]
    assert [player.config for player in trainer.players] == [config.g, config.d]
    longer = build_trainer(replace(config, schedule_steps=50), load_dataset("ring"))
    assert longer.procedure.schedule_steps == 50
    assert TrainConfig.from_dict(config.to_dict()) == config


def run_config(**options):
    player = PlayerConfig(schedule="cosine", warmup=2)
    defaults = {"regularizer": "none", "width": 8, "latent_dim": 4, "batch_size": 8, "g": player}
    return TrainConfig(**{**defaults, "tensorboard": False, "log_every": 1, **options})


def test_a_run_with_schedules_and_growing_batches_is_resumed_bit_for_bit(tmp_path):
    options = {"growth": GrowthConfig(factor=2, every=4, maximum=64), "precision": "bf16"}
    config = run_config(steps=12, schedule_steps=12, discriminator_steps=2, **options)
    Run.create(tmp_path / "straight", config).train()
    Run.create(tmp_path / "other", replace(config, steps=5)).train()
    Run.resume(tmp_path / "other", steps=12).train()
    states = [
        load_state(tmp_path / name / "checkpoints/step-000000012.safetensors")
        for name in ("straight", "other")
    ]
    assert equal(states[0]["trainer"], states[1]["trainer"])


def test_a_schedule_by_time_falls_until_the_time_is_over(tmp_path):
    run = Run.create(tmp_path / "run", run_config(seconds=0.2, log_every=1))
    run.train()
    rows = [row for row in run.folder.read_metrics() if row["step"] > 2]
    rates = [row["lr_g"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]
    assert "lr_d" not in rows[0]


@pytest.mark.parametrize("precision", ["float64", "bf16", "fp16"])
def test_runs_of_every_precision_write_their_pictures(tmp_path, precision):
    run = Run.create(
        tmp_path / "run", run_config(steps=3, precision=precision, regularizer="gaussian+r1")
    )
    assert "samples.png" in run.train()
    assert (tmp_path / "run" / "kernel.png").exists()


@pytest.mark.parametrize("dataset", DEFAULTS)
def test_every_optimizer_goes_with_the_defaults_of_every_data_set(dataset):
    defaults = DEFAULTS[dataset]
    for name in OPTIMIZERS:
        player = replace(defaults.d, optimizer=name)
        assert replace(defaults, d=player).d.optimizer == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "g.lr must be at least 0, got -1.0"),
        ({"lr": "1e-3"}, "g.lr must be a number, got '1e-3'"),
        ({"lr": math.inf}, "g.lr must be finite, got inf"),
        ({"optimizer": "adm"}, "g.optimizer must be adadelta, adafactor, adagrad, adam, adamax, "),
        ({"optimizer": "lbfgs"}, "or module:factory, got 'lbfgs'"),
        ({"optimizer": "a b:c"}, "or module:factory, got 'a b:c'"),
        ({"beta1": 1.0}, r"g.beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"g.beta2 must be in \[0, 1\), got -0.1"),
        ({"momentum": 0.9}, "g.optimizer adam has no momentum"),
        ({"optimizer": "sgd", "beta1": 0.9}, "g.optimizer sgd has no betas"),
        ({"optimizer": "rprop", "weight_decay": 0.9}, "g.optimizer rprop has no weight_decay"),
        ({"weight_decay": -1.0}, "g.weight_decay must be at least 0, got -1"),
        ({"l1": math.nan}, "g.l1 must be finite, got nan"),
        ({"clip": -0.5}, "g.clip must be at least 0, got -0.5"),
        ({"schedule": "step"}, "g.schedule must be one of constant, linear, exponential, cosine"),
        ({"end_factor": 1.5}, "g.end_factor must be at most 1, got 1.5"),
        (
            {"schedule": "exponential", "end_factor": 0.0},
            "g.end_factor must be positive with exponential, got 0.0",
        ),
        ({"warmup": -1}, "g.warmup must be at least 0, got -1"),
        ({"batch_size": 2.5}, "g.batch_size must be an integer, got 2.5"),
    ],
)
def test_bad_options_of_a_network_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(g=PlayerConfig(**options))
    with pytest.raises(ValueError, match=message):
        small_trainer(g=PlayerConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discriminator_steps": 0}, "discriminator_steps must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"schedule_steps": -1}, "schedule_steps must be at least 0, got -1"),
        ({"precision": "fp8"}, "precision must be one of float32, float64, bf16, fp16, got"),
        ({"ttur": "g3"}, "ttur must be one of none, g2, d2, got 'g3'"),
        ({"ttur": "g2", "g": PlayerConfig(lr=0.1)}, "g.lr must be equal to d.lr with ttur g2,"),
        (
            {"loss": "mmd", "regularizer": "r1", "g": PlayerConfig(batch_size=1)},
            "batch_size must be at least 2 with mmd, got 1",
        ),
        (
            {"regularizer": "gaussian", "batch_size": 8, "accumulate": 5},
            "accumulate must be at most 4 with gaussian, for parts of two samples, got 5",
        ),
    ],
)
def test_bad_options_of_steps_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrowthConfig(factor=0), "factor must be at least 1, got 0"),
        (lambda: GrowthConfig(factor=1.5), "factor must be an integer, got 1.5"),
        (lambda: GrowthConfig(every=0), "every must be at least 1, got 0"),
        (lambda: InstanceNoiseConfig(std=-1.0), "std must be at least 0, got -1"),
        (lambda: InstanceNoiseConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: Procedure(precision="half"), "precision must be one of float32, float64, bf16"),
        (
            lambda: small_trainer(procedure=Procedure(accumulate=9)),
            "accumulate must be at most the 8 rows of a batch, got 9",
        ),
        (
            lambda: small_trainer(procedure=Procedure(growth=GrowthConfig(2, maximum=41))),
            r"growth.maximum must be in \[8, 40\], from the first batch to all samples, got 41",
        ),
        (
            lambda: small_trainer(procedure=Procedure(growth=GrowthConfig(2, maximum=7))),
            r"growth.maximum must be in \[8, 40\], from the first batch to all samples, got 7",
        ),
        (
            lambda: small_trainer(g=PlayerConfig(batch_size=41)),
            r"batch_size must be in \[1, 40\] for 40 samples, got 41",
        ),
        (
            lambda: small_trainer([HSN1R()], procedure=Procedure(accumulate=2)),
            "accumulate must be 1 with HSN1R, which takes the Hessian on a whole batch, got 2",
        ),
        (
            lambda: small_trainer(
                orthogonal=Orthogonal("previous"), procedure=Procedure(discriminator_steps=2)
            ),
            "discriminator_steps must be 1 with orthogonal previous",
        ),
        (
            lambda: small_trainer(
                orthogonal=Orthogonal("previous"), procedure=Procedure(precision="fp16")
            ),
            "precision must be another than fp16 with orthogonal previous",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:make", "g.cannot import no_such_module: ModuleNotFoundError"),
        ("my_optimizers:Nothing", "g.my_optimizers:Nothing: my_optimizers has no Nothing"),
        ("my_optimizers:PROCEDURES", "g.my_optimizers:PROCEDURES must be callable, got dict"),
        ("my_optimizers:not_an_optimizer", "must be a torch.optim.Optimizer, got int"),
    ],
)
@pytest.mark.usefixtures("this_module")
def test_factories_that_make_no_optimizer_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        small_trainer(g=PlayerConfig(optimizer=name))
    with pytest.raises(ValueError, match=r"optimizer my_optimizers:Counting has no momentum"):
        small_trainer(g=PlayerConfig(optimizer="my_optimizers:Counting", momentum=0.5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--g.lr -1", "g.lr must be at least 0, got -1.0"),
        ("--d.optimizer adm", "d.optimizer must be"),
        ("--d.schedule step", "d.schedule"),
        ("--growth.factor 2 --growth.maximum 5000", "growth.maximum must be in [64, 1437]"),
        ("--regularizer hsn1r --accumulate 2", "accumulate must be 1 with HSN1R"),
        ("--d.optimizer no_such:thing", "cannot import no_such"),
        ("--ttur d2 --d.lr 3e-3", "g.lr must be equal to d.lr with ttur d2"),
    ],
)
def test_the_command_line_refuses_in_one_line(capsys, tmp_path, flags, message):
    arguments = ["train", "digits", *flags.split(), f"--out={tmp_path / 'run'}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_with_all_of_it(capsys, tmp_path):
    small = ["--width=8", "--latent_dim=4", "--batch-size=8", "--tensorboard=false", "--steps=4"]
    flags = (
        "--regularizer=r1 --g.lr 2e-4 --g.optimizer=sgd --g.momentum 0.9 --d.beta1=0 --d.beta2 0.9"
        " --d.weight-decay 1e-4 --g.l1 1e-5 --d.clip 1 --g.schedule cosine --g.warmup=2"
        " --d.batch_size 16 --discriminator-steps 2 --growth.factor 2 --growth.every 2"
        " --instance_noise.std 0.1 --precision bf16 --accumulate 2 --log_every=1"
    )
    assert main(["train", "digits", *small, *flags.split(), f"--out={tmp_path / 'run'}"]) == 0
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "momentum: 0.9" in config
    assert main(["resume", str(tmp_path / "run"), "--steps", "6"]) == 0
