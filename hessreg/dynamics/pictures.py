"""Trajectories and generated points as PNG files: one figure for all methods of a game."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hessreg.gan.mixtures import load_mixture
from hessreg.gan.pictures import _save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hessreg.dynamics.lab import Trajectory
    from hessreg.dynamics.ring import RingResult

__all__ = ["save_rings", "save_trajectories"]

_COLUMNS = 5  # panels in a row at most
_SIDE, _TITLE = 2.5, 0.6  # of a panel, in inches
_LEGEND = "dot: start, square: end, cross: equilibrium; from dark to light"
_POINTS = 2000


def save_trajectories(path: Path, title: str, found: Sequence[Trajectory]) -> None:
    """Draw where each method went in the plane of the players' first parameters.

    Args:
        path: The PNG file.
        title: Of the figure.
        found: What to draw, from one game that starts at norm 1. All panels have the same scale;
            what diverges leaves them.
    """
    bounded = [each.points.abs().max().item() for each in found if each.outcome != "diverges"]
    limit = 1.1 * min(max(bounded, default=1.0), 2.5) + 0.1
    figure, panels = _panels(f"{title}\n{_LEGEND}", len(found), limit, (-1, 0, 1))
    for axes, each in zip(panels, found, strict=True):
        theory = "" if each.theory is None else f"\ntheory {each.theory:.4f}"
        axes.set_title(f"{each.method}\n{each.outcome}, {each.factor:.4f}{theory}", fontsize=9)
        _draw_path(axes, each.points[:, [0, each.num_x]].numpy())
    _save_figure(path, figure)


def _panels(
    title: str, count: int, limit: float, ticks: Sequence[float]
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    rows = -(-count // _COLUMNS)
    columns = max(-(-count // rows), 2)
    width, height = _SIDE * columns, (_SIDE + _TITLE) * rows + _TITLE
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, fontsize=min(11, 4.3 * columns), y=1 - 0.1 / height)
    # In inches: matplotlib's own layouts take as long as the rest of the picture.
    figure.subplots_adjust(
        left=0.3 / width,
        right=1 - 0.1 / width,
        bottom=0.25 / height,
        top=1 - 2 * _TITLE / height,
        wspace=0.15,
        hspace=(_TITLE + 0.25) / (_SIDE - 0.25),
    )
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[:count]:
        axes.set(aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit))
        axes.set(xticks=ticks, yticks=ticks)
        axes.tick_params(labelsize=7)
    return figure, panels[:count]


def _draw_path(axes: Axes, points: np.ndarray) -> None:
    """A line from dark to light, its start, and the equilibrium."""
    from matplotlib.collections import LineCollection

    lines = np.stack([points[:-1], points[1:]], 1)
    path = LineCollection(list(lines), cmap="viridis", linewidths=1.0)
    path.set_array(np.arange(len(lines)))
    axes.add_collection(path)
    axes.plot(*points[0], "o", color="black", markersize=4)
    axes.plot(*points[-1], "s", color="tab:red", markersize=4)
    axes.plot(0, 0, "+", color="black", markersize=8)


def save_rings(path: Path, title: str, results: Sequence[RingResult]) -> None:
    """Draw 2000 generated points of each method over real ones.

    Args:
        path: The PNG file.
        title: Of the figure.
        results: What to draw.
    """
    legend = f"blue: {_POINTS} real points, orange: as many generated ones"
    figure, panels = _panels(f"{title}\n{legend}", len(results), 2.9, (-2, 0, 2))
    real = load_mixture().tensors()[1][:_POINTS]
    for axes, each in zip(panels, results, strict=True):
        axes.set_title(f"{each.method}\n{_judged(each)}", fontsize=9)
        _scatter(axes, real, "tab:blue")
        _scatter(axes, each.points[:_POINTS], "tab:orange")
    _save_figure(path, figure)


def _judged(result: RingResult) -> str:
    if not result.metrics:
        return "diverges"
    return f"{result.metrics['modes']} modes, quality {result.metrics['quality']:.0%}"


def _scatter(axes: Axes, points: Tensor, color: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], s=2, c=color, linewidths=0)
