"""Curves of losses as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hessreg.gan.pictures import _save_figure

__all__ = ["save_losses"]

_PARTS = "loss", "content", "style", "tv"
_AXES = {"seconds": "seconds", "step": "steps"}


def save_losses(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Plot the loss of runs against time and against steps, and of a single one its parts.

    Args:
        path: The PNG file.
        runs: Rows of losses by name of the run; those of one colour share the name up to a comma.
    """
    from matplotlib.figure import Figure

    parts = _PARTS if len(runs) == 1 else _PARTS[:1]
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(map(_group, runs)))}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 2), _AXES.items(), strict=True):
        labelled: set[str] = set()
        for name, rows in runs.items():
            for i, part in enumerate(parts):
                color = colors[_group(name)] if len(runs) > 1 else f"C{i}"
                title = _group(name) if len(runs) > 1 else part
                known = "_" if title in labelled else ""
                values = [row[part] for row in rows]
                if any(value > 0 for value in values):
                    x = [row[key] for row in rows]
                    axes.plot(x, values, color=color, label=known + title, linewidth=1)
                labelled.add(title)
        axes.set(xlabel=label, ylabel="loss" if len(runs) > 1 else "", yscale="log")
        axes.legend(fontsize="small")
    _save_figure(path, figure)


def _group(name: str) -> str:
    return name.split(",")[0]
