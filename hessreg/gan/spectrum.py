"""Eigenvalues, trace and spectral density of an operator: measured, shown and written."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessreg.curvature import (
    Eigenvalues,
    Estimate,
    LinearOperator,
    SpectralDensity,
    SymmetricOperator,
    eigenvalues,
    spectral_density,
    trace,
)
from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.curvature_targets import naming_target
from hessreg.gan.progress import say

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ENDS", "Spectrum", "SpectrumOptions", "measure", "write_spectra"]

ENDS = {"LA": "largest", "SA": "smallest", "LM": "largest modulus"}
_INTERVAL = 3.0  # seconds between plain lines


@dataclass(frozen=True)
class SpectrumOptions:
    """What to spend on a spectrum.

    Args:
        k: Eigenvalues at each end.
        ends: Keys of `ENDS`.
        tol: Largest residual relative to the norm of the operator; 0 for the default.
        steps: Lanczos steps of each probe of the density.
        probes: Random vectors of the density.
        seed: Of the random vectors.
    """

    k: int
    ends: Sequence[str]
    tol: float
    steps: int
    probes: int
    seed: int


@dataclass(frozen=True)
class Spectrum:
    """What was found of one operator.

    Attributes:
        name: Of the operator.
        n: Its number of rows.
        found: Eigenpairs by end of the spectrum.
        trace: With half its 99 % confidence interval.
        density: With its error bars.
        num_products: Products spent on all of it.
        seconds: Wall-clock time spent.
    """

    name: str
    n: int
    found: dict[str, Eigenvalues]
    trace: Estimate
    density: SpectralDensity
    num_products: int
    seconds: float

    @property
    def converged(self) -> bool:
        """Whether all eigenvalues can be trusted."""
        return all(bool(pairs.converged.all()) for pairs in self.found.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not a finite number is None."""
        rows = [
            {"end": end, "value": _number(value), "residual": _number(residual), "converged": sure}
            for end, value, residual, sure in self._rows()
        ]
        density = {
            name: getattr(self.density, name).tolist() for name in ("grid", "density", "error")
        }
        return {
            "n": self.n,
            "eigenvalues": rows,
            "trace": {"value": self.trace.value, "error": self.trace.error},
            "density": density | {"bandwidth": self.density.bandwidth},
            "num_products": self.num_products,
            "seconds": round(self.seconds, 2),
        }

    def describe(self) -> str:
        """Return a table of the eigenvalues and a line with the trace."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("end")
        for heading in ("eigenvalue", "residual", "converged"):
            table.add_column(heading, justify="right")
        for end, value, residual, sure in self._rows():
            table.add_row(ENDS[end], f"{value:.6g}", f"{residual:.1e}", "yes" if sure else "NO")
        console = Console(file=io.StringIO(), width=72, color_system=None)
        with console.capture() as captured:
            console.print(table)
        lines = [f"{self.name}: {self.n:,} x {self.n:,}"]
        lines += [line.rstrip() for line in captured.get().splitlines()]
        lines.append(f"trace: {self.trace.value:.6g} +- {self.trace.error:.2g} (99 %)")
        lines.append(f"{self.num_products} products, {self.seconds:.1f} s")
        if not self.converged:
            lines.append("NO: the eigenvalue is not to be trusted; --tol may ask for too much")
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, float, float, bool]]:
        for end, pairs in self.found.items():
            columns = (t.tolist() for t in (pairs.values, pairs.residuals, pairs.converged))
            for value, residual, sure in zip(*columns, strict=True):
                yield end, value, residual, sure


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def measure(name: str, op: LinearOperator, options: SpectrumOptions, quiet: bool) -> Spectrum:
    """Measure the spectrum of an operator and show how far it is.

    Args:
        name: Of the operator.
        op: Symmetric operator.
        options: What to spend.
        quiet: Print nothing to standard output.

    Raises:
        TargetError: If the operator is not symmetric or not deterministic, or too small.
        NonFiniteError: If a product is not finite.
    """
    start = time.monotonic()
    with naming_target(name), _meter(name, op, quiet) as meter:
        found = {}
        for end in options.ends:
            meter.begin(f"{ENDS[end]} eigenvalues")
            found[end] = _eigenvalues(meter, end, options)
        meter.begin("trace")
        total = trace(meter, generator=_random(options))
        meter.begin("density", options.steps * options.probes)
        density = spectral_density(
            meter,
            num_steps=options.steps,
            num_probes=options.probes,
            generator=_random(options),
        )
    seconds = time.monotonic() - start
    return Spectrum(name, op.shape[0], found, total, density, meter.num_products, seconds)


def _eigenvalues(op: LinearOperator, end: Any, options: SpectrumOptions) -> Eigenvalues:
    return eigenvalues(op, options.k, end, tol=options.tol or None, generator=_random(options))


def _random(options: SpectrumOptions) -> torch.Generator:
    return torch.Generator().manual_seed(options.seed)


class _Meter(SymmetricOperator):
    """An operator that counts its products and shows the count.

    Args:
        name: Of the operator.
        op: The operator.
        progress: A bar, or None for plain lines.
        quiet: Print no plain lines.
    """

    def __init__(
        self, name: str, op: LinearOperator, progress: Progress | None, quiet: bool
    ) -> None:
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device
        self.num_products = 0
        self._op, self._name, self._quiet = op, name, quiet
        self._progress = progress
        self._task = None if progress is None else progress.add_task(name, total=None)
        self._last, self._since, self._stage = time.monotonic(), 0, ""

    def begin(self, stage: str, total: int | None = None) -> None:
        """Name what is computed now, and the number of products it takes, if it is known."""
        self._since, self._stage = self.num_products, stage
        if self._progress is not None and self._task is not None:
            label = f"{self._name}: {stage}"
            self._progress.reset(self._task, description=label, total=total)

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Product with v [n]."""
        product = self._op.matvec(v, create_graph=create_graph)
        self._count(1)
        return product

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the k columns of V [n, k]: [n, k]."""
        product = self._op.matmat(V)
        self._count(V.shape[1])
        return product

    def check_finite(self, product: Tensor) -> None:
        """Say where a product is not finite, if the operator knows."""
        check = getattr(self._op, "check_finite", None)
        if check is not None:
            check(product)

    def _count(self, products: int) -> None:
        self.num_products += products
        done = self.num_products - self._since
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
        elif not self._quiet and time.monotonic() - self._last >= _INTERVAL:
            self._last = time.monotonic()
            say(f"{self._name}: {self._stage}, {done} products")


@contextmanager
def _meter(name: str, op: LinearOperator, quiet: bool) -> Iterator[_Meter]:
    """A bar on standard error if that is a terminal, else a plain line from time to time."""
    if not sys.stderr.isatty():
        yield _Meter(name, op, None, quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    title = TextColumn("{task.description}", markup=False)  # module:factory: is no emoji
    columns = title, BarColumn(20), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Meter(name, op, progress, quiet)


def write_spectra(
    out: Path, spectra: Sequence[Spectrum], described: dict[str, Any]
) -> tuple[dict[str, Any], list[Path]]:
    """Write ``spectrum.json`` and a picture of each density.

    Args:
        out: Folder; made if it is missing. Files of these names in it are replaced.
        spectra: What was measured.
        described: Goes into the JSON before the results.

    Returns:
        What was written as JSON, and the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    content = described | {"spectra": {each.name: each.to_dict() for each in spectra}}
    files = [out / "spectrum.json"]
    write_atomically(files[0], json.dumps(content, indent=2, allow_nan=False).encode())
    for each in spectra:
        files.append(out / (f"density-{each.name}.png" if each.name.isalpha() else "density.png"))
        each.density.plot(files[-1], f"Spectral density: {each.name}")
    return content, files
