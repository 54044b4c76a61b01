"""``hessreg resume``: continue an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input
from hessreg.commands._options import new_parser
from hessreg.gan.progress import make_progress, say
from hessreg.gan.run import Run

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("Continue an interrupted run.")
    parser.add_argument("out", type=str, help="Folder of the run.")
    parser.add_argument("--steps", type=int, default=0, help="New limit of steps.")
    parser.add_argument("--seconds", type=float, default=0.0, help="New limit of CPU time.")
    parser.add_argument("--plain", action="store_true", help="Plain lines instead of a bar.")
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    with bad_input():
        training = Run.resume(Path(options["out"]), options["steps"], options["seconds"])
    say(training.train(make_progress(training.config.title, options["plain"])))
