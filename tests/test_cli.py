"""The command line: results, errors in one line, interruption, and resuming bit for bit."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
import torch

from hessreg import cli, mmd2
from hessreg.cli import main
from hessreg.commands._options import noise_seed
from hessreg.gan import DEFAULTS
from hessreg.gan.progress import PlainProgress
from hessreg.gan.run_folder import RunFolder
from hessreg.kernels import median_bandwidth

for package in ("jsonargparse", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

import yaml  # noqa: E402
from PIL import Image  # noqa: E402

SMALL = ["--width=8", "--latent_dim=4", "--batch_size=8", "--tensorboard=false"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_lack_of_memory_is_one_line(capsys, error):
    assert cli._explain(error) == 1
    assert capsys.readouterr().err.startswith("hessreg: not enough memory: ")


@pytest.mark.parametrize(("given", "wanted"), [(None, 6), (3, 3)])
def test_noise_is_other_than_that_of_the_run(given, wanted):
    assert noise_seed(given, of_run=5) == wanted


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


def test_r1_is_the_penalty_of_every_data_set():
    assert {config.regularizer for config in DEFAULTS.values()} == {"r1"}


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


def refused(capsys, *args) -> str:
    """The one line on standard error of a command that must be refused."""
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hessreg: ")
    assert captured.err.count("\n") == 1
    return captured.err


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
