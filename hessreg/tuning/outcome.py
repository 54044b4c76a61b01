"""What a search found: the best configuration, a table, pictures, and a test on fresh seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.compare import format_table
from hessreg.gan.config import TrainConfig, with_values
from hessreg.gan.intervals import confidence_interval
from hessreg.gan.tasks import make_task
from hessreg.tuning.space import SearchSpace
from hessreg.tuning.trial_run import TrialRun

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

__all__ = ["Outcome", "OutcomeError"]

_FRESH, _SECOND = 1_000_000, 500_000  # far from the seeds of trials and from each other
_RUNS = 2  # of each leader, beside its trial
_POLL = 0.2  # seconds


class OutcomeError(RuntimeError):
    """A run on a fresh seed did not finish."""


class Outcome:
    """The finished trials of a study.

    Args:
        path: Folder for ``best.yaml`` (or ``pareto-NUMBER.yaml`` with several objectives),
            ``trials.csv`` and pictures.
        study: The study.
        space: What was varied.
        objectives: Names of the metrics.
    """

    def __init__(
        self, path: Path, study: Study, space: SearchSpace, objectives: Sequence[str]
    ) -> None:
        self.path, self.study, self.space, self.objectives = path, study, space, objectives
        self._chosen: FrozenTrial | None = None

    @property
    def best(self) -> list[FrozenTrial]:
        """The best trial, or with several objectives those that none beats in all."""
        return [self._chosen] if self._chosen else self.study.best_trials

    def choose(self, leaders: int, workers: int) -> str:
        """Name the best of the leading trials by further runs: one is first by luck, too.

        Args:
            leaders: Trials with the best values, each of which is trained with two other seeds, the
                same for all; the value of its trial no longer counts. A run that fails is worse
                than all others.
            workers: Runs at once.

        Returns:
            What was found, a line for each leader.
        """
        trials = self._leaders(leaders)
        configs = {_name(trial): self.config_of(trial) for trial in trials}
        runs = self._train("leaders", configs, _SECOND, _RUNS, workers)
        found = {name: statistics.fmean(map(self._value, group)) for name, group in runs.items()}
        self._chosen = min(trials, key=lambda trial: self._sign * found[_name(trial)])
        name = self.objectives[0]
        lines = [
            f"trial {trial.number}: {name} {trial.values[0]:.4g},"
            f" {found[_name(trial)]:.4g} with {_RUNS} other seeds"
            for trial in trials
        ]
        return "\n".join(lines)

    def _value(self, run: TrialRun) -> float:
        value = run.result().get(self.objectives[0], math.nan) if run.is_finished else math.nan
        return value if math.isfinite(value) else self._sign * math.inf

    def _leaders(self, count: int) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        done = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        return sorted(done, key=lambda trial: self._sign * trial.values[0])[:count]

    @property
    def _sign(self) -> int:
        """1 if a smaller value is better, else -1."""
        from optuna.study import StudyDirection

        return 1 if self.study.direction == StudyDirection.MINIMIZE else -1

    def config_of(self, trial: FrozenTrial) -> TrainConfig:
        """Return the configuration of a trial, with the seed of the search."""
        return with_values(self.space.base, self.space.values_of(trial))

    def write(self) -> list[Path]:
        """Write configurations, table and pictures, and return their files."""
        several = len(self.objectives) > 1
        files = []
        for trial in self.best if several else self.best[:1]:
            file = self.path / (f"pareto-{trial.number}.yaml" if several else "best.yaml")
            write_atomically(file, _yaml(self.config_of(trial)))
            files.append(file)
        write_atomically(self.path / "trials.csv", self._table())
        return [*files, self.path / "trials.csv", *self._draw()]

    def describe(self) -> str:
        """Return the best values, and what made them, as text for people."""
        lines = []
        for trial in self.best if len(self.objectives) > 1 else self.best[:1]:
            values = zip(self.objectives, trial.values, strict=True)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values)
            chosen = self.space.values_of(trial)
            lines.append(f"trial {trial.number}: {shown}")
            lines += [f"  {name}: {value}" for name, value in chosen.items()]
        return "\n".join(lines)

    def confirm(self, seeds: int, workers: int) -> str:
        """Train the best configuration and the one the search started from on fresh seeds.

        Args:
            seeds: Of each.
            workers: Runs at once.

        Returns:
            A table with means and standard deviations, and by how much the best is better.

        Raises:
            OutcomeError: If a run does not finish.
        """
        best = self.best[0]
        configs = {"default": self.space.base, _name(best): self.config_of(best)}
        runs = self._train("confirm", configs, _FRESH, seeds, workers)
        task = make_task(self.space.base)
        judge = task.judge(task.load())
        for run in (run for group in runs.values() for run in group):
            if not run.is_finished:
                raise OutcomeError(f"{run.path} did not finish: {run.reason()}")
        pairs = zip(("default", "best"), runs.values(), strict=True)
        rows = {name: [run.result() for run in group] for name, group in pairs}
        return f"{format_table(rows, {}, judge.columns)}\n{self._gain(rows)}"

    def _gain(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """By how much the best beats the default with the same seeds, and whether by chance."""
        name, pairs = self.objectives[0], zip(rows["default"], rows["best"], strict=True)
        none = math.nan
        gains = [self._sign * (old.get(name, none) - new.get(name, none)) for old, new in pairs]
        if len(gains) == 1 or not all(map(math.isfinite, gains)):
            return f"gain in {name}: not known of one seed, or of values that are not finite"
        gain = confidence_interval(gains)
        verdict = "the best is better" if gain.mean > 0 else "the default is better"
        if gain.margin >= abs(gain.mean):
            verdict = "which may be chance"
        what = f"gain in {name} with each seed, mean and 95 % interval"
        return f"{what}: {gain.text('.2g')}: {verdict}"

    def _train(
        self,
        folder: str,
        configs: Mapping[str, TrainConfig],
        first: int,
        seeds: int,
        workers: int,
    ) -> dict[str, list[TrialRun]]:
        """Train each configuration with the same seeds, counted from the search's + ``first``."""
        runs: dict[str, list[TrialRun]] = {name: [] for name in configs}
        for index in range(seeds):
            for name, config in configs.items():
                seed = config.seed + first + index
                run = TrialRun((self.path / folder / f"{name}-{seed}").resolve())
                run.prepare(replace(config, seed=seed))
                runs[name].append(run)
        # By seeds: the load of the machine changes, and all should have as much of it.
        turns = zip(*runs.values(), strict=True)
        _finish_all([run for turn in turns for run in turn], workers)
        return runs

    def _table(self) -> bytes:
        names = [parameter.name for parameter in self.space.parameters]
        heads = ["number", "state", *self.objectives, "seconds", "reason", *names]
        text = io.StringIO()
        writer = csv.DictWriter(text, heads)
        writer.writeheader()
        for trial in self.study.get_trials(deepcopy=False):
            values = dict(zip(self.objectives, trial.values or [], strict=False))
            duration = trial.duration.total_seconds() if trial.duration else ""
            known = {"number": trial.number, "state": trial.state.name, "seconds": duration}
            reason = {"reason": trial.user_attrs.get("reason", "")}
            writer.writerow(known | values | reason | self.space.values_of(trial))
        return text.getvalue().encode()

    def _draw(self) -> list[Path]:
        """History, importances and parallel coordinates of the first objective."""
        import matplotlib as mpl
        from optuna.visualization import matplotlib as plots

        mpl.use("Agg")  # Optuna draws with pyplot, which would look for a screen
        name = self.objectives[0]
        target: Callable[[FrozenTrial], float] | None = None
        if len(self.objectives) > 1:
            target = _first_value
        makers: dict[str, Callable[..., Any]] = {
            "history.png": plots.plot_optimization_history,
            "parallel.png": plots.plot_parallel_coordinate,
            "importances.png": plots.plot_param_importances,
        }
        files = []
        for file, plot in makers.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Optuna, that its pictures are experimental
                axes = plot(self.study, target=target, target_name=name)
            files.append(_save(self.path / file, axes, max(10.0, len(self.space.parameters))))
        return files


def _name(trial: FrozenTrial) -> str:
    return f"trial-{trial.number}"


def _first_value(trial: FrozenTrial) -> float:
    return trial.values[0]


def _yaml(config: TrainConfig) -> bytes:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(config.to_dict())), sort_keys=False).encode()


def _save(file: Path, axes: Any, width: float) -> Path:
    import matplotlib.pyplot as plt

    figure = axes.figure
    figure.set_size_inches(width, 5)
    content = io.BytesIO()
    figure.savefig(content, dpi=120, bbox_inches="tight")
    plt.close(figure)
    write_atomically(file, content.getvalue())
    return file


def _finish_all(runs: Sequence[TrialRun], workers: int) -> None:
    """Run all to their ends, good or bad."""
    waiting: list[TrialRun] = list(runs)
    active: list[TrialRun] = []
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                active.append(waiting.pop(0))
            active = [run for run in active if run.poll() == "running"]
            time.sleep(_POLL)
    finally:
        for run in active:
            run.stop()
