"""``hessreg sample``: draw with the generator of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input
from hessreg.commands._options import generator_parser, noise_seed
from hessreg.gan.evaluation import TrainedGenerator, write_samples
from hessreg.gan.progress import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = generator_parser("Draw with the averaged generator of a run.")
    parser.add_argument("-n", "--n", type=int, default=64, help="Number of samples.")
    out = "samples.png, or .npy; a picture shows the first 64 images or 2000 points."
    parser.add_argument("--out", type=str, default="samples.png", help=out)
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    out = Path(options["out"])
    with bad_input():
        trained = TrainedGenerator.load(Path(options["run"]))
        seed = noise_seed(options["seed"], trained.config.seed)
        write_samples(trained, options["n"], seed, out)
    say(f"{out}: {options['n']} samples by {trained.title}")
