"""The command ``hessreg``; what each command does is in `hessreg.commands`.

Exit codes: 0 done, 1 training failed or a curvature is not finite, 2 bad input, 130 interrupted
with the state saved. Every failure is one line on standard error, after its traceback if the
environment has ``HESSREG_TRACEBACK=1``.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

import hessreg
from hessreg._interrupt import INTERRUPTED, Interrupts
from hessreg._spelling import suggestion
from hessreg.commands import COMMANDS, PER_DATASET, load_command
from hessreg.commands._errors import FailedError, InputError
from hessreg.commands._options import new_parser
from hessreg.curvature import NonFiniteError as NonFiniteCurvatureError
from hessreg.gan.checkpoint import CheckpointError
from hessreg.gan.compare import ComparisonError
from hessreg.gan.config import DEFAULTS, flatten
from hessreg.gan.distributed import (
    LostProcessError,
    current_shard,
    is_shared,
    joined,
    together,
)
from hessreg.gan.run import Interrupted, StorageError, TrainingError
from hessreg.gan.run_folder import RunFolderError
from hessreg.gan.trainer import NonFiniteError
from hessreg.optim import OppositeGradientsError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]

_FAILURES = (
    ComparisonError,
    FailedError,
    LostProcessError,
    NonFiniteError,
    NonFiniteCurvatureError,
    OppositeGradientsError,
    StorageError,
    TrainingError,
)
_PROVIDERS = {
    "cmaes": "'hessreg[tune]'",
    "optuna": "'hessreg[tune]'",
    "torchmetrics": "'hessreg[metrics]'",
    "wandb": "wandb",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the name of the program; ``sys.argv`` by default.

    Returns:
        The exit code.
    """
    with joined():
        return _main(_spelled(sys.argv[1:] if args is None else args))


def _main(args: list[str]) -> int:
    signals = Interrupts()
    try:
        # Before signals are exceptions, which an import may turn into others.
        with suppress(LookupError):
            load_command(_words(args)[0])
        with signals:
            _run(args)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED, error)
    except KeyboardInterrupt as error:
        return _fail("interrupted", INTERRUPTED, error)
    except Exception as error:
        # Some libraries turn an interruption into an error of theirs.
        if signals.received and not is_shared(error):
            return _fail("interrupted", INTERRUPTED, error)
        return _explain(error)
    return 0


def _explain(error: Exception) -> int:
    """Say in one line what went wrong, and return the exit code."""
    try:
        raise error
    except ModuleNotFoundError as error:
        package = _PROVIDERS.get(str(error.name).partition(".")[0], "'hessreg[gan]'")
        return _fail(f"this command needs {error.name}: pip install {package}", 2, error)
    except (CheckpointError, InputError, RunFolderError, OSError) as error:
        return _fail(str(error), 2, error)
    except _FAILURES as error:
        return _fail(str(error), 1, error)
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        return _fail(f"not enough memory: {str(error) or 'it is all used'}", 1, error)


def _is_of_memory(error: Exception) -> bool:
    """Of a RuntimeError of torch only the message says so: without a GPU it has no other type."""
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _run(args: list[str]) -> None:
    with together(current_shard()):
        command, options = _parse(args)
        _check_processes(command)
    load_command(command).run(options)


def _check_processes(command: str) -> None:
    size = current_shard().size
    if size > 1 and command not in ("train", "resume"):
        raise InputError(f"{command} is for one process, got {size}: start it without torchrun")


