"""``hessreg report``: one self-contained HTML page that compares runs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.compare import format_cell
from hessreg.gan.config import DEFAULTS, TrainConfig, flatten
from hessreg.gan.fid import COLUMNS
from hessreg.gan.html import Html, Series, element, line_chart, page, picture, table
from hessreg.gan.metrics import ImageJudge, Judge, PrincipalJudge
from hessreg.gan.mixtures import MixtureJudge
from hessreg.gan.run_folder import RunFolder, RunFolderError
from hessreg.gan.tasks import make_task

__all__ = ["ReportedRun", "command_of", "find_runs", "write_report"]

_COST = {"steps": ("steps", ".0f"), "cpu_seconds": ("CPU s", ".1f")}
_SIDES = {"g": "generator", "d": "discriminator"}
_OF_A_NETWORK = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "hessian_norm": "Hessian norm",
    "penalty": "penalties",
    "hessian_smallest": "smallest eigenvalue of the Hessian",
    "hessian_largest": "largest eigenvalue of the Hessian",
    "angle": "angle of gradients, degrees,",
    "angle_after": "angle of gradients after projection, degrees,",
}
_TITLES = {"fdd": "FDD", "modes": "modes", "quality": "quality", "mmd": "MMD", "tv": "TV"} | {
    f"{key}_{side}": f"{title} of the {name}"
    for key, title in _OF_A_NETWORK.items()
    for side, name in _SIDES.items()
}
_JUDGES = ImageJudge, PrincipalJudge, MixtureJudge
_NONE = "-"
_NOT_DRAWN = {"step", "cpu_seconds", "kid_std"}
_PICTURES = {
    "samples.png": ("Samples", "Samples of the averaged generator"),
    "interpolation.png": ("Between samples", "Samples on ways between noise vectors"),
    "spectral_density.png": ("Spectra of the Hessians", "Spectral densities of both Hessians"),
    "kernel.png": ("Kernel matrices", "Gaussian kernel matrix of real and generated samples"),
}
_MADE_WITH = ("hessreg", "torch", "python", "device", "threads")


@dataclass(frozen=True)
class ReportedRun:
    """What the folder of a run holds.

    Attributes:
        folder: The folder.
        config: What was trained.
        rows: Of ``metrics.jsonl``.
        result: Of ``result.json``; None if the run did not finish.
    """

    folder: RunFolder
    config: TrainConfig
    rows: list[dict[str, float]]
    result: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> ReportedRun:
        """Read a run folder; the run may be going on.

        Raises:
            RunFolderError: If a file in it is missing or damaged.
        """
        folder = RunFolder(path)
        return cls(folder, folder.read_config(), folder.read_metrics(), _result(folder))

    @property
    def values(self) -> dict[str, Any]:
        """The result, or the last value of everything logged so far."""
        if self.result is not None:
            return self.result
        return {key: value for row in self.rows for key, value in row.items()} | self._progress

    @property
    def _progress(self) -> dict[str, Any]:
        last = self.rows[-1] if self.rows else {"step": 0, "cpu_seconds": 0.0}
        return {"steps": last["step"], "cpu_seconds": last["cpu_seconds"], "seed": self.config.seed}


def _result(folder: RunFolder) -> dict[str, Any] | None:
    try:
        result = folder.read_result()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RunFolderError(f"{folder.path / 'result.json'} is damaged: {reason}") from None
    if not isinstance(result, dict):
        raise RunFolderError(f"{folder.path / 'result.json'} is damaged: not a mapping")
    return result


@dataclass(frozen=True)
class _Group:
    """Runs that differ in their seeds only."""

    name: str
    style: int
    runs: list[ReportedRun]

    @property
    def config(self) -> TrainConfig:
        return self.runs[0].config

    @property
    def status(self) -> str:
        unfinished = [run for run in self.runs if run.result is None]
        return f"{len(unfinished)} not finished" if unfinished else "finished"

    @cached_property
    def options(self) -> dict[str, str]:
        plain = flatten(self.config.to_dict())
        return {name: _shown(value) for name, value in plain.items() if name != "seed"}

    def title(self) -> str:
        seeds = ", ".join(str(run.config.seed) for run in self.runs)
        return f"{self.name} (seed{'s' if len(self.runs) > 1 else ''} {seeds})"


def find_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Return the runs in folders: each is that of a run, or holds several.

    Raises:
        RunFolderError: If there is none in one of them, or a file is damaged.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        inside = [path] if (path / "config.yaml").exists() else _runs_inside(path)
        if not inside:
            raise RunFolderError(
                f"there is no run in {path}: no config.yaml there or one level below"
            )
        folders |= dict.fromkeys(inside)
    return [ReportedRun.read(folder) for folder in folders]


def _runs_inside(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(each for each in path.iterdir() if (each / "config.yaml").exists())


def write_report(paths: Sequence[Path], out: Path) -> str:
    """Write a page that compares runs.

    Args:
        paths: Folders of runs, or folders that hold several, such as that of a comparison.
        out: The HTML file; replaced as a whole.

    Returns:
        A line that says what was written.

    Raises:
        RunFolderError: If there is no run in a folder, or a file is damaged.
        OSError: If the page cannot be written.
    """
    runs = find_runs(paths)
    groups = _grouped(runs)
    unfinished = sum(run.result is None for run in runs)
    state = f"{unfinished} of them not finished" if unfinished else "finished"
    summary = f"{len(runs)} run{'s' * (len(runs) > 1)}, {state}."
    title = f"hessreg: {', '.join(group.name for group in groups)}"
    body = [
        element("h1", title if len(groups) < 5 else f"hessreg: {len(groups)} kinds of runs"),
        element("p", summary, class_="soft"),
        *_differences(groups),
        *_results(groups),
        *_curves(groups),
        *_pictures(groups),
        *_origins(groups),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page(title, body).encode())
    return f"{out}: {summary}"


def _grouped(runs: Sequence[ReportedRun]) -> list[_Group]:
    """Runs by configuration without the seed, in the order of the runs."""
    by_config: dict[str, list[ReportedRun]] = {}
    for run in runs:
        key = json.dumps(run.config.to_dict() | {"seed": 0}, sort_keys=True, default=str)
        by_config.setdefault(key, []).append(run)
    names = [_name(group) for group in by_config.values()]
    full = [str(group[0].folder.path) for group in by_config.values()]
    titled = zip(names, full, strict=True)
    unique = [name if names.count(name) == 1 else path for name, path in titled]
    groups = zip(unique, by_config.values(), strict=True)
    return [_Group(name, style, group) for style, (name, group) in enumerate(groups)]


def _name(group: Sequence[ReportedRun]) -> str:
    """The folder's name, without the seed if that tells the runs apart."""
    names = {run.folder.path.resolve().name: run.config.seed for run in group}
    without = {name.removesuffix(f"-{seed}") for name, seed in names.items()}
    return without.pop() if len(names) > 1 and len(without) == 1 else ", ".join(names)


