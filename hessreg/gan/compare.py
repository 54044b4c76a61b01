"""Several methods at equal cost, side by side."""

from __future__ import annotations

import csv
import io
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hessreg.gan import pictures
from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.config import TrainConfig
from hessreg.gan.convergence import Convergence
from hessreg.gan.data import subset
from hessreg.gan.fid import COLUMNS
from hessreg.gan.intervals import confidence_interval
from hessreg.gan.methods import with_method
from hessreg.gan.metrics import Judge
from hessreg.gan.run import Interrupted, Run
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.tasks import make_task

__all__ = ["Comparison", "ComparisonError", "format_cell", "format_table"]

Row = dict[str, Any]
Rows = dict[str, list[Row]]  # of each method one for each seed

_SHOWN = 2000  # samples in a picture, at most
_INTERRUPTED = 130  # exit code of a run that saved its state after a signal


class ComparisonError(RuntimeError):
    """One of the compared runs did not finish."""


class Comparison:
    """Several methods, the same limit and networks, over some seeds. Use `create`, then `train`.

    Each runs in a process of its own, so that none shares threads, caches or random
    numbers with another, and in its own run folder ``path/name``, or with several seeds
    ``path/name-seed``.

    Args:
        path: Folder for the runs, ``comparison.png``, ``curves.png``, ``comparison.csv``,
            ``comparison.json`` and, of several seeds, ``convergence.png`` and ``convergence.csv``.
        methods: As `with_method` takes them.
        config: Everything else.
        seeds: Of the runs of each method.
        jobs: Runs at once. CPU time is what is limited, so this changes the wait only.
    """

    def __init__(
        self,
        path: Path,
        methods: Sequence[str],
        config: TrainConfig,
        seeds: Sequence[int] = (0,),
        jobs: int = 1,
    ) -> None:
        self.path = path
        self.config = config
        self.jobs = jobs
        several = len(seeds) > 1
        self._folders = {
            method: {seed: path / _folder_name(method, seed if several else None) for seed in seeds}
            for method in methods
        }

    @classmethod
    def create(
        cls,
        path: Path,
        methods: Sequence[str],
        config: TrainConfig,
        seeds: Sequence[int] = (),
        jobs: int = 1,
    ) -> Comparison:
        """Prepare the runs.

        Args:
            path: New folder, or that of an unfinished comparison with equal options.
            methods: As `with_method` takes them, each once.
            config: Everything else.
            seeds: Of the runs of each method; that of the configuration by default.
            jobs: Runs at once.

        Raises:
            RunFolderError: If the folder has content or cannot be written.
            ValueError: If a name or a seed is unknown or given twice, or an option cannot be used.
        """
        seeds = list(seeds) or [config.seed]
        for what, given in {"methods": methods, "seeds": seeds}.items():
            if not given or len(set(given)) < len(given):
                named = ", ".join(map(str, given))
                raise ValueError(f"{what} must be different, and at least one, got {named!r}")
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        comparison = cls(path, methods, config, seeds, jobs)
        chosen = {method: with_method(config, method) for method in methods}
        runs = {
            folder: replace(chosen[method], seed=seed)
            for method, folders in comparison._folders.items()
            for seed, folder in folders.items()
        }
        for folder, own in runs.items():
            _prepare(folder, own)
        return comparison

    def train(self) -> str:
        """Train all, evaluate and draw.

        Returns:
            A table with the runs and the reference rows, and what the pictures show.

        Raises:
            ComparisonError: If a run failed.
            Interrupted: If Ctrl-C was pressed; every run has saved its state.
        """
        folders = [folder for by_seed in self._folders.values() for folder in by_seed.values()]
        unfinished = [folder for folder in folders if not (folder / "result.json").exists()]
        _train_all(self.path, unfinished, self.jobs)
        rows = {
            method: [RunFolder(folder).read_result() for folder in by_seed.values()]
            for method, by_seed in self._folders.items()
        }
        task = make_task(self.config)
        dataset = task.load()
        judge = task.judge(dataset)
        references = judge.reference_rows()
        measured = [row for of_seeds in rows.values() for row in of_seeds]
        further = {k: v for k, v in COLUMNS.items() if all(k in row for row in measured)}
        columns = {**judge.columns, **further}
        _write_tables(self.path, rows, references, columns)
        shown = torch.arange(min(_SHOWN, len(dataset.train_samples)))
        task.draw(self.path / "training.png", subset(dataset.train_samples, shown))
        first = {method: next(iter(each.values())) for method, each in self._folders.items()}
        _write_pictures(self.path, first, rows, judge)
        table = format_table(rows, references, columns)
        return "\n".join([table, "", *self._convergence(judge), _verdict(self.path, rows, judge)])

    def _convergence(self, judge: Judge) -> list[str]:
        """Lines with the headline's metric in the course of training, of several seeds."""
        if len(next(iter(self._folders.values()))) == 1:
            return []
        runs = {
            method: [RunFolder(folder).read_metrics() for folder in by_seed.values()]
            for method, by_seed in self._folders.items()
        }
        heading = judge.columns[judge.headline]
        found = Convergence.of(runs, judge.headline, *heading, self.config.eval_every)
        found.save(self.path)
        said = f"{heading[0]} on the way, with 95 % intervals ({self.path / 'convergence.png'}):"
        return [said, *_aligned(found.table()), ""]