def _fail(message: str, code: int, error: BaseException) -> int:
    shard = current_shard()
    is_alone = shard.size > 1 and not is_shared(error)
    if os.environ.get("HESSREG_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)
    if shard.rank == 0 or is_alone:
        # One write with its end, or the lines of two processes run together.
        sys.stderr.write(f"hessreg: {' '.join(message.split())}\n")
    if is_alone:
        raise SystemExit(code)  # without waiting for the others, which do not know
    return code


def _spelled(args: Sequence[str]) -> list[str]:
    """Names of options may have dashes, too, and ``resume`` has another name."""
    if list(args[:2]) == ["train", "--resume"]:
        args = ["resume", *args[2:]]
    # Only the name: a value may have dashes of its own.
    names = re.compile(r"^--[\w.-]+")
    return [names.sub(lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in args]


def _words(args: Sequence[str]) -> tuple[str, str]:
    """The command and what follows, which may be a data set; empty where there is none."""
    words = [arg for arg in args if not arg.startswith("-")]
    command, dataset = [*words, "", ""][:2]
    return command, dataset


def _parser(args: list[str]) -> ArgumentParser:
    """Only what the arguments name has options: those of all commands take seconds."""
    from jsonargparse import ArgumentParser

    chosen, dataset = _words(args)
    parser = ArgumentParser(prog="hessreg", description=hessreg.__doc__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    for name, purpose in COMMANDS.items():
        is_empty = name != chosen or name in PER_DATASET
        made = new_parser(purpose) if is_empty else load_command(name).make_parser()
        commands.add_subcommand(name, made, help=purpose)
        if name in PER_DATASET:
            _add_datasets(made, name, dataset if name == chosen else "")
    return parser


def _add_datasets(parser: ArgumentParser, command: str, chosen: str) -> None:
    """Give a command a parser for each data set: each has defaults of its own."""
    datasets = parser.add_subcommands(dest="dataset")
    for name in DEFAULTS:
        purpose = f"{COMMANDS[command]} on {name}"
        is_empty = name != chosen
        made = new_parser(purpose) if is_empty else load_command(command).make_parser(name)
        datasets.add_subcommand(name, made, help=purpose)


def _parse(args: list[str]) -> tuple[str, dict[str, Any]]:
    from jsonargparse import ArgumentError

    parser = _parser(args)
    try:
        options = parser.instantiate(parser.parse_args(args))
    except UnicodeDecodeError as error:
        raise InputError(f"--config: not a text file ({error})") from None
    except (ArgumentError, ValueError, TypeError, OverflowError, RecursionError) as error:
        # Of an unknown name in a file, jsonargparse says only the command.
        nameless = str(error) == repr(args[0]) if args else False
        message = _unknown_name(args) if nameless else str(error)
        where = _config_file(args) if _OF_A_FILE.search(message) else ""
        near = suggestion(message, _names(args))
        raise InputError(f"{where}{_readable(message)}{near}") from None
    chosen = options[options.command]
    per_dataset = options.command in PER_DATASET
    return options.command, dict(vars(chosen[chosen.dataset] if per_dataset else chosen))


def _innermost_parser(args: list[str]) -> ArgumentParser:
    """That of a command and its data set; a LookupError if there is none."""
    make_parser = load_command(args[0]).make_parser
    if args[0] not in PER_DATASET:
        return make_parser()
    if args[1] not in DEFAULTS:
        raise LookupError(args[1])
    return make_parser(args[1])


def _names(args: list[str]) -> list[str]:
    """Every option that a command has."""
    try:
        options = _innermost_parser(args).get_defaults().as_dict()
    except LookupError:
        return []
    files = ["print_config"] if "config" in options else []
    return [*files, *flatten(options)]


def _unknown_name(args: list[str]) -> str:
    """What the innermost parser says, which names the unknown key."""
    from jsonargparse import ArgumentError

    per_dataset = args[0] in PER_DATASET
    try:
        _innermost_parser(args).parse_args(args[2 if per_dataset else 1 :])
    except (ArgumentError, ValueError, TypeError) as error:
        return str(error)
    except LookupError:
        pass
    return "--config: unknown name"


# Messages that do not say what they are about.
_OF_A_FILE = re.compile(r"Problems parsing|Unexpected config|argument after \*\*|recursion")


def _config_file(args: list[str]) -> str:
    """The last file given with --config, for messages about it."""
    files = re.findall(r"(?:^|\n)--config[=\n]([^\n]*)", "\n".join(args))
    return f"--config {files[-1]}: " if files else ""


def _readable(message: str) -> str:
    """Drop Python's type syntax from a message of jsonargparse."""
    message = re.sub(r".* argument after \*\* ", "a group of options ", message, flags=re.DOTALL)
    message = re.sub(r"(?:a )?<class '(\w+)'>", r"\1", message)
    message = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", message)
    return re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)
