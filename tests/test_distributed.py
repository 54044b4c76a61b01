"""Several processes: their training is that of one, their derivatives, decisions and failures."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessreg.distributed import WHOLE, ProcessShard, Shard
from hessreg.gan import (
    Discriminator,
    Generator,
    HessianCorrectedGradients,
    NonFiniteError,
    Orthogonal,
    PlayerConfig,
    Run,
    ShuffledSampler,
    TrainConfig,
    Trainer,
)
from hessreg.gan.checkpoint import load_state, save_state
from hessreg.gan.distributed import (
    agree,
    first_decides,
    is_shared,
    synchronize_layers,
    together,
)
from hessreg.gan.losses import make_loss
from hessreg.gan.options import GrowthConfig, InstanceNoiseConfig
from hessreg.gan.players import Procedure
from hessreg.gan.run_folder import RunFolderError
from hessreg.optim import MODES
from hessreg.regularizers import (
    DRAGAN,
    HSN1R,
    R1,
    R2,
    WGANGP,
    GaussianKernel,
    HessianPenalty,
    IterativeGradientPenalty,
    Regularizer,
)
from tests.processes import in_processes, in_two_processes

for package in ("matplotlib", "PIL", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

DOUBLE = torch.float64


@dataclass
class Case:
    """What a short training is made of."""

    regularizers: Callable[[], Sequence[Regularizer]] = list
    steps: int = 5
    loss: str = "nonsaturating"
    architecture: str = "mlp"
    orthogonal: Orthogonal | None = None
    width: int = 8
    conditional: Literal["none", "concat", "projection"] = "none"
    dropout: float = 0.0
    player: dict[str, Any] = field(default_factory=dict)
    procedure: Procedure = field(default_factory=Procedure)


def hsn1r(**options):
    return lambda: [HSN1R(weight=1e-2, discriminator_weight=1e-2, num_steps=3, **options)]


def kernel(**options):
    return lambda: [GaussianKernel(generator_weight=0.5, discriminator_weight=0.5, **options)]


def follower(**options):
    return lambda: [IterativeGradientPenalty(**options)]


def hsc(loss="nonsaturating", **options):
    options = {"num_steps": 4, "every": 2, "eps": 1.0, "mu": 1.0} | options
    return lambda: [HessianCorrectedGradients("both", loss=make_loss(loss), **options)]


CASES = {
    "none": Case(),
    "hsn1r": Case(hsn1r(), steps=20),
    "hsn1r spectral": Case(hsn1r(norm="spectral")),
    "hsn1r one": Case(hsn1r(norm="one")),
    "hsn1r fro": Case(hsn1r(norm="fro")),
    "hsn1r deflated": Case(hsn1r(num_deflated=1, num_probes=2)),
    "hsn1r exact": Case(hsn1r(method="exact"), width=2, steps=1),
    "hsn1r of mmd": Case(hsn1r(), loss="mmd"),
    "hsn1r exact of mmd": Case(hsn1r(method="exact"), width=2, steps=1, loss="mmd"),
    "hsn1r of dcgan": Case(hsn1r(), architecture="dcgan", steps=3),
    "r1": Case(lambda: [R1()]),
    "r2": Case(lambda: [R2()]),
    "wgan_gp": Case(lambda: [WGANGP()], loss="wasserstein"),
    "iterative": Case(follower(jitter=0.5, num_points=2), loss="wasserstein"),
    "iterative energy": Case(follower(distance="energy"), loss="wasserstein"),
    "iterative critic": Case(follower(distance="critic"), loss="wasserstein"),
    "dragan": Case(lambda: [DRAGAN()]),
    "relativistic": Case(lambda: [R1(), R2()], loss="relativistic"),
    "hinge": Case(loss="hinge"),
    "mmd": Case(lambda: [WGANGP()], loss="mmd"),
    "gaussian": Case(kernel()),
    "gaussian ema": Case(kernel(sigma="ema")),
    "gaussian learned": Case(kernel(sigma="learned")),
    "gaussian features": Case(kernel(space="features", sigma=[0.5, 1.0])),
    "hessian_penalty": Case(lambda: [HessianPenalty(weight=1.0)]),
    "hsc": Case(hsc()),
    "hsc rows": Case(hsc(rows=4)),
    "hsc of mmd": Case(hsc("mmd", rows=4), loss="mmd"),
    "hsc rows of classes": Case(hsc(rows=4), conditional="concat"),
    "iterative of classes": Case(
        lambda: [IterativeGradientPenalty(distance="critic", num_points=2)],
        conditional="projection",
    ),
    "dcgan": Case(architecture="dcgan"),
    "r1 of dropout": Case(lambda: [R1()], dropout=0.3),
    "r1 of dcgan": Case(lambda: [R1(), WGANGP(), HessianPenalty()], architecture="dcgan"),
    "orthogonal real_fake": Case(lambda: [R1()], orthogonal=Orthogonal("terms", pair="real_fake")),
}
CASES |= {
    "procedure": Case(
        lambda: [WGANGP(), DRAGAN()],
        player={"l1": 1e-3, "clip": 1.0, "schedule": "cosine", "weight_decay": 0.1},
        procedure=Procedure(
            discriminator_steps=2,
            schedule_steps=8,
            growth=GrowthConfig(factor=2, every=2, maximum=32),
            instance_noise=InstanceNoiseConfig(std=0.2),
        ),
    ),
    "accumulate": Case(
        lambda: [WGANGP(), GaussianKernel(), HessianPenalty(), R1()],
        architecture="dcgan",
        procedure=Procedure(accumulate=2, instance_noise=InstanceNoiseConfig(std=0.2)),
    ),
    "accumulate terms": Case(
        lambda: [DRAGAN()],
        loss="mmd",
        orthogonal=Orthogonal("terms"),
        procedure=Procedure(accumulate=2),
    ),
}
CASES |= {f"orthogonal {mode}": Case(lambda: [R1()], orthogonal=Orthogonal(mode)) for mode in MODES}


def make_trainer(case: Case, shard: Shard = WHOLE, batch_size: int = 8) -> Trainer:
    with torch.random.fork_rng():
        images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        torch.manual_seed(0)
        loss = make_loss(case.loss)
        classes = 0 if case.conditional == "none" else 3
        options = {"num_classes": classes, "dropout": case.dropout}
        judging = {"conditional": case.conditional, "outputs": loss.outputs}
        networks = (
            Generator(case.architecture, 4, case.width, **options),
            Discriminator(case.architecture, case.width, **judging, **options),
        )
    return Trainer(
        *(network.double() for network in networks),
        images.double(),
        case.regularizers(),
        batch_size=batch_size,
        g=PlayerConfig(lr=1e-3, **case.player),
        d=PlayerConfig(lr=1e-3, **case.player),
        procedure=case.procedure,
        loss=loss,
        orthogonal=case.orthogonal,
        labels=torch.arange(40) % 3 if classes else None,
        shard=shard,
    )


def train(trainer: Trainer, steps: int) -> tuple[Tensor, dict[str, float]]:
    """All weights and buffers after some steps, and the metrics."""
    torch.manual_seed(0)
    for _ in range(steps):
        trainer.step()
    networks = (trainer.generator, trainer.discriminator, trainer.ema)
    tensors = [t.double().flatten() for each in networks for t in each.state_dict().values()]
    return torch.cat(tensors), trainer.metrics()


def join(rank, size, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=90)
    )
    return ProcessShard(dist.group.WORLD)


def leave():
    dist.barrier()
    dist.destroy_process_group()


def state_after(case: Case, shard: Shard, path: Path) -> Trainer:
    """A trainer that continues from the file, or one that is new."""
    trainer = make_trainer(case, shard)
    if path.exists():
        trainer.load_state_dict(load_state(path))
    return trainer


def _trainings(rank, size, store, results):
    warnings.simplefilter("ignore")
    shard = join(rank, size, store)
    found = {}
    for name, case in CASES.items():
        weights, metrics = train(make_trainer(case, shard), case.steps)
        found[name] = weights.numpy(), metrics
    results.put((rank, found))
    leave()


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """The weights and metrics that each of two processes has, by rank and case."""
    return in_two_processes(_trainings, tmp_path_factory.mktemp("processes") / "store")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:mode 'game'")
def test_two_processes_train_as_one(trained_by_two, name):
    case = CASES[name]
    weights, metrics = train(make_trainer(case), case.steps)
    (first, logged), (second, logged_by_second) = (trained_by_two[rank][name] for rank in range(2))
    assert first.tobytes() == second.tobytes()
    torch.testing.assert_close(torch.from_numpy(first), weights, rtol=0, atol=1e-9)
    assert logged == logged_by_second
    # An angle is the arc cosine of a number near 1.
    assert logged == pytest.approx(metrics, rel=1e-6, abs=1e-7)


BY_THREE = ("hsn1r", "mmd", "gaussian", "r1 of dcgan", "r1 of dropout", "accumulate")
BY_THREE += ("hsc", "orthogonal previous")


def _shares_of_three(rank, size, store, results):
    warnings.simplefilter("ignore")
    shard = join(rank, size, store)
    made = {name: make_trainer(CASES[name], shard, batch_size=12) for name in BY_THREE}
    results.put((rank, {name: train(each, 2)[0].numpy() for name, each in made.items()}))
    leave()


@pytest.fixture(scope="module")
def trained_by_three(tmp_path_factory):
    """The weights that each of three processes has, by rank and case."""
    return in_processes(3, _shares_of_three, tmp_path_factory.mktemp("processes") / "store")


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_THREE)
def test_three_processes_train_as_one(trained_by_three, name):
    weights, _ = train(make_trainer(CASES[name], batch_size=12), 2)
    for found in trained_by_three.values():
        torch.testing.assert_close(torch.from_numpy(found[name]), weights, rtol=0, atol=1e-9)


# --- states

RESUMED = "hsn1r", "orthogonal previous", "hsc", "dcgan", "gaussian learned", "iterative"


def _resumed(rank, size, store, results):
    shard = join(rank, size, store)
    found = {}
    for name in RESUMED:
        trainer = state_after(CASES[name], shard, store.with_name(f"by one {name}"))
        found[name] = train(trainer, 4)[0].numpy()
        trainer = make_trainer(CASES[name], shard)
        train(trainer, 3)
        if rank == 0:
            save_state(store.with_name(f"by two {name}"), trainer.state_dict())
    results.put((rank, found))
    leave()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A folder with states of one and of two processes, and the weights after the former."""
    folder = tmp_path_factory.mktemp("states")
    for name in RESUMED:
        trainer = make_trainer(CASES[name])
        train(trainer, 3)
        save_state(folder / f"by one {name}", trainer.state_dict())
    return folder, in_two_processes(_resumed, folder / "store")


