"""Times the trainer against hand-written loops, as ``python -m benchmarks.bench_training``.

The same networks, noise, batches, fused Adam and averaged generator, so the weights are the same
after it, which is checked first. ``by hand`` checks the losses and sums them for its log; ``by
hand, norms`` logs the norms of gradients and penalties, too, as the trainer does. And what a
checkpoint costs.
"""

from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.harness import measure, run_cases, save
from hessreg.gan import DEFAULTS, load_dataset
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import num_bytes, save_state

OURS = "hessreg"
STEPS = 20  # at a time
CHECKED = 5  # steps, before anything is timed
ASKED = 0.05  # of overhead, at most


class Case(NamedTuple):
    """What is trained."""

    dataset: str
    regularizer: str

    def __str__(self) -> str:
        return f"{self.dataset}, {self.regularizer}"


CASES = [Case(dataset, name) for dataset in ("digits", "ring") for name in ("none", "r1")]


def trainer_of(case: Case, device: str) -> Any:
    """The trainer of ``hessreg train`` with its defaults, at constant rates."""
    config = replace(DEFAULTS[case.dataset], regularizer=case.regularizer, device=device)
    config.g, config.d = (replace(each, schedule="constant") for each in (config.g, config.d))
    return build_trainer(config, load_dataset(case.dataset))


def batches(data: Tensor, size: int) -> Iterator[Tensor]:
    """Every sample once in each pass; what is left over starts the next one."""
    generator = torch.Generator().manual_seed(0)
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(len(data), generator=generator)])
        yield data[queue[:size]]
        queue = queue[size:]


class ByHand:
    """The loop that one would write for this case."""

    def __init__(self, case: Case, device: str, with_norms: bool) -> None:
        config = DEFAULTS[case.dataset]
        made = trainer_of(case, device)
        self.g, self.d, self.ema, self.data = (
            made.generator,
            made.discriminator,
            made.ema,
            made.data,
        )
        self.size, self.latent_dim = config.batch_size, config.latent_dim
        self.gamma = config.r1.gamma if case.regularizer == "r1" else None
        self.with_norms = with_norms
        self.noise = torch.Generator().manual_seed(0)
        self.batches = batches(self.data, self.size)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=player.lr, betas=(0.5, 0.999), fused=True)
            for network, player in ((self.g, config.g), (self.d, config.d))
        ]
        self.parameters = [list(self.g.parameters()), list(self.d.parameters())]
        self.averages = list(self.ema.parameters())
        self.steps_done = 0
        self.sums: dict[str, Tensor | float] = {}

    def draw(self) -> Tensor:
        """Noise."""
        shape = (self.size, self.latent_dim)
        return torch.randn(shape, generator=self.noise).to(self.data.device)

    def update(self, side: int, loss: Tensor, penalty: Tensor | None) -> None:
        """Differentiate, check, log and step."""
        total = loss if penalty is None else loss + penalty
        grads = torch.autograd.grad(total, self.parameters[side])
        logged = {f"loss{side}": loss}
        if self.with_norms:
            logged[f"norm{side}"] = torch.nn.utils.get_total_norm(grads)
            if penalty is not None:
                logged[f"penalty{side}"] = penalty
        if not torch.stack(list(logged.values())).isfinite().all():
            raise ArithmeticError(f"step {self.steps_done}: not finite")
        for name, value in logged.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        for parameter, grad in zip(self.parameters[side], grads, strict=True):
            parameter.grad = grad
        self.optimizers[side].step()

    def step(self) -> None:
        """One of the discriminator and one of the generator."""
        real = next(self.batches)
        with torch.no_grad():
            fake = self.g(self.draw())
        if self.gamma is not None:
            real = real.requires_grad_(True)
        on_real = self.d(real)
        loss = softplus(-on_real).mean() + softplus(self.d(fake)).mean()
        penalty = None
        if self.gamma is not None:
            (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            penalty = 0.5 * self.gamma * slope.flatten(1).square().sum(1).mean()
        self.update(1, loss, penalty)
        self.update(0, softplus(-self.d(self.g(self.draw()))).mean(), None)
        decay = min(0.999, (1 + self.steps_done) / (10 + self.steps_done))
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.parameters[0], strict=True):
                average.lerp_(parameter, 1.0 - decay)
        self.steps_done += 1


def several(step: Callable[[], None]) -> Callable[[], None]:
    """So many steps at once."""

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def check_same(case: Case, device: str) -> None:
    """All make the same networks of the same start."""
    ours = trainer_of(case, device)
    theirs = [ByHand(case, device, with_norms) for with_norms in (False, True)]
    for each in (ours, *theirs):
        for _ in range(CHECKED):
            each.step()
    for each in theirs:
        for a, b in zip(ours.ema.parameters(), each.ema.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def run(case: Case, rounds: int, device: str) -> dict[str, Any]:
    """Checks and measures one case."""
    check_same(case, device)
    made = trainer_of(case, device)
    runs = {
        OURS: several(made.step),
        "by hand": several(ByHand(case, device, with_norms=False).step),
        "by hand, norms": several(ByHand(case, device, with_norms=True).step),
    }
    times = measure(runs, rounds=rounds, device=device, cold=False)
    each = {who: {k: v / STEPS for k, v in t.items()} for who, t in times.items()}
    ours = each[OURS]["median"]
    overhead = {who: ours / t["median"] - 1 for who, t in each.items() if who != OURS}
    return {
        **case._asdict(),
        "milliseconds": each,
        "overhead": overhead,
        "checkpoint": checkpoint(made, rounds),
    }


def checkpoint(trainer: Any, rounds: int) -> dict[str, float]:
    """What saving takes, in milliseconds, and in memory as multiples of what is saved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        times = measure(
            {"save": lambda: save_state(path, trainer.state_dict())},
            rounds=rounds,
            device="cpu",
            cold=False,
        )
        tracemalloc.start()
        save_state(path, trainer.state_dict())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    size = num_bytes(trainer.state_dict())
    return {"milliseconds": times["save"]["median"], "bytes": size, "python bytes": peak}


def show(result: dict[str, Any]) -> None:
    """Prints one case as a table."""
    print(f"\na step on {result['dataset']}, {result['regularizer']}")
    for who, times in result["milliseconds"].items():
        note = "" if who == OURS else f"we take {100 * result['overhead'][who]:+.1f} %"
        spread = f"({times['low']:.3f} - {times['high']:.3f})"
        print(f"  {who:16s} {times['median']:7.3f} ms {spread:18s} {note}")
    saved = result["checkpoint"]
    print(f"  a checkpoint of {saved['bytes'] / 1e3:.0f} kB: {saved['milliseconds']:.1f} ms")


def requirements(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for."""
    return [
        {
            "what": f"overhead of the trainer, {case['dataset']}, {case['regularizer']}",
            "asked": 100 * ASKED,
            "measured": 100 * case["overhead"]["by hand, norms"],
            "unit": "%",
        }
        for case in cases
    ]


def main() -> None:
    """Runs every case."""
    args, card, cases = run_cases(__doc__.splitlines()[0], CASES, run, show)
    if args.json:
        found = {"cases": cases, "requirements": requirements(cases)}
        save(args.json, {"machine": card, "threads": args.threads, "training": found})


if __name__ == "__main__":
    main()
