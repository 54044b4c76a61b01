"""Several processes: their training is that of one, their derivatives, decisions and failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

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
    Trainer,
)
from hessreg.gan.distributed import synchronize_norms
from hessreg.gan.losses import make_loss
from hessreg.optim import MODES
from hessreg.regularizers import (
    DRAGAN,
    HSN1R,
    R1,
    R2,
    WGANGP,
    GaussianKernel,
    HessianPenalty,
    Regularizer,
)
from tests.processes import in_two_processes

DOUBLE = torch.float64


@dataclass
class Case:
    """What a short training is made of."""

    regularizers: Callable[[], Sequence[Regularizer]] = list
    steps: int = 5
    loss: str = "nonsaturating"
    architecture: str = "mlp"
    orthogonal: Orthogonal | None = None
    tolerance: float = 1e-9
    networks: dict[str, Any] = field(default_factory=dict)


def hsn1r(**options):
    return lambda: [HSN1R(weight=1e-2, discriminator_weight=1e-2, num_steps=3, **options)]


def kernel(**options):
    return lambda: [GaussianKernel(generator_weight=0.5, discriminator_weight=0.5, **options)]


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
    "hsn1r exact": Case(hsn1r(method="exact"), steps=1),
    "hsn1r of mmd": Case(hsn1r(), loss="mmd"),
    "hsn1r exact of mmd": Case(hsn1r(method="exact"), steps=1, loss="mmd"),
    "hsn1r of dcgan": Case(hsn1r(), architecture="dcgan", steps=3),
    "r1": Case(lambda: [R1()]),
    "r2": Case(lambda: [R2()]),
    "wgan_gp": Case(lambda: [WGANGP()], loss="wasserstein"),
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
    "dcgan": Case(architecture="dcgan"),
    "r1 of dcgan": Case(lambda: [R1(), WGANGP(), HessianPenalty()], architecture="dcgan"),
    "orthogonal real_fake": Case(lambda: [R1()], orthogonal=Orthogonal("terms", pair="real_fake")),
}
CASES |= {f"orthogonal {mode}": Case(lambda: [R1()], orthogonal=Orthogonal(mode)) for mode in MODES}


def make_trainer(case: Case, shard: Shard = WHOLE) -> Trainer:
    with torch.random.fork_rng():
        images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        torch.manual_seed(0)
        loss = make_loss(case.loss)
        networks = (
            Generator(case.architecture, 4, 8),
            Discriminator(case.architecture, 8, outputs=loss.outputs),
        )
    return Trainer(
        *(network.double() for network in networks),
        images.double(),
        case.regularizers(),
        batch_size=8,
        learning_rates=(1e-3, 1e-3),
        loss=loss,
        orthogonal=case.orthogonal,
        shard=shard,
    )


def train(trainer: Trainer, steps: int) -> tuple[Tensor, dict[str, float]]:
    """All weights and buffers after some steps, and the metrics."""
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


def _trainings(rank, size, store, results):
    import warnings

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
    both = [trained_by_two[rank][name] for rank in range(2)]
    assert both[0][0].tobytes() == both[1][0].tobytes()
    found = torch.from_numpy(both[0][0])
    print(name, (found - weights).abs().max().item())
    torch.testing.assert_close(found, weights, rtol=0, atol=case.tolerance)
    assert both[0][1] == both[1][1]
    assert both[0][1] == pytest.approx(metrics, rel=1e-7, abs=1e-9)