def _shown(value: Any) -> str:
    """A value as YAML and the command line have it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _differences(groups: Sequence[_Group]) -> Iterable[Html]:
    names = list(dict.fromkeys(name for group in groups for name in group.options))
    differ = [name for name in names if len({group.options.get(name) for group in groups}) > 1]
    yield element("h2", "Configuration")
    if differ:
        rows = [
            [group.title(), *(group.options.get(name, _NONE) or _NONE for name in differ)]
            for group in groups
        ]
        yield table("What differs between the runs", ["run", *differ], rows)
    elif len(groups) > 1:
        yield element("p", "The runs differ in nothing but their seeds.")
    everything = [[name, *(group.options.get(name, _NONE) for group in groups)] for name in names]
    inner = table("All options", ["option", *(group.name for group in groups)], everything)
    yield element("details", [element("summary", "All options"), inner])


def _results(groups: Sequence[_Group]) -> Iterable[Html]:
    """A table for each data set: the numbers of two cannot be compared."""
    yield element("h2", "Results")
    by_data: dict[str, list[_Group]] = {}
    for group in groups:
        config = group.config
        own = getattr(config, config.dataset, None)
        by_data.setdefault(f"{config.dataset} {config.data} {own}", []).append(group)
    for alike in by_data.values():
        if len(by_data) > 1:
            yield element("h3", alike[0].config.dataset)
        yield from _result_table(alike)


def _result_table(groups: Sequence[_Group]) -> Iterable[Html]:
    try:
        judge = _judge(groups[0].config)
        columns, references = dict(judge.columns), judge.reference_rows()
    except (ValueError, OSError) as error:
        known = {k: v for kind in _JUDGES for k, v in kind.columns.items()}
        columns = {key: shown for key, shown in known.items() if _any_has(groups, key)}
        references = {}
        yield element("p", f"The data set cannot be read, so nothing is known for scale: {error}")
    columns |= {key: shown for key, shown in COLUMNS.items() if _any_has(groups, key)} | _COST
    rows = [
        [g.title(), *(_final(g, key, form) for key, (_, form) in columns.items()), g.status]
        for g in groups
    ]
    for name, values in references.items():
        cells = [f"{values[k]:{form}}" if k in values else "" for k, (_, form) in columns.items()]
        rows.append([name, *cells, "for scale"])
    head = ["", *(heading for heading, _ in columns.values()), "state"]
    yield table("Final metrics", head, rows, len(references))
    if any(len(group.runs) > 1 for group in groups):
        yield element("p", "Several seeds: mean ± standard deviation.", class_="soft")


def _judge(config: TrainConfig) -> Judge:
    task = make_task(config)
    return task.judge(task.load())


def _any_has(groups: Sequence[_Group], key: str) -> bool:
    return any(key in run.values for group in groups for run in group.runs)


def _final(group: _Group, key: str, form: str) -> str:
    values = [{key: run.values[key]} for run in group.runs if _is_number(run.values.get(key))]
    return format_cell(values, key, form) if values else _NONE


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _curves(groups: Sequence[_Group]) -> Iterable[Html]:
    keys = dict.fromkeys(key for g in groups for run in g.runs for row in run.rows for key in row)
    charts = [_chart(key, groups) for key in sorted(keys.keys() - _NOT_DRAWN, key=_rank)]
    shown = [chart for chart in charts if chart is not None]
    if shown:
        yield element("h2", "Curves")
        yield element("p", "The number beside a name is the last value.", class_="soft")
        yield element("div", shown, class_="grid")


def _rank(key: str) -> tuple[int, str]:
    """In the order of the titles, then by name."""
    order = list(_TITLES)
    return (order.index(key), "") if key in _TITLES else (len(order), key.lower())


def _chart(key: str, groups: Sequence[_Group]) -> Html | None:
    series: list[Series] = []
    for group in groups:
        label: str | None = group.name
        for run in group.runs:
            found = [(row["cpu_seconds"], row[key]) for row in run.rows if key in row]
            points = [(x, y) for x, y in found if math.isfinite(x) and math.isfinite(y)]
            if len(points) > 1:  # one alone is in the table
                series.append(Series(label, group.style, points))
                label = None
    title = _TITLES.get(key, COLUMNS.get(key, (key.replace("_", " "),))[0])
    return line_chart(title, "CPU seconds of training", series) if series else None


def _pictures(groups: Sequence[_Group]) -> Iterable[Html]:
    for name, (heading, text) in _PICTURES.items():
        found = [
            picture(group.runs[0].folder.path / name, f"{text} of {group.name}", _caption(group))
            for group in groups
        ]
        shown = [each for each in found if each is not None]
        if shown:
            yield element("h2", heading)
            yield element("div", shown, class_="grid")


def _caption(group: _Group) -> str:
    first = group.runs[0]
    return f"{group.name}, seed {first.config.seed}, step {first.values.get('steps', '?')}"


def _origins(groups: Sequence[_Group]) -> Iterable[Html]:
    yield element("h2", "How to make them again")
    runs = [(group, run) for group in groups for run in group.runs]
    rows = [
        [
            str(run.folder.path),
            *(str(run.values.get(key, _NONE)) for key in _MADE_WITH),
            command_of(run.config),
        ]
        for _, run in runs
    ]
    yield table("Versions and commands", ["folder", *_MADE_WITH, "command"], rows)


def command_of(config: TrainConfig) -> str:
    """Return the command that trains what a configuration says.

    Example:
        >>> from dataclasses import replace
        >>> command_of(replace(DEFAULTS["digits"], regularizer="none", seconds=0.0, steps=5))
        'hessreg train digits --regularizer=none --steps=5'
    """
    default = flatten(DEFAULTS[config.dataset].to_dict() | {"seconds": 0.0})
    chosen = flatten(config.to_dict())
    options = [f"--{k}={_shown(v)}" for k, v in chosen.items() if v != default[k]]
    return shlex.join(["hessreg", "train", config.dataset, *options])
