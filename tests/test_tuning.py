"""Search for hyperparameters: the space, the study, and trials that die."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from examples import tuning_advice
from hessreg.cli import main
from hessreg.commands import train
from hessreg.commands._options import train_config
from hessreg.gan import DEFAULTS, TrainConfig
from hessreg.gan.config import with_values
from hessreg.gan.run import Interrupted
from hessreg.gan.run_folder import RunFolder, RunFolderError
from hessreg.tuning import (
    DEFAULT_SPACE,
    SearchSpace,
    SpaceError,
    StudyError,
    TuneConfig,
    Tuner,
    TuningError,
)
from hessreg.tuning.study import STUDY_ID, _order, _storage, _wait_for_queue, queued_point
from hessreg.tuning.trial_run import TrialRun

optuna = pytest.importorskip("optuna")

BASE = DEFAULTS["ring"]
RATE = {"low": 1e-4, "high": 1e-2, "log": True}
# A "run" whose metric is the distance of log10 of the rate to -3: no training, a real process.
STAND_IN = """
import json, math, pathlib, sys, time, yaml
folder = pathlib.Path(sys.argv[1])
config = yaml.safe_load(folder.with_suffix(".yaml").read_text())
rate, lag = config["g"]["lr"], config["ring"]["radius"]
if rate > 0.009:
    sys.exit("hessreg: step 3: generator loss is not finite")
folder.mkdir(exist_ok=True)
value = abs(math.log10(rate) + 3)
with (folder / "metrics.jsonl").open("a") as file:
    for step in (100, 200, 300):
        file.write(json.dumps({"step": step, "cpu_seconds": 0.1, "mmd": value}) + "\\n")
        file.flush()
        time.sleep(lag if value > 0.9 else 0)
