"""``hessreg eval``: measure the generator of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input
from hessreg.commands._options import generator_parser, noise_seed
from hessreg.curvature._checks import check_at_least
from hessreg.gan.evaluation import TrainedGenerator
from hessreg.gan.options import FIDConfig
from hessreg.gan.progress import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = generator_parser(
        "Metrics of what the averaged generator of a run draws from fresh noise, and a two-sample"
        " test against test data by the maximum mean discrepancy."
    )
    parser.add_argument("--permutations", type=int, default=500, help="Of the test; 0: none.")
    parser.add_class_arguments(FIDConfig, "fid")
    parser.add_argument("--json", action="store_true", help="Print JSON, not lines.")
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    with bad_input():
        check_at_least(0, permutations=options["permutations"])
        trained = TrainedGenerator.load(Path(options["run"]))
        seed = noise_seed(options["seed"], trained.config.seed)
        features = options["fid"].features
        values = trained.evaluate(seed, options["permutations"], features)
    say(json.dumps(values, indent=2) if options["json"] else trained.describe(values))