@pytest.mark.parametrize("name", RESUMED)
def test_what_some_processes_saved_is_continued_by_others(resumed, name):
    folder, by_two = resumed
    wanted = train(make_trainer(CASES[name]), 7)[0]
    by_one = train(state_after(CASES[name], WHOLE, folder / f"by two {name}"), 4)[0]
    torch.testing.assert_close(by_one, wanted, rtol=0, atol=1e-9)
    for rank in range(2):
        found = torch.from_numpy(by_two[rank][name])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


# --- derivatives, batch normalisation, decisions and failures


def third_derivatives(shard: Shard) -> list[Tensor]:
    """Of a mean over rows that is no mean of the rows' functions."""
    x = torch.linspace(-1, 1, 12, dtype=DOUBLE).view(6, 2)
    w = torch.tensor([0.5, -1.5], dtype=DOUBLE, requires_grad=True)
    rows = shard.take(x)
    whole = shard.gather((rows @ w).exp())
    value = whole.var() * shard.mean((rows @ w).sin().mean()).square() + shard.std(rows)
    found = []
    v = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, w, create_graph=True)
        found.append(shard.mean(gradient.detach()))
        value = gradient @ v
    return found


def normalized(shard: Shard, momentum: float | None) -> list[Tensor]:
    """Outputs, running statistics and outputs in evaluation mode of batch normalisation."""
    layer = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum, dtype=DOUBLE))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    synchronize_layers(layer, shard)
    x = torch.randn(4, 3, 2, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    outputs = [shard.gather(layer(shard.take(k * x))).detach() for k in (1, 2)]
    outputs.append(shard.gather(layer.eval()(shard.take(x))).detach())
    return [*outputs, *layer.state_dict().values()]


RANDOM = {
    "dropout": (nn.Dropout, (8, 5)),
    "dropout 1d": (nn.Dropout1d, (8, 3, 5)),
    "dropout 2d": (nn.Dropout2d, (8, 3, 2, 2)),
    "dropout 3d": (nn.Dropout3d, (8, 3, 1, 2, 2)),
    "alpha dropout": (nn.AlphaDropout, (8, 5)),
    "feature alpha dropout": (nn.FeatureAlphaDropout, (8, 3, 5)),
    "rrelu": (nn.RReLU, (8, 5)),
}


def drawn(shard: Shard, name: str) -> list[Tensor]:
    """What a random layer, used twice, makes of a batch, its derivative, and without training."""
    kind, shape = RANDOM[name]
    layer = kind(0.3)
    layers = nn.Sequential(layer, nn.Tanh(), layer)
    synchronize_layers(layers, shard)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.linspace(-2, -1, 8 * math.prod(shape[1:]), dtype=DOUBLE).view(shape)
        x.requires_grad_()
        y = shard.gather(layers(shard.take(x)))
        (slope,) = torch.autograd.grad(y.square().sum(), x)
    return [y.detach(), shard.mean(slope), shard.gather(layers.eval()(shard.take(x))).detach()]


def what_both_get(shard: Shard) -> list[str]:
    """How failures of one process look in each."""
    found = []

    def fail(rank: int, error: BaseException) -> None:
        try:
            with together(shard):
                if shard.rank == rank:
                    raise error
        except (ValueError, KeyboardInterrupt) as caught:
            found.append(f"{type(caught).__name__} {caught} {is_shared(caught)}")

    fail(1, ValueError("of the second"))
    fail(0, KeyboardInterrupt())
    try:
        first_decides(shard, lambda: 1 / 0 if shard.rank == 0 else None)
    except ZeroDivisionError as caught:
        found.append(str(caught))
    decided = first_decides(shard, lambda: {"rank": shard.rank})
    found.append(f"{decided} {agree(shard, 1.0 + shard.rank, shard.rank == 1)}")
    return [*found, str(agree(shard, 1.0, False))]


NOT_FINITE = "none", "hsn1r", "hsc", "mmd", "orthogonal terms"


def message_of_nan(shard: Shard, name: str) -> str:
    """What stops a training with NaN among the last rows of its first batch."""
    trainer = make_trainer(CASES[name], shard)
    trainer.data[next(ShuffledSampler(40, 8, 0))[-1]] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        trainer.step()
    return str(caught.value)


def norm_without(shard: Shard, ranks: Collection[int]) -> float | str:
    """Of the generator's gradient where the samples of these processes are detached."""
    trainer = make_trainer(CASES["none"], shard)
    if shard.rank in ranks:
        trainer.generator.register_forward_hook(lambda module, inputs, output: output.detach())
    try:
        trainer.step()
    except ValueError as error:
        return str(error)
    return trainer.metrics()["grad_norm_g"]


def config(**options) -> TrainConfig:
    small = {"width": 8, "latent_dim": 4, "batch_size": 8, "tensorboard": False}
    often = {"log_every": 2, "eval_every": 3, "save_every": 2}
    return TrainConfig(regularizer="r1", **{**small, **often, "steps": 6, **options})


def what_a_run_leaves(shard: Shard, path: Path) -> list[str]:
    """Of a run that stops by a signal to the second process in its fourth step, and goes on."""
    run = Run.create(path, config())
    step = run.trainer.step

    def stepping(*args) -> None:
        step(*args)
        if run.trainer.steps_done == 4 and shard.rank == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # torchrun's own

    run.trainer.step = stepping
    with pytest.raises(KeyboardInterrupt) as caught:
        run.train()
    said = [str(caught.value), run.resume(path).train()]
    with pytest.raises(RunFolderError) as refused:
        Run.create(path, config())
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 processes, got 9"):
        Run.create(path.with_name(f"refused {shard.rank}"), config(batch_size=9))
    return [*said, str(refused.value)]


def _others(rank, size, store, results):
    shard = join(rank, size, store)
    found = {
        "third": [t.numpy() for t in third_derivatives(shard)],
        "norms": [[t.numpy() for t in normalized(shard, m)] for m in (0.1, None)],
        "drawn": {name: [t.numpy() for t in drawn(shard, name)] for name in RANDOM},
        "failures": what_both_get(shard),
        "nan": [message_of_nan(shard, name) for name in NOT_FINITE],
        "cut off": [norm_without(shard, ranks) for ranks in ({1}, {0, 1})],
        "run": what_a_run_leaves(shard, store.parent / f"run {rank}"),
    }
    results.put((rank, found))
    leave()


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The folder, and what each of two processes found, by rank."""
    folder = tmp_path_factory.mktemp("others")
    return folder, in_two_processes(_others, folder / "store")


def test_derivatives_of_every_order_go_through_collectives(others):
    for found in others[1].values():
        for ours, wanted in zip(found["third"], third_derivatives(WHOLE), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_normalisation_has_the_statistics_of_the_whole_batch(others, momentum):
    for found in others[1].values():
        ours = found["norms"][momentum is None]
        for each, wanted in zip(ours, normalized(WHOLE, momentum), strict=True):
            torch.testing.assert_close(torch.from_numpy(each), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", RANDOM)
def test_random_layers_draw_for_the_whole_batch(others, name):
    wanted = drawn(WHOLE, name)
    assert not torch.equal(wanted[0], wanted[2])
    for found in others[1].values():
        for ours, theirs in zip(found["drawn"][name], wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs)


def test_what_fails_in_one_process_fails_in_both_and_the_first_decides(others):
    both = [found["failures"] for found in others[1].values()]
    wanted = [
        "ValueError of the second True",
        "KeyboardInterrupt  True",
        "division by zero",
        "{'rank': 0} (1.0, True)",
        "(1.0, False)",
    ]
    assert both == [wanted, wanted]


@pytest.mark.parametrize("index", range(len(NOT_FINITE)), ids=NOT_FINITE)
def test_what_is_not_finite_in_one_process_stops_both(others, index):
    for found in others[1].values():
        assert found["nan"][index] == "step 1: discriminator loss is not finite"


def test_a_network_that_one_process_reaches_is_trained_and_one_that_none_does_is_refused(others):
    (norm, refused), second = (found["cut off"] for found in others[1].values())
    assert norm > 0
    assert refused.startswith("the loss of the generator must depend on a parameter")
    assert second == [norm, refused]


def test_only_the_first_process_writes_and_both_stop_and_go_on(others):
    folder, by_rank = others
    (stopped, done, refused), (also_stopped, nothing, also_refused) = (
        by_rank[rank]["run"] for rank in range(2)
    )
    assert stopped == f"stopped at step 4; continue with: hessreg resume {folder / 'run 0'}"
    assert also_stopped.startswith("stopped at step 4;")
    assert "after 6 steps" in done
    assert nothing == ""
    assert refused.startswith(f"{folder / 'run 0'} is not empty")
    assert also_refused == refused
    assert {path.name for path in folder.iterdir()} - {"store"} == {"run 0"}
    lines = (folder / "run 0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4, 6]


def test_a_run_of_one_process_calls_no_collective(tmp_path, monkeypatch):
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, None)
    assert "after 6 steps" in Run.create(tmp_path / "run", config()).train()


def test_a_batch_that_does_not_divide_is_refused():
    class Three(Shard):
        size = 3

    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 8"):
        make_trainer(Case(), Three())
    case = Case(hsc(rows=3))
    Three.size = 2
    with pytest.raises(ValueError, match=r"hsc\.rows must be a multiple of the 2 processes, got 3"):
        make_trainer(case, Three())


# --- torchrun

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 150  # seconds for a job, of which most are spent on imports


def torchrun(*args: object, program: Sequence[str] = ("-m", "hessreg")) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launch, *program, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(job: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, standard output and our own lines of standard error."""
    try:
        out, err = job.communicate(timeout=LIMIT)
    finally:
        job.kill()
    print(err)  # which pytest shows of a test that fails
    assert "[rank" not in err  # which begins a line of a traceback of ours
    return job.returncode, out, [line for line in err.splitlines() if line.startswith("hessreg:")]


ENDLESS = [
    *("train", "ring", "--regularizer=r1", "--width=8", "--steps=1000000", "--tensorboard=false"),
    *("--batch_size=8", "--eval_every=1000000", "--log_every=5", "--save_every=20"),
]


def wait_for_checkpoints(folder: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not any("000000000" not in p.name for p in (folder / "checkpoints").glob("step-*")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker_of(job: subprocess.Popen[str], rank: int) -> int:
    """The process that torchrun started as this rank."""
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_and_the_run_goes_on(tmp_path, rank):
    folder = tmp_path / "run"
    job = torchrun(*ENDLESS, "--out", folder)
    wait_for_checkpoints(folder, job)
    os.kill(worker_of(job, rank), signal.SIGKILL)
    start = time.monotonic()
    code, _, said = ended(job)
    assert code != 0
    lost = "hessreg: another process has ended or does not answer; continue with: hessreg resume"
    assert said[0] == f"{lost} {folder}"
    assert time.monotonic() - start < 60
    run = Run.resume(folder)
    done = run.trainer.steps_done
    run.close()
    assert done > 0
    assert done % 20 == 0
    code, out, said = ended(torchrun("resume", folder, "--steps", done + 10))
    assert (code, said) == (0, [])
    assert f"after {done + 10} steps" in out
    assert out.count("after") == 1


THREADS_AFTERWARDS = """
import sys
from pathlib import Path
from hessreg.cli import main

main(sys.argv[1:])
threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
sys.stderr.write(f"hessreg: {[name for name in threads if 'gloo' in name]}\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds threads by /proc")
@pytest.mark.parametrize(
    ("option", "fails"), [("--width=8", 0), ("--width=-1", 1), ("--d.lr=1e30", 1)]
)
def test_no_thread_of_the_processes_outlives_the_command(tmp_path, option, fails):
    program = tmp_path / "program.py"
    program.write_text(THREADS_AFTERWARDS)
    options = "--regularizer=hsn1r", "--batch_size=8", "--steps=9", "--tensorboard=false", option
    job = torchrun("train", "ring", "--out", tmp_path / "run", *options, program=[str(program)])
    code, _, said = ended(job)
    assert code == 0
    assert said[-2:] == ["hessreg: []"] * 2
    assert len(said) == 2 + fails


@pytest.mark.slow
def test_a_stop_signal_saves_and_one_process_goes_on(tmp_path):
    folder = tmp_path / "run"
    job = torchrun(*ENDLESS, "--out", folder)
    wait_for_checkpoints(folder, job)
    job.send_signal(signal.SIGTERM)
    code, _, said = ended(job)
    assert code != 0
    (line,) = said
    assert line.endswith(f"continue with: hessreg resume {folder}")
    run = Run.resume(folder)
    done = run.trainer.steps_done
    assert f"stopped at step {done};" in line
    run.close()
    assert f"after {done + 5} steps" in Run.resume(folder, steps=done + 5).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "ring", "--batch_size=9"], "batch_size must be a multiple of the 2 processes"),
        (["train", "ring", "--width=x"], "--width"),
        (["doctor"], "doctor is for one process, got 2: start it without torchrun"),
    ],
)
def test_a_refused_configuration_is_one_line_of_several_processes(tmp_path, args, message):
    out = ["--out", tmp_path / "run"] if args[0] == "train" else []
    code, _, said = ended(torchrun(*args, *out))
    assert code != 0
    (line,) = said
    assert message in line
    assert not (tmp_path / "run").exists()
