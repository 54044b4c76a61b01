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
from hessreg.gan.data import Dataset, ScaledSamples
from hessreg.gan.intervals import Curve
from hessreg.gan.mixtures import Mixture, load_mixture
from hessreg.kernels import gaussian_kernel, mmd2

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LabelledPoints = tuple[Tensor, Tensor]

__all__ = [
    "save_bands",
    "save_curves",
    "save_densities",
    "save_grid",
    "save_kernel",
    "save_paths",
    "save_points",
    "save_scatter",
    "save_side_by_side",
    "save_strips",
    "tile",
]


def _of_both(name: str) -> tuple[str, ...]:
    """A quantity of both networks, before and after a correction."""
    return tuple(f"{name}{kind}_{side}" for side in "gd" for kind in ("", "_corrected"))


_SCALE, _WANTED = 6, 96  # screen pixels per image pixel at most; per image, about
_GAP = 4
_IMAGES, _POINTS = 64, 2000  # in one picture
_LINES = {
    "loss_d": "--",
    "grad_norm_d": "--",
    "hessian_norm_d": "--",
    "hessian_smallest_d": "--",
    "hessian_largest_d": "--",
    "r1": ":",
    "r2": "-.",
    "dragan": "--",
    "mmd2": "-.",
    "lambda": "--",
    "distance": ":",
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
_NORMS = "grad_norm_g", "grad_norm_d"
_PENALTIES = (
    *("hessian_norm_g", "hessian_norm_d", "mmd2", "hessian_penalty"),
    *("r1", "r2", "wgan_gp", "iterative", "dragan"),
)
_ANGLES = "angles of gradients, degrees"
_STEPS = {
    "ends of the spectra of H": tuple(
        f"hessian_{end}_{side}" for side in "gd" for end in ("smallest", "largest")
    ),
    "iterative penalty: path and weight": ("rho", "lambda", "distance"),
    _ANGLES: ("angle", "angle_after", "angle_g", "angle_after_g", "angle_d", "angle_after_d"),
    "condition number of H, and corrected": _of_both("hsc_condition"),
    "smallest |eigenvalue| of H, and corrected": _of_both("hsc_smallest"),
    "learning rates": ("lr_g", "lr_d"),
}
_BLUE, _ORANGE = "tab:blue", "tab:orange"


def tile(images: Tensor, columns: int = 8) -> np.ndarray:
    """Enlarge images smoothly, as the eye reads them best, and arrange them in a grid.

    Args:
        images: ``[n, channels, height, width]`` in [-1, 1], grey or in three colours; n a multiple
            of ``columns``.
        columns: Images side by side.

    Returns:
        ``uint8[rows * (s height + 4), columns * (s width + 4)]``, and ``[..., 3]`` in colour; s is
        6 for the smallest images and 1 for large ones.
    """
    scale = min(_SCALE, max(1, round(_WANTED / images.shape[2])))
    large = interpolate(images.float().cpu(), scale_factor=scale, mode="bicubic")
    framed = pad(large.clamp(-1.0, 1.0), [_GAP // 2] * 4, value=-0.3)
    _, channels, height, width = framed.shape
    rows = framed.view(-1, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = rows.reshape(-1, columns * width, channels).add(1.0).mul(127.5).round()
    return pixels.numpy().astype(np.uint8).squeeze(2 if channels == 1 else ())


def save_grid(path: Path, images: Tensor, columns: int = 8) -> None:
    """Write the first images ``[n, channels, height, width]``, about 64, as one enlarged grid.

    Args:
        path: The PNG file.
        images: In [-1, 1].
        columns: Images side by side.
    """
    from PIL import Image

    shown, buffer = images[: _IMAGES // columns * columns], io.BytesIO()
    columns = min(columns, len(shown))
    missing = shown.new_full((-len(shown) % columns, *shown.shape[1:]), -1.0)
    Image.fromarray(tile(torch.cat([shown, missing]), columns)).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_strips(path: Path, walks: Tensor) -> None:
    """Write images on ways through the noise, ``[rows, steps, 1, height, width]``, row by row."""
    save_grid(path, walks.flatten(0, 1), walks.shape[1])


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
    real = mixture.unit * load_mixture(mixture).tensors()[1][:_POINTS].T
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


def save_paths(path: Path, walks: Tensor, mixture: Mixture) -> None:
    """Write points on ways through the noise, ``[rows, steps, 2]``, as lines over real points.

    Args:
        path: The PNG file.
        walks: Scaled as the mixture; shown in its own unit.
        mixture: Where the real ones are from.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
    axes = figure.subplots()
    real = mixture.unit * load_mixture(mixture).test_samples[torch.arange(_POINTS)].T
    axes.scatter(real[0], real[1], s=2, c="0.7", label="real", linewidths=0)
    for row in mixture.unit * walks.float().cpu():
        (line,) = axes.plot(row[:, 0], row[:, 1], linewidth=1.2, marker=".", markersize=3)
        axes.plot(*row[[0, -1]].T, "o", color=line.get_color(), markersize=5)
    axes.set_aspect("equal")
    axes.set_title(f"{len(walks)} ways through the noise, {walks.shape[1]} points on each")
    _save_figure(path, figure)


def save_densities(path: Path, spectra: Sequence[Mapping[str, Any]]) -> None:
    """Write the spectral densities of each network's Hessian in the course of training.

    Args:
        path: The PNG file.
        spectra: Rows with ``network``, ``step``, ``grid [g]``, ``density [g]``, ``bandwidth`` and
            ``n``, the number of eigenvalues. Of many, at most six are shown for each network.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in spectra))
    figure = Figure(figsize=(5.6, 3.6 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 1, squeeze=False)[:, 0]
    for axes, network in zip(panels, networks, strict=True):
        rows = _evenly([row for row in spectra if row["network"] == network], 6)
        for row, shade in zip(rows, np.linspace(0.0, 0.9, len(rows)), strict=True):
            x, y = np.asarray(row["grid"]), np.asarray(row["density"])
            # A tenth of the height of a single eigenvalue.
            floor = 0.1 / (np.sqrt(2.0 * np.pi) * row["bandwidth"] * row["n"])
            label, colour = f"step {row['step']}", colormaps["viridis"](shade)
            axes.plot(x, np.where(y > floor, y, np.nan), color=colour, linewidth=1.2, label=label)
        axes.set(title=f"Hessian of the {network}", xlabel="eigenvalue", ylabel="density")
        axes.set_yscale("log")
        axes.legend(fontsize="small", frameon=False)
    _save_figure(path, figure)


def _evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """At most so many of the rows, with the first and the last."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i)] for i in np.linspace(0, len(rows) - 1, count)]


def save_scatter(path: Path, points: Tensor, dataset: Dataset) -> None:
    """Write the first 2000 of points ``[n, d]`` over real ones: of each its first two components.

    Args:
        path: The PNG file.
        points: Scaled as the data set; shown in the unit of its values.
        dataset: Where the real ones are from.
    """
    from matplotlib.figure import Figure

    samples = dataset.test_samples
    real = samples[torch.arange(min(_POINTS, len(samples)))]
    figure = Figure(figsize=(6.0, 6.0), layout="constrained")
    axes = figure.subplots()
    for name, each, colour in (("real", real, _BLUE), ("generated", points, _ORANGE)):
        shown = each[:_POINTS].float().cpu()
        if isinstance(samples, ScaledSamples):
            shown = (shown - samples.shift) / samples.scale
        if shown.shape[1] == 1:
            axes.hist(shown[:, 0], bins=100, alpha=0.6, color=colour, label=name, density=True)
        else:
            axes.scatter(
                shown[:, 0], shown[:, 1], s=3, c=colour, label=name, linewidths=0, alpha=0.7
            )
    axes.legend(frameon=False)
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
    panels = {
        "losses": _LOSSES,
        "gradient norms": _NORMS,
        "penalties": _PENALTIES,
        headline[1]: headline[:1],
    } | _STEPS
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


def save_bands(path: Path, panels: Mapping[str, Mapping[str, Curve]], quantity: str) -> None:
    """Plot means within their intervals, side by side.

    Args:
        path: The PNG file.
        panels: Curves by name, by what they are against.
        quantity: Its name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            mean = np.array([each.mean for each in curve.intervals])
            margin = np.array([each.margin for each in curve.intervals])
            style: dict[str, Any] = {"color": f"C{number}", "linewidth": 1}
            axes.plot(curve.x, mean, label=name, marker=".", **style)
            if len(mean):
                axes.fill_between(curve.x, mean - margin, mean + margin, alpha=0.2, **style)
        axes.set(xlabel=title, title=f"{quantity}: mean and 95 % interval")
    if any(
        each.mean > 0 for axes in panels.values() for c in axes.values() for each in c.intervals
    ):
        row[0].set_yscale("log", nonpositive="clip")  # of all: they share it
    lines = row[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=2, fontsize="small")
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
