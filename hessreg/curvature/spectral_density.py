"""Density of the eigenvalues of a symmetric operator, with error bars and a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessreg.curvature._checks import check_at_least, of_operator
from hessreg.curvature._krylov import random_vector
from hessreg.curvature._statistics import NORMAL_99
from hessreg.curvature.lanczos import lanczos
from hessreg.curvature.operators import LinearOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["QuadratureRule", "SpectralDensity", "spectral_density"]

_FIRST_STEPS = (0.9, 0.8, 0.7, 0.6)  # parts of the steps whose rules are compared with that of all
_POINTS = 1000  # of the default grid
_MARGIN = 4  # bandwidths of the default grid beyond the outermost nodes


@dataclass(frozen=True)
class QuadratureRule:
    """Nodes [p, m] and weights [p, m] of a Gauss rule for each of p probes; the rows sum to 1."""

    nodes: Tensor
    weights: Tensor

    def mean(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The mean over the probes of sum_i weight_i f(x - node_i), at each x [g]: [g]."""
        total = torch.zeros_like(x)
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            total += f(x[:, None] - nodes) @ weights
        return total / len(self.nodes)


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the eigenvalues, each blurred to a normal one. All CPU, float64.

    Attributes:
        grid: points [g].
        density: [g], integrates to 1.
        error: [g], half the 99 % confidence interval at each point by itself.
        bandwidth: standard deviation of the blur.
        n: number of eigenvalues.
        rule: the quadrature of each probe.
        coarse_rules: the same from fewer steps; the differences tell the error of the quadrature.
    """

    grid: Tensor
    density: Tensor
    error: Tensor
    bandwidth: float
    n: int
    rule: QuadratureRule
    coarse_rules: tuple[QuadratureRule, ...]

    def cumulative(self, x: Tensor | float) -> tuple[Tensor, Tensor]:
        """The fraction of eigenvalues, blurred, below each x: the integral of the density.

        Args:
            x: points, of any shape.

        Returns:
            The fractions and half their 99 % confidence intervals, in the shape of x.

        Example:
            >>> from hessreg.curvature import DenseOperator
            >>> H = DenseOperator(torch.diag(torch.tensor([-2.0] * 30 + [1.0] * 10)))
            >>> found = spectral_density(H, num_steps=5, num_probes=50, bandwidth=0.1)
            >>> fraction, error = found.cumulative(0.0)
            >>> bool((fraction - 0.75).abs() < error)
            True
        """
        points = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        value, error = _estimate(self, _step, 1.0, points.reshape(-1))
        return value.reshape(points.shape), error.reshape(points.shape)

    def plot(self, path: str | Path, title: str = "Spectral density") -> None:
        """Writes a picture as a PNG file: the density with its error, on a logarithmic axis.

        As in Ghorbani, Krishnan and Xiao (2019), the logarithm shows single outliers beside a bulk
        of a million. A dotted line marks the height of one eigenvalue. Needs matplotlib (``pip
        install hessreg[gan]``).

        Args:
            path: the file; replaced as a whole or not at all.
            title: above the picture.
        """
        from matplotlib.figure import Figure

        from hessreg.gan.checkpoint import write_atomically

        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        self._draw(figure.subplots())
        figure.suptitle(title, fontsize="large")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        write_atomically(Path(path), buffer.getvalue())

    def _draw(self, axes: Axes) -> None:
        single = _peak(self.bandwidth) / self.n
        floor = 0.1 * single
        x, y, error = (t.numpy() for t in (self.grid, self.density, self.error))
        low, high = (y - error).clip(floor), (y + error).clip(floor)
        axes.fill_between(x, low, high, color="tab:blue", alpha=0.25, linewidth=0, label="99 %")
        axes.plot(x, y.clip(floor), color="tab:blue", linewidth=1.4)
        axes.axhline(single, color="0.35", linestyle=":", linewidth=1, label="one eigenvalue")
        axes.set_yscale("log")
        axes.set(xlim=(x[0], x[-1]), ylim=(floor, 2 * max(high.max(), single)))
        axes.set(xlabel="eigenvalue", ylabel="density")
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right")
        axes.set_title(self._caption(), fontsize="small", color="0.35")

    def _caption(self) -> str:
        probes, steps = self.rule.nodes.shape
        return (
            f"n = {self.n:,}; {probes} probes of {steps} Lanczos steps;"
            f" blurred by {self.bandwidth:.3g}"
        )


@of_operator
@torch.no_grad()
def spectral_density(
    op: LinearOperator,
    *,
    num_steps: int = 80,
    num_probes: int = 10,
    grid: Tensor | None = None,
    bandwidth: float | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Density of the eigenvalues by stochastic Lanczos quadrature.

    Ubaru, Chen and Saad (2017), for Hessians Ghorbani, Krishnan and Xiao (2019): from a random unit
    vector, num_steps Lanczos steps give a Gauss rule for the spectrum as that vector weights it;
    the mean over vectors is unbiased for the spectrum. Each eigenvalue is blurred to a normal
    distribution of standard deviation ``bandwidth``, so that a finite rule can resolve it.

    The error stated has two parts. That of the probes follows from the variance of a quadratic form
    on the sphere, estimated with what they might have missed: wide where hardly an eigenvalue was
    seen, valid for a single probe. That of the rule is its largest change over the last two fifths
    of the steps: it grows where the bandwidth is too small for num_steps.

    Cost: num_steps num_probes products. Memory: num_steps vectors.

    Args:
        op: symmetric operator, (n, n).
        num_steps: Lanczos steps for each probe, at least 2.
        num_probes: random vectors.
        grid: points [g], ascending; by default 1000 from the smallest node to the largest, and 4
            bandwidths beyond.
        bandwidth: of the blur; by default the width of the spectrum over num_steps, about the least
            that the rule resolves.
        generator: source of the random vectors; None is one seeded with 0, so that calls agree and
            the global random state stays as it is.

    Returns:
        The density on the grid and its error.

    Raises:
        TypeError: a count that is not an int.
        ValueError: a count below its minimum, a bandwidth that is not positive, a grid that is not
            a finite vector.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.linspace(-1.0, 1.0, 100)))
        >>> found = spectral_density(H, num_steps=20, grid=torch.tensor([0.0, 3.0]))
        >>> bool((found.density - torch.tensor([0.5, 0.0])).abs().le(found.error).all())
        True
    """
    check_at_least(2, num_steps=num_steps)
    check_at_least(1, num_probes=num_probes)
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be finite and positive, got {bandwidth}")
    grid = _check_grid(grid)
    generator = generator or torch.Generator().manual_seed(0)
    rules = [_rules(op, num_steps, random_vector(op, generator)) for _ in range(num_probes)]
    fine, *coarse = (_stack(kind) for kind in zip(*rules, strict=True))
    bandwidth = _default_bandwidth(fine, num_steps) if bandwidth is None else bandwidth
    grid = _default_grid(fine, bandwidth) if grid is None else grid
    empty = torch.empty(0, dtype=torch.float64, device="cpu")
    found = SpectralDensity(grid, empty, empty, bandwidth, op.shape[0], fine, tuple(coarse))
    density, error = _estimate(found, _bell, _peak(bandwidth), grid)
    return SpectralDensity(grid, density, error, bandwidth, op.shape[0], fine, tuple(coarse))


