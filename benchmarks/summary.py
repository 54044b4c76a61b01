"""Every row of a file in one line each, and as bars: ``python -m benchmarks.summary FILE.json``.

The picture lies beside the file: how many times as long as ours the fastest rival of each row
takes, also where it wins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.tables import (
    Row,
    best_rival,
    digits,
    less_exact,
    limit_rows,
    percent,
    share_of_floor,
)
from benchmarks.targets import CPU, GPU

_AHEAD, _BEHIND = "#2f7d4f", "#b5443a"


def lines(results: dict[str, Any]) -> list[str]:
    """What there is to print."""
    limits = results.get("limits")
    found = ["", "the limits of this machine"]
    found += [f"  {what:16s} {rate:>12s}" for what, rate in limit_rows(limits)] if limits else []
    found += [] if limits else ["  not measured"]
    for name, suite in results["suites"].items():
        found += [
            "",
            f"{name}: ours, the floor reached, and how many times as long the fastest rival takes",
        ]
        found += [f"  {_line(row)}" for row in suite["cases"]]
    return [*found, "", "asked for", *_asked(results)]


def _line(row: Row) -> str:
    title = f"{row['group']}: {row['case']}"[:88]
    if "failed" in row or not row["ours"]:
        return f"{title:88s} {row.get('failed', 'left out')}"
    own = f"{digits(row['milliseconds'][row['ours'][0]]['median'])} ms"
    rival = best_rival(row)
    other = f"{digits(rival[1]):>6s} x {rival[0]}{less_exact(row, rival[0])}" if rival else ""
    missing = [who for who, why in row["left out"].items() if why.startswith("missing")]
    absent = f"   not installed: {', '.join(missing)}" if missing else ""
    loses = "   (wins)" if rival and rival[1] < 1 else ""
    return f"{title:88s} {own:>11s} {percent(share_of_floor(row)):>6s} {other}{loses}{absent}"


def _asked(results: dict[str, Any]) -> list[str]:
    found = []
    for target in GPU if "gpu" in results["machine"] else CPU:
        measured = target.measured(results["suites"])
        if measured is not None:
            verdict = "met" if target.is_met(measured) else "missed"
            bound = "at most" if target.at_most else "at least"
            what = f"{bound} {target.asked:g}, measured {digits(measured)} {target.unit}"
            found.append(f"  {target.what[:88]:88s} {what:44s} {verdict}")
    return found or ["  nothing of it was measured"]


def draw(results: dict[str, Any], path: Path) -> None:
    """A bar for each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = _bars(results)
    if not bars:
        return
    titles, ratios = zip(*bars, strict=True)
    figure, axes = plt.subplots(figsize=(13, 1.2 + 0.19 * len(bars)), layout="constrained")
    colours = [_AHEAD if ratio >= 1 else _BEHIND for ratio in ratios]
    places = range(len(bars))
    axes.barh(places, [r - 1 for r in ratios], left=1, color=colours, height=0.75)
    axes.set_xscale("log", base=2)
    axes.set_yticks(places, titles, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.005)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", alpha=0.3)
    for place, ratio in zip(places, ratios, strict=True):
        axes.annotate(f" {digits(ratio)}", (max(ratio, 1), place), va="center", fontsize=7)
    card = results["machine"]
    where = f"{card.get('gpu') or card['processor']}, {results['threads']} thread(s)"
    axes.set_title(f"The fastest rival's time over ours, {where}; red: the rival wins", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(results: dict[str, Any]) -> list[tuple[str, float]]:
    found = []
    for suite in results["suites"].values():
        for row in suite["cases"]:
            rival = None if "failed" in row else best_rival(row)
            if rival is not None:
                who = rival[0] + less_exact(row, rival[0])
                found.append((f"{row['group']}: {row['case']} ({who})", rival[1]))
    return found


def main() -> None:
    """Prints, and draws where matplotlib is."""
    path = Path(sys.argv[1])
    results = json.loads(path.read_text())
    print(*lines(results), sep="\n")
    picture = path.with_suffix(".png")
    try:
        draw(results, picture)
    except ImportError:
        print("no picture: matplotlib is not installed")
    else:
        print(f"\nwritten: {path}, {picture}")


if __name__ == "__main__":
    main()