row = {"mmd": value, "quality": 1 - value / 9, "seed": config["seed"], "steps": 300}
(folder / "result.json").write_text(json.dumps(row | {"modes": 8, "tv": 0.1, "cpu_seconds": 0.1}))
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Trials that take no time."""

    def command(self):
        return [sys.executable, "-c", STAND_IN, str(self.path)]

    monkeypatch.setattr(TrialRun, "_command", command)
    return command


def space_file(tmp_path, declared):
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(declared, sort_keys=False))
    return str(file)


def search(tmp_path, declared, base=BASE, out="out", **options):
    """A search with the defaults of a test, and the trials of its study afterwards."""
    options = {"trials": 6, "sampler": "random", "pruner": "none", "confirm": 0} | options
    config = TuneConfig(space=space_file(tmp_path, declared), **options)
    tuner = Tuner(tmp_path / out, base, config)
    outcome = tuner.run()
    return outcome, tuner.study.trials


def read_table(file):
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def states(trials):
    return [trial.state.name for trial in trials]


# --- the space ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DEFAULTS)
def test_default_space_holds_for_every_data_set(dataset):
    base = DEFAULTS[dataset]
    names = {parameter.name for parameter in SearchSpace.read(base, DEFAULT_SPACE).parameters}
    assert {"g.lr", "d.lr", "batch_size", "loss", "regularizer"} <= names


def test_space_from_yaml_takes_numbers_without_a_point(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("g.lr: {low: 1e-4, high: 1e-2, log: true}\nbatch_size: [32, 64]\n")
    rate, size = SearchSpace.read(BASE, file).parameters
    assert (rate.low, rate.high, size.values) == (1e-4, 1e-2, (32, 64))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([1, 2], "a space is a mapping of options to values"),
        ({}, "a space is a mapping"),
        ({"g.lrr": RATE}, "g.lrr is no option of a run; did you mean g.lr?"),
        ({"g.lr": 3}, "g.lr must be a list of values, or low and high"),
        ({"g.lr": []}, "g.lr: values must be a list"),
        ({"g.lr": {"low": 1}}, "g.lr: high must be a finite number, got None"),
        ({"g.lr": {"low": "x", "high": 1}}, "g.lr: low must be a finite number, got 'x'"),
        ({"g.lr": {"low": float("nan"), "high": 1}}, "g.lr: low must be a finite number"),
        ({"g.lr": {"low": 2.0, "high": 1.0}}, "g.lr needs low < high"),
        ({"g.lr": {"low": 0.0, "high": 1.0, "log": True}}, "g.lr needs 0 < low < high with log"),
        ({"g.lr": {**RATE, "log": "yes"}}, "g.lr: log must be true or false, got 'yes'"),
        ({"g.lr": {**RATE, "step": 2}}, "g.lr: step is none of low, high, log, when"),
        ({"g.lr": {"low": -1.0, "high": 1.0}}, "g.lr cannot be -1.0: g.lr must be at least 0"),
        ({"batch_size": [64, "many"]}, "batch_size cannot be 'many'"),
        ({"regularizer": ["r1", "r9"]}, "regularizer cannot be 'r9'"),
        ({"g.lr": {**RATE, "when": 3}}, "g.lr: when must be a mapping"),
        (
            {"g.lr": {**RATE, "when": {"los": "mmd"}}},
            "los is no option of a run; did you mean loss",
        ),
    ],
)
def test_what_a_space_cannot_be(declared, message):
    with pytest.raises(SpaceError) as caught:
        SearchSpace(BASE, declared)
    assert message in str(caught.value)


def test_missing_or_damaged_space_file_is_named(tmp_path):
    missing, damaged = tmp_path / "no.yaml", tmp_path / "bad.yaml"
    damaged.write_text("a: [1\nb: }")
    for file, message in ((missing, "No such file"), (damaged, "while parsing")):
        with pytest.raises(SpaceError, match=message) as caught:
            SearchSpace.read(BASE, file)
        assert str(file) in str(caught.value)


def test_neighbours_differ_in_two_values_from_the_start():
    space = SearchSpace.read(BASE, DEFAULT_SPACE)
    start, points = space.base_point(), space.neighbours(200, random.Random(0))
    changed = [{n for n in start if point.get(n, start[n]) != start[n]} for point in points]
    # One where the other does not matter any more, as r1.gamma without r1.
    assert {len(names) for names in changed} <= {1, 2}
    assert sum(len(names) == 2 for names in changed) > 150
    assert set.union(*changed) >= {"g.lr", "batch_size", "regularizer", "label_smoothing"}
    assert all(
        set(start) >= set(point) or "regularizer" in names
        for point, names in zip(points, changed, strict=True)
    )
    wgan = next(point for point in points if point["regularizer"] == "wgan_gp")
    assert (wgan["wgan_gp.weight"], "r1.gamma" in wgan) == (BASE.wgan_gp.weight, False)
    assert all(space.values_of(trial) == trial.params for trial in map(frozen, points))
    assert points != space.neighbours(200, random.Random(1))


def frozen(point):
    space = {name: optuna.distributions.CategoricalDistribution([v]) for name, v in point.items()}
    return optuna.trial.create_trial(params=point, distributions=space, value=0.0)


def test_no_point_is_tried_twice_where_there_are_few():
    space = SearchSpace(with_values(BASE, {"batch_size": 256}), {"batch_size": [128, 256]})
    assert space.neighbours(20, random.Random(0)) == [{"batch_size": 128}]
    outside = SearchSpace(with_values(BASE, {"batch_size": 64}), {"batch_size": [128, 256]})
    assert outside.neighbours(20, random.Random(0)) == []


def test_numbers_by_chance_are_within_the_range():
    declared = {"g.lr": RATE, "width": {"low": 16, "high": 18}, "r1.gamma": {"low": 0, "high": 0.5}}
    rate, width, gamma = SearchSpace(BASE, declared).parameters
    chance = random.Random(0)
    drawn = [[each.draw(chance, each.low) for each in (rate, width, gamma)] for _ in range(400)]
    rates, widths, gammas = zip(*drawn, strict=True)
    assert sorted(rates)[200] == pytest.approx(1e-3, rel=0.3)  # the middle of the logarithms
    assert (set(widths), {type(value) for value in widths}) == ({16, 17, 18}, {int})
    assert 0 <= min(gammas) < 0.05 < 0.45 < max(gammas) <= 0.5


def test_grid_leaves_out_what_does_not_matter():
    gamma = {"values": [0.1, 1.0], "when": {"regularizer": ["r1", "r1+r2"]}}
    declared = {"regularizer": ["none", "r1"], "r1.gamma": gamma, "batch_size": [32, 64]}
    points = SearchSpace(BASE, declared).grid()
    assert len(points) == 6
    assert {"regularizer": "none", "batch_size": 32} in points
    assert {"regularizer": "r1", "r1.gamma": 1.0, "batch_size": 64} in points


def test_grid_too_large_is_refused():
    declared = {name: list(range(1, 31)) for name in ("save_every", "log_every", "eval_every")}
    with pytest.raises(SpaceError, match="more than 10000 points"):
        SearchSpace(BASE, declared).grid()


def test_values_of_any_kind_come_back(tmp_path, stand_in):
    declared = {"threads": [1, 2], "tensorboard": [True, False], "projection.strength": [None, 0.5]}
    outcome, trials = search(tmp_path, declared, sampler="grid", trials=8)
    found = [outcome.space.values_of(trial) for trial in trials]
    wanted = itertools.product([1, 2], [True, False], [None, 0.5])
    assert sorted(map(str, (tuple(each.values()) for each in found))) == sorted(map(str, wanted))


def test_with_values_changes_those_only():
    changed = with_values(BASE, {"g.lr": 0.5, "loss": "hinge"})
    assert (changed.g.lr, changed.loss) == (0.5, "hinge")
    assert with_values(changed, {"g.lr": BASE.g.lr, "loss": BASE.loss}) == BASE


# --- the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_search_begins_with_the_default_and_finds_better(tmp_path, stand_in, sampler):
    base = with_values(BASE, {"g.lr": 2e-4})
    outcome, trials = search(tmp_path, {"g.lr": RATE}, base, sampler=sampler, trials=12, workers=2)
    assert [trial.number for trial in trials] == list(range(12))
    assert trials[0].params["g.lr"] == 2e-4
    assert len({trial.params["g.lr"] for trial in trials}) == 12
    assert set(states(trials)) <= {"COMPLETE", "PRUNED"}
    assert outcome.best[0].value < trials[0].value / 2
    seeds = {
        yaml.safe_load((tmp_path / f"out/trials/{n:04d}.yaml").read_text())["seed"]
        for n in range(12)
    }
    assert seeds == set(range(12))


def test_grid_is_searched_point_by_point(tmp_path, stand_in):
    declared = {"g.lr": [1e-4, 1e-3, 5e-3], "batch_size": [32, 64]}
    outcome, trials = search(tmp_path, declared, sampler="grid", trials=100, workers=3)
    found = {(trial.params["g.lr"], trial.params["batch_size"]) for trial in trials}
    assert len(trials) == 6
    assert found == set(itertools.product([1e-4, 1e-3, 5e-3], [32, 64]))
    assert outcome.best[0].params["g.lr"] == 1e-3


def test_grid_goes_on_where_fewer_trials_ended_it(tmp_path, stand_in):
    declared = {"g.lr": [1e-4, 1e-3, 5e-3], "projection.strength": [None, 0.5]}
    for wanted in (2, 6, 6):
        config = TuneConfig(space=space_file(tmp_path, declared), sampler="grid", trials=wanted)
        tuner = Tuner(tmp_path / "out", BASE, config)
        points = [str(queued_point(trial)) for trial in tuner.study.trials]
        assert len(set(points)) == len(points) == wanted


def test_point_of_a_grid_that_is_lost_is_tried_again(tmp_path, stand_in):
    declared = {"g.lr": [1e-3], "batch_size": [32, 64]}
    config = TuneConfig(space=space_file(tmp_path, declared), sampler="grid", trials=2)
    tuner = Tuner(tmp_path / "out", BASE, config)
    lost = tuner.study.ask()
    lost.suggest_categorical("g.lr", [1e-3])  # got no further
    lost.set_user_attr("alive", time.time() - 1e4)
    tuner.run()
    first, *others = tuner.study.trials
    assert first.state.name == "FAIL"
    assert sorted(trial.params["batch_size"] for trial in others) == [32, 64]


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_queue_that_was_left_unfinished_is_finished(tmp_path, stand_in, monkeypatch, sampler):
    declared = {"g.lr": [1e-4, 1e-3], "batch_size": [32, 64, 128]}
    enqueue = optuna.Study.enqueue_trial

    def interrupted(study, point):
        if len(study.trials) == 2:
            raise KeyboardInterrupt
        enqueue(study, point)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", interrupted)
    base = with_values(BASE, {"g.lr": 1e-3, "batch_size": 64})
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, declared, base, sampler=sampler, storage=f"journal:{tmp_path / 'a.log'}")
    monkeypatch.setattr(optuna.Study, "enqueue_trial", enqueue)
    monkeypatch.setattr("hessreg.tuning.study._QUEUE_TIMEOUT", 0.1)
    config = TuneConfig(
        space=space_file(tmp_path, declared),
        sampler=sampler,
        trials=6,
        storage=f"journal:{tmp_path / 'a.log'}",
    )
    queued = [queued_point(trial) for trial in Tuner(tmp_path / "out", base, config).study.trials]
    whole = Tuner(tmp_path / "whole", base, replace(config, storage="")).study.trials
    assert queued == [queued_point(trial) for trial in whole]
    assert len(queued) > 2


def test_queue_that_grows_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("hessreg.tuning.study._QUEUE_TIMEOUT", 0.5)
    study = optuna.create_study()
    pauses = []

    def pause(_):
        pauses.append(study.enqueue_trial({"x": len(pauses)}))
        if len(pauses) == 20:
            study.set_user_attr(STUDY_ID, "known")

    clock = itertools.count(step=0.2)
    monkeypatch.setattr("hessreg.tuning.study.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("hessreg.tuning.study.time.sleep", pause)
    _wait_for_queue(study)
    assert len(pauses) == 20


def test_outcome_is_a_configuration_a_table_and_pictures(tmp_path, stand_in):
    outcome, trials = search(tmp_path, {"g.lr": RATE, "loss": ["hinge", "minimax"]})
    files = {file.name for file in outcome.write()}
    assert files == {"best.yaml", "trials.csv", "history.png", "parallel.png", "importances.png"}
    best = TrainConfig.from_dict(yaml.safe_load((tmp_path / "out/best.yaml").read_text()))
    assert best == with_values(BASE, outcome.best[0].params)
    rows = read_table(tmp_path / "out/trials.csv")
    assert [int(row["number"]) for row in rows] == list(range(6))
    complete = [row for row in rows if row["state"] == "COMPLETE"]
    assert min(float(row["mmd"]) for row in complete) == outcome.best[0].value
    assert f"g.lr: {outcome.best[0].params['g.lr']}" in outcome.describe()
    assert len(trials) == 6


def test_several_objectives_give_a_front(tmp_path, stand_in):
    outcome, _ = search(tmp_path, {"g.lr": RATE}, objectives="mmd,quality")
    assert [d.name for d in outcome.study.directions] == ["MINIMIZE", "MAXIMIZE"]
    fronts = [file.name for file in outcome.write() if file.name.startswith("pareto-")]
    assert fronts == [f"pareto-{outcome.best[0].number}.yaml"]  # one is best in both


def test_training_that_is_not_finite_counts_as_bad(tmp_path, stand_in):
    declared = {"g.lr": [1e-3, 9.5e-3]}
    outcome, trials = search(tmp_path, declared, sampler="grid")
    pruned = next(trial for trial in trials if trial.params["g.lr"] == 9.5e-3)
    assert pruned.state.name == "PRUNED"
    assert "generator loss is not finite" in pruned.user_attrs["reason"]
    assert outcome.best[0].params["g.lr"] == 1e-3


def test_nothing_but_failures_is_an_error(tmp_path, stand_in):
    with pytest.raises(TuningError, match="none of the trials got to its end"):
        search(tmp_path, {"g.lr": {"low": 0.0095, "high": 0.01}}, trials=2)


def test_values_that_contradict_each_other_cost_one_trial(tmp_path, stand_in):
    declared = {"batch_size": [1, 64], "loss": ["hinge", "mmd"]}
    base = with_values(BASE, {"regularizer": "none"})
    _, trials = search(tmp_path, declared, base, sampler="grid", trials=9)
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    assert len(trials) == 4
    assert [trial.params for trial in failed] == [{"batch_size": 1, "loss": "mmd"}]
    assert "at least 2 with mmd" in failed[0].user_attrs["reason"]


def test_hopeless_trials_are_ended(tmp_path, stand_in):
    """A bad run waits between its evaluations, so there is time to end it at the first."""
    rates = [1e-3, 1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3, 1e-5]
    # A pruner needs some to compare with: a seed with which the bad one comes last.
    seed = next(s for s in itertools.count() if shuffled(rates, s)[-1] == 1e-5)
    base = with_values(BASE, {"ring.radius": 20.0, "seed": seed})
    _, trials = search(tmp_path, {"g.lr": rates}, base, sampler="grid", pruner="median")
    hopeless = trials[-1]
    assert (hopeless.params["g.lr"], hopeless.state.name) == (1e-5, "PRUNED")
    assert hopeless.intermediate_values.keys() == {100}


def shuffled(values, seed):
    values = list(values)
    random.Random(seed).shuffle(values)
    return values


def test_study_goes_on_and_does_not_repeat(tmp_path, stand_in):
    _, first = search(tmp_path, {"g.lr": RATE}, trials=3)
    _, all_trials = search(tmp_path, {"g.lr": RATE}, trials=7)
    assert [t.params for t in all_trials[:3]] == [t.params for t in first]
    assert len({t.params["g.lr"] for t in all_trials}) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"declared": {"g.lr": [1e-3]}}, "other space"),
        ({"base": with_values(BASE, {"batch_size": 32})}, "other base"),
        ({"objectives": "quality"}, "other objectives"),
        ({"directions": "maximize"}, "other directions"),
    ],
)
def test_another_search_is_not_mixed_in(tmp_path, stand_in, change, message):
    search(tmp_path, {"g.lr": RATE}, trials=2)
    with pytest.raises(StudyError, match=message):
        search(tmp_path, **({"declared": {"g.lr": RATE}, "trials": 3} | change))


def test_folder_is_of_one_study(tmp_path, stand_in):
    """Another has trials of the same numbers, which would find these trained already."""
    search(tmp_path, {"g.lr": RATE}, trials=1)
    advised = "out has trials of another study than second: choose another --out"
    with pytest.raises(StudyError, match=advised):
        search(tmp_path, {"g.lr": [1e-4]}, trials=1, study="second")
    _, trials = search(tmp_path, {"g.lr": [1e-4]}, out="new", trials=1, study="second")
    assert trials[0].value == pytest.approx(1)


def test_trial_in_an_equal_path_of_another_machine_is_left_alone(tmp_path, stand_in):
    config = TuneConfig(
        space=space_file(tmp_path, {"g.lr": RATE}),
        trials=2,
        storage=f"journal:{tmp_path / 'shared.journal'}",
        confirm=0,
    )
    there = Tuner(tmp_path / "out", BASE, config)
    there._ask()
    there.close()
    (tmp_path / "out").rename(tmp_path / "its disk")
    here = Tuner(tmp_path / "out", BASE, config)
    here.run()
    assert states(here.study.trials) == ["RUNNING", "COMPLETE"]


@pytest.mark.parametrize("storage", ["sqlite:///{}/study.db", "journal:{}/shared.journal"])
def test_two_searches_share_a_study(tmp_path, storage):
    """Two commands at once, as on two machines: no trial is lost or there twice."""
    url = storage.format(tmp_path)
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from hessreg.tuning import Tuner, TuneConfig\n"
        "from hessreg.tuning.trial_run import TrialRun\n"
        "from hessreg.gan import DEFAULTS\n"
        f"code = {STAND_IN!r}\n"
        "TrialRun._command = lambda self: [sys.executable, '-c', code, str(self.path)]\n"
        f"config = TuneConfig(trials=10, storage={url!r}, confirm=0, sampler='random',\n"
        f"                    space={space_file(tmp_path, {'g.lr': RATE})!r})\n"
        "from pathlib import Path\n"
        "Tuner(Path(sys.argv[1]), DEFAULTS['ring'], config).run()\n"
    )
    searches = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / name)])
        for name in ("a", "b")
    ]
    assert [each.wait(timeout=300) for each in searches] == [0, 0]
    trials = optuna.load_study(study_name="ring", storage=_storage(url, tmp_path)).trials
    # Both may see room for the last one.
    assert 10 <= len(trials) <= 11
    assert set(states(trials)) <= {"COMPLETE", "PRUNED"}
    assert len({trial.params["g.lr"] for trial in trials}) == len(trials)
    folders = {trial.user_attrs["folder"] for trial in trials}
    assert len(folders) == len(trials)


@pytest.mark.parametrize("storage", ["sqlite:///{}/study.db", "journal:{}/shared.journal"])
def test_searches_that_begin_at_once_differ(tmp_path, storage):
    """Each takes other trials of the queue, and draws from another stream."""
    url = storage.format(tmp_path)
    queue = optuna.create_study(study_name="ring", storage=_storage(url, tmp_path))
    for point in range(30):
        queue.enqueue_trial({"x": point})
    together = threading.Barrier(3)

    def take(_):
        own = _storage(url, tmp_path)
        study = optuna.load_study(study_name="ring", storage=own)
        together.wait()
        return _order(study, own), [study.ask().number for _ in range(10)]

    with ThreadPoolExecutor(3) as threads:
        orders, numbers = zip(*threads.map(take, range(3)), strict=True)
    assert sorted(orders) == [0, 1, 2]
    assert sorted(itertools.chain(*numbers)) == list(range(30))


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
@pytest.mark.parametrize("url", ["", "journal:out/shared.journal"])
def test_lock_of_a_search_killed_while_it_writes_can_be_broken(tmp_path, monkeypatch, url):
    """Optuna looks at what the lock leads to, and waits for ever if that is nothing."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    _storage(url, Path("out"))._backend._lock.acquire()
    (lock,) = Path("out").glob("*.lock")
    assert lock.resolve(strict=True).suffix == ".journal"


