"""A GAN on handwritten digits with and without corrected steps, over several seeds, in one table.

    python examples/hessian_correction.py --seconds 40 --seeds 0,1,2 --jobs 2 --out runs/hsc
    python examples/hessian_correction.py --steps 2000 --seeds 0 --hsc.eps=0.5

What it does not know goes to ``hessreg train digits``. Each run is a process and a folder of its
own, below ``--out``; called again, it goes on with those that are missing. The conditioning is the
median over a run's logged steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from hessreg.gan.run_folder import RunFolder

VARIANTS = ("none", "hsc")
QUALITY = {
    "fdd": ("FDD", ".1f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "coverage": ("coverage", ".2f"),
    "steps": ("steps", ".0f"),
}
CONDITIONING = {
    "hsc_condition_g": "condition of H",
    "hsc_condition_corrected_g": "corrected",
    "hsc_smallest_g": "smallest abs. eigenvalue",
    "hsc_smallest_corrected_g": "corrected",
    "hsc_turn_g": "turn",
}


def train(folder: Path, variant: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One run, unless it is there: its result, and the medians of what it logged."""
    path = folder / f"{variant}-{seed}"
    files = RunFolder(path)
    if not (path / "result.json").exists():
        chosen = ["--regularizer=none", f"--correction={variant}", f"--seed={seed}"]
        command = [sys.executable, "-m", "hessreg", "train", "digits", *chosen, *options]
        subprocess.run([*command, f"--out={path}", "--plain"], check=True)  # noqa: S603
    rows = files.read_metrics()
    logged = {key: [row[key] for row in rows if key in row] for key in CONDITIONING}
    return files.read_result() | {key: median(values) for key, values in logged.items() if values}


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: each run, the mean of each variant, and the conditioning."""
    headings = ["correction", "seed", *(heading for heading, _ in QUALITY.values())]
    lines = [headings, ["---"] * len(headings)]
    for variant, runs in results.items():
        for run in runs:
            figures = [f"{run[key]:{form}}" for key, (_, form) in QUALITY.items()]
            lines.append([variant, str(run["seed"]), *figures])
        means = [spread([run[key] for run in runs], form) for key, (_, form) in QUALITY.items()]
        lines.append([variant, "mean", *means])
    headings = ["seed", *CONDITIONING.values()]
    lines += [[], headings, ["---"] * len(headings)]
    for run in results["hsc"]:
        lines.append([str(run["seed"]), *(f"{run[key]:.3g}" for key in CONDITIONING)])
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2", help="Numbers with commas.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at once.")
    parser.add_argument("--out", type=Path, default=Path("runs/hessian-correction"))
    known, options = parser.parse_known_args(arguments)
    tasks = [(variant, int(seed)) for seed in known.seeds.split(",") for variant in VARIANTS]

    def run(task: tuple[str, int]) -> dict[str, Any]:
        return train(known.out, *task, options)

    with ThreadPoolExecutor(known.jobs) as pool:
        runs = list(pool.map(run, tasks))
    print(table({variant: runs[i :: len(VARIANTS)] for i, variant in enumerate(VARIANTS)}))


if __name__ == "__main__":
    main()
