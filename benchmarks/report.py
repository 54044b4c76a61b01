"""Writes docs/benchmarks.md from benchmarks/results: ``python -m benchmarks.report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

_HEAD = """# Benchmarks

Made by `python -m benchmarks.report` from the files in `benchmarks/results`, which
`python -m benchmarks.bench_projection --json FILE` writes. Medians of interleaved runs; in
brackets the quartiles. Contestants on large vectors start with nothing of theirs in the caches.

The floor is what the same bytes cost torch's own single passes over flat vectors in the same run:
one `dot`, and one `sub` into memory that is there already. A loop over tensors is above it by what
reading one of its vectors again costs, mostly from the caches: where memory is the limit, that is
about what there is to gain on it.
"""


def page() -> str:
    """The whole page."""
    machines = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return _HEAD + "".join(_machine(results) for results in machines)


def _machine(results: dict[str, Any]) -> str:
    card = results["machine"]
    where = card.get("gpu") or f"{card['processor']}, {card['build']['isa']}"
    title = f"\n## {where}, torch {card['torch']}, {results['threads']} thread(s)\n"
    cases = results["projection"].items()
    return title + "".join(_case(name, result) for name, result in cases)


def _case(name: str, result: dict[str, Any]) -> str:
    ratios = result["times faster than"]
    rows = [
        f"| `{who}` | {t['median']:.3f} ({t['low']:.3f} - {t['high']:.3f}) | {ratios[who]:.2f} |"
        for who, t in result["milliseconds"].items()
        if who in ratios
    ]
    share = (
        f"{result['gigabytes per second']:.0f} GB/s, {100 * result['share of the floor']:.0f} % of"
        " the floor"
    )
    head = f"\n**Projection, {name}** ({share})\n\n| | ms | times ours |\n| --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