def test_trial_of_a_search_without_life_is_replaced(tmp_path, stand_in, monkeypatch):
    config = TuneConfig(space=space_file(tmp_path, {"g.lr": RATE}), trials=3, confirm=0)
    tuner = Tuner(tmp_path / "out", BASE, config)
    lost = tuner.study.ask()
    lost.set_user_attr("owner", "elsewhere")
    lost.set_user_attr("alive", time.time() - 1e4)
    tuner.run()
    by_state = states(tuner.study.trials)
    assert (by_state[0], len(by_state), by_state.count("FAIL")) == ("FAIL", 4, 1)


def test_trial_that_another_search_gave_up_is_let_go(tmp_path, stand_in, monkeypatch):
    """As after a machine was asleep for longer than others wait."""
    base = with_values(BASE, {"ring.radius": 60.0, "g.lr": 1e-4})  # slow: alive when given up
    config = TuneConfig(
        space=space_file(tmp_path, {"g.lr": [1e-4, 1e-3]}), trials=2, sampler="random", confirm=0
    )
    tuner = Tuner(tmp_path / "out", base, config)
    pause = time.sleep

    def give_up(seconds):
        for frozen in tuner._trials("RUNNING"):
            if frozen.number == 0:
                tuner._mark_lost(frozen)
        pause(seconds)

    monkeypatch.setattr("hessreg.tuning.tuner.time.sleep", give_up)
    rates = itertools.chain([1e-4], itertools.repeat(1e-3))
    monkeypatch.setattr(tuner.space, "suggest", lambda trial: {"g.lr": next(rates)})
    tuner.run()
    assert states(tuner.study.trials) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert not (tmp_path / "out/trials/0000/result.json").exists()


