"""``hessreg compare``: train with several methods at equal cost."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input
from hessreg.commands._options import config_parser, out_folder, train_config
from hessreg.gan.compare import Comparison
from hessreg.gan.progress import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]

_COMPARED = "none,r1,hsn1r,gaussian"


def make_parser(dataset: str) -> ArgumentParser:
    """Return the parser of the command."""
    purpose = f"Train with several methods on {dataset} at equal cost."
    parser = config_parser(dataset, purpose, {"regularizer", "orthogonal", "correction", "seed"})
    names = "With commas: none, or regularisers, a loss, hsc and orthogonal_MODE joined by +."
    parser.add_argument("--methods", type=str, default=_COMPARED, help=names)
    parser.add_argument("--seeds", type=str, default="0", help="Seeds, with commas.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at once.")
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    names = _names(options["methods"])
    with bad_input():
        config = train_config(options)
        seeds = _seeds(options["seeds"])
        with out_folder(options, f"{config.dataset}-compare") as out:
            comparison = Comparison.create(out, names, config, seeds, options["jobs"])
    say(comparison.train())


def _names(text: str) -> list[str]:
    """Methods; a number after a comma goes on with the setting before it."""
    parts = re.split(r",(?!\s*[-+.\d])", text)
    return [part.strip() for part in parts]


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"seeds must be integers of at least 0 with commas, got {text!r:.40}")
    return [int(part) for part in parts]
