"""``hessreg train``: train a GAN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input
from hessreg.commands._options import config_parser, out_folder, train_config
from hessreg.gan.distributed import current_shard, together
from hessreg.gan.progress import make_progress, say
from hessreg.gan.run import Run

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]


def make_parser(dataset: str) -> ArgumentParser:
    """Return the parser of the command."""
    parser = config_parser(dataset, f"Train a GAN on {dataset} and show what it draws.", set())
    parser.add_argument("--plain", action="store_true", help="Plain lines instead of a bar.")
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    with bad_input():
        with together(current_shard()):
            config = train_config(options)
        progress = make_progress(config.title, options["plain"])
        with out_folder(options, config.name) as out:
            training = Run.create(out, config)
    say(training.train(progress))