def test_trial_of_a_dead_search_is_replaced_when_all_others_are_done(tmp_path, stand_in):
    config = TuneConfig(space=space_file(tmp_path, {"g.lr": RATE}), trials=1, confirm=0)
    tuner = Tuner(tmp_path / "out", BASE, config)
    tuner.study.ask().set_user_attr("alive", time.time() - 1e4)
    tuner.run()
    assert states(tuner.study.trials) == ["FAIL", "COMPLETE"]


def test_two_searches_may_notice_the_same_dead_one(tmp_path, stand_in):
    config = TuneConfig(space=space_file(tmp_path, {"g.lr": RATE}), trials=1, confirm=0)
    tuner = Tuner(tmp_path / "out", BASE, config)
    tuner.study.ask()
    (seen,) = tuner._trials("RUNNING")
    tuner._mark_lost(seen)
    tuner._mark_lost(seen)
    tuner.run()
    assert states(tuner.study.trials) == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize("rate", [1e-3, 1e-5, 9.5e-3])  # good, bad, not finite
def test_trial_that_is_given_up_as_it_ends_is_let_go(tmp_path, stand_in, monkeypatch, rate):
    base = with_values(BASE, {"g.lr": rate, "ring.radius": 0.01})
    config = TuneConfig(space=space_file(tmp_path, {"g.lr": [rate, 1.1e-3]}), trials=2, confirm=0)
    tuner = Tuner(tmp_path / "out", base, config)
    poll = TrialRun.poll

    def give_up(run):
        state = poll(run)
        for frozen in tuner._trials("RUNNING") if state != "running" else []:
            if frozen.number == 0:
                tuner._mark_lost(frozen)
        return state

    monkeypatch.setattr(TrialRun, "poll", give_up)
    tuner.run()
    first, *others = tuner.study.trials
    assert (first.state.name, first.user_attrs["lost"]) == ("FAIL", True)
    assert len(others) == 2


