"""Trajectories and generated points as PNG files: one figure for all methods of a game."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hessreg.gan.pictures import _save_figure
from hessreg.gan.ring import load_ring

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hessreg.dynamics.lab import Trajectory
    from hessreg.dynamics.ring import RingResult

__all__ = ["save_rings", "save_trajectories"]

_COLUMNS, _SIDE = 5, 2.5  # panels in a row; inches
_POINTS = 2000


def save_trajectories(path: Path, title: str, found: Sequence[Trajectory]) -> None:
    """Draw where each method went in the plane of the players' first parameters.

    Args:
        path: The PNG file.
        title: Of the figure.
        found: What to draw, from one game. All panels have the same scale, by the starting point;
            what leaves it is cut off.
    """
    figure, panels = _panels(title, len(found))
    for axes, each in zip(panels, found, strict=True):
        theory = "" if each.theory is None else f"\ntheory {each.theory:.4f}"
        axes.set_title(f"{each.method}\n{each.outcome}, {each.factor:.4f}{theory}", fontsize=9)
        _draw_path(axes, each.points[:, [0, each.num_x]].numpy())
        axes.set_xlim(-1.5, 1.5)
        axes.set_ylim(-1.5, 1.5)
    _save_figure(path, figure)


def _panels(title: str, count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(_SIDE * max(columns, 2), (_SIDE + 0.6) * rows), layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[:count]:
        axes.set_aspect("equal")
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
    figure, panels = _panels(title, len(results))
    real = load_ring().test_samples[:_POINTS]
    for axes, each in zip(panels, results, strict=True):
        axes.set_title(f"{each.method}\n{_judged(each)}", fontsize=9)
        _scatter(axes, real, "tab:blue")
        _scatter(axes, each.points[:_POINTS], "tab:orange")
        axes.set_xlim(-2.9, 2.9)
        axes.set_ylim(-2.9, 2.9)
    _save_figure(path, figure)


def _judged(result: RingResult) -> str:
    if not result.metrics:
        return "diverges"
    return f"{result.metrics['modes']} modes, quality {result.metrics['quality']:.0%}"


def _scatter(axes: Axes, points: Tensor, color: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], s=2, c=color, linewidths=0)
