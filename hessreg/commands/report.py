"""``hessreg report``: compare runs on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import InputError
from hessreg.commands._options import new_parser
from hessreg.gan.progress import say
from hessreg.gan.report import write_report

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Compare runs on one HTML page with tables, curves and pictures.",
    )
    runs = "Folders of runs, finished or not, or folders that hold several."
    parser.add_argument("runs", type=str, nargs="+", help=runs)
    out = "The page; by default report.html in the first folder."
    parser.add_argument("--out", type=str, default="", help=out)
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    paths = [Path(path) for path in options["runs"]]
    out = Path(options["out"]) if options["out"] else paths[0] / "report.html"
    if out.is_dir():
        raise InputError(f"out must be a file, got the folder {out}")
    say(write_report(paths, out))
