"""Samples, kernel matrices and curves as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.mixtures import Mixture, load_mixture
from hessreg.kernels import gaussian_kernel, mmd2

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LabelledPoints = tuple[Tensor, Tensor]

__all__ = ["save_curves", "save_grid", "save_kernel", "save_points", "save_side_by_side", "tile"]


def _of_both(name: str) -> tuple[str, ...]:
    """A quantity of both networks, before and after a correction."""
    return tuple(f"{name}{kind}_{side}" for side in "gd" for kind in ("", "_corrected"))


_SCALE = 6  # screen pixels per image pixel
_GAP = 4
_IMAGES, _POINTS = 64, 2000  # in one picture
_LINES = {
    "loss_d": "--",
    "hessian_norm_d": "--",
    "r1": ":",
    "r2": "-.",
    "dragan": "--",
    "mmd2": "-.",
    "angle_d": "--",
    "angle_after": ":",
    "angle_after_g": ":",
    "angle_after_d": "-.",
    "lr_d": "--",
    "hsc_condition_d": "--",
    "hsc_condition_corrected_g": ":",
    "hsc_condition_corrected_d": "-.",
    "hsc_smallest_d": "--",
    "hsc_smallest_corrected_g": ":",
    "hsc_smallest_corrected_d": "-.",
}
_LOSSES = "loss_g", "loss_d"
_PENALTIES = (
    *("hessian_norm_g", "hessian_norm_d", "mmd2", "hessian_penalty"),
    *("r1", "r2", "wgan_gp", "dragan"),
)
_ANGLES = "angles of gradients, degrees"
_STEPS = {
    _ANGLES: ("angle", "angle_after", "angle_g", "angle_after_g", "angle_d", "angle_after_d"),
    "condition number of H, and corrected": _of_both("hsc_condition"),
    "smallest |eigenvalue| of H, and corrected": _of_both("hsc_smallest"),
    "learning rates": ("lr_g", "lr_d"),
}
_BLUE, _ORANGE = "tab:blue", "tab:orange"


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
    """Write the first 64 of images ``[n, 1, height, width]`` as one enlarged grid."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile(images[:_IMAGES])).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_points(path: Path, points: Tensor, mixture: Mixture) -> None:
    """Write the first 2000 of points ``[n, 2]`` over real ones; two modes also enlarged.

    Args:
        path: The PNG file.
        points: Scaled as the mixture; shown in its own unit.
        mixture: Where the real ones are from.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 5.0), layout="constrained")
    panels = figure.subplot_mosaic("AAB;AAC")
    real = mixture.unit * load_mixture(mixture).test_samples[:_POINTS].T
    drawn = mixture.unit * points[:_POINTS].float().cpu().T
    for (name, axes), size in zip(panels.items(), (1, 4, 4), strict=True):
        axes.scatter(real[0], real[1], s=size, c=_BLUE, label="real", linewidths=0)
        axes.scatter(
            drawn[0], drawn[1], s=size, c=_ORANGE, label="generated", linewidths=0, alpha=0.7
        )
        axes.set_aspect("equal")
        axes.tick_params(labelsize="small")
        if name != "A":
            _zoom(axes, mixture, "BC".index(name))
    end = 1.45 * real.abs().max().item()
    panels["A"].set(xlim=(-end, end), ylim=(-end, end), title=f"{drawn.shape[1]} points of each")
    panels["A"].legend(loc="center", markerscale=5, frameon=False)
    _save_figure(path, figure)


def _zoom(axes: Axes, mixture: Mixture, mode: int) -> None:
    """Show one mode, and the circle that holds its samples of high quality."""
    from matplotlib.patches import Circle

    mode = min(mode, len(mixture.centres) - 1)
    x, y = (mixture.unit * mixture.centres[mode]).tolist()
    std = mixture.unit * mixture.std
    axes.add_patch(Circle((x, y), 3 * std, fill=False, color="black", linewidth=0.8))
    wide = 7.5 * std
    axes.set(
        xlim=(x - wide, x + wide), ylim=(y - wide, y + wide), title=f"mode {mode}; circle: 3 std"
    )


def save_kernel(path: Path, real: LabelledPoints, fake: LabelledPoints, sigma: Tensor) -> None:
    """Write the Gaussian kernel matrix of real and generated points as a heat map.

    Both are ordered by label, so that what is alike stands together: where the distributions are
    equal, all four blocks show the same pattern.

    Args:
        path: The PNG file.
        real: Points ``[n, d]`` and their labels ``[n]``.
        fake: Points ``[m, d]`` and their labels ``[m]``.
        sigma: Bandwidth, or bandwidths ``[components]``.
    """
    from matplotlib.figure import Figure

    ordered = [points[labels.argsort(stable=True)] for points, labels in (real, fake)]
    joined = torch.cat(ordered)
    figure = Figure(figsize=(6.6, 5.8), layout="constrained")
    axes = figure.subplots()
    matrix = gaussian_kernel(joined, sigma=sigma).cpu().numpy()
    image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="k(x, y)")
    _mark_blocks(axes, [len(points) for points in ordered])
    axes.set_title(f"Gaussian kernel, {_sigma_text(sigma)}\nMMD$^2$ {_mmd2_text(ordered, sigma)}")
    _save_figure(path, figure)


def _mark_blocks(axes: Axes, sizes: Sequence[int]) -> None:
    """Divide real from generated points, and name both."""
    middles = [sizes[0] / 2 - 0.5, sizes[0] + sizes[1] / 2 - 0.5]
    axes.axhline(sizes[0] - 0.5, color="white", linewidth=2)
    axes.axvline(sizes[0] - 0.5, color="white", linewidth=2)
    axes.set_xticks(middles, [f"{sizes[0]} real", f"{sizes[1]} generated"])
    axes.set_yticks(middles, ["real", "generated"], rotation=90, va="center")
    axes.tick_params(length=0)
    axes.set_xlabel("each ordered by label")


def _sigma_text(sigma: Tensor) -> str:
    return "sigma " + ", ".join(f"{value:.3g}" for value in sigma.reshape(-1).tolist())


def _mmd2_text(samples: Sequence[Tensor], sigma: Tensor) -> str:
    return f"{mmd2(samples[0], samples[1], sigma).item():.2g} (unbiased)"


def save_side_by_side(path: Path, titled: Mapping[str, Path]) -> None:
    """Write several PNG files as one picture, each below its title."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    images = [imread(file) for file in titled.values()]
    ratios = [image.shape[1] / image.shape[0] for image in images]
    figure = Figure(figsize=(4.2 * sum(ratios), 4.6), layout="constrained")
    panels = figure.subplots(1, len(titled), squeeze=False, width_ratios=ratios)[0]
    for axes, title, image in zip(panels, titled, images, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    _save_figure(path, figure)


def save_curves(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]], headline: tuple[str, str]
) -> None:
    """Plot what one or several runs logged against CPU time: a panel for each kind of quantity.

    Args:
        path: The PNG file.
        runs: Rows of ``metrics.jsonl`` by name of the run.
        headline: Name and heading of the metric.
    """
    from matplotlib.figure import Figure

    logged = {key for rows in runs.values() for row in rows for key in row}
    panels = {"losses": _LOSSES, "penalties": _PENALTIES, headline[1]: headline[:1]} | _STEPS
    panels = {title: keys for title, keys in panels.items() if logged & {*keys}}
    figure = Figure(figsize=(5 * max(1, len(panels)), 4.2), layout="constrained")
    for number, (title, keys) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for index, (run, rows) in enumerate(runs.items()):
            for key in keys:
                _plot(axes, rows, key, color=f"C{index}", label=f"{run} {key}")
        axes.set(title=title, xlabel="CPU seconds of training")
        axes.legend(fontsize="small")
        if title not in ("losses", _ANGLES):
            _set_scale(axes)
    _save_figure(path, figure)


def _plot(axes: Axes, rows: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    """Plot one quantity of one run, if it has it; a single value shows as a dot."""
    points = [(row["cpu_seconds"], row[key]) for row in rows if key in row]
    if points:
        line = _LINES.get(key, "-")
        axes.plot(*zip(*points, strict=True), linestyle=line, marker=".", linewidth=1, **style)


def _set_scale(axes: Axes) -> None:
    """Logarithmic, linear about 0 if there are values that have no logarithm."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    sizes = np.abs(values[values != 0])
    if (values > 0).all():
        axes.set_yscale("log")
    elif sizes.size:
        axes.set_yscale("symlog", linthresh=float(np.median(sizes)))


def _save_figure(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
