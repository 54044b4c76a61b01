"""``hessreg spectrum``: right values of runs and of the user's operators, files, errors."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from hessreg.cli import main
from hessreg.gan import DEFAULTS, make_task
from hessreg.gan.checkpoint import load_state
from hessreg.gan.config import FROM_FILES
from hessreg.gan.curvature_targets import load_run
from hessreg.gan.run_folder import RunFolder
from tests.test_cli import refused

for package in ("jsonargparse", "matplotlib", "rich", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

FEW = ["-k=2", "--steps=8", "--probes=2"]
HEADER = "import torch\nfrom hessreg.curvature import DenseOperator\n"
SPECTRUM = "torch.tensor([5.0, 5.0, 1.0, 0.5, 0.0, -7.0], dtype=torch.float64)"
numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module with a factory into the current folder; returns the target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(body):
        name = f"user_module_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(f"{HEADER}def factory():\n    {body}\n")
        return f"{name}:factory"

    return write


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two small networks on the ring."""
    folder = tmp_path_factory.mktemp("ring") / "run"
    small = ["--width=3", "--latent_dim=2", "--batch_size=8", "--activation=tanh", "--steps=4"]
    options = ["--save_every=2", "--tensorboard=false", "--regularizer=r1"]
    assert main(["train", "ring", *small, *options, f"--out={folder}"]) == 0
    return folder


