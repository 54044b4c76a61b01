"""Whatever is wrong with an option, a file or the moment: one line, an exit code, nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from hessreg.cli import main
from hessreg.commands import bench, mmd
from hessreg.dynamics.lab import Lab
from hessreg.gan import metrics, run
from hessreg.gan.checkpoint import load_state, save_state
from hessreg.gan.run_folder import RunFolder
from hessreg.style.run import StyleRun

for package in ("jsonargparse", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402

SMALL = "--width=8 --latent_dim=4 --batch_size=8 --tensorboard=false"
FACTORIES = """
import torch
from hessreg.curvature import DenseOperator
number = 3
def three(): return 3
def four(): return (1, 2, 3, 4)
def broken(): raise KeyError("x")
def leafless(): return torch.ones(2), torch.ones(2)
def tiny(): return DenseOperator(torch.ones(1, 1))
def good(): return DenseOperator(torch.eye(9))
"""
YAML = {
    "bracket": "regularizer: [",
    "list": "- 1",
    "unknown": "depth: 3",
    "typo": "g:\n  lrr: 3",
    "words": "steps: many",
    "deep": "[" * 3000,
    "huge": "steps: " + "9" * 400,
    "null": "r1: null",
    "kind": "hsn1r: 3",
}


def make_world(folder: Path) -> None:
    """Good and bad files of every kind; every bad one has its own fault and no other."""
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (folder / "wrong_targets.py").write_text(FACTORIES)
    (folder / "unparsed.py").write_text("1 +")
    (folder / "file").touch()
    (folder / "full").mkdir()
    (folder / "folder.json").mkdir()
    (folder / "full" / "something").touch()
    make_arrays(folder)
    make_pictures(folder)
    make_runs(folder)


def make_arrays(folder: Path) -> None:
    holed = np.zeros((3, 2))
    holed[1, 0] = np.nan
    arrays = {
        "good": np.eye(4, 2),
        "nan": holed,
        "wide": np.zeros((3, 5)),
        "words": np.array(["a", "b"]),
        "objects": np.array([{}, {}], dtype=object),
        "one": np.zeros((1, 2)),
        "scalar": np.zeros(()),
        "far": 1e200 * np.eye(3, 2),
        "complex": np.eye(3, 2) * 1j,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    np.savez(folder / "two.npz", a=arrays["good"], b=arrays["good"])
    np.savez(folder / "empty.npz")
    (folder / "text.npy").write_text("1 2 3")
    whole = (folder / "good.npy").read_bytes()
    (folder / "cut.npy").write_bytes(whole[:-9])
    for name in ("bad.npy", "bad.npz"):
        (folder / name).write_bytes(b"PK\x03\x04 no array")
    header = b"{'descr': '<f8', 'shape': (3, 2".ljust(118)
    broken = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    for name, content in (("notes.txt", b"no array"), ("a.npy", broken)):
        with zipfile.ZipFile(folder / f"holds_{name[0]}.npz", "w") as archive:
            archive.writestr(name, content)
    np.savez(folder / "whole.npz", a=np.zeros((3, 2)))
    entry = (folder / "whole.npz").read_bytes().index(b"PK\x01\x02")
    places = {"encrypted": (8, 1), "unknown_method": (10, 77), "not_deflated": (10, 8)}
    for name, (place, value) in places.items():
        damaged = bytearray((folder / "whole.npz").read_bytes())
        damaged[entry + place] = value
        (folder / f"{name}.npz").write_bytes(damaged)


def make_pictures(folder: Path) -> None:
    folders = {"no_images": [], "sizes": [(4, 5), (5, 5)], "colours": [(4, 5), (4, 5, 3)]}
    for name, shapes in folders.items():
        (folder / name).mkdir()
        for i, shape in enumerate(shapes):
            Image.fromarray(np.full(shape, i, np.uint8)).save(folder / name / f"{i}.png")
    for name in ("sixteen", "torn"):
        (folder / name).mkdir()
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(folder / "sixteen" / "0.png")
    (folder / "torn" / "0.png").write_bytes(b"\x89PNG nothing")


def make_runs(folder: Path) -> None:
    """A run, and copies of it with something missing or damaged."""
    made = folder / "run"
    train = ["train", "ring", "--regularizer=none", *SMALL.split(), "--steps=2"]
    assert main([*train, f"--out={made}"]) == 0
    copies = (
        "no_config",
        "wide",
        "damaged",
        "empty_run",
        "rows",
        "nonsense",
        "moments",
        "torn_run",
    )
    for name in copies:
        shutil.copytree(made, folder / name)
    (folder / "no_config" / "config.yaml").unlink()
    text = (made / "config.yaml").read_text()
    (folder / "wide" / "config.yaml").write_text(text.replace("width: 8\n", "width: 16\n"))
    (folder / "nonsense" / "config.yaml").write_text(text + "depth: 3\n")
    (folder / "torn_run" / "config.yaml").write_text("[" * 20)
    damaged = RunFolder(folder / "damaged").last_checkpoint()
    damaged.write_bytes(damaged.read_bytes()[:-7])
    shutil.rmtree(folder / "empty_run" / "checkpoints")
    (folder / "rows" / "metrics.jsonl").write_text('{"step": 1, "cpu_seconds": 0}\ngarbage\n')
    last = RunFolder(folder / "moments").last_checkpoint()
    state = load_state(last)
    state["trainer"]["sampler"]["queue"] = torch.full((50,), 99_999_999)
    save_state(last, state)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


LONG = "9" * 400
TRAIN = {
    "": "train,resume,compare,tune,eval",
    "paint": "invalid choice: 'paint'",
    "--steps 3": "argument command: invalid choice: '3'",
    "train": "dataset",
    "train mnisty": "invalid choice: 'mnisty'",
    "train ring extra": "unrecognized arguments: extra",
    "train digits --regularizer wgan": "joined by +, got 'wgan'",
    "train digits --regularizer r1+r1": "joined by +, got 'r1+r1'",
    "train digits --hsn1r.norm max": "--hsn1r.norm: Expected one of 'nuclear'",
    "train digits --hsn1r.weight=-1": "weight must be at least 0, got -1.0",
    "train digits --hsn1r.every 0": "every must be at least 1, got 0",
    "train digits --hsn1r.weight 1e400": "weight must be finite, got inf",
    "train digits --r1.gamma x": "--r1.gamma: Expected float. Got value: x",
    "train digits --wgan_gp.weight nan": "weight",
    "train digits --dragan.spread=-1": "spread must be at least 0, got -1.0",
    "train digits --steps x": "--steps: Expected int. Got value: x",
    "train digits --steps 2.5": "--steps: Expected int. Got value: 2.5",
    "train digits --steps=-5": "steps must be at least 0, got -5",
    "train digits --seconds inf": "--seconds: Expected float. Got value: inf",
    f"train digits --seconds {LONG}": "too large",
    "train digits --threads 1000000": "threads must be at most 1024",
    f"train digits --seed {LONG}": "seed must be in (-2**63, 2**63), got 9",
    "train digits --seed 1" + "0" * 5000: "seed",
    "train digits --seed=-1": "seed must be at least 0, got -1",
    "train digits --batch_size 5000": "hessreg: batch_size must be in [1, 1437]",
    "train digits --g.batch_size 5000": "hessreg: g.batch_size must be in [1, 1437]",
    "train digits --d.batch_size 5000": "hessreg: d.batch_size must be in [1, 1437]",
    "train digits --width 1000000": "width must be in [2, 8192]",
    "train digits --width": "argument --width: expected one argument",
    "train digits --latent_dim 0": "latent_dim must be at least 1, got 0",
    "train digits --log_every 0": "log_every must be at least 1, got 0",
    "train digits --save_every=-3": "save_every must be at least 1, got -3",
    "train digits --tensorboard maybe": "--tensorboard: Expected bool. Got value: maybe",
    "train digits --ema_decay 1": "ema_decay must be in [0, 1), got 1.0",
    "train digits --activation relu6": "--activation: Expected one of 'silu'",
    "train digits --device tpu": "--device: Expected one of 'auto', 'cpu', 'cuda'",
    "train digits --loss hinge --label_smoothing 0.1": "label_smoothing is for losses with",
    "train digits --orthogonal terms --regularizer none": "projection.pair must be real_fake",
    "train digits --orthogonal terms --projection.strength 0.5": "strength must be null",
    "train digits --correction newton": "--correction: Expected one of 'none', 'hsc'",
    "train digits --hsc.network x": "--hsc.network: Expected one of 'generator'",
    "train digits --hsc.eps 0": "eps must be positive, got 0.0",
    "train digits --hsc.trust_radius=-1": "trust_radius must be positive or null, got -1",
    "train digits --hsc.every 0": "every must be at least 1, got 0",
    "train digits --hessian_penalty.num_probes 1": "num_probes must be at least 2, got 1",
    "train digits --g.lr x": "--g.lr: Expected float. Got value: x",
    "train digits --d.lr=-1": "lr must be at least 0, got -1.0",
    "train ring --ring.modes 0": "modes must be in [1, 1000], got 0",
    "train ring --ring.radius -1": "radius must be positive, got -1",
    "train ring --ring.std 0": "std must be positive, got 0",
    "train ring --ring.rotation inf": "--ring.rotation: Expected float. Got value: inf",
    "train grid --grid.side 1": "side must be in [2, 30], got 1",
    "train ring --architecture dcgan": "dcgan is for images whose sides halve",
    "train ring --gaussian.sigma 0": "sigma must be median, ema, learned or positive",
    "train ring --gaussian.interaction_weight 1e400": "interaction_weight must be finite",
    "train ring --regularizer gaussian --batch_size 1": "at least 2 with gaussian, got 1",
    "train ring --loss mmd --d.batch_size 1": "hessreg: d.batch_size must be at least 2 with mmd",
    f"train ring {SMALL} --steps 1 --out file/run": "cannot write to file/run",
    f"train ring {SMALL} --steps 1 --out file": "cannot write to file",
    f"train ring {SMALL} --steps 1 --out full": "full is not empty: choose another folder",
    f"train ring {SMALL} --steps 1 --out run": "continue its run with: hessreg resume run",
}
NAMES = {
    "train digits --lr 1": "unrecognized arguments: --lr 1 (did you mean --",
    "train digits --g.lrr 1": "unrecognized arguments: --g.lrr 1 (did you mean --g.lr?)",
    "train digits --hsc.step 3": "unrecognized arguments: --hsc.step 3 (did you mean --hsc.",
    "train digits --hsn1r.wieght=1": "--hsn1r.wieght=1 (did you mean --hsn1r.weight?)",
    "train ring --rign.modes 3": "--rign.modes 3 (did you mean --ring.modes?)",
    "train ring --prnt-config": "(did you mean --print_config?)",
    "train digits --config missing.yaml": "--config: File does not exist",
    "train digits --config unknown.yaml": "'depth' is not accepted",
    "train digits --config typo.yaml": "does not accept option 'lrr' (did you mean g.lr?)",
    "train digits --config bracket.yaml": "--config bracket.yaml: Problems parsing config",
    "train digits --config list.yaml": "--config list.yaml: Unexpected config: - 1",
    "train digits --config deep.yaml": "--config deep.yaml: ",
    "train digits --config huge.yaml": "steps",
    "train digits --config words.yaml": "steps",
    "train digits --config null.yaml": "a group of options must be a mapping, not NoneType",
    "train digits --config kind.yaml": "--config kind.yaml: a group of options must be a mapping",
    "train digits --config bytes.yaml": "--config: not a text file",
    "train digits --config run/config.yaml": "dataset",
    "compare ring --metods none": "--metods none (did you mean --methods?)",
    "compare ring --config typo.yaml": "does not accept option 'lrr' (did you mean g.lr?)",
    "dynamics --gaems bilinear": "--gaems bilinear (did you mean --games?)",
    "dynamics --config unknown.yaml": "does not accept option 'depth'",
    "style run run -o x.png --szie 3": "--szie 3 (did you mean --size?)",
    "spectrum run --probs 3": "--probs 3 (did you mean --probes?)",
    "mmd good.npy good.npy --sgma 1": "--sgma 1 (did you mean --sigma?)",
    "resume run --stps 3": "--stps 3 (did you mean --steps?)",
    "doctor now": "unrecognized arguments: now",
}
COMPARE = {
    "compare digits --methods none,foo": "one loss and one projection, got 'foo'",
    "compare ring --methods r1@r1.gama=1": "an option such as r1.gamma, got 'r1.gama'",
    "compare ring --methods r1@r1.gamma": "of a method must be option=value, got 'r1.gamma'",
    "compare ring --methods r1@seed=1": "given once, of none of dataset, data, ring, grid",
    "compare ring --methods r1@ring.modes=4": "given once, of none of dataset, data, ring, grid",
    "compare ring --methods r1@r1.gamma=x": "r1.gamma must be",
    "compare digits --methods r1,r1": "methods must be different, and at least one, got 'r1, r1'",
    "compare digits --methods hinge+minimax": "at most one loss and one projection, got 'hinge+m",
    "compare digits --methods previous": "at most one loss and one projection, got 'prev",
    "compare digits --seeds 1,x": "seeds must be integers of at least 0 with commas, got '1,x'",
    "compare digits --seeds 1,1": "seeds must be different, and at least one, got '1, 1'",
    "compare digits --methods hsc --seeds 1,1" + "0" * 30: "seed must be in (-2**63, 2**63)",
    "compare ring --methods mmd --batch_size 1": "batch_size must be at least 2 with mmd",
    "compare digits --jobs 0": "jobs must be at least 1, got 0",
    "compare ring --methods none --out full/something": "cannot write to full/something/none",
}
RESUME = {
    "resume": "out",
    "resume missing": "missing is not a run folder",
    "train --resume missing": "missing is not a run folder",
    "resume file": "file is not a run folder",
    "resume run --steps x": "--steps: Expected int. Got value: x",
    "resume run --steps 1": "steps must be at least the 2 already done, got 1",
    "resume run --steps=-1": "steps must be at least 0, got -1",
    "resume run --seconds 1e-9": "already done, got 1e-09",
    "resume no_config": "no_config is not a run folder: no readable config.yaml",
    "resume nonsense": "config.yaml is damaged: names must be among",
    "resume torn_run": "config.yaml is damaged",
    "resume wide": "does not fit the configuration",
    "resume moments": "does not fit the configuration: the sampler's queue has indices outside",
    "resume damaged": "step-000000002.safetensors is damaged",
    "resume empty_run": "no checkpoint in empty_run/checkpoints",
    "resume rows": "metrics.jsonl is damaged: line 2 is not a metrics row",
}
FEW = "--steps 4 --probes 1 --k 1"
SPECTRUM = {
    "spectrum nowhere": "there is no nowhere: name a run folder",
    "spectrum full": "full is not a run folder",
    "spectrum damaged": "is damaged",
    "spectrum wide": "does not fit the configuration",
    "spectrum run --rows 0": "rows must be in [1, 40000] for ring, got 0",
    "spectrum run --probes 0": "probes must be at least 1, got 0",
    "spectrum run --k 0": "k must be at least 1, got 0",
    "spectrum run --tol=-1": "tol",
    "spectrum run --seed=-1": "seed must be in [0, 2**63), got -1",
    "spectrum run --which top": "invalid choice: 'top'",
    "spectrum run --network judge": "invalid choice: 'judge'",
    f"spectrum no_such_module:factory {FEW}": "cannot import no_such_module: ModuleNotFoundError",
    f"spectrum unparsed:factory {FEW}": "cannot import unparsed: SyntaxError",
    f"spectrum wrong_targets:nothing {FEW}": "wrong_targets has no nothing",
    f"spectrum wrong_targets:number {FEW}": "wrong_targets:number must be callable, got int",
    f"spectrum wrong_targets:three {FEW}": "must return a LinearOperator",
    f"spectrum wrong_targets:four {FEW}": "got a tuple of 4",
    f"spectrum wrong_targets:broken {FEW}": "wrong_targets:broken: KeyError: 'x'",
    f"spectrum wrong_targets:leafless {FEW}": "params[0], shape (2,), must require",
    "spectrum wrong_targets:tiny --k 2 --probes 1": "k must be at most 1",
    f"spectrum wrong_targets:good {FEW} --rows 8": "are for runs",
    f"spectrum wrong_targets:good {FEW} --out file": "file",
}
MMD = {
    "mmd good.npy": "fake",
    "mmd good.npy nan.npy": "nan.npy holds nan at (1, 0)",
    "mmd good.npy wide.npy": "equal dimensions: 2 in the first, 5 in the second",
    "mmd good.npy words.npy": "must hold real numbers, got dtype <U1",
    "mmd good.npy complex.npy": "must hold real numbers, got dtype complex128",
    "mmd good.npy objects.npy": "not a readable array (Object arrays cannot be loaded",
    "mmd good.npy one.npy": "at least 2 samples",
    "mmd good.npy scalar.npy": "at least 2 samples",
    "mmd good.npy no.npy": "there is no file no.npy",
    "mmd good.npy nowhere": "must be a .npy or .npz file or a folder",
    "mmd good.npy file": "file must be a .npy or .npz file or a folder",
    "mmd good.npy two.npz": "choose one with --key: a, b",
    "mmd good.npy two.npz --key c": "has no array 'c', only a, b",
    "mmd good.npy empty.npz": "holds no arrays",
    "mmd good.npy text.npy": "text.npy is no NumPy file",
    "mmd good.npy cut.npy": "cut.npy is not a readable array",
    "mmd good.npy bad.npy": "bad.npy is not a readable array",
    "mmd good.npy bad.npz": "bad.npz is not a readable array",
    "mmd good.npy holds_n.npz": "holds_n.npz",
    "mmd good.npy holds_a.npz": "holds_a.npz",
    "mmd good.npy encrypted.npz": "encrypted.npz is not a readable array",
    "mmd good.npy unknown_method.npz": "unknown_method.npz is not a readable array",
    "mmd good.npy not_deflated.npz": "not_deflated.npz is not a readable array",
    "mmd far.npy far.npy": "not positive and finite",
    "mmd no_images no_images": "holds no images (.png, .jpg, .jpeg)",
    "mmd sizes sizes": "has 5 x 4 pixels, grey",
    "mmd colours colours": "1.png has 5 x 4 pixels, colour",
    "mmd sixteen sixteen": "0.png has I;16 pixels, 8 bits wanted",
    "mmd torn torn": "0.png is not a readable image",
    "mmd good.npy good.npy --sigma mean": "sigma must be median or positive numbers with commas",
    "mmd good.npy good.npy --sigma ema": "sigma must be median or positive numbers with commas",
    "mmd good.npy good.npy --sigma 0": "positive numbers with commas, got '0'",
    "mmd good.npy good.npy --sigma 1e-160": "positive numbers with commas, got '1e-160'",
    "mmd good.npy good.npy --sigma 1e-200": "positive numbers with commas, got '1e-200'",
    "mmd good.npy good.npy --estimator best": "invalid choice: 'best'",
    "mmd good.npy good.npy --permutations=-1": "num_permutations must be at least 1, got -1",
    "mmd good.npy good.npy --permutations x": "--permutations: Expected int",
    "mmd good.npy good.npy --permutations 9 --seed=-1": "seed must be in [0, 2**63), got -1",
}
OTHERS = {
    "style sample:china": "the following arguments are required: style.out",
    "style sample:china -o x.png": "styles: name one picture",
    "style sample:china sample:flower": "out",
    "style sample:moon sample:flower -o x.png": "no photograph sample:moon: there are sample:china",
    "style nowhere.png sample:flower -o x.png": "no image at nowhere.png",
    "style torn/0.png sample:flower -o x.png": "torn/0.png",
    "style full sample:flower -o x.png": "full is a folder, not an image",
    "style sample:china sample:flower -o x.txt": "x.txt",
    "style sample:china sample:flower -o x.png --size 0": "size",
    "dynamics --games chess": "chess",
    "dynamics --methods luck": "luck",
    "dynamics --eta=-1": "eta",
    "dynamics --steps 0": "steps",
    "dynamics --seed=-1": "seed",
    "dynamics --games bilinear --methods r1 --out full": "r1 does not apply to bilinear",
    "bench --family spectrl": "family must be all, or some of projection, spectral",
    "bench --family hvp,": "joined by commas, got ''",
    "bench --quik": "--quik (did you mean --quick?)",
    "bench --threads 0": "threads must be in [1, 1024], got 0",
    "bench --threads two": "--threads: Expected int. Got value: two",
    "bench --minutes nan": "--minutes: Expected float. Got value: nan",
    "bench --minutes=-1": "minutes must be positive and finite, got -1.0",
    "bench --device tpu": "--device: invalid choice: 'tpu'",
    "bench --json results.txt": "json must be a file name that ends in .json, got 'results.txt'",
    "bench --json file/new.json": "file",
    "bench --json folder.json": "folder.json is a folder",
}
TUNE = {
    "tune ring --trials 0": "trials must be at least 1, got 0",
    "tune ring --trials many": "--trials: Expected int. Got value: many",
    "tune ring --workers 0": "workers must be at least 1, got 0",
    "tune ring --workers 2000": "workers must be at most 1024, got 2000",
    "tune ring --leaders=0": "leaders must be at least 1, got 0",
    "tune ring --confirm=-1": "confirm must be at least 0, got -1",
    "tune ring --sampler luck": "--sampler: Expected one of 'tpe', 'random', 'grid', 'cmaes'",
    "tune ring --pruner axe": "--pruner: Expected one of 'median', 'hyperband', 'none'",
    "tune ring --trails 3": "--trails 3 (did you mean --trials?)",
    "tune ring --steps=-1": "steps must be at least 0, got -1",
    "tune ring --space missing.yaml": "space missing.yaml: No such file or directory",
    "tune ring --space full": "space full: Is a directory",
    "tune ring --space bracket.yaml": "space bracket.yaml: while parsing",
    "tune ring --space bytes.yaml": "space bytes.yaml: 'utf-8' codec can't decode",
    "tune ring --space deep.yaml": "space deep.yaml: ",
    "tune ring --space list.yaml": "a space is a mapping of options to values, got [1]",
    "tune ring --space unknown.yaml": "space unknown.yaml: depth is no option of a run",
    "tune ring --space words.yaml": "steps must be a list of values, or low and high, got 'many'",
    "tune ring --objectives fdd": "objectives must be different ones of modes, quality, tv, mmd",
    "tune ring --objectives mmd,mmd": "objectives must be different ones of",
    "tune digits --objectives steps": "objectives must be different ones of fdd",
    "tune ring --out file": "cannot write to file: File exists",
    "tune ring --out file/new": "cannot write to file/new: Not a directory",
}
if find_spec("optuna"):
    TUNE |= {
        "tune ring --out new --directions up": "minimize or maximize for each of mmd, got 'up'",
        "tune ring --out new --directions minimize,minimize": "for each of mmd, got 'minimize,m",
        "tune ring --out new --storage nowhere": "storage nowhere: Could not parse",
        "tune ring --out new --storage foo://study.db": "storage foo://study.db: ",
        "tune ring --out new --storage journal:none/x": "storage journal:none/x: ",
        "tune ring --out new --storage sqlite:///none/study.db": "unable to open database file",
        "tune ring --out new --sampler grid": "the grid has more than 10000 points",
    }
TABLE = {**TRAIN, **NAMES, **COMPARE, **RESUME, **SPECTRUM, **MMD, **OTHERS, **TUNE}


@pytest.mark.parametrize("command", TABLE)
def test_wrong_input_is_refused_in_one_line(world, monkeypatch, capsys, command):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    before = contents(world)
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hessreg: ")
    assert captured.err.count("\n") == 1
    assert TABLE[command] in captured.err
    assert contents(world) == before


PROCESSES = [
    "train digits --g.lrr 1",
    "train digits --config bytes.yaml",
    "resume damaged",
    "spectrum nowhere",
    "mmd good.npy encrypted.npz",
]


@pytest.mark.parametrize("command", PROCESSES)
def test_a_process_says_the_same(world, command):
    before = contents(world)
    path = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "hessreg", *command.split()],
        cwd=world,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("hessreg: ")
    assert process.stderr.count("\n") == 1
    assert TABLE[command] in process.stderr
    assert contents(world) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(tmp_path, capsys):
    assert main(["train", "digits", "--device=cuda", f"--out={tmp_path / 'run'}"]) == 2
    assert "device cuda is not available" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Interruptions before there is anything to save: what is interrupted, and where

INTERRUPTED = {
    "train digits --out new": (metrics, "_train_classifier"),
    "train ring --out new": (run, "build_trainer"),
    "train grid --out new": (RunFolder, "check_space"),
    "train ring --out new --save_every 9": (RunFolder, "write_config"),
    "compare ring --methods none --out new": (run, "build_trainer"),
    "resume run --steps 9": (run, "build_trainer"),
    "resume run --steps 10": (RunFolder, "load_checkpoint"),
    "spectrum run --rows 8": (RunFolder, "read_config"),
    "spectrum run --rows 9": (torch, "randperm"),
    "mmd good.npy two.npz --key a": (np, "load"),
    "mmd good.npy good.npy --permutations 99": (mmd, "mmd2_test"),
    "dynamics --games bilinear --out new": (Lab, "run"),
    "style sample:china sample:flower -o new.png": (StyleRun, "__init__"),
    "bench --family hvp --json new.json": (bench, "_python"),
    "doctor": (torch, "linspace"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", INTERRUPTED)
def test_an_interruption_is_one_line_and_loses_nothing(world, monkeypatch, capsys, command, number):
    place, name = INTERRUPTED[command]
    called = getattr(place, name)

    def interrupted(*args, **kwargs):
        signal.raise_signal(number)
        return called(*args, **kwargs)

    monkeypatch.chdir(world)
    before = contents(world)
    monkeypatch.setattr(place, name, interrupted)
    assert main(command.split()) == 130
    assert capsys.readouterr().err == "hessreg: interrupted\n"
    assert contents(world) == before


def test_an_error_that_a_library_makes_of_an_interruption_is_one(monkeypatch, capsys):
    def import_by_a_library(*args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("KeyboardInterrupt: <EMPTY MESSAGE>") from None

    monkeypatch.setattr(mmd, "load_samples", import_by_a_library)
    assert main(["mmd", "a.npy", "b.npy"]) == 130
    assert capsys.readouterr().err == "hessreg: interrupted\n"
