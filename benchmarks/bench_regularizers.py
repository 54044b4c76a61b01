"""Times regularisers inside a training step, as ``python -m benchmarks.bench_regularizers``.

Every method of ``hessreg compare`` with the defaults of ``hessreg train``, at constant rates: the
same networks, batches and optimisers, so what differs is the method. The unit is the step without
any. R1 and WGAN-GP, which everyone uses, are the ones to compare with. Peaks of memory are those of
one step in a process that gives memory back at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.bench_training import several, step_work
from benchmarks.harness import Contest, Suite, run_suite
from benchmarks.processes import alone, giving_memory_back, peak_growth
from hessreg.gan import DEFAULTS, load_dataset
from hessreg.gan.building import build_trainer
from hessreg.gan.methods import with_method

PLAIN = "none"
STEPS = 16  # at a time: what is done every so many steps is done
METHODS = {  # what a row says -> the method, and options of it
    "R1": ("r1", {}),
    "R1 and R2": ("r1+r2", {}),
    "WGAN-GP": ("wasserstein+wgan_gp", {}),
    "iterative penalty": ("wasserstein+iterative", {}),
    "Gaussian kernel": ("gaussian", {}),
    "Hessian Penalty": ("hessian_penalty", {}),
    "HSN1R, every=1": ("hsn1r", {"hsn1r": {"every": 1}}),
    "HSN1R, every=16": ("hsn1r", {"hsn1r": {"every": 16}}),
    "HSC, generator, every=10": ("hsc", {}),
    "orthogonal, terms, with R1": ("orthogonal_terms+r1", {}),
    "orthogonal, previous": ("orthogonal_previous", {}),
}
_CHECKED_STEPS = 2


class Case(NamedTuple):
    """What is trained, and how."""

    dataset: str
    method: str

    def __str__(self) -> str:
        return f"{self.dataset}, {self.method}"


def trainer_of(dataset: str, method: str, device: str) -> Any:
    """The trainer of the command line, at constant rates."""
    name, changes = METHODS.get(method, (PLAIN, {}))
    config = replace(with_method(DEFAULTS[dataset], name), device=device)
    config.g, config.d = (replace(each, schedule="constant") for each in (config.g, config.d))
    for group, values in changes.items():
        setattr(config, group, replace(getattr(config, group), **values))
    return build_trainer(config, load_dataset(dataset))


class Regularizers(Suite):
    """Steps with regularisers against plain ones."""

    name = "regularizers"
    rounds = 12
    seconds = 3.0

    def cases(self) -> list[Case]:
        """All, or a cheap one."""
        if self.args.quick:
            return [Case("ring", "R1")]
        return [Case(dataset, method) for dataset in ("digits", "ring") for method in METHODS]

    def contest(self, case: Case) -> Contest:
        """The step with the method, and the one without."""
        trainers = {"hessreg": trainer_of(*case, self.device)}
        trainers[PLAIN] = trainer_of(case.dataset, PLAIN, self.device)
        for _ in range(_CHECKED_STEPS):
            trainers["hessreg"].step()
        weights = torch.nn.utils.parameters_to_vector(trainers["hessreg"].generator.parameters())
        if not weights.isfinite().all():
            raise ArithmeticError(f"{case}: weights are not finite")
        runs = {who: several(trainer.step, STEPS) for who, trainer in trainers.items()}
        work = step_work(several(trainers["hessreg"].step, STEPS), trainers["hessreg"])
        work = replace(work, bytes=STEPS * work.bytes)
        group = f"{STEPS} training steps on {case.dataset}"
        return Contest(group, case.method, runs, ["hessreg"], work, [PLAIN])

    def extras(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The peaks of memory, all in one other process."""
        if self.args.quick:
            return {}
        arguments = ["digits", "--device", self.device, "--threads", str(self.args.threads)]
        found = alone("benchmarks.bench_regularizers", arguments, giving_memory_back())
        for method, megabytes in found.items():
            print(f"  peak memory of a step on digits, {method}: {megabytes} MB", flush=True)
        return {"memory": found}


def peaks(dataset: str, device: str) -> dict[str, float]:
    """The most that a step needs beyond what was there before it, in MB, by method."""
    found = {}
    for method in (PLAIN, *METHODS):
        trainer = trainer_of(dataset, method, device)
        several(trainer.step, STEPS)()
        found[method] = round(peak_growth(several(trainer.step, STEPS), device) / 1e6, 2)
    return found


def main() -> None:
    """Runs every case, or measures memory in a process of its own."""
    if "--alone" not in sys.argv:
        return run_suite(Regularizers)
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(peaks(args.alone, args.device)))
    return None


if __name__ == "__main__":
    main()