def test_trial_that_was_never_written_down_is_replaced(tmp_path, stand_in):
    config = TuneConfig(space=space_file(tmp_path, {"g.lr": RATE}), trials=2, confirm=0)
    tuner = Tuner(tmp_path / "out", BASE, config)
    killed = tuner.study.ask()
    killed.set_user_attr("owner", tuner._owner)
    tuner.run()
    assert states(tuner.study.trials)[0] == "FAIL"
    assert len(tuner.study.trials) == 3


def test_interrupted_search_goes_on(tmp_path, stand_in, monkeypatch):
    base = with_values(BASE, {"ring.radius": 2.0, "g.lr": 1e-4})  # slow: alive when interrupted
    monkeypatch.setattr("hessreg.tuning.tuner.time.sleep", interrupt)
    with pytest.raises(Interrupted, match="continue with the same command and --out"):
        search(tmp_path, {"g.lr": RATE}, base, trials=3)
    monkeypatch.undo()
    monkeypatch.setattr(TrialRun, "_command", stand_in)
    _, trials = search(tmp_path, {"g.lr": RATE}, base, trials=3)
    assert set(states(trials)) <= {"COMPLETE", "PRUNED"}
    assert len(trials) == 3


def test_a_trial_that_is_taken_up_again_reports_no_step_twice(tmp_path, stand_in, monkeypatch):
    config = TuneConfig(space=space_file(tmp_path, {"g.lr": RATE}), trials=1, confirm=0)
    tuner = Tuner(tmp_path / "out", BASE, config)
    trial = tuner.study.ask()
    run = tuner._run_of(trial.number)
    trial.set_user_attr("owner", tuner._owner)
    run.prepare(with_values(BASE, tuner.space.suggest(trial)))
    trial.report(0.5, 100)
    reported = []
    monkeypatch.setattr(
        "optuna.trial.Trial.report", lambda self, value, step: reported.append(step)
    )
    tuner.run()
    assert reported == [200, 300]


