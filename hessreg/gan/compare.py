"""Several methods at equal cost, side by side."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hessreg.gan import pictures
from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.config import METHODS, TrainConfig
from hessreg.gan.data import Dataset, load_dataset
from hessreg.gan.metrics import Judge, reference_rows
from hessreg.gan.run import Interrupted, Run
from hessreg.gan.run_folder import RunFolder

__all__ = ["Comparison", "ComparisonError", "format_table"]

_INTERRUPTED = 130  # exit code of a run that saved its state after a signal
_COLUMNS = ("fdd", "classes", "precision", "recall", "coverage", "copies")


class ComparisonError(RuntimeError):
    """One of the compared runs did not finish."""


class Comparison:
    """Several methods trained with the same limit, seed and networks. Use `create`, then `train`.

    Each method runs in a process of its own, so that none shares threads, caches or random
    numbers with another, and in its own run folder ``path/method``.

    Args:
        path: Folder for the runs, ``comparison.png``, ``curves.png``, ``comparison.csv`` and
            ``comparison.json``.
        methods: Names from `METHODS`.
        dataset: Name of the data set.
        jobs: Methods to run at once. CPU time is what is limited, so this changes the wait only.
    """

    def __init__(self, path: Path, methods: Sequence[str], dataset: str, jobs: int = 1) -> None:
        self.path = path
        self.methods = list(methods)
        self.dataset = dataset
        self.jobs = jobs

    @classmethod
    def create(
        cls, path: Path, methods: Sequence[str], config: TrainConfig, jobs: int = 1
    ) -> Comparison:
        """Prepare one run for each method.

        Args:
            path: New folder, or that of an unfinished comparison with equal options.
            methods: Names from `METHODS`, each once.
            config: Everything else; its ``method`` is ignored.
            jobs: Methods to run at once.

        Raises:
            RunFolderError: If the folder has content or cannot be written.
            ValueError: If a method is unknown or named twice, or an option cannot be used.
        """
        _check_methods(methods)
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        for method in methods:
            _prepare(path / method, replace(config, method=cast(Any, method)))
        return cls(path, methods, config.dataset, jobs)

    def train(self) -> str:
        """Train all methods, evaluate and draw.

        Returns:
            A table with the methods and the reference rows, and what the pictures show.

        Raises:
            ComparisonError: If a run failed.
            Interrupted: If Ctrl-C was pressed; every run has saved its state.
        """
        _train_all(self.path, self.methods, self.jobs)
        rows = {method: RunFolder(self.path / method).read_result() for method in self.methods}
        dataset = load_dataset(self.dataset)
        references = reference_rows(Judge(dataset))
        _write_tables(self.path, {**rows, **references})
        _write_pictures(self.path, rows, dataset)
        return "\n".join([format_table(rows, references), "", _verdict(self.path, rows)])


def _check_methods(methods: Sequence[str]) -> None:
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods must be different names, got {', '.join(methods)!r}")


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


def _train_all(path: Path, methods: Sequence[str], jobs: int) -> None:
    children = _Children()

    def train(method: str) -> int:
        command = [sys.executable, "-m", "hessreg", "resume", str(path / method)]
        # Two bars would overwrite each other.
        code = children.run(command if jobs == 1 else [*command, "--plain"])
        if code == _INTERRUPTED:
            children.stop()
            raise KeyboardInterrupt
        return code

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(train, methods))
        except KeyboardInterrupt:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise Interrupted(f"stopped; continue with the same command and --out {path}") from None
    failed = [method for method, code in zip(methods, codes, strict=True) if code]
    if failed:
        raise ComparisonError(f"{', '.join(failed)} did not finish; see {path}")


def _write_tables(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    named = [{"name": name, **row} for name, row in rows.items()]
    write_atomically(path / "comparison.json", json.dumps(named, indent=2).encode())
    table = io.StringIO()
    writer = csv.DictWriter(
        table, ["name", *_COLUMNS, "steps", "cpu_seconds"], extrasaction="ignore"
    )
    writer.writeheader()
    writer.writerows(named)
    write_atomically(path / "comparison.csv", table.getvalue().encode())


def _write_pictures(path: Path, rows: dict[str, dict[str, Any]], dataset: Dataset) -> None:
    pictures.save_grid(path / "training.png", dataset.train_images[:64])
    titled = {"training images": path / "training.png"}
    for name, row in rows.items():
        titled[f"{name}: FDD {row['fdd']:.1f}"] = path / name / "samples.png"
    pictures.save_side_by_side(path / "comparison.png", titled)
    curves = {name: RunFolder(path / name).read_metrics() for name in rows}
    pictures.save_curves(path / "curves.png", curves)


def _verdict(path: Path, rows: dict[str, dict[str, Any]]) -> str:
    order = sorted(rows, key=lambda name: rows[name]["fdd"])
    ranking = " < ".join(f"{name} ({rows[name]['fdd']:.1f})" for name in order)
    return (
        f"Lowest FDD, one seed: {ranking}\n"
        f"{path / 'comparison.png'}: samples beside real images; {path / 'curves.png'}: losses,"
        f" Hessian norms and FDD against CPU time; {path / 'comparison.csv'} and .json: the numbers"
    )


def format_table(rows: dict[str, dict[str, Any]], references: dict[str, dict[str, float]]) -> str:
    """Return methods and reference rows as aligned text."""
    head = ["", "FDD", *_COLUMNS[1:], "steps", "CPU s"]
    body = [_cells(name, row) for name, row in (rows | references).items()]
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


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    shares = [f"{row[key]:.2f}" for key in ("precision", "recall", "coverage")]
    cost = [str(row["steps"]), f"{row['cpu_seconds']:.1f}"] if "steps" in row else ["", ""]
    return [
        name,
        f"{row['fdd']:.1f}",
        str(row["classes"]),
        *shares,
        f"{100 * row['copies']:.1f} %",
        *cost,
    ]
