"""Comparisons over seeds: settings of methods, confidence intervals, curves with them."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from hessreg.cli import main
from hessreg.gan.config import TrainConfig
from hessreg.gan.convergence import Convergence
from hessreg.gan.intervals import confidence_interval, mean_curve
from hessreg.gan.methods import with_method
from hessreg.gan.run_folder import RunFolder

stats = pytest.importorskip("scipy.stats")
for package in ("jsonargparse", "matplotlib", "rich", "safetensors", "yaml"):
    pytest.importorskip(package)

SMALL = ["--width=8", "--latent_dim=4", "--batch_size=8", "--tensorboard=false"]


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_intervals_are_those_of_scipy(count):
    values = np.random.default_rng(count).normal(3.0, 2.0, count)
    found = confidence_interval(list(values), level=0.9)
    low, high = stats.t.interval(0.9, count - 1, values.mean(), stats.sem(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.margin == pytest.approx((high - low) / 2)


def test_nineteen_of_twenty_intervals_hold_the_mean():
    samples = np.random.default_rng(0).normal(1.0, 3.0, (2000, 4))
    found = [confidence_interval(list(row)) for row in samples]
    share = np.mean([abs(each.mean - 1.0) <= each.margin for each in found])
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_one_value_has_no_interval():
    assert math.isnan(confidence_interval([2.0]).margin)


def rows(steps, values, pace=1.0):
    pairs = zip(steps, values, strict=True)
    found = [{"step": x, "cpu_seconds": pace * x, "fdd": y} for x, y in pairs]
    return [{"step": 1, "cpu_seconds": pace, "loss_g": 0.0}, *found]  # without the metric


def test_curves_are_interpolated_where_all_runs_are():
    runs = [rows([10, 20, 40], [8.0, 4.0, 2.0]), rows([20, 30], [6.0, 3.0])]
    curve = mean_curve(runs, "fdd", "step", extra=[25, 50])
    assert list(curve.x) == [20, 25, 30]
    assert [each.mean for each in curve.intervals] == [5.0, 4.0, 3.0]
    assert curve.at(25).margin == pytest.approx(confidence_interval([3.5, 4.5]).margin)


def test_runs_that_were_never_at_the_same_moment_have_no_curve():
    assert list(mean_curve([rows([10], [1.0]), rows([12], [1.0])], "fdd", "step").x) == []


def test_a_table_shows_the_way_of_the_slowest():
    fast = [rows([10, 20, 30, 40, 50], [9, 7, 5, 3, 1]), rows([10, 20, 30, 40], [9, 7, 5, 3])]
    slow = [rows([10, 20, 30, 40], [8, 6, 4, 2], pace=2.0)] * 2
    found = Convergence.of({"fast": fast, "slow": slow}, "fdd", "FDD", ".1f", every=10)
    assert found.table() == [
        ["FDD", "10 steps", "20 steps", "40 steps", "10 s", "20 s", "40 s"],
        ["fast", "9.0 ± 0.0", "7.0 ± 0.0", "3.0 ± 0.0", "9.0 ± 0.0", "7.0 ± 0.0", "3.0 ± 0.0"],
        ["slow", "8.0 ± 0.0", "6.0 ± 0.0", "2.0 ± 0.0", "-", "8.0 ± 0.0", "6.0 ± 0.0"],
    ]


@pytest.mark.parametrize("steps", [(10, 12), (10, 10)])
def test_runs_that_were_evaluated_once_are_drawn_as_far_as_they_can_be(tmp_path, steps):
    runs = {"r1": [rows([step], [2.0], pace) for step, pace in zip(steps, (1.0, 1.1), strict=True)]}
    found = Convergence.of(runs, "fdd", "FDD", ".1f", every=100)
    found.save(tmp_path)
    assert [cell for cell in found.table()[1][1:] if cell != "-"] == []
    written = (tmp_path / "convergence.csv").read_text().splitlines()[1:]
    assert written == (["r1,step,10,2.0,0.0"] if steps == (10, 10) else [])
    assert (tmp_path / "convergence.png").exists()


def test_a_setting_may_have_commas():
    from hessreg.commands.compare import _names

    text = "none, gaussian@gaussian.sigma=0.25,0.5,r1@g.lr=1e-3,hsc"
    wanted = ["none", "gaussian@gaussian.sigma=0.25,0.5", "r1@g.lr=1e-3", "hsc"]
    assert _names(text) == wanted


def test_settings_of_a_method():
    base = TrainConfig(loss="wasserstein")
    chosen = with_method(base, "wgan_gp@wgan_gp.weight=0.1@g.schedule=linear@d.lr=2e-4")
    assert (chosen.loss, chosen.regularizer, chosen.wgan_gp.weight) == (
        "wasserstein",
        "wgan_gp",
        0.1,
    )
    assert (chosen.g.schedule, chosen.d.schedule, chosen.d.lr) == ("linear", "constant", 2e-4)
    assert with_method(base, "none@projection.strength=null").projection.strength is None


def test_compare_methods_with_settings(tmp_path, capfd):
    folder = tmp_path / "compare"
    methods = ["r1", "r1@r1.gamma=3@architecture=mlp"]
    args = [f"--methods={','.join(methods)}", "--seeds=0,1", "--steps=6", "--eval_every=2"]
    assert main(["compare", "ring", *args, f"--out={folder}", *SMALL]) == 0
    printed = capfd.readouterr().out
    assert "MMD on the way, with 95 % intervals" in printed
    assert "mean over 2 seeds with its 95 % interval: r1" in printed
    found = json.loads((folder / "comparison.json").read_text())
    runs = [row for row in found if "seed" in row]
    assert [row["name"] for row in runs] == [methods[0]] * 2 + [methods[1]] * 2
    chosen = RunFolder(folder / f"{methods[1]}-1").read_config()
    assert (chosen.r1.gamma, chosen.seed) == (3.0, 1)
    assert (folder / "convergence.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "convergence.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row["against"] == "step"]
    assert [(row["name"], float(row["x"])) for row in steps] == [
        (name, x) for name in methods for x in (2, 4, 6)
    ]
    written = [(folder / name / "result.json").stat().st_mtime_ns for name in ("r1-0", "r1-1")]
    (folder / "r1-0" / "result.json").unlink()
    assert main(["compare", "ring", *args, f"--out={folder}", *SMALL]) == 0
    again = [(folder / name / "result.json").stat().st_mtime_ns for name in ("r1-0", "r1-1")]
    assert again[0] > written[0]
    assert again[1] == written[1]
    last = confidence_interval([row["mmd"] for row in runs[:2]])
    assert (float(steps[2]["mmd"]), float(steps[2]["margin"])) == (last.mean, last.margin)
