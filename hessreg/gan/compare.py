"""Several regularisers at equal cost, side by side."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from hessreg.gan import pictures
from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.config import TrainConfig
from hessreg.gan.metrics import Judge
from hessreg.gan.run import Interrupted, Run
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.tasks import TASKS

__all__ = ["Comparison", "ComparisonError", "format_table"]

_INTERRUPTED = 130  # exit code of a run that saved its state after a signal


class ComparisonError(RuntimeError):
    """One of the compared runs did not finish."""


class Comparison:
    """Several regularisers, the same limit, seed and networks. Use `create`, then `train`.

    Each runs in a process of its own, so that none shares threads, caches or random
    numbers with another, and in its own run folder ``path/name``.

    Args:
        path: Folder for the runs, ``comparison.png``, ``curves.png``, ``comparison.csv`` and
            ``comparison.json``.
        regularizers: What `TrainConfig.regularizer` may be.
        dataset: Name of the data set.
        jobs: Runs at once. CPU time is what is limited, so this changes the wait only.
    """

    def __init__(
        self, path: Path, regularizers: Sequence[str], dataset: str, jobs: int = 1
    ) -> None:
        self.path = path
        self.regularizers = list(regularizers)
        self.dataset = dataset
        self.jobs = jobs

    @classmethod
    def create(
        cls, path: Path, regularizers: Sequence[str], config: TrainConfig, jobs: int = 1
    ) -> Comparison:
        """Prepare one run for each.

        Args:
            path: New folder, or that of an unfinished comparison with equal options.
            regularizers: What `TrainConfig.regularizer` may be, each once.
            config: Everything else; its ``regularizer`` is ignored.
            jobs: Runs at once.

        Raises:
            RunFolderError: If the folder has content or cannot be written.
            ValueError: If a name is unknown or given twice, or an option cannot be used.
        """
        if not regularizers or len(set(regularizers)) < len(regularizers):
            named = ", ".join(regularizers)
            raise ValueError(f"regularizers must be different names, got {named!r}")
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        for each in [replace(config, regularizer=name) for name in regularizers]:
            _prepare(path / each.regularizer, each)
        return cls(path, regularizers, config.dataset, jobs)

    def train(self) -> str:
        """Train all, evaluate and draw.

        Returns:
            A table with the runs and the reference rows, and what the pictures show.

        Raises:
            ComparisonError: If a run failed.
            Interrupted: If Ctrl-C was pressed; every run has saved its state.
        """
        _train_all(self.path, self.regularizers, self.jobs)
        rows = {name: RunFolder(self.path / name).read_result() for name in self.regularizers}
        task = TASKS[self.dataset]
        dataset = task.load()
        judge = task.judge(dataset)
        references = judge.reference_rows()
        _write_tables(self.path, {**rows, **references}, judge)
        task.draw(self.path / "training.png", dataset.train_samples)
        _write_pictures(self.path, rows, judge)
        table = format_table(rows, references, judge.columns)
        return "\n".join([table, "", _verdict(self.path, rows, judge)])


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


def _train_all(path: Path, regularizers: Sequence[str], jobs: int) -> None:
    children = _Children()

    def train(regularizer: str) -> int:
        command = [sys.executable, "-m", "hessreg", "resume", str(path / regularizer)]
        # Two bars would overwrite each other.
        code = children.run(command if jobs == 1 else [*command, "--plain"])
        if code == _INTERRUPTED:
            children.stop()
            raise KeyboardInterrupt
        return code

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(train, regularizers))
        except KeyboardInterrupt:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise Interrupted(f"stopped; continue with the same command and --out {path}") from None
    failed = [regularizer for regularizer, code in zip(regularizers, codes, strict=True) if code]
    if failed:
        raise ComparisonError(f"{', '.join(failed)} did not finish; see {path}")


def _write_tables(path: Path, rows: dict[str, dict[str, Any]], judge: Judge) -> None:
    named = [{"name": name, **row} for name, row in rows.items()]
    write_atomically(path / "comparison.json", json.dumps(named, indent=2).encode())
    table = io.StringIO()
    names = ["name", *judge.columns, "steps", "cpu_seconds"]
    writer = csv.DictWriter(table, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(named)
    write_atomically(path / "comparison.csv", table.getvalue().encode())


def _write_pictures(path: Path, rows: dict[str, dict[str, Any]], judge: Judge) -> None:
    heading, form = judge.columns[judge.headline]
    titled = {"training data": path / "training.png"}
    for name, row in rows.items():
        titled[f"{name}: {heading} {row[judge.headline]:{form}}"] = path / name / "samples.png"
    pictures.save_side_by_side(path / "comparison.png", titled)
    curves = {name: RunFolder(path / name).read_metrics() for name in rows}
    pictures.save_curves(path / "curves.png", curves, (judge.headline, heading))


def _verdict(path: Path, rows: dict[str, dict[str, Any]], judge: Judge) -> str:
    heading, form = judge.columns[judge.headline]
    order = sorted(rows, key=lambda name: rows[name][judge.headline])
    ranking = " < ".join(f"{name} ({rows[name][judge.headline]:{form}})" for name in order)
    return (
        f"Lowest {heading}, one seed: {ranking}\n"
        f"{path / 'comparison.png'}: samples beside real data; {path / 'curves.png'}: losses,"
        f" regularisers and {heading} against CPU time; {path / 'comparison.csv'} and .json: the"
        " numbers"
    )


def format_table(
    rows: dict[str, dict[str, Any]],
    references: dict[str, dict[str, float]],
    columns: Mapping[str, tuple[str, str]],
) -> str:
    """Return runs and reference rows as aligned text, with a judge's columns."""
    head = ["", *(heading for heading, _ in columns.values()), "steps", "CPU s"]
    body = [_cells(name, row, columns) for name, row in (rows | references).items()]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in [head, *body]
    ]
    lines.insert(1 + len(rows), "-" * len(lines[0]))
    return "\n".join(lines)


def _cells(name: str, row: dict[str, Any], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    cost = [str(row["steps"]), f"{row['cpu_seconds']:.1f}"] if "steps" in row else ["", ""]
    return [name, *(f"{row[key]:{form}}" for key, (_, form) in columns.items()), *cost]