def measured(capsys, target, *options):
    """What ``--json`` prints, and what is written."""
    capsys.readouterr()
    assert main(["spectrum", str(target), "--json", "--out=out", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    with open("out/spectrum.json", encoding="utf-8") as file:
        content = json.load(file)
    assert json.loads(captured.out) == content
    return content["spectra"]


def values(spectrum, end):
    rows = [row for row in spectrum["eigenvalues"] if row["end"] == end]
    assert all(row["converged"] for row in rows)
    return [row["value"] for row in rows]


# Operators of the user


def test_table_and_files_of_an_operator(module, tmp_path, capsys):
    target = module(f"return DenseOperator(torch.diag({SPECTRUM}))")
    assert main(["spectrum", target, *FEW, "--out=new/folder"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[0] == [f"{target}:", "6", "x", "6"]
    assert lines[1] == ["end", "eigenvalue", "residual", "converged"]
    found = [(row[0], float(row[1]), row[3]) for row in lines[2:6]]
    wanted = [("largest", 5.0), ("largest", 5.0), ("smallest", -7.0), ("smallest", 0.0)]
    for (end, value, converged), (wanted_end, wanted_value) in zip(found, wanted, strict=True):
        assert (end, converged) == (wanted_end, "yes")
        assert value == pytest.approx(wanted_value, abs=1e-6)
    assert lines[6][:3] == ["trace:", "4.5", "+-"]
    out = tmp_path / "new" / "folder"
    assert sorted(path.name for path in out.iterdir()) == ["density.png", "spectrum.json"]
    assert (out / "density.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("which", "wanted"), [("LM", [-7.0, 5.0]), ("LA", [5.0, 5.0])])
def test_one_end(module, capsys, which, wanted):
    target = module(f"return DenseOperator(torch.diag({SPECTRUM}))")
    spectrum = measured(capsys, target, *FEW, f"--which={which}")[target]
    np.testing.assert_allclose(values(spectrum, which), wanted, atol=1e-6)
    assert len(spectrum["eigenvalues"]) == 2
    assert spectrum["trace"]["value"] == pytest.approx(4.5)
    density = spectrum["density"]
    assert np.trapezoid(density["density"], density["grid"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "returned",
    [
        "0.5 * (d * x * x).sum(), x",
        "lambda: 0.5 * (d * x * x).sum(), [x]",
        "lambda b: 0.5 * (b * d * x * x).sum(1).mean(), [x], [torch.ones(2, 6), torch.ones(1, 6)]",
    ],
)
def test_losses(module, capsys, returned):
    target = module(
        f"d = {SPECTRUM}; x = torch.ones_like(d, requires_grad=True); return {returned}"
    )
    spectrum = measured(capsys, target, *FEW)[target]
    np.testing.assert_allclose(values(spectrum, "LA"), [5.0, 5.0], atol=1e-6)
    np.testing.assert_allclose(values(spectrum, "SA"), [-7.0, 0.0], atol=1e-6)


def test_what_did_not_converge_is_said(module, capsys):
    body = "torch.manual_seed(0); A = torch.randn(9, 9); return DenseOperator(A + A.T)"
    assert main(["spectrum", module(body), *FEW, "--tol=1e-30", "--out=out"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" NO\n") == 4
    assert "not to be trusted" in printed
    with open("out/spectrum.json", encoding="utf-8") as file:
        (spectrum,) = json.load(file)["spectra"].values()
    assert [row["converged"] for row in spectrum["eigenvalues"]] == [False] * 4


def test_an_operator_of_another_kind(module, capsys):
    """The protocol is enough: no class of ours is needed."""
    body = """
    class Shift:
        shape, dtype, device = (4, 4), torch.float32, torch.device("cpu")
        def matvec(self, v, *, create_graph=False): return v.flip(0)
        def matmat(self, V): return V.flip(0)
        def to_scipy(self): raise NotImplementedError
    return Shift()"""
    target = module(body)
    spectrum = measured(capsys, target, *FEW)[target]
    np.testing.assert_allclose(values(spectrum, "LA"), [1.0, 1.0], atol=1e-5)
    np.testing.assert_allclose(values(spectrum, "SA"), [-1.0, -1.0], atol=1e-5)


# Runs


def hessian(trainer, network, rows, seed):
    """The Hessian of a network's loss, whole: for networks whose samples do not mix."""
    random = torch.Generator().manual_seed(seed)
    data = trainer.data[torch.randperm(len(trainer.data), generator=random)[:rows]]
    noise = torch.randn(rows, 2, generator=random)
    other = trainer.discriminator if network == "generator" else trainer.generator
    module = getattr(trainer, network)
    named = dict(module.named_parameters())

    def loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        given = {k: v.view_as(p) for (k, p), v in zip(named.items(), parts, strict=True)}
        if network == "generator":
            return F.softplus(-other(functional_call(module, given, (noise,)))).mean()
        real, fake = (functional_call(module, given, (x,)) for x in (data, other(noise).detach()))
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    return torch.autograd.functional.hessian(loss, flat)


def test_spectra_of_a_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    spectra = measured(capsys, run, *FEW, "--rows=20", "--seed=3")
    assert list(spectra) == ["generator", "discriminator"]
    trainer = load_run(run, 20, 3, evaluate=False).trainer
    for network, spectrum in spectra.items():
        H = hessian(trainer, network, rows=20, seed=3)
        truth = torch.linalg.eigvalsh(H.double()).numpy()
        scale = np.abs(truth).max()
        assert spectrum["n"] == len(truth)
        np.testing.assert_allclose(values(spectrum, "LA"), truth[:-3:-1], atol=2e-5 * scale)
        np.testing.assert_allclose(values(spectrum, "SA"), truth[:2], atol=2e-5 * scale)
        assert spectrum["trace"]["value"] == pytest.approx(truth.sum(), abs=1e-4 * scale)
    names = ["density-discriminator.png", "density-generator.png", "spectrum.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_checkpoint_is_the_run_at_that_moment(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*FEW, "--rows=8", "--network=discriminator"]
    files = sorted((run / "checkpoints").glob("step-*"))
    first, last, folder = (measured(capsys, t, *options) for t in (files[0], files[1], run))
    for spectra in (first, last, folder):
        spectra["discriminator"].pop("seconds")
        assert list(spectra) == ["discriminator"]
    assert last == folder
    assert first != last


def test_batches_of_a_run_with_mmd_are_not_of_one_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--width=3", "--latent_dim=2", "--batch_size=8", "--activation=tanh", "--steps=2"]
    options = ["--loss=mmd", "--regularizer=none", "--tensorboard=false", "--out=run"]
    assert main(["train", "ring", *small, *options]) == 0
    capsys.readouterr()
    message = "rows must be no multiple of 8 and 1 more, with loss mmd, got 17"
    assert message in refused(capsys, "spectrum", "run", "--rows=17", *FEW)
    found = measured(capsys, "run", "--rows=18", *FEW)
    assert list(found) == ["generator", "discriminator"]


def test_modes_and_batches_are_those_of_training(tmp_path, monkeypatch, capsys):
    """Batch normalisation tells the modes, and the size of the batches, apart."""
    monkeypatch.chdir(tmp_path)
    small = ["--architecture=dcgan", "--width=4", "--latent_dim=2", "--batch_size=8", "--steps=2"]
    options = ["--regularizer=none", "--tensorboard=false", "--out=run"]
    assert main(["train", "digits", *small, *options]) == 0
    state = load_state(RunFolder(tmp_path / "run").last_checkpoint())["trainer"]
    found = {}
    for evaluate in (False, True):
        target = load_run(tmp_path / "run", 16, 0, evaluate)
        op = target.operator("generator")
        v = torch.ones(op.shape[0])
        found[evaluate] = op.matvec(v)
        losses = [target._generator_loss(batch) for batch in target._batches()]
        wanted = []
        for loss in losses:
            params = list(target.trainer.generator.parameters())
            grads = torch.autograd.grad(loss, params, create_graph=True)
            total = sum(g.sum() for g in grads)
            wanted.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, params)]))
        torch.testing.assert_close(found[evaluate], sum(wanted) / 2, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found[False], found[True], rtol=0.01)
    fresh = load_run(tmp_path / "run", 16, 0, evaluate=False)
    fresh.operator("generator")
    for name, buffer in fresh.trainer.generator.named_buffers():
        assert torch.equal(buffer, state["generator"][name])


# Bad input


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return 3",
            "must return a LinearOperator, (loss, params) or (loss, params, data), got int",
        ),
        ("return (1, 2, 3, 4)", "got a tuple of 4"),
        ("raise KeyError('x')", "factory: KeyError: 'x'"),
        ("return torch.ones(2), torch.ones(2)", "ValueError: params[0], shape (2,), must require"),
        ("return 'loss', torch.ones(2, requires_grad=True)", "TypeError: loss must be a Tensor or"),
        ("return DenseOperator(torch.ones(1, 1))", "k must be at most 1"),
    ],
)
def test_factories_that_give_nothing_are_refused(module, capsys, body, message):
    assert message in refused(capsys, "spectrum", module(body), *FEW)


def test_what_is_not_symmetric_is_refused(module, capsys):
    body = """
    class Skew(DenseOperator):
        def matvec(self, v, *, create_graph=False): return v.flip(0) * torch.arange(5.0)
        def matmat(self, V): return V.flip(0) * torch.arange(5.0)[:, None]
    return Skew(torch.eye(5))"""
    assert "op must be symmetric" in refused(capsys, "spectrum", module(body), *FEW)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "x = torch.zeros(2, requires_grad=True); return x.sum() / 0 * 0, x",
            "loss must be finite",
        ),
        ("x = torch.zeros(3, requires_grad=True); return x.abs().pow(1.5).sum(), x", "at (0,)"),
    ],
)
def test_what_is_not_finite_says_where(module, capsys, body, message):
    target = module(body)
    assert main(["spectrum", target, *FEW]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"hessreg: {target}: ")
    assert error.count("\n") == 1
    assert message in error