def _folder_name(method: str, seed: int | None) -> str:
    name = method.replace("/", "_")
    return name if seed is None else f"{name}-{seed}"


def _prepare(path: Path, config: TrainConfig) -> None:
    """Make a run for a process of its own, unless it is there already."""
    if (path / "config.yaml").exists() and RunFolder(path).read_config() == config:
        return
    Run.create(path, config).close()


class _Children:
    """Processes that end together: after `stop` none is started any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end and return its exit code."""
        with self._lock:
            if self._stopping.is_set():
                return _INTERRUPTED
            process = subprocess.Popen(command)  # noqa: S603
            self._processes.append(process)
        return process.wait()

    def stop(self) -> None:
        """Tell all processes to save their states and end."""
        self._stopping.set()
        with self._lock:
            for process in self._processes:
                process.terminate()


def _train_all(path: Path, folders: Sequence[Path], jobs: int) -> None:
    children = _Children()

    def train(folder: Path) -> int:
        command = [sys.executable, "-m", "hessreg", "resume", str(folder)]
        # Two bars would overwrite each other.
        code = children.run(command if jobs == 1 else [*command, "--plain"])
        if code == _INTERRUPTED:
            children.stop()
            raise KeyboardInterrupt
        return code

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(train, folders))
        except KeyboardInterrupt:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise Interrupted(f"stopped; continue with the same command and --out {path}") from None
    failed = [folder.name for folder, code in zip(folders, codes, strict=True) if code]
    if failed:
        raise ComparisonError(f"{', '.join(failed)} did not finish; see {path}")


def _write_tables(
    path: Path, rows: Rows, references: dict[str, Row], columns: Iterable[str]
) -> None:
    runs = [{"name": name, **row} for name, of_seeds in rows.items() for row in of_seeds]
    named = runs + [{"name": name, **row} for name, row in references.items()]
    write_atomically(path / "comparison.json", json.dumps(named, indent=2).encode())
    table = io.StringIO()
    names = ["name", "seed", *columns, "steps", "cpu_seconds"]
    writer = csv.DictWriter(table, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(named)
    write_atomically(path / "comparison.csv", table.getvalue().encode())


def _write_pictures(path: Path, folders: Mapping[str, Path], rows: Rows, judge: Judge) -> None:
    """Samples and curves of each method's first seed."""
    heading, form = judge.columns[judge.headline]
    titled = {"training data": path / "training.png"}
    for name, folder in folders.items():
        value = rows[name][0][judge.headline]
        titled[f"{name}: {heading} {value:{form}}"] = folder / "samples.png"
    pictures.save_side_by_side(path / "comparison.png", titled)
    curves = {name: RunFolder(folder).read_metrics() for name, folder in folders.items()}
    pictures.save_curves(path / "curves.png", curves, (judge.headline, heading))


def _verdict(path: Path, rows: Rows, judge: Judge) -> str:
    heading, form = judge.columns[judge.headline]
    found = {
        name: confidence_interval([row[judge.headline] for row in of_seeds])
        for name, of_seeds in rows.items()
    }
    count = len(next(iter(rows.values())))
    ranking = " < ".join(
        f"{name} ({each.mean:{form}})" if count == 1 else f"{name} ({each.text(form)})"
        for name, each in sorted(found.items(), key=lambda item: item[1].mean)
    )
    over = "one seed" if count == 1 else f"mean over {count} seeds with its 95 % interval"
    shown = "" if count == 1 else " of the first seed"
    return (
        f"Lowest {heading}, {over}: {ranking}\n"
        f"{path / 'comparison.png'}: samples{shown} beside real data; {path / 'curves.png'}:"
        f" losses, penalties and {heading}{shown} against CPU time;"
        f" {path / 'comparison.csv'} and .json: the numbers"
    )


def format_table(
    rows: Rows, references: dict[str, Row], columns: Mapping[str, tuple[str, str]]
) -> str:
    """Return runs and reference rows as aligned text, with a judge's columns.

    Args:
        rows: Of each method the runs; several are shown as mean and standard deviation.
        references: A row for each of those below the line.
        columns: Heading and format by name.
    """
    head = ["", *(heading for heading, _ in columns.values()), "steps", "CPU s"]
    singles = {name: [row] for name, row in references.items()}
    body = [_cells(name, group, columns) for name, group in (rows | singles).items()]
    lines = _aligned([head, *body])
    if references:
        lines.insert(1 + len(rows), "-" * len(lines[0]))
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pairs = [list(zip(line, widths, strict=True)) for line in table]
    return [
        "  ".join([line[0][0].ljust(line[0][1]), *(cell.rjust(width) for cell, width in line[1:])])
        for line in pairs
    ]


def _cells(name: str, runs: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """Of references some are empty."""
    forms = {key: form for key, (_, form) in columns.items()}
    forms |= {"steps": ".0f", "cpu_seconds": ".1f"}
    shown = [format_cell(runs, k, form) if k in runs[0] else "" for k, form in forms.items()]
    return [name, *shown]


def format_cell(runs: Sequence[Row], key: str, form: str) -> str:
    """Return a value of one run, or mean and standard deviation over several."""
    if len(runs) == 1:
        return f"{runs[0][key]:{form}}"
    spread = statistics.stdev(run[key] for run in runs)
    form = ".1f" if form == "d" else form  # a mean of counts is none
    return f"{_mean(runs, key):{form}} ± {spread:{form}}"


def _mean(runs: Sequence[Row], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)
