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

from benchmarks.harness import Contest, Runs, Suite, measure, run_suite
from benchmarks.limits import Work, counted_work
from hessreg.gan import DEFAULTS, load_dataset
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import num_bytes, save_state

OURS = "hessreg"
STEPS = 20  # at a time
CHECKED = 5  # steps, before anything is timed


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
            torch.optim.Adam(
                network.parameters(), lr=player.lr, betas=(player.beta1, player.beta2), fused=True
            )
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


def several(step: Callable[[], None], steps: int = STEPS) -> Callable[[], None]:
    """So many steps at once."""

    def run() -> None:
        for _ in range(steps):
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


HAND, LOGGING = "by hand", "by hand, norms"


def checkpoint(trainer: Any, rounds: int) -> dict[str, float]:
    """What saving takes, in milliseconds, and in memory as multiples of what is saved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save = {"save": lambda: save_state(path, trainer.state_dict())}
        times = measure(save, rounds=rounds, device="cpu", cold=False)
        tracemalloc.start()
        save_state(path, trainer.state_dict())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    size = num_bytes(trainer.state_dict())
    return {"milliseconds": times["save"]["median"], "bytes": size, "python bytes": peak}


def step_work(step: Callable[[], None], trainer: Any) -> Work:
    """The products of torch in a step, and the weights, which are read and written."""
    networks = (trainer.generator, trainer.discriminator, trainer.ema)
    return counted_work(step, [p for network in networks for p in network.parameters()])


class Training(Suite):
    """A step of the trainer."""

    name = "training"
    rounds = 40
    seconds = 3.0

    def cases(self) -> list[Case]:
        """All, or one."""
        return CASES[: 1 if self.args.quick else None]

    def contest(self, case: Case) -> Contest:
        """Checks that all make the same networks."""
        check_same(case, self.device)
        made = trainer_of(case, self.device)
        hands = {name: ByHand(case, self.device, name == LOGGING) for name in (HAND, LOGGING)}
        everyone: Runs = {OURS: several(made.step)}
        everyone |= {name: several(hand.step) for name, hand in hands.items()}
        runs = self.admitted(everyone, [OURS])
        work = step_work(hands[HAND].step, made)
        return Contest(
            f"{STEPS} training steps",
            str(case),
            runs,
            [OURS],
            replace(work, bytes=STEPS * work.bytes, flops=STEPS * work.flops),
            notes={"checkpoint": checkpoint(made, min(self.args.rounds, 20))},
        )


if __name__ == "__main__":
    run_suite(Training)
