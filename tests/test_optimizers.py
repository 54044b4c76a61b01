"""How networks are stepped: optimisers of every kind and schedules, all of it resumed."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from hessreg.gan import (
    DEFAULTS,
    NonSaturating,
    PlayerConfig,
    Procedure,
    Trainer,
)
from hessreg.gan.optimizers import OPTIMIZERS, make_optimizer, optimizer_state, state_loader
from hessreg.gan.schedules import Schedule
from tests.small_trainers import check_resume, small_trainer, weights
from tests.states import equal

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
            real = by_hand.data[next(by_hand.batches.sampler)]
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:make", "g.cannot import no_such_module: ModuleNotFoundError"),
        ("my_optimizers:Nothing", "g.my_optimizers:Nothing: my_optimizers has no Nothing"),
        ("my_optimizers:OPTIMIZERS", "g.my_optimizers:OPTIMIZERS must be callable, got dict"),
        ("my_optimizers:not_an_optimizer", "must be a torch.optim.Optimizer, got int"),
    ],
)
@pytest.mark.usefixtures("this_module")
def test_factories_that_make_no_optimizer_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        small_trainer(g=PlayerConfig(optimizer=name))
    with pytest.raises(ValueError, match=r"optimizer my_optimizers:Counting has no momentum"):
        small_trainer(g=PlayerConfig(optimizer="my_optimizers:Counting", momentum=0.5))


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


@pytest.mark.parametrize("dataset", DEFAULTS)
def test_every_optimizer_goes_with_the_defaults_of_every_data_set(dataset):
    defaults = DEFAULTS[dataset]
    for name in OPTIMIZERS:
        player = replace(defaults.d, optimizer=name)
        assert replace(defaults, d=player).d.optimizer == name
