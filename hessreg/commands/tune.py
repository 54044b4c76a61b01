"""``hessreg tune``: search for hyperparameters."""

from __future__ import annotations

from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input, failing
from hessreg.commands._options import config_parser, out_folder, train_config
from hessreg.gan.progress import say
from hessreg.tuning.config import TuneConfig
from hessreg.tuning.outcome import OutcomeError
from hessreg.tuning.tuner import Tuner, TuningError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]

_TUNED_EVERY = 500  # steps between values that a pruner sees
_TUNED_SECONDS = 20.0  # of a trial: 20 by two workers take minutes on two cores


def make_parser(dataset: str) -> ArgumentParser:
    """Return the parser of the command."""
    purpose = (
        f"Search for hyperparameters on {dataset}; every trial is a run of its own,"
        f" of {_TUNED_SECONDS:.0f} CPU seconds without --steps and --seconds."
    )
    parser = config_parser(dataset, purpose, set())
    parser.set_defaults(eval_every=_TUNED_EVERY, tensorboard=False)
    parser.add_class_arguments(TuneConfig)
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    if not options["steps"] and not options["seconds"]:
        options = options | {"seconds": _TUNED_SECONDS}
    with bad_input():
        base = train_config(options)
        config = TuneConfig(**{f.name: options[f.name] for f in fields(TuneConfig)})
        with out_folder(options, f"{base.dataset}-tune") as out:
            tuner = Tuner(out, base, config)
    # To the end: runs of the leaders are in its folder.
    with failing(OutcomeError, TuningError), closing(tuner):
        _search(tuner, config)


def _search(tuner: Tuner, config: TuneConfig) -> None:
    outcome = tuner.run()
    outcome.write()  # what was found is there also if what follows does not get to its end
    if config.leaders > 1 and len(outcome.objectives) == 1:
        say(outcome.choose(config.leaders, config.workers))
    files = outcome.write()
    say(outcome.describe())
    if config.confirm and len(outcome.objectives) == 1:
        say(outcome.confirm(config.confirm, config.workers))
    say(f"written: {', '.join(map(str, files))}")