def interrupt(_seconds):
    raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_is_killed_every_time_fails_its_trial(tmp_path, stand_in, monkeypatch):
    code = "import os; print('started', flush=True); os.kill(os.getpid(), 9)"

    def command(self):
        is_doomed = self.path.name == "0001"
        return [sys.executable, "-c", code] if is_doomed else stand_in(self)

    monkeypatch.setattr(TrialRun, "_command", command)
    _, trials = search(tmp_path, {"g.lr": RATE}, trials=3, workers=2)
    assert trials[1].state.name == "FAIL"
    assert trials[1].user_attrs["reason"] == "killed repeatedly"
    assert (tmp_path / "out/trials/0001.log").read_text() == "started\n" * 3
    assert len(trials) == 3  # the search went on, and it counts


LUCK = """
row["mmd"] += {5: -0.9, 6: 0.0}.get(config["seed"], 0.01 * (config["seed"] % 7))
(folder / "result.json").write_text(json.dumps(row | {"modes": 8, "tv": 0.1, "cpu_seconds": 0.1}))
"""


@pytest.mark.parametrize("leaders", [1, 2, 9])
def test_the_best_of_several_leaders_is_not_the_luckiest(tmp_path, monkeypatch, leaders):
    def command(self):
        return [sys.executable, "-c", STAND_IN + LUCK, str(self.path)]

    monkeypatch.setattr(TrialRun, "_command", command)
    base = with_values(BASE, {"seed": 5})
    rates = {5: 2e-4, 6: 1e-3}  # by seed: the worse one is lucky
    monkeypatch.setattr("random.Random.shuffle", lambda self, points: points.sort(key=str))
    outcome, trials = search(tmp_path, {"g.lr": list(rates.values())}, base, sampler="grid")
    found = {trial.user_attrs["folder"][-1]: trial.values[0] for trial in trials}
    assert found["0"] < found["1"]  # by luck
    said = outcome.choose(leaders, workers=2)
    chosen = yaml.safe_load(outcome.write()[0].read_text())
    assert chosen["g"]["lr"] == (2e-4 if leaders == 1 else 1e-3)
    assert chosen["seed"] == 5
    assert len(said.splitlines()) == min(leaders, 2)
    files = sorted(file.name for file in (tmp_path / "out/leaders").glob("*.yaml"))
    numbers = ["0", "1"][: min(leaders, 2)]
    assert files == [f"trial-{n}-{seed}.yaml" for n in numbers for seed in (500_005, 500_006)]


def test_a_leader_that_fails_with_another_seed_is_not_the_best(tmp_path, stand_in, monkeypatch):
    code = "import sys; sys.exit('hessreg: step 3: generator loss is not finite')"

    def command(self):
        return (
            [sys.executable, "-c", code] if "trial-1-500001" in self.path.name else stand_in(self)
        )

    monkeypatch.setattr(TrialRun, "_command", command)
    monkeypatch.setattr("random.Random.shuffle", lambda self, points: points.sort(key=str))
    outcome, _ = search(tmp_path, {"g.lr": [2e-4, 1e-3]}, sampler="grid")
    said = outcome.choose(2, workers=1)
    assert "trial 1: mmd 0, inf with 2 other seeds" in said
    assert yaml.safe_load(outcome.write()[0].read_text())["g"]["lr"] == 2e-4


def test_best_and_default_are_compared_on_fresh_seeds(tmp_path, stand_in, monkeypatch):
    base = with_values(BASE, {"g.lr": 2e-4, "seed": 5})
    outcome, _ = search(tmp_path, {"g.lr": [2e-4, 1e-3]}, base, sampler="grid")
    started = []
    monkeypatch.setattr(
        TrialRun, "_command", lambda self: (started.append(self.path.name), stand_in(self))[1]
    )
    table = outcome.confirm(3, workers=2)
    best = f"trial-{outcome.best[0].number}"
    assert [name.rpartition("-")[0] for name in started] == ["default", best] * 3
    for name, rate in (("default", 2e-4), (best, 1e-3)):
        files = sorted((tmp_path / "out/confirm").glob(f"{name}-*.yaml"))
        assert len(files) == 3
        configs = [TrainConfig.from_dict(yaml.safe_load(file.read_text())) for file in files]
        seeds = range(1_000_005, 1_000_008)
        assert configs == [with_values(base, {"g.lr": rate, "seed": seed}) for seed in seeds]
    *table, gain = table.splitlines()
    assert gain.endswith("mean and 95 % interval: 0.7 ± 0: the best is better")
    heads, default, best = (re.split("  +", line.strip()) for line in table)
    assert heads == ["modes", "quality", "TV", "MMD", "steps", "CPU s"]
    shown = [f"{abs(math.log10(rate) + 3):.4f} ± 0.0000" for rate in (2e-4, 1e-3)]
    assert [(line[0], line[4]) for line in (default, best)] == list(
        zip(("default", "best"), shown, strict=True)
    )


