"""Which optimiser paints sooner: L-BFGS, Adam, and Adam with corrected gradients.

    python examples/style_optimizers.py --out style_optimizers.png

Each starts from the same noise and has the same CPU time on one thread; seeds change the noise and
the random features. Prints the loss against time and against steps, and draws the curves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hessreg.style import RandomFeatures, StyleObjective, load_image
from hessreg.style.config import StyleConfig
from hessreg.style.pictures import save_losses
from hessreg.style.transfer import PictureOptimizer, start_picture

Row = dict[str, float]
KINDS = {
    "L-BFGS": StyleConfig(init="noise"),
    "Adam": StyleConfig(init="noise", optimizer="adam"),
    "Adam + HSC": StyleConfig(init="noise", optimizer="adam", correction="hsc"),
    "L-BFGS + HSC": StyleConfig(init="noise", correction="hsc"),
}
STEPS = 10, 30, 100


def make_objective(config: StyleConfig, size: int) -> StyleObjective:
    """The temple in the style of the flower."""
    return StyleObjective(
        RandomFeatures(config.seed),
        load_image("sample:china", size),
        [load_image("sample:flower", size)],
        **config.weights,
        style_weights=None,
    )


def paint(config: StyleConfig, size: int, seconds: float) -> list[Row]:
    """The losses of one run at each step, with the CPU seconds it took to get there."""
    objective = make_objective(config, size)
    content = load_image("sample:china", size)
    began = time.process_time()
    optimizer = PictureOptimizer(objective, start_picture(config, content, content), config)
    rows: list[Row] = []
    while not rows or rows[-1]["seconds"] < seconds:
        loss = optimizer.measure()["loss"]
        spent = time.process_time() - began
        rows.append({"step": optimizer.steps_done, "seconds": spent, "loss": loss})
        optimizer.step()
    return rows


def reached(rows: Sequence[Row], key: str, limit: float) -> float | None:
    """The loss of the last row within a limit, if the run got that far."""
    within = [row["loss"] for row in rows if row[key] <= limit]
    return within[-1] if rows[-1][key] >= limit and within else None


def cell(runs: Sequence[Sequence[Row]], key: str, limit: float) -> str:
    """The median over seeds and the range."""
    losses = sorted(loss for rows in runs if (loss := reached(rows, key, limit)) is not None)
    if len(losses) < len(runs):
        return "-"
    return f"{losses[len(losses) // 2]:.3g} ({losses[0]:.3g}..{losses[-1]:.3g})"


def table(found: dict[str, list[list[Row]]], seconds: float) -> str:
    """Losses against time and against steps, in Markdown."""
    times = [seconds / 4, seconds / 2, seconds]
    headings = [f"{t:g} s" for t in times] + [f"{n} steps" for n in STEPS] + ["steps"]
    lines = ["| optimiser | " + " | ".join(headings) + " |", "| --- " * (len(headings) + 1) + "|"]
    for name, runs in found.items():
        cells = [cell(runs, "seconds", t) for t in times] + [cell(runs, "step", n) for n in STEPS]
        steps = sorted(int(rows[-1]["step"]) for rows in runs)
        lines.append(f"| {name} | " + " | ".join([*cells, f"{steps[len(steps) // 2]}"]) + " |")
    return "\n".join(lines)


def compare(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, list[list[Row]]]:
    """Every optimiser with every seed; the seeds are interleaved."""
    found: dict[str, list[list[Row]]] = {name: [] for name in options.kinds}
    for seed in range(options.seeds):
        for name in options.kinds:
            config = StyleConfig(**{**vars(KINDS[name]), "seed": seed})
            found[name].append(paint(config, options.size, options.seconds))
            last = found[name][-1][-1]
            say(f"seed {seed}: {name}, loss {last['loss']:.4g} after {last['step']} steps")
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU time of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS)[:3])
    parser.add_argument("--out", type=Path, help="PNG file for the curves")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = compare(options, lambda line: print(line, file=sys.stderr, flush=True))
    print(table(found, options.seconds))
    if options.out:
        curves = {
            f"{name}, {i}": rows for name, runs in found.items() for i, rows in enumerate(runs)
        }
        save_losses(options.out, curves)


if __name__ == "__main__":
    main(sys.argv[1:])
