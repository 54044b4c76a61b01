"""The command line: results, errors in one line, interruption, and resuming bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from hessreg.cli import main
from hessreg.gan.checkpoint import load_state
from hessreg.gan.progress import PlainProgress
from hessreg.gan.run_folder import RunFolder

for package in ("jsonargparse", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

SMALL = ["--width=8", "--latent_dim=4", "--batch_size=8", "--tensorboard=false"]
LONG = ["--steps=320", "--log_every=7", "--save_every=40", "--eval_every=150", "--hsn1r.every=4"]


def start(*args) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-m", "hessreg", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*args) -> None:
    process = start(*args)
    _, error = process.communicate()
    assert process.returncode == 0, error


def wait_for_step(folder, step, process) -> None:
    while process.poll() is None:
        rows = RunFolder(folder).read_metrics()
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"ended before step {step}: {process.communicate()}")


def outcome(folder):
    """All that must not depend on interruptions: state, metrics without times, picture."""
    files = RunFolder(folder)
    state = load_state(files.last_checkpoint())["trainer"]
    rows = [{k: v for k, v in row.items() if k != "cpu_seconds"} for row in files.read_metrics()]
    return state, rows, (folder / "samples.png").read_bytes()


def assert_same(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_run_resumes_bit_for_bit_whatever_stopped_it(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["train", "digits", "--method=hsn1r+r1", *SMALL, *LONG]
    run(*command, f"--out={whole}")

    process = start(*command, f"--out={broken}")
    for number, step in ((signal.SIGKILL, 70), (signal.SIGTERM, 150), (signal.SIGINT, 230)):
        wait_for_step(broken, step, process)
        process.send_signal(number)
        _, error = process.communicate()
        if number != signal.SIGKILL:
            assert process.returncode == 130
            assert_says_how_to_continue(broken, error)
        process = start("resume", broken)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert_same(outcome(broken), outcome(whole))


def assert_says_how_to_continue(folder, error) -> None:
    assert error.count("\n") == 1
    assert f"continue with: hessreg resume {folder}" in error
    step = int(error.split("stopped at step ")[1].split(";")[0])
    assert RunFolder(folder).last_checkpoint().name == f"step-{step:09d}.safetensors"


def test_compare_writes_pictures_and_tables(tmp_path, capfd):
    folder = tmp_path / "compare"
    args = ["--methods=none,hsn1r", "--steps=20", f"--out={folder}", "--jobs=2", *SMALL]
    assert main(["compare", "digits", *args]) == 0
    printed = capfd.readouterr().out
    for name in ("none", "hsn1r", "training images", "one image per class", "Lowest FDD"):
        assert name in printed
    rows = json.loads((folder / "comparison.json").read_text())
    assert [row["name"] for row in rows[:3]] == ["none", "hsn1r", "training images"]
    assert (folder / "comparison.csv").read_text().startswith("name,fdd,classes,precision")
    for picture in ("comparison.png", "curves.png", "none/samples.png", "hsn1r/curves.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_config_file_and_flags_give_the_printed_configuration(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("method: r1\nr1:\n  gamma: 0.5\nsteps: 7\n")
    args = ["train", "digits", f"--config={file}", "--r1.gamma=0.25", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "method: r1" in printed
    assert "gamma: 0.25" in printed
    assert "steps: 7" in printed


def test_doctor_names_versions_and_devices(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed
    assert "cpu" in printed


def refused(capsys, *args) -> str:
    """The one line on standard error of a command that must be refused."""
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hessreg: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "train,resume,compare,doctor"),
        ("paint", "invalid choice: 'paint'"),
        ("train", "dataset"),
        ("train mnist", "invalid choice: 'mnist'"),
        ("train digits --method wgan", "--method: Expected one of 'none', 'r1', 'hsn1r'"),
        ("train digits --hsn1r.norm max", "--hsn1r.norm: Expected one of 'nuclear'"),
        ("train digits --hsn1r.weight=-1", "weight must be at least 0, got -1.0"),
        ("train digits --hsn1r.every 0", "every must be at least 1, got 0"),
        ("train digits --r1.gamma x", "--r1.gamma: Expected float. Got value: x"),
        ("train digits --steps x", "--steps: Expected int. Got value: x"),
        ("train digits --steps=-5", "steps must be at least 0, got -5"),
        ("train digits --seconds inf", "seconds"),
        ("train digits --hsn1r.weight 1e400", "weight must be finite, got inf"),
        ("train digits --threads 1000000", "threads must be at most 1024"),
        ("train digits --seed 1" + "0" * 400, "seed must be in (-2**63, 2**63), got 1"),
        ("train digits --seconds 1" + "0" * 400, "too large"),
        ("train digits --seed 1" + "0" * 5000, "seed"),
        ("train digits --lr 1", "unrecognized arguments: --lr 1"),
        ("train digits --config missing.yaml", "--config: File does not exist"),
        ("train digits --batch_size 5000", "batch_size must be in [1, 1437]"),
        ("train digits --width 1000000", "width must be in [2, 8192]"),
        ("compare digits --methods none,foo", "unknown method 'foo'"),
        ("compare digits --methods r1,r1", "methods must be different names"),
        ("compare digits --jobs 0", "jobs must be at least 1, got 0"),
        ("resume missing", "missing is not a run folder"),
        ("train --resume missing", "missing is not a run folder"),
        ("resume missing --steps x", "--steps: Expected int. Got value: x"),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *args.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused(capsys, tmp_path):
    error = refused(capsys, "train", "digits", "--device=cuda", f"--out={tmp_path / 'run'}")
    assert "device cuda is not available" in error


def test_damaged_config_file_is_refused(capsys, tmp_path):
    file = tmp_path / "config.yaml"
    texts = ("method: [", "- 1", "depth: 3", "steps: many", "[" * 3000, "steps: " + "9" * 400)
    for text in texts:
        file.write_text(text)
        refused(capsys, "train", "digits", f"--config={file}", f"--out={tmp_path / 'run'}")
    file.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused(capsys, "train", "digits", f"--config={file}")


def test_folders_that_cannot_be_used_are_refused(capsys, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    small = ["train", "digits", "--steps=1", *SMALL]
    assert "cannot write to" in refused(capsys, *small, f"--out={tmp_path / 'file' / 'run'}")
    assert "cannot write to" in refused(capsys, *small, f"--out={tmp_path / 'file'}")
    full = refused(capsys, *small, f"--out={tmp_path / 'full'}")
    assert "is not empty: choose another folder" in full
    assert f"hessreg resume {tmp_path / 'full'}" in full


def test_missing_and_damaged_checkpoints_are_refused(capsys, tmp_path):
    folder = tmp_path / "run"
    small = [*SMALL, "--method=none", f"--out={folder}", "--steps=2"]
    assert main(["train", "digits", *small]) == 0
    capsys.readouterr()
    last = RunFolder(folder).last_checkpoint()
    last.write_bytes(last.read_bytes()[:-7])
    assert f"checkpoint {last} is damaged" in refused(capsys, "resume", folder)
    for file in last.parent.iterdir():
        file.unlink()
    assert "no checkpoint in" in refused(capsys, "resume", folder)


def test_missing_package_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    small = [*SMALL, "--method=none", f"--out={tmp_path / 'run'}", "--steps=2"]
    assert "pip install 'hessreg[gan]'" in refused(capsys, "train", "digits", *small)


def test_a_broken_pipe_does_not_stop_training(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        PlainProgress("none", interval=0.0).update({"step": 1, "cpu_seconds": 1.0}, 0.5)
        small = [*SMALL, "--method=none", f"--out={tmp_path / 'run'}", "--steps=2"]
        assert main(["train", "digits", *small]) == 0
        monkeypatch.undo()
    assert RunFolder(tmp_path / "run").read_result()["steps"] == 2


def test_divergence_stops_the_run_and_names_the_last_checkpoint(capsys, tmp_path):
    folder = tmp_path / "run"
    options = ["--method=r1", "--discriminator_lr=1e30", "--steps=50", f"--out={folder}"]
    assert main(["train", "digits", *SMALL, *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not finite" in error
    assert str(folder / "checkpoints" / "step-000000000.safetensors") in error
