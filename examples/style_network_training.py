"""Training a network for one style with and without corrected gradients, in equal CPU time.

    python examples/style_network_training.py --seconds 16 --seeds 3

A feed-forward network learns to draw scikit-learn's temple in the style of its flower, with Adam,
and with Adam along gradients corrected by the Hessian of each batch's loss. The table has the loss
of the whole photograph, the mean of the last five measurements, one each ten steps: after the time,
and after as many steps as the slower of the two could make.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Literal

import torch

from hessreg.style import RandomFeatures, StyleObjective, load_image
from hessreg.style.config import StyleConfig, TrainingConfig
from hessreg.style.synthesis import build_trainer

EVERY = 10
KINDS: tuple[Literal["none", "hsc"], ...] = ("none", "hsc")


def losses(config: StyleConfig, size: int) -> list[tuple[int, float]]:
    """Steps, and the loss of the whole photograph after them, up to a limit of CPU time."""
    content, style = (load_image(name, size) for name in ("sample:china", "sample:flower"))
    features = RandomFeatures(config.seed)
    objective = StyleObjective(features, content, [style], **config.weights, style_weights=None)
    trainer = build_trainer(objective, [content], config)
    seconds, rows = 0.0, []
    while seconds < config.seconds:
        if trainer.steps_done % EVERY == 0:
            with torch.no_grad():
                rows.append((trainer.steps_done, objective.total(trainer.parts(content)).item()))
        start = time.process_time()
        trainer.step()
        seconds += time.process_time() - start
    return rows


def mean_of_last(rows: Sequence[tuple[int, float]], count: int = 5) -> float:
    return sum(loss for _, loss in rows[-count:]) / len(rows[-count:])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=16.0, help="CPU time of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=160, help="pixels of the longer side")
    parser.add_argument("--crop", type=int, default=64, help="pixels of the pieces trained on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("seed   steps: Adam + HSC   loss: Adam + HSC   Adam after the steps of + HSC")
    for seed in range(options.seeds):
        runs = {}
        for kind in KINDS:
            config = StyleConfig(
                method="network",
                correction=kind,
                seed=seed,
                seconds=options.seconds,
                training=TrainingConfig(crop=options.crop),
            )
            runs[kind] = losses(config, options.size)
        plain, corrected = runs["none"], runs["hsc"]
        steps = corrected[-1][0]
        equal = mean_of_last([row for row in plain if row[0] <= steps])
        print(
            f"{seed:4}   {plain[-1][0]:11} {steps:5}   {mean_of_last(plain):10.3f}"
            f" {mean_of_last(corrected):5.3f}   {equal:28.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
