"""``hessreg style``: paint a photograph in the style of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input
from hessreg.commands._options import check_seed, new_parser
from hessreg.gan.progress import make_progress, say
from hessreg.style.config import StyleConfig
from hessreg.style.images import ImageError
from hessreg.style.run import StyleRun, draw_at_once

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    samples = "or sample:china, sample:flower, which come with scikit-learn"
    parser = new_parser("Paint a photograph in the style of others.")
    parser.add_argument("content", type=str, help=f"What the picture shows: an image, {samples}.")
    parser.add_argument("styles", type=str, nargs="*", help="How it is painted: one or several.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument(
        "-o", "--out", type=str, required=True, help="The picture: .png, .jpg or .webp."
    )
    parser.add_argument("--plain", action="store_true", help="Plain lines instead of a bar.")
    parser.add_argument("--keep_colors", action="store_true", help="Those of the content.")
    parser.add_class_arguments(StyleConfig, skip={"keep_colors"})
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    with bad_input():
        config = StyleConfig.from_options(options)
        check_seed(config.seed)
        content, styles, out = options["content"], options["styles"], Path(options["out"])
        _check_styles(styles, config.network)
        if config.network:
            say(draw_at_once(content, out, config))
            return
        progress = make_progress(config.title, options["plain"])
        training = StyleRun(content, styles, out, config)
    say(training.describe())
    with bad_input(ImageError):
        say(training.train(progress))


def _check_styles(styles: Sequence[str], network: str) -> None:
    if network and styles:
        raise ValueError(f"{network} draws in its own style: leave out {' '.join(styles)}")
    if not network and not styles:
        raise ValueError("styles: name one picture or several, or --network FILE")