@pytest.mark.parametrize(
    ("best", "wanted"),
    [
        ([0.1, 0.11, 0.12], "0.091 ± 0.021: the best is better"),
        ([0.1, 0.15, 0.4], "-0.015 ± 0.4: which may be chance"),
        ([0.31, 0.32, 0.33], "-0.12 ± 0.021: the default is better"),
        ([0.2, 0.201, 0.203], "0 ± 0: which may be chance"),
    ],
)
def test_what_may_be_chance_is_said_to_be(tmp_path, stand_in, best, wanted):
    outcome, _ = search(tmp_path, {"g.lr": [2e-4, 1e-3]}, sampler="grid")
    rows = {"default": [0.2, 0.201, 0.203], "best": best}
    rows = {name: [{"mmd": x} for x in each] for name, each in rows.items()}
    assert outcome._gain(rows) == f"gain in mmd with each seed, mean and 95 % interval: {wanted}"
    unknown = "gain in mmd: not known of one seed, or of values that are not finite"
    assert outcome._gain({name: each[:1] for name, each in rows.items()}) == unknown
    for bad in ({"mmd": math.inf}, {}):
        assert outcome._gain({**rows, "best": [*rows["best"][:2], bad]}) == unknown


def test_a_gain_is_a_rise_where_larger_is_better(tmp_path, stand_in):
    outcome, _ = search(tmp_path, {"g.lr": [2e-4, 1e-3]}, sampler="grid", objectives="quality")
    rows = {"default": [{"quality": 0.5}, {"quality": 0.6}]}
    rows["best"] = [{"quality": 0.9}, {"quality": 1.0}]
    assert outcome._gain(rows).endswith("0.4 ± 0: the best is better")


def sleeper(tmp_path, monkeypatch):
    """A trial whose process notes that it was started and goes on for long."""
    code = f"import time; print('started', file=open({str(tmp_path / 'notes')!r}, 'a'))"
    command = [sys.executable, "-c", f"{code}; time.sleep(600)"]
    monkeypatch.setattr(TrialRun, "_command", lambda self: command)
    trial = TrialRun(tmp_path / "0000")
    trial.prepare(BASE)
    assert trial.poll() == "running"
    notes = tmp_path / "notes"
    wait_for(lambda: notes.exists() and notes.read_text())
    return trial


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
def test_a_process_that_outlived_its_search_is_watched_and_stopped(tmp_path, monkeypatch):
    orphaned = sleeper(tmp_path, monkeypatch)
    adopted = TrialRun(orphaned.path)
    assert adopted.poll() == "running"
    adopted.stop()
    assert orphaned._process.wait(timeout=60) == -signal.SIGTERM
    assert (tmp_path / "notes").read_text() == "started\n"  # not a second time beside the first


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
def test_a_process_that_only_has_the_number_of_an_old_one_lives_on(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / "0000.lock").write_text(str(other.pid))
        TrialRun(tmp_path / "0000").stop()
        other.communicate(b"\n")
    assert other.returncode == 0


def test_folder_is_used_by_one_search(tmp_path, stand_in):
    config = TuneConfig(space=space_file(tmp_path, {"g.lr": RATE}), confirm=0)
    tuner = Tuner(tmp_path / "out", BASE, config)
    script = f"from hessreg.cli import main; main(['tune', 'ring', '--out={tmp_path / 'out'}'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "is in use by another process" in done.stderr
    tuner.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
def test_command_has_its_folder_to_itself_to_the_end(tmp_path, stand_in, monkeypatch):
    out, entered = tmp_path / "out", []

    def enter(*_):
        opened = f"open({str(out / '.lock')!r}, 'r+')"
        script = f"from fcntl import *; lockf({opened}, LOCK_EX | LOCK_NB)"
        done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        entered.append(done.returncode == 0)
        return ""

    monkeypatch.setattr("hessreg.tuning.outcome.Outcome.choose", enter)
    monkeypatch.setattr("hessreg.tuning.outcome.Outcome.confirm", enter)
    space = space_file(tmp_path, {"g.lr": RATE})
    main(["tune", "ring", f"--out={out}", f"--space={space}", "--trials=2", "--sampler=random"])
    enter()
    assert entered == [False, False, True]


