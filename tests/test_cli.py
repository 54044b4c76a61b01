"""The command line: results, errors in one line, interruption, and resuming bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

from hessreg import mmd2
from hessreg.cli import main
from hessreg.gan import DEFAULTS
from hessreg.gan.checkpoint import load_state
from hessreg.gan.progress import PlainProgress
from hessreg.gan.run_folder import RunFolder
from hessreg.kernels import median_bandwidth

for package in ("jsonargparse", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

import yaml  # noqa: E402
from PIL import Image  # noqa: E402

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
@pytest.mark.parametrize(
    "task",
    [
        ["digits", "--regularizer=hsn1r+r1"],
        ["ring", "--regularizer=gaussian", "--gaussian.sigma=learned", "--save_every=20"],
        ["digits", "--regularizer=r1", "--orthogonal=previous", "--projection.strength=0.4"],
        ["digits", "--regularizer=none", "--correction=hsc", "--hsc.every=3", "--hsc.network=both"],
    ],
    ids=["digits", "ring", "orthogonal", "corrected"],
)
def test_a_run_resumes_bit_for_bit_whatever_stopped_it(tmp_path, task):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["train", *task[:1], *SMALL, *LONG, *task[1:]]
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
    assert (folder / "comparison.csv").read_text().startswith("name,seed,fdd,classes,precision")
    for picture in ("comparison.png", "curves.png", "none/samples.png", "hsn1r/curves.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_kernels_keep_all_modes_of_the_ring(tmp_path):
    args = ["--regularizer=gaussian", "--steps=3000", "--tensorboard=false"]
    assert main(["train", "ring", *args, f"--out={tmp_path / 'run'}"]) == 0
    result = RunFolder(tmp_path / "run").read_result()
    assert result["modes"] == 8
    assert result["tv"] < 0.05
    assert (tmp_path / "run" / "kernel.png").exists()


def test_compare_on_the_ring(tmp_path, capfd):
    folder = tmp_path / "compare"
    args = ["--methods=none,gaussian+r1", "--steps=20", f"--out={folder}", *SMALL]
    assert main(["compare", "ring", *args]) == 0
    printed = capfd.readouterr().out
    for name in ("none", "gaussian+r1", "training points", "all modes but one", "Lowest MMD"):
        assert name in printed
    assert (folder / "comparison.csv").read_text().startswith("name,seed,modes,quality,tv,mmd")
    assert (folder / "gaussian+r1" / "kernel.png").exists()


def test_compare_any_methods_over_seeds(tmp_path, capfd):
    folder = tmp_path / "compare"
    methods = "relativistic+r1+r2,hsc,orthogonal_previous"
    args = [f"--methods={methods}", "--seeds=3,4", "--steps=4", f"--out={folder}", *SMALL]
    assert main(["compare", "ring", *args, "--hsc.num_steps=2"]) == 0
    printed = capfd.readouterr().out
    assert "Lowest MMD, mean over 2 seeds" in printed
    rows = [row for row in json.loads((folder / "comparison.json").read_text()) if "seed" in row]
    kinds = [(r["loss"], r["regularizer"], r["orthogonal"], r["correction"]) for r in rows]
    assert kinds[::2] == kinds[1::2]
    assert kinds[::2] == [
        ("relativistic", "r1+r2", "none", "none"),
        ("nonsaturating", "none", "none", "hsc"),
        ("nonsaturating", "none", "previous", "none"),
    ]
    assert [row["seed"] for row in rows] == [3, 4] * 3
    mean = (rows[0]["mmd"] + rows[1]["mmd"]) / 2
    assert f"{mean:.4f} ± {abs(rows[0]['mmd'] - rows[1]['mmd']) / 2**0.5:.4f}" in printed
    assert (folder / "hsc-4" / "samples.png").exists()


@pytest.mark.parametrize(
    ("command", "modes"),
    [("ring --ring.modes=3 --ring.radius=50 --ring.std=1 --ring.rotation=10", 3), ("grid", 25)],
)
def test_train_on_any_mixture(tmp_path, capfd, command, modes):
    folder = tmp_path / "run"
    args = ["--regularizer=r1", "--steps=4", f"--out={folder}", *SMALL]
    assert main(["train", *command.split(), *args]) == 0
    assert f"of {modes} modes" in capfd.readouterr().out
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert main(["resume", str(folder), "--steps=6", "--plain"]) == 0
    assert RunFolder(folder).read_result()["steps"] == 6


def test_each_data_set_has_defaults_of_its_own(capsys):
    for dataset, config in DEFAULTS.items():
        with pytest.raises(SystemExit):
            main(["train", dataset, "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        del printed["out"], printed["plain"]
        assert {"dataset": dataset, **printed} == config.to_dict() | {"seconds": 0.0}


def test_the_configuration_of_a_run_can_be_used_again(tmp_path, capsys):
    args = [
        "--regularizer=gaussian",
        "--gaussian.sigma=0.5",
        "--steps=2",
        f"--out={tmp_path / 'a'}",
    ]
    assert main(["train", "ring", *SMALL, *args]) == 0
    config = f"--config={tmp_path / 'a' / 'config.yaml'}"
    assert main(["train", "ring", config, f"--out={tmp_path / 'b'}"]) == 0
    assert RunFolder(tmp_path / "a").read_config() == RunFolder(tmp_path / "b").read_config()
    capsys.readouterr()
    assert "dataset" in refused(capsys, "train", "digits", config)


def test_config_file_and_flags_give_the_printed_configuration(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("regularizer: r1\nr1:\n  gamma: 0.5\ngaussian:\n  sigma: 0.5\nsteps: 7\n")
    args = ["train", "digits", f"--config={file}", "--r1.gamma=0.25", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "regularizer: r1" in printed
    assert "gamma: 0.25" in printed
    assert "sigma: 0.5" in printed
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
        ("", "train,resume,compare,spectrum,dynamics"),
        ("paint", "invalid choice: 'paint'"),
        ("train", "dataset"),
        ("train mnist", "invalid choice: 'mnist'"),
        ("train digits --regularizer wgan", "gaussian, hessian_penalty joined by +, got 'wgan'"),
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
        ("compare digits --methods none,foo", "one loss and one projection, got 'foo'"),
        (
            "compare digits --methods r1,r1",
            "methods must be different, and at least one, got 'r1, r1'",
        ),
        (
            "compare digits --methods hinge+minimax",
            "at most one loss and one projection, got 'hinge+m",
        ),
        (
            "compare digits --seeds 1,x",
            "seeds must be integers of at least 0 with commas, got '1,x'",
        ),
        ("compare digits --methods previous", "at most one loss and one projection, got 'prev"),
        ("compare digits --methods hsc --seeds 1,1" + "0" * 30, "seed must be in (-2**63, 2**63)"),
        ("compare ring --methods mmd --batch_size 1", "batch_size must be at least 2 with mmd"),
        ("train digits --loss hinge --label_smoothing 0.1", "label_smoothing is for losses with"),
        ("compare digits --seeds 1,1", "seeds must be different, and at least one, got '1, 1'"),
        ("train ring --ring.modes 0", "modes must be in [1, 1000], got 0"),
        ("train ring --ring.radius -1", "radius must be positive, got -1"),
        ("train ring --ring.std 0", "std must be positive, got 0"),
        ("train ring --ring.rotation inf", "--ring.rotation: Expected float. Got value: inf"),
        ("train grid --grid.side 1", "side must be in [2, 30], got 1"),
        ("compare digits --jobs 0", "jobs must be at least 1, got 0"),
        ("train ring --architecture dcgan", "dcgan is for samples of shape (1, 8, 8), got (2,)"),
        ("train ring --gaussian.sigma 0", "sigma must be median, ema, learned or positive"),
        ("train ring --gaussian.interaction_weight 1e400", "interaction_weight must be finite"),
        ("train ring --batch_size 1", "batch_size must be at least 2 with gaussian, got 1"),
        ("train digits --correction newton", "--correction: Expected one of 'none', 'hsc'"),
        ("train digits --hsc.network x", "--hsc.network: Expected one of 'generator'"),
        ("train digits --hsc.eps 0", "eps must be positive, got 0.0"),
        ("train digits --hsc.trust_radius=-1", "trust_radius must be positive or null, got -1"),
        ("train digits --hsc.every 0", "every must be at least 1, got 0"),
        ("train digits --hsc.step 3", "hsc.step"),
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
    texts = ("regularizer: [", "- 1", "depth: 3", "steps: many", "[" * 3000, "steps: " + "9" * 400)
    for text in texts:
        file.write_text(text)
        error = refused(capsys, "train", "digits", f"--config={file}", f"--out={tmp_path / 'run'}")
        assert "depth" in error or text != "depth: 3"
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
    small = [*SMALL, "--regularizer=none", f"--out={folder}", "--steps=2"]
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
    small = [*SMALL, "--regularizer=none", f"--out={tmp_path / 'run'}", "--steps=2"]
    assert "pip install 'hessreg[gan]'" in refused(capsys, "train", "digits", *small)


def test_a_broken_pipe_does_not_stop_training(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        PlainProgress("none", interval=0.0).update({"step": 1, "cpu_seconds": 1.0}, 0.5)
        small = [*SMALL, "--regularizer=none", f"--out={tmp_path / 'run'}", "--steps=2"]
        assert main(["train", "digits", *small]) == 0
        monkeypatch.undo()
    assert RunFolder(tmp_path / "run").read_result()["steps"] == 2


def test_divergence_stops_the_run_and_names_the_last_checkpoint(capsys, tmp_path):
    folder = tmp_path / "run"
    options = ["--regularizer=r1", "--d.lr=1e30", "--steps=50", f"--out={folder}"]
    assert main(["train", "digits", *SMALL, *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not finite" in error
    assert str(folder / "checkpoints" / "step-000000000.safetensors") in error


@pytest.mark.parametrize("dataset", ["digits", "ring"])
def test_samples_that_are_not_finite_stop_the_run(capsys, tmp_path, dataset):
    folder = tmp_path / "run"
    options = ["--regularizer=none", "--g.lr=1e20", "--steps=1", f"--out={folder}"]
    assert main(["train", dataset, *SMALL, *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 1: generated samples are not finite; the last good checkpoint is" in error
    assert not (folder / "result.json").exists()


def test_limits_below_what_is_done_are_refused(capsys, tmp_path):
    folder = tmp_path / "run"
    small = [*SMALL, "--regularizer=none", f"--out={folder}", "--steps=3"]
    assert main(["train", "digits", *small]) == 0
    capsys.readouterr()
    before = (folder / "config.yaml").read_bytes()
    error = refused(capsys, "resume", folder, "--steps=2")
    assert "steps must be at least the 3 already done, got 2" in error
    assert "already done, got 1e-09" in refused(capsys, "resume", folder, "--seconds=1e-9")
    assert (folder / "config.yaml").read_bytes() == before


# Two samples


def samples(folder, name, array):
    path = folder / name
    if path.suffix == ".npz":
        np.savez(path, **array)
    else:
        np.save(path, array, allow_pickle=True)
    return path


def images(folder, shapes, suffix=".png"):
    folder.mkdir()
    for i, shape in enumerate(shapes):
        grey = np.full(shape, 51 * i, dtype=np.uint8)
        Image.fromarray(grey).save(folder / f"{i}{suffix}")
    return folder


def printed(capsys, *args) -> dict[str, str]:
    """What ``hessreg mmd`` says, by what it is."""
    assert main(["mmd", *map(str, args)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return dict(line.split(": ", 1) for line in captured.out.splitlines())


def test_mmd_of_arrays(tmp_path, capsys):
    x, y = np.random.default_rng(0).normal(size=(2, 40, 2, 3))
    files = samples(tmp_path, "x.npy", x.astype(np.float32)), samples(tmp_path, "y.npz", {"a": y})
    points = [torch.from_numpy(a.reshape(40, 6)) for a in (x.astype(np.float32), y)]
    points = [p.double() for p in points]
    result = printed(capsys, *files)
    sigma = median_bandwidth(*points)
    assert result["MMD^2"] == f"{mmd2(*points, sigma).item():.6g} (unbiased)"
    assert result["sigma"] == f"{sigma.item():.4g} (median)"
    assert result["n"] == "40, m: 40, d: 6"
    several = printed(capsys, *files, "--sigma=0.5,2", "--estimator=biased")
    assert several["MMD^2"] == f"{mmd2(*points, (0.5, 2.0), 'biased').item():.6g} (biased)"
    assert several["sigma"] == "0.5, 2"
    keyed = samples(tmp_path, "two.npz", {"a": x, "b": y + 5})
    far = printed(capsys, files[0], keyed, "--key=b", "--permutations=99")
    assert far["p-value"].startswith("0.01 (99 permutations")
    same = printed(capsys, files[0], keyed, "--key=a", "--permutations=99")
    assert same["p-value"].startswith("1 (")


def test_mmd_of_folders_of_images(tmp_path, capsys):
    shapes = [(4, 5)] * 3
    png, jpg = images(tmp_path / "png", shapes), images(tmp_path / "jpg", shapes, ".jpg")
    (png / "notes.txt").touch()
    result = printed(capsys, png, jpg, "--sigma=10")
    assert result["n"] == "3, m: 3, d: 20"
    # Grey levels of 51 i in [-1, 1] are 0.4 i - 1; both folders hold the same.
    levels = 0.4 * torch.arange(3, dtype=torch.float64)[:, None].expand(3, 20)
    assert float(result["MMD^2"].split()[0]) == pytest.approx(mmd2(levels, levels, 10.0).item())
    colour = images(tmp_path / "colour", [(4, 5, 3)] * 2)
    assert printed(capsys, colour, colour)["n"] == "2, m: 2, d: 60"


def test_samples_that_cannot_be_compared_are_refused(tmp_path, capsys):
    good = samples(tmp_path, "good.npy", np.zeros((3, 2)))

    def error(other, *options):
        return refused(capsys, "mmd", good, other, *options)

    holed = np.zeros((3, 2))
    holed[1, 0] = np.nan
    assert "holds nan at (1, 0)" in error(samples(tmp_path, "nan.npy", holed))
    wide = samples(tmp_path, "wide.npy", np.zeros((3, 5)))
    assert "equal dimensions: 2 in the first, 5 in the second" in error(wide)
    texts = samples(tmp_path, "text.npy", np.array(["a", "b"]))
    assert "must hold real numbers, got dtype <U1" in error(texts)
    pickled = samples(tmp_path, "pickle.npy", np.array([{}, {}], dtype=object))
    assert "not a readable array (Object arrays cannot be loaded" in error(pickled)
    assert "at least 2 samples" in error(samples(tmp_path, "one.npy", np.zeros((1, 2))))
    assert "at least 2 samples" in error(samples(tmp_path, "scalar.npy", np.zeros(())))
    assert f"there is no file {tmp_path / 'no.npy'}" in error(tmp_path / "no.npy")
    assert "must be a .npy or .npz file or a folder" in error(tmp_path / "no")
    two = samples(tmp_path, "two.npz", {"a": holed, "b": holed})
    assert "choose one with --key: a, b" in error(two)
    assert "has no array 'c', only a, b" in error(two, "--key=c")
    assert "holds no arrays" in error(samples(tmp_path, "empty.npz", {}))
    (tmp_path / "text.npy").write_text("1 2 3")
    assert "text.npy is no NumPy file" in error(tmp_path / "text.npy")
    far = samples(tmp_path, "far.npy", 1e200 * np.eye(3, 2))
    assert "not positive and finite" in error(far)
    for name in ("bad.npy", "bad.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no array")
        assert "is not a readable array" in error(tmp_path / name)


def test_folders_that_cannot_be_compared_are_refused(tmp_path, capsys):
    def error(folder, *options):
        return refused(capsys, "mmd", folder, folder, *options)

    assert "holds no images (.png, .jpg, .jpeg)" in error(images(tmp_path / "empty", []))
    mixed = images(tmp_path / "mixed", [(4, 5), (5, 5)])
    assert "has 5 x 4 pixels, grey" in error(mixed)
    coloured = images(tmp_path / "coloured", [(4, 5), (4, 5, 3)])
    assert "1.png has 5 x 4 pixels, colour" in error(coloured)
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(tmp_path / "deep" / "0.png")
    assert "0.png has I;16 pixels, 8 bits wanted" in error(tmp_path / "deep")
    (tmp_path / "empty" / "broken.png").write_bytes(b"\x89PNG nothing")
    assert "broken.png is not a readable image" in error(tmp_path / "empty")


def test_damaged_archives_are_refused(tmp_path, capsys):
    good, file = samples(tmp_path, "good.npy", np.zeros((3, 2))), tmp_path / "bad.npz"
    header = b"{'descr': '<f8', 'shape': (3, 2".ljust(118)
    broken = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    for name, content in (("notes.txt", b"no array"), ("a.npy", broken)):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, content)
        assert "bad.npz" in refused(capsys, "mmd", good, file)
    whole = bytearray(samples(tmp_path, "whole.npz", {"a": np.zeros((3, 2))}).read_bytes())
    entry = whole.index(b"PK\x01\x02")
    for place, value in ((entry + 8, 1), (entry + 10, 77), (entry + 10, 8)):
        damaged = whole.copy()
        damaged[place] = value  # encrypted, an unknown compression, no deflated data
        file.write_bytes(damaged)
        assert "bad.npz is not a readable array" in refused(capsys, "mmd", good, file)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--sigma=mean", "sigma must be median or positive numbers with commas, got 'mean'"),
        ("--sigma=ema", "sigma must be median or positive numbers with commas, got 'ema'"),
        ("--sigma=0", "sigma must be median or positive numbers with commas, got '0'"),
        ("--sigma=1e-160", "positive numbers with commas, got '1e-160'"),
        ("--sigma=1e-200", "positive numbers with commas, got '1e-200'"),
        ("--estimator=best", "invalid choice: 'best'"),
        ("--permutations=-1", "num_permutations must be at least 1, got -1"),
        ("--permutations=x", "--permutations: Expected int"),
    ],
)
def test_bad_options_of_mmd_are_refused(tmp_path, capsys, option, message):
    file = samples(tmp_path, "x.npy", np.eye(4))
    assert message in refused(capsys, "mmd", file, file, option)


def test_a_seed_out_of_range_is_refused(tmp_path, capsys):
    file = samples(tmp_path, "x.npy", np.eye(4))
    options = "--permutations=9", "--seed=-1"
    assert "seed must be in [0, 2**63), got -1" in refused(capsys, "mmd", file, file, *options)
