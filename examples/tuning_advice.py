"""What guides to the training of GANs advise, measured: each piece of advice with and without it.

    python examples/tuning_advice.py --seconds 8 --seeds 3 --out runs/advice

Prints a table in markdown. All runs are of one length in CPU time and take turns, so that a busy
hour of the machine is everybody's. Called again with the same options it goes on where it
was stopped. Advice is confirmed, or wrong here, where the 95 % interval of the
difference of means with and without it, by the pooled variance (Student's t), leaves out 0.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

from hessreg.gan import DEFAULTS, TrainConfig
from hessreg.gan.config import with_values
from hessreg.gan.progress import SilentProgress
from hessreg.gan.run import Run
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.tasks import make_task
from hessreg.gan.trainer import NonFiniteError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Advice:
    """What to do, and what is done without it: values of options, none for the defaults."""

    text: str
    followed: Values = field(default_factory=dict)
    ignored: Values = field(default_factory=dict)


def both(name: str, value: Any) -> dict[str, Any]:
    """An option of both networks."""
    return {f"g.{name}": value, f"d.{name}": value}


ADVICE = [
    Advice("a small classic rate", both("lr", 2e-4)),
    Advice("a faster generator", {"ttur": "g2"}),
    Advice("a faster discriminator", {"ttur": "d2"}),
    Advice("rates that fall (linear)", both("schedule", "linear"), both("schedule", "constant")),
    Advice("rates that fall (cosine)", both("schedule", "cosine"), both("schedule", "constant")),
    Advice("batches of 32", {"batch_size": 32}),
    Advice("batches of 128", {"batch_size": 128}),
    Advice("batches of their own", {"g.batch_size": 32, "d.batch_size": 128}),
    Advice("batches that grow", {"batch_size": 32, "growth.factor": 2, "growth.every": 700}),
    Advice("little momentum", both("beta1", 0.5), both("beta1", 0.9)),
    Advice("RMSprop", both("optimizer", "rmsprop")),
    Advice("L2", both("weight_decay", 1e-4)),
    Advice("L1", both("l1", 1e-5)),
    Advice("dropout", {"d.dropout": 0.2}),
    Advice("gradient clipping", both("clip", 1.0)),
    Advice("smooth labels, one side", {"label_smoothing": 0.1}),
    Advice("two discriminator steps", {"discriminator_steps": 2}),
    Advice("least squares", {"loss": "least_squares"}),
    Advice("hinge", {"loss": "hinge"}),
    Advice("Wasserstein", {"loss": "wasserstein", "regularizer": "wgan_gp"}),
    Advice("a gradient penalty", {"regularizer": "r1"}, {"regularizer": "none"}),
    Advice("a stronger penalty", {"r1.gamma": 5.0}),
    Advice(
        "spectral normalisation",
        {"regularizer": "none", "d.spectral_norm": True},
        {"regularizer": "none"},
    ),
    Advice("noise on samples", {"instance_noise.std": 0.1, "instance_noise.steps": 2000}),
    Advice("uniform noise", {"latent": "uniform"}),
    Advice("more noise components", {"latent_dim": 64}),
    Advice("leaky ReLU", {"activation": "leaky_relu"}),
    Advice("normal initial weights", {"initialization": "normal"}),
]


def shown(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not math.isfinite(sum(values)):
        return "not finite"
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.2g}"


def verdict(followed: Sequence[float], ignored: Sequence[float]) -> str:
    """What the values of a metric say of the advice, if a smaller one is better."""
    better = sum(followed) / len(followed) < sum(ignored) / len(ignored)
    is_finite = math.isfinite(sum(followed) + sum(ignored))
    if math.isinf(sum(followed)) and math.isinf(sum(ignored)):
        return "no effect"
    if is_finite and not stats.ttest_ind(followed, ignored).pvalue < 0.05:
        return "no effect"
    return "confirmed" if better else "wrong here"


def flags(values: Values) -> str:
    """Options of `hessreg train`."""
    return " ".join(f"--{name} {value}" for name, value in values.items())


class Table:
    """Runs of some pieces of advice on some data sets.

    Args:
        out: Folder of the runs.
        bases: Configuration of each data set that is varied.
        advice: The rows.
        seeds: Runs of each configuration; the defaults, with which most are compared, get twice
            as many.
    """

    def __init__(
        self, out: Path, bases: Mapping[str, TrainConfig], advice: Sequence[Advice], seeds: int
    ) -> None:
        self.out, self.bases, self.advice, self.seeds = out, bases, advice, seeds

    def train(self) -> None:
        """Train what is not there yet, every configuration with a seed before the next seed."""
        runs: list[tuple[int, Values]] = []
        for seed in range(self.seeds):
            runs += [(self.seeds + seed, {}), *((seed, values) for values in self._ways())]
        for done, (seed, values) in enumerate(runs, 1):
            for dataset in self.bases:
                print(f"{done} of {len(runs)}: {dataset} {flags(values)}", flush=True)
                self._train(dataset, values, seed)

    def markdown(self) -> str:
        """Return the table."""
        metrics = {name: make_task(base) for name, base in self.bases.items()}
        names = {name: task.judge(task.load()).headline for name, task in metrics.items()}
        heads = [f"{data}: {metric} with | without | " for data, metric in names.items()]
        lines = [f"| advice | with | without | {' | '.join(heads)} |"]
        lines.append("|" + "---|" * (3 + 3 * len(names)))
        for each in self.advice:
            cells = [each.text, *(f"`{flags(v)}`" if v else "" for v in self._pair(each))]
            for dataset, metric in names.items():
                samples = [self._sample(dataset, values, metric) for values in self._pair(each)]
                cells += [*map(shown, samples), verdict(*samples)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _pair(self, advice: Advice) -> tuple[Values, Values]:
        return advice.followed, advice.ignored

    def _ways(self) -> list[Values]:
        """All configurations once, the defaults first."""
        ways: list[Values] = [{}]
        for values in (values for each in self.advice for values in self._pair(each)):
            if values not in ways:
                ways.append(values)
        return ways

    def _config(self, dataset: str, values: Values, seed: int) -> TrainConfig:
        return replace(with_values(self.bases[dataset], values), seed=seed)

    def _folder(self, dataset: str, values: Values, seed: int) -> Path:
        """Values that a data set has anyway are its defaults."""
        is_default = self._config(dataset, values, seed) == self._config(dataset, {}, seed)
        chosen = ",".join(f"{name}={value}" for name, value in values.items())
        return self.out / dataset / ("default" if is_default else chosen) / str(seed)

    def _train(self, dataset: str, values: Values, seed: int) -> None:
        folder = self._folder(dataset, values, seed)
        config = self._config(dataset, values, seed)
        if (folder / "result.json").exists() or (folder / "failed").exists():
            return
        begun = (folder / "config.yaml").exists() and RunFolder(folder).read_config() == config
        run = Run.resume(folder) if begun else Run.create(folder, config)
        try:
            run.train(SilentProgress())
        except NonFiniteError as error:
            (folder / "failed").write_text(str(error), encoding="utf-8")

    def _sample(self, dataset: str, values: Values, metric: str) -> list[float]:
        is_default = self._folder(dataset, values, 0) == self._folder(dataset, {}, 0)
        folders = [
            self._folder(dataset, values, seed)
            for seed in range(2 * self.seeds if is_default else self.seeds)
        ]
        return [_metric(folder, metric) for folder in folders]


def _metric(folder: Path, name: str) -> float:
    if (folder / "failed").exists():
        return math.inf
    return float(RunFolder(folder).read_result()[name])


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", default="ring,digits", help="data sets, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="CPU time of each run")
    parser.add_argument("--steps", type=int, default=0, help="a limit of steps in place of it")
    parser.add_argument("--rows", type=int, default=len(ADVICE), help="only the first so many")
    parser.add_argument(
        "--base", type=_option, nargs="+", default=[], metavar="NAME=VALUE", help="other defaults"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, for an interval, got {options.seeds}")
    seconds = 0.0 if options.steps else options.seconds
    limits = {"steps": options.steps, "seconds": seconds, "tensorboard": False}
    rarely = {"eval_every": 10**6, "save_every": 10**6}  # neither is what is measured
    fixed = dict(options.base) | limits | rarely
    bases = {name: with_values(DEFAULTS[name], fixed) for name in options.data.split(",")}
    table = Table(options.out, bases, ADVICE[: options.rows], options.seeds)
    table.train()
    print(table.markdown())


if __name__ == "__main__":
    main(sys.argv[1:])