def test_a_folder_that_another_search_made_is_left_alone(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def come_second(self):
        (out / "of another").touch()
        raise RunFolderError("in use")

    monkeypatch.setattr(RunFolder, "lock", come_second)
    with pytest.raises(RunFolderError):
        search(tmp_path, {"g.lr": RATE})
    assert (out / "of another").exists()


@pytest.mark.parametrize(
    ("given", "limits"),
    [("", (0, 20.0)), ("--steps=3", (3, 0.0)), ("--seconds=4", (0, 4.0))],
)
def test_a_trial_takes_20_seconds_without_a_limit(tmp_path, monkeypatch, given, limits):
    class Recorded:
        def __init__(self, path, base, config):
            raise TuningError(f"{base.steps} steps, {base.seconds} seconds")

    monkeypatch.setattr("hessreg.commands.tune.Tuner", Recorded)
    with pytest.raises(TuningError, match="{} steps, {} seconds".format(*limits)):
        main(["tune", "ring", *given.split()])


# --- real runs that die --------------------------------------------------------------------------

REAL = "--steps=60 --eval_every=20 --save_every=10 --width=16 --batch_size=16 --pruner=none"


def command(tmp_path, *more):
    space = f"--space={space_file(tmp_path, {'g.lr': RATE})}"
    out = f"--out={tmp_path / 'out'}"
    fixed = [*REAL.split(), space, out, "--trials=4", "--workers=2", "--confirm=1", *more]
    return [sys.executable, "-m", "hessreg", "tune", "ring", *fixed]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def trainers(tmp_path):
    """Processes that train in the folder of a search."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if any(str(tmp_path / "out/trials") in word for word in words):
                found.append(int(entry))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_killed_trials_and_killed_searches_lose_nothing(tmp_path):
    first = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL)
    wait_for(lambda: any((tmp_path / "out/trials").glob("*/checkpoints/step-*")))
    os.kill(trainers(tmp_path)[0], signal.SIGKILL)
    wait_for(lambda: any((tmp_path / "out/trials").glob("*/result.json")))
    first.kill()
    first.wait()
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = read_table(tmp_path / "out/trials.csv")
    assert [row["state"] for row in rows] == ["COMPLETE"] * 4
    assert len({row["g.lr"] for row in rows}) == 4
    results = [json.loads(f.read_text()) for f in (tmp_path / "out/trials").glob("*/result.json")]
    assert [result["steps"] for result in results] == [60] * 4
    assert (
        main(
            [
                "train",
                "ring",
                f"--config={tmp_path / 'out/best.yaml'}",
                "--plain",
                f"--out={tmp_path / 'again'}",
            ]
        )
        == 0
    )
    assert "default" in done.stdout
    assert "best" in done.stdout


# --- what guides advise, measured ----------------------------------------------------------------


def advice_table(tmp_path, capsys):
    fixed = ["--data=ring", "--rows=2", "--steps=10", "--seeds=2"]
    base = ["--base", "batch_size=16", "g.beta2=0.9"]
    tuning_advice.main([f"--out={tmp_path / 'advice'}", *fixed, *base])
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


@pytest.mark.slow
def test_advice_is_a_table_that_goes_on(tmp_path, capsys, monkeypatch):
    rows = advice_table(tmp_path, capsys)
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0][3:5] == ["ring: mmd with", "without"]
    assert [row[1] for row in cells[2:]] == ["`--g.lr 0.0002 --d.lr 0.0002`", "`--ttur g2`"]
    results = {}
    for seed in range(4):
        file = tmp_path / f"advice/ring/default/{seed}/result.json"
        results[seed] = json.loads(file.read_text())
    assert [(row["seed"], row["steps"]) for row in results.values()] == [(n, 10) for n in range(4)]
    values = [row["mmd"] for row in results.values()]
    shown = f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.2g}"
    assert [row[4] for row in cells[2:]] == [shown] * 2
    assert {row[5] for row in cells[2:]} <= {"confirmed", "no effect", "wrong here"}
    found = yaml.safe_load((tmp_path / "advice/ring/ttur=g2/1/config.yaml").read_text())
    assert (found["batch_size"], found["g"]["beta2"], found["ttur"]) == (16, 0.9, "g2")
    monkeypatch.setattr(tuning_advice.Run, "create", None)  # all there: nothing is trained
    assert advice_table(tmp_path, capsys) == rows
    shutil.rmtree(tmp_path / "advice/ring/ttur=g2/1")
    with pytest.raises(TypeError):
        advice_table(tmp_path, capsys)


def test_advice_that_ends_in_numbers_not_finite_is_wrong(tmp_path):
    advice = tuning_advice.Advice("haste", tuning_advice.both("lr", 1e30))
    bases = {"ring": with_values(BASE, {"steps": 10, "tensorboard": False})}
    table = tuning_advice.Table(tmp_path, bases, [advice], 2)
    for _ in range(2):  # the second time, it is known
        table._train("ring", advice.followed, 0)
    found = tuning_advice._metric(table._folder("ring", advice.followed, 0), "mmd")
    assert tuning_advice.shown([0.1, found]) == "not finite"
    assert tuning_advice.verdict([0.1, found], [0.1, 0.2]) == "wrong here"
    assert tuning_advice.verdict([0.1, 0.2], [0.1, found]) == "confirmed"


@pytest.mark.parametrize(("shift", "wanted"), [(2.80, "confirmed"), (2.75, "no effect")])
def test_verdicts_are_those_of_students_test(shift, wanted):
    """Three values and three, variances 1: 2.776, of four degrees of freedom, times root 2/3."""
    first = [-1.0, 0.0, 1.0]
    second = [value + shift * math.sqrt(2 / 3) for value in first]
    assert tuning_advice.verdict(first, second) == wanted
    opposite = {"confirmed": "wrong here"}.get(wanted, wanted)
    assert tuning_advice.verdict(second, first) == opposite


@pytest.mark.parametrize("dataset", ["ring", "digits"])
def test_advice_is_options_that_can_be_typed(dataset):
    parser = train.make_parser(dataset)
    ways = [way for each in tuning_advice.ADVICE for way in (each.followed, each.ignored)]
    for values in ways:
        typed = parser.parse_args(tuning_advice.flags(values).split())
        assert train_config(vars(parser.instantiate(typed))) == with_values(
            DEFAULTS[dataset], values
        )
