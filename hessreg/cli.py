"""The command ``hessreg``.

Exit codes: 0 done, 1 training failed, 2 bad input, 130 interrupted with the state saved. Every
failure is one line on standard error.
"""

from __future__ import annotations

import importlib.metadata
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hessreg
from hessreg.gan.compare import Comparison, ComparisonError
from hessreg.gan.config import METHODS, TrainConfig
from hessreg.gan.data import DATASETS
from hessreg.gan.progress import make_progress, say
from hessreg.gan.run import Run
from hessreg.gan.trainer import NonFiniteError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]

_PACKAGES = ("numpy", "scikit-learn", "safetensors", "matplotlib", "tensorboard", "rich")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the name of the program; ``sys.argv`` by default.

    Returns:
        The exit code.
    """
    try:
        with _terminate_as_interrupt():
            _run(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt as error:  # an Interrupted run among them
        return _fail(str(error) or "interrupted", 130)
    except ModuleNotFoundError as error:
        return _fail(f"this command needs {error.name}: pip install 'hessreg[gan]'", 2)
    except (_InputError, OSError) as error:
        return _fail(str(error), 2)
    except (ComparisonError, NonFiniteError) as error:
        return _fail(str(error), 1)
    return 0


def _run(args: list[str]) -> None:
    command, options = _parse(args)
    {"train": _train, "resume": _resume, "compare": _compare, "doctor": _doctor}[command](options)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a command in the way Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _InputError(Exception):
    """What the user gave cannot be used."""


@contextmanager
def _input() -> Iterator[None]:
    """What is wrong here is wrong with the input."""
    try:
        yield
    except ValueError as error:
        raise _InputError(str(error)) from None


def _fail(message: str, code: int) -> int:
    # One write with its end, or the lines of two processes run together.
    sys.stderr.write(f"hessreg: {' '.join(message.split())}\n")
    return code


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="hessreg", description=hessreg.__doc__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("train", _train_parser(), help="train a GAN")
    commands.add_subcommand("resume", _resume_parser(), help="continue a run; also train --resume")
    commands.add_subcommand("compare", _compare_parser(), help="several methods at equal cost")
    doctor = ArgumentParser(exit_on_error=False, description="Show versions and devices.")
    commands.add_subcommand("doctor", doctor, help="show versions and devices")
    return parser


def _config_parser(description: str, skip: set[str]) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description=description)
    parser.add_argument("dataset", choices=DATASETS, help="Images to train on.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("--out", type=str, default="", help="New folder; by default in runs/.")
    parser.add_class_arguments(TrainConfig, skip={"dataset", *skip})
    return parser


def _train_parser() -> ArgumentParser:
    parser = _config_parser("Train a GAN and show what it draws.", set())
    parser.add_argument("--plain", action="store_true", help="Plain lines instead of a bar.")
    return parser


def _compare_parser() -> ArgumentParser:
    parser = _config_parser("Train several methods at equal cost.", {"method"})
    parser.add_argument(
        "--methods", type=str, default=",".join(METHODS), help="Names, with commas."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Methods to run at once.")
    return parser


def _resume_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description="Continue an interrupted run.")
    parser.add_argument("out", type=str, help="Folder of the run.")
    parser.add_argument("--steps", type=int, default=0, help="New limit of steps.")
    parser.add_argument("--seconds", type=float, default=0.0, help="New limit of CPU time.")
    parser.add_argument("--plain", action="store_true", help="Plain lines instead of a bar.")
    return parser


def _parse(args: list[str]) -> tuple[str, dict[str, Any]]:
    from jsonargparse import ArgumentError

    if args[:2] == ["train", "--resume"]:
        args = ["resume", *args[2:]]
    parser = _parser()
    try:
        options = parser.instantiate(parser.parse_args(args))
    except UnicodeDecodeError as error:
        raise _InputError(f"--config: not a text file ({error})") from None
    except (ArgumentError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _InputError(_readable(str(error))) from None
    return options.command, dict(vars(options[options.command]))


def _readable(message: str) -> str:
    """Drop Python's type syntax from a message of jsonargparse."""
    message = re.sub(r"(?:a )?<class '(\w+)'>", r"\1", message)
    message = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", message)
    return re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)


def _train_config(options: dict[str, Any]) -> TrainConfig:
    names = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: options[name] for name in names & options.keys()})


def _out(options: dict[str, Any], name: str) -> Path:
    return Path(options["out"] or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S"))


def _train(options: dict[str, Any]) -> None:
    with _input():
        config = _train_config(options)
        progress = make_progress(config.method, options["plain"])
        run = Run.create(_out(options, f"{config.dataset}-{config.method}"), config)
    say(run.train(progress))


def _resume(options: dict[str, Any]) -> None:
    with _input():
        run = Run.resume(Path(options["out"]), options["steps"], options["seconds"])
    say(run.train(make_progress(run.config.method, options["plain"])))


def _compare(options: dict[str, Any]) -> None:
    methods = [name.strip() for name in options["methods"].split(",")]
    with _input():
        config = _train_config(options)
        out = _out(options, f"{config.dataset}-compare")
        comparison = Comparison.create(out, methods, config, options["jobs"])
    say(comparison.train())


def _doctor(options: dict[str, Any]) -> None:
    for name, value in hessreg.build_info().items():
        say(f"{name}: {value}")
    for name in _PACKAGES:
        say(f"{name}: {_version(name)}")
    say(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        say(f"cuda:{index}: {torch.cuda.get_device_name(index)}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install 'hessreg[gan]')"
