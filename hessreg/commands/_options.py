"""Options that several commands have: their parsers, and what becomes of them."""

from __future__ import annotations

import argparse
import reprlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.gan.config import DEFAULTS, TrainConfig, flatten
from hessreg.gan.run_folder import new_folder

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = [
    "check_seed",
    "config_parser",
    "generator_parser",
    "new_parser",
    "noise_seed",
    "out_folder",
    "train_config",
]


def new_parser(description: str) -> ArgumentParser:
    """Return a parser that raises its errors."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(exit_on_error=False, description=description)


def config_parser(dataset: str, description: str, skip: set[str]) -> ArgumentParser:
    """Return a parser of a training's options on a data set, but those to skip."""
    parser = new_parser(description)
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("--out", type=str, default="", help="New folder; by default in runs/.")
    # Hidden: it only lets --config be the config.yaml of a run.
    parser.add_argument("--dataset", choices=[dataset], default=dataset, help=argparse.SUPPRESS)
    parser.add_class_arguments(TrainConfig, skip={"dataset", *skip})
    defaults = flatten(DEFAULTS[dataset].to_dict())
    parser.set_defaults({k: v for k, v in defaults.items() if k not in {*skip, "seconds"}})
    return parser


def generator_parser(description: str) -> ArgumentParser:
    """Return a parser for a command that draws with the generator of a run."""
    parser = new_parser(description)
    parser.add_argument("run", type=str, help="A run folder, or a checkpoint in one.")
    seed = "Of the noise; by default 1 more than that of the run, whose own noise has its seed."
    parser.add_argument("--seed", type=int | None, default=None, help=seed)
    return parser


def train_config(options: dict[str, Any]) -> TrainConfig:
    """Return the configuration that the options give."""
    names = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: options[name] for name in names & options.keys()})


def out_folder(options: dict[str, Any], name: str) -> AbstractContextManager[Path]:
    """Return the folder that was chosen, or a new one in ``runs/`` (see `new_folder`)."""
    return nullcontext(Path(options["out"])) if options["out"] else new_folder(name)


def noise_seed(given: int | None, of_run: int) -> int:
    """Return the seed that was given, or one whose noise the run itself has not drawn."""
    seed = of_run + 1 if given is None else given
    check_seed(seed)
    return seed


def check_seed(seed: int) -> None:
    """Refuse what torch does not take.

    Raises:
        ValueError: If the seed is outside of [0, 2**63).
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {reprlib.repr(seed)}")
