"""How each network is trained, by its configuration and on the command line."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hessreg.cli import main
from hessreg.gan import (
    GrowthConfig,
    InstanceNoiseConfig,
    Orthogonal,
    PlayerConfig,
    Procedure,
    Run,
    TrainConfig,
    load_dataset,
)
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import load_state
from hessreg.regularizers import HSN1R
from tests.small_trainers import small_trainer
from tests.states import equal


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
