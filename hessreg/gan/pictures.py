"""Sample grids and curves as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate, pad

from hessreg.gan.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_curves", "save_grid", "save_side_by_side", "tile"]

_SCALE = 6  # screen pixels per image pixel
_GAP = 4


def tile(images: Tensor, columns: int = 8) -> np.ndarray:
    """Enlarge images smoothly, as the eye reads them best, and arrange them in a grid.

    Args:
        images: ``[n, 1, height, width]`` in [-1, 1]; n a multiple of ``columns``.
        columns: Images side by side.

    Returns:
        ``uint8[rows * (6 height + 4), columns * (6 width + 4)]``.
    """
    large = interpolate(images.float().cpu(), scale_factor=_SCALE, mode="bicubic")
    framed = pad(large.clamp(-1.0, 1.0), [_GAP // 2] * 4, value=-0.3)
    _, _, height, width = framed.shape
    rows = framed.view(-1, columns, height, width).permute(0, 2, 1, 3)
    grey = rows.reshape(-1, columns * width).add(1.0).mul(127.5).round()
    return grey.numpy().astype(np.uint8)


def save_grid(path: Path, images: Tensor) -> None:
    """Write images ``[n, 1, height, width]`` as one enlarged grid."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile(images)).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_side_by_side(path: Path, titled: Mapping[str, Path]) -> None:
    """Write several PNG files as one picture, each below its title."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figure = Figure(figsize=(4.2 * len(titled), 4.6), layout="constrained")
    panels = figure.subplots(1, len(titled), squeeze=False)[0]
    for axes, (title, file) in zip(panels, titled.items(), strict=True):
        axes.imshow(imread(file), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    _save_figure(path, figure)


def save_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Plot losses, Hessian norms and FDD of one or several runs against CPU time.

    Args:
        path: The PNG file.
        runs: Rows of ``metrics.jsonl`` by name of the run.
    """
    from matplotlib.figure import Figure

    panels = {
        "losses": ("loss_g", "loss_d"),
        "Hessian norms": ("hessian_norm_g", "hessian_norm_d"),
        "Frechet distance (FDD)": ("fdd",),
    }
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for run, rows in runs.items():
            for key in keys:
                points = [(row["cpu_seconds"], row[key]) for row in rows if key in row]
                if points:
                    axes.plot(*zip(*points, strict=True), label=f"{run} {key}", linewidth=1)
        axes.set(title=title, xlabel="CPU seconds of training")
        if axes.lines:
            axes.legend(fontsize="small")
            if title != "losses":
                axes.set_yscale("log")
    _save_figure(path, figure)


def _save_figure(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
