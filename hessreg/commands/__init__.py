"""The commands of ``hessreg``, a module each.

A module has ``make_parser``, which takes the data set if the command has options for each, and
``run``, which takes the options. It is imported when its command is given.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["COMMANDS", "PER_DATASET", "load_command"]

COMMANDS = {
    "train": "train a GAN",
    "resume": "continue a run; also train --resume",
    "compare": "several methods at equal cost",
    "tune": "search for hyperparameters",
    "eval": "metrics of what a run draws from fresh noise",
    "sample": "draw with the generator of a run",
    "report": "compare runs on one HTML page",
    "spectrum": "eigenvalues, trace and density of a Hessian",
    "dynamics": "how training methods move in small games, and why",
    "style": "paint a photograph in the style of another",
    "mmd": "maximum mean discrepancy of two samples",
    "bench": "time everything against rivals and the machine's limits",
    "doctor": "versions, devices and self-tests",
}
PER_DATASET = ("train", "compare", "tune")


def load_command(name: str) -> ModuleType:
    """Import the module of a command.

    Raises:
        LookupError: If there is no such command.

    Example:
        >>> load_command("doctor").__name__
        'hessreg.commands.doctor'
    """
    if name not in COMMANDS:
        raise LookupError(name)
    return import_module(f"hessreg.commands.{name}")