def test_targets_that_are_not_there_are_refused(module, tmp_path, capsys):
    def error(target, *options):
        return refused(capsys, "spectrum", target, *options)

    target = module("return 3")
    name = target.partition(":")[0]
    assert "there is no nowhere: name a run folder" in error("nowhere")
    assert "cannot import no_such_module: ModuleNotFoundError" in error("no_such_module:factory")
    assert f"{target}s: {name} has no factorys" in error(f"{target}s")
    assert f"{name}:torch must be callable, got module" in error(f"{name}:torch")
    assert "are for runs" in error(target, "--rows=8")
    assert "are for runs" in error(target, "--network=generator")
    assert "are for runs" in error(target, "--eval")
    assert "is not a run folder" in error(tmp_path)
    (tmp_path / "broken.py").write_text("1 +")
    assert "cannot import broken: SyntaxError" in error("broken:factory")


def test_damaged_runs_are_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def error(target, *options):
        return refused(capsys, "spectrum", target, *options)

    assert "rows must be in [1, 40000] for ring, got 0" in error(run, "--rows=0")
    assert "rows must be in [1, 40000]" in error(run, "--rows=40001")
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "no checkpoint in" in error(copy)
    broken = copy / "checkpoints" / "step-000000001.safetensors"
    whole = RunFolder(run).last_checkpoint().read_bytes()
    broken.write_bytes(whole[:-7])
    assert f"checkpoint {broken} is damaged" in error(copy)
    broken.write_bytes(whole)
    wide = (run / "config.yaml").read_text().replace("width: 3", "width: 4")
    (copy / "config.yaml").write_text(wide)
    assert f"{broken} does not fit the configuration" in error(copy)
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--k=0", "k must be at least 1, got 0"),
        ("-k=x", "Expected int"),
        ("--steps=1", "steps must be at least 2, got 1"),
        ("--probes=0", "probes must be at least 1, got 0"),
        ("--tol=-1", "tol must be finite and not negative, got -1.0"),
        ("--tol=nan", "--tol: Expected float. Got value: nan"),
        ("--seed=-1", "seed must be in [0, 2**63), got -1"),
        ("--which=top", "invalid choice: 'top'"),
        ("--network=critic", "invalid choice: 'critic'"),
    ],
)
def test_bad_options_are_refused(module, capsys, option, message):
    assert message in refused(capsys, "spectrum", module("return 3"), option)


def test_a_folder_that_cannot_be_written_is_refused(module, tmp_path, capsys):
    (tmp_path / "file").touch()
    target = module(f"return DenseOperator(torch.diag({SPECTRUM}))")
    assert "file" in refused(capsys, "spectrum", target, *FEW, "--out=file")


def test_the_rows_of_tasks_suffice():
    own = [config for name, config in DEFAULTS.items() if name not in FROM_FILES]
    assert all(len(make_task(each).load().train_samples) >= 512 for each in own)