def _rules(op: LinearOperator, num_steps: int, start: Tensor) -> tuple[QuadratureRule, ...]:
    """The Gauss rules of all steps and of the first ones."""
    alpha, beta, _ = lanczos(op, num_steps, start)
    diagonal, off = torch.stack([alpha, beta]).cpu().double()
    T = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    m = len(T)
    exact = m < num_steps or m == op.shape[0]  # the space is invariant
    sizes = [m if exact else max(1, int(part * m)) for part in _FIRST_STEPS]
    return _gauss(T), *(_gauss(T[:i, :i]) for i in sizes)


def _gauss(T: Tensor) -> QuadratureRule:
    nodes, vectors = torch.linalg.eigh(T)
    return QuadratureRule(nodes[None], vectors[:1].square())


def _stack(rules: Sequence[QuadratureRule]) -> QuadratureRule:
    """One rule for all probes; those that ended early are filled with weights of 0."""
    nodes, weights = (
        torch.nn.utils.rnn.pad_sequence([getattr(r, name)[0] for r in rules], batch_first=True)
        for name in ("nodes", "weights")
    )
    return QuadratureRule(nodes, weights)


def _estimate(
    found: SpectralDensity, f: Callable[[Tensor, float], Tensor], largest: float, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean [g] of f(x - eigenvalue), for f between 0 and ``largest``, and its error [g]."""

    def kernel(distance: Tensor) -> Tensor:
        return f(distance, found.bandwidth)

    value = found.rule.mean(kernel, x)
    square = found.rule.mean(lambda d: kernel(d).square(), x)
    # For u on the sphere, u' F u has the variance 2 / (n + 2) (tr F^2 / n - (tr F / n)^2). It is
    # estimated, so it is raised by what it would be were the value off by the error h itself:
    # h^2 = c (variance + h largest).
    c = NORMAL_99**2 * 2 / ((found.n + 2) * len(found.rule.nodes))
    variance = (square - value.square()).clamp_min(0)
    half = c * largest / 2
    probes = half + (half**2 + c * variance).sqrt()
    # The difference to any one rule changes its sign between the points.
    changes = [(value - rule.mean(kernel, x)).abs() for rule in found.coarse_rules]
    return value, probes + torch.stack(changes).amax(0)


def _bell(distance: Tensor, bandwidth: float) -> Tensor:
    return torch.exp(-0.5 * (distance / bandwidth).square()) * _peak(bandwidth)


def _peak(bandwidth: float) -> float:
    return 1 / (bandwidth * math.sqrt(2 * math.pi))


def _step(distance: Tensor, bandwidth: float) -> Tensor:
    return torch.special.ndtr(distance / bandwidth)


def _extent(rule: QuadratureRule) -> tuple[float, float]:
    nodes = rule.nodes[rule.weights > 0]
    return nodes.min().item(), nodes.max().item()


def _default_bandwidth(rule: QuadratureRule, num_steps: int) -> float:
    low, high = _extent(rule)
    largest = max(abs(low), abs(high))
    # A multiple of the identity has no width, the zero operator no scale either.
    return max(high - low, 0.01 * largest) / num_steps or 1.0


def _default_grid(rule: QuadratureRule, bandwidth: float) -> Tensor:
    low, high = _extent(rule)
    margin = _MARGIN * bandwidth
    return torch.linspace(low - margin, high + margin, _POINTS, dtype=torch.float64, device="cpu")


def _check_grid(grid: Tensor | None) -> Tensor | None:
    if grid is None:
        return None
    if grid.dim() != 1 or not torch.isfinite(grid).all() or len(grid) == 0:
        raise ValueError(f"grid must be a finite vector, got shape {tuple(grid.shape)}")
    return grid.detach().cpu().double()
