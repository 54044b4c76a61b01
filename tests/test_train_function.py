"""``hessreg.train``: the command's run from Python, and an import that stays light."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

import hessreg
from hessreg.cli import main
from hessreg.gan import R1Config, RingConfig
from hessreg.gan.checkpoint import load_state
from hessreg.gan.run_folder import RunFolder

for package in ("jsonargparse", "matplotlib", "PIL", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

SMALL = {"width": 8, "latent_dim": 4, "batch_size": 8, "tensorboard": False}


def test_it_is_the_run_of_the_command(tmp_path, capsys):
    folder, other = tmp_path / "function", tmp_path / "command"
    options = SMALL | {"regularizer": "r1", "steps": 4, "seed": 3}
    run = hessreg.train("ring", out=folder, r1={"gamma": 0.25}, ring=RingConfig(modes=5), **options)
    assert "samples.png: 2000 points by r1 after 4 steps" in capsys.readouterr().out
    flags = [f"--{name}={str(value).lower()}" for name, value in options.items()]
    command = ["train", "ring", *flags, "--r1.gamma=0.25", "--ring.modes=5", f"--out={other}"]
    assert main(command) == 0
    assert RunFolder(folder).read_config() == RunFolder(other).read_config()
    first, second = (
        load_state(RunFolder(each).last_checkpoint())["trainer"]["ema"] for each in (folder, other)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run.result["steps"] == 4
    assert run.config.g.lr == hessreg.gan.DEFAULTS["ring"].g.lr
    assert torch.equal(run.sample(5), run.sample(5))
    assert run.sample(5, seed=2).shape == (5, 2)


def test_quiet_prints_nothing_and_a_folder_is_found(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = hessreg.train(
        "digits", regularizer="none", steps=2, quiet=True, log_every=1, r1=R1Config(2.0), **SMALL
    )
    assert capsys.readouterr() == ("", "")
    assert run.folder.path.parent.name == "runs"
    assert run.folder.path.name.startswith("digits-none-")
    assert (run.folder.path / "samples.png").exists()


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: form.partition("%")[0] + "now")
    for _ in range(3):
        hessreg.train("ring", regularizer="none", steps=1, quiet=True, **SMALL)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["ring-none-now", "ring-none-now-2", "ring-none-now-3"]


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="batch_size"):
        hessreg.train("digits", batch_size=10_000, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "mist"}, "dataset must be one of digits, ring"),
        ({"dataset": ["digits"]}, "dataset must be one of digits, ring"),
        ({"regulariser": "r1"}, "regulariser"),
        ({"r1": {"gama": 1.0}}, "gama"),
        ({"r1": 2.0}, "mapping of names to values, got 2.0"),
        ({"r1": R1Config}, "mapping of names to values"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"steps": "many"}, "steps must be an integer, got 'many'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        hessreg.train(**{"out": tmp_path / "run", **options})
    assert not (tmp_path / "run").exists()


def test_without_it_nothing_heavy_is_imported():
    code = (
        "import sys, hessreg; assert callable(hessreg.train);"
        "heavy = {'hessreg.gan', 'sklearn', 'matplotlib', 'safetensors', 'yaml', 'PIL'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
