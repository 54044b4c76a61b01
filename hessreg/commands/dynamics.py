"""``hessreg dynamics``: play small games of two players."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input
from hessreg.commands._options import check_seed, new_parser, out_folder
from hessreg.dynamics.config import DynamicsConfig
from hessreg.dynamics.lab import Lab
from hessreg.gan.progress import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Play small games of two players by many methods; measured against theory.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("--out", type=str, default="", help="Folder; by default in runs/.")
    parser.add_class_arguments(DynamicsConfig)
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    with bad_input():
        config = DynamicsConfig.from_options(options)
        check_seed(config.seed)
        lab = Lab(config)
    with out_folder(options, "dynamics") as out:
        say(lab.run(out))
