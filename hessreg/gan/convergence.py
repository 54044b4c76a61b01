"""How fast compared methods get near the data, by steps and by CPU time, with intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.intervals import Curve, Rows, mean_curve
from hessreg.gan.pictures import save_bands

__all__ = ["Convergence"]

_TITLES = {"step": "generator steps", "cpu_seconds": "CPU seconds of training"}
_UNITS = {"step": "steps", "cpu_seconds": "s"}
_NONE = "-"


@dataclass(frozen=True)
class Convergence:
    """A metric of several methods in the course of training, as mean over seeds.

    Attributes:
        key: The metric, as rows call it.
        heading: As people do, with the format of its values.
        form: The latter.
        moments: To show in a table, by what they are measured in.
        curves: Of each method, by what moments are measured in.
    """

    key: str
    heading: str
    form: str
    moments: Mapping[str, Sequence[float]]
    curves: Mapping[str, Mapping[str, Curve]]

    @classmethod
    def of(
        cls, runs: Mapping[str, Sequence[Rows]], key: str, heading: str, form: str, every: int
    ) -> Convergence:
        """Average the rows that runs logged.

        Args:
            runs: Of each method those of every seed, each the rows of its ``metrics.jsonl``.
            key: The metric.
            heading: As people call it.
            form: Format of its values.
            every: Steps between evaluations.
        """
        last = [[row for row in rows if key in row][-1] for each in runs.values() for rows in each]
        count = int(min(row["step"] for row in last)) // every
        seconds = int(10 * min(row["cpu_seconds"] for row in last)) / 10
        moments: dict[str, Sequence[float]] = {
            "step": sorted({every * max(1, round(share * count)) for share in (0.25, 0.5, 1.0)}),
            "cpu_seconds": [share * seconds for share in (0.25, 0.5, 1.0)],
        }
        curves = {
            name: {by: mean_curve(each, key, by, moments[by]) for by in moments}
            for name, each in runs.items()
        }
        return cls(key, heading, form, moments, curves)

    def table(self) -> Sequence[Sequence[str]]:
        """Return head and lines of a table: a quarter, half and all of the way of the slowest."""
        head = [self.heading]
        head += [f"{x:g} {_UNITS[by]}" for by, each in self.moments.items() for x in each]
        return [head, *([name, *self._cells(curves)] for name, curves in self.curves.items())]

    def _cells(self, curves: Mapping[str, Curve]) -> list[str]:
        found = [(curves[by], x) for by, each in self.moments.items() for x in each]
        return [curve.at(x).text(self.form) if x in curve.x else _NONE for curve, x in found]

    def save(self, folder: Path) -> None:
        """Write ``convergence.png`` and, with the numbers behind it, ``convergence.csv``."""
        panels = {
            title: {name: curves[by] for name, curves in self.curves.items()}
            for by, title in _TITLES.items()
        }
        save_bands(folder / "convergence.png", panels, self.heading)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["name", "against", "x", self.key, "margin"])
        for name, curves in self.curves.items():
            for by, curve in curves.items():
                for x, found in zip(curve.x, curve.intervals, strict=True):
                    writer.writerow([name, by, x, found.mean, found.margin])
        write_atomically(folder / "convergence.csv", text.getvalue().encode())
