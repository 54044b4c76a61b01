"""The command ``hessreg``.

Exit codes: 0 done, 1 training failed or a curvature is not finite, 2 bad input, 130 interrupted
with the state saved. Every failure is one line on standard error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import reprlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import hessreg
from hessreg._interrupt import INTERRUPTED
from hessreg._spelling import suggestion
from hessreg.curvature import LinearOperator
from hessreg.curvature import NonFiniteError as NonFiniteCurvatureError
from hessreg.curvature._checks import check_at_least, check_not_negative
from hessreg.dynamics.config import DynamicsConfig
from hessreg.dynamics.lab import Lab
from hessreg.gan.checkpoint import CheckpointError
from hessreg.gan.compare import Comparison, ComparisonError
from hessreg.gan.config import DEFAULTS, TrainConfig
from hessreg.gan.curvature_targets import NETWORKS, load_factory, load_run
from hessreg.gan.distributed import current_shard, is_shared, joined, together
from hessreg.gan.options import parse_sigma
from hessreg.gan.progress import make_progress, say
from hessreg.gan.run import Interrupted, Run, StorageError
from hessreg.gan.run_folder import RunFolderError
from hessreg.gan.sample_files import load_samples
from hessreg.gan.spectrum import (
    ENDS,
    Spectrum,
    SpectrumOptions,
    measure,
    write_spectra,
)
from hessreg.gan.trainer import NonFiniteError
from hessreg.kernels import TwoSampleTest, median_bandwidth, mmd2, mmd2_test
from hessreg.ops.gaussian import _ESTIMATORS
from hessreg.optim import OppositeGradientsError
from hessreg.self_test import self_tests, tested_devices
from hessreg.style.config import StyleConfig
from hessreg.style.images import ImageError
from hessreg.style.run import StyleRun, draw_at_once

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]


class _SelfTestError(Exception):
    """An operator computes something else than its reference."""


_ROWS = 512  # of the data of a run
_COMPARED = "none,r1,hsn1r,gaussian"
_FAILURES = (
    ComparisonError,
    NonFiniteError,
    NonFiniteCurvatureError,
    OppositeGradientsError,
    StorageError,
    _SelfTestError,
)
_PACKAGES = ("numpy", "scikit-learn", "safetensors", "matplotlib", "tensorboard", "rich")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the name of the program; ``sys.argv`` by default.

    Returns:
        The exit code.
    """
    with joined():
        return _main(list(sys.argv[1:] if args is None else args))


def _main(args: list[str]) -> int:
    signals = _Interrupts()
    try:
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
        return _fail(f"this command needs {error.name}: pip install 'hessreg[gan]'", 2, error)
    except (_InputError, CheckpointError, RunFolderError, ImageError, OSError) as error:
        return _fail(str(error), 2, error)
    except _FAILURES as error:
        return _fail(str(error), 1, error)


def _run(args: list[str]) -> None:
    with together(current_shard()):
        command, options = _parse(args)
        _check_processes(command)
    commands = {
        "train": _train,
        "resume": _resume,
        "compare": _compare,
        "spectrum": _spectrum,
        "dynamics": _dynamics,
        "style": _style,
        "mmd": _mmd,
        "doctor": _doctor,
    }
    commands[command](options)


def _check_processes(command: str) -> None:
    size = current_shard().size
    if size > 1 and command not in ("train", "resume"):
        raise _InputError(f"{command} is for one process, got {size}: start it without torchrun")


class _Interrupts:
    """SIGTERM ends a command in the way Ctrl-C does: by a KeyboardInterrupt in the main thread."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}
        self._report = sys.unraisablehook

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            sys.unraisablehook = self._raise_again
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._report

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt

    def _raise_again(self, unraisable: Any) -> None:
        """Where an exception cannot rise, as in a destructor, it would only be printed."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        else:
            self._report(unraisable)


class _InputError(Exception):
    """What the user gave cannot be used."""


@contextmanager
def _input() -> Iterator[None]:
    """What is wrong here is wrong with the input."""
    try:
        yield
    except NonFiniteCurvatureError:
        raise
    except ValueError as error:
        raise _InputError(str(error)) from None


def _fail(message: str, code: int, error: BaseException) -> int:
    shard = current_shard()
    is_alone = shard.size > 1 and not is_shared(error)
    if shard.rank == 0 or is_alone:
        # One write with its end, or the lines of two processes run together.
        sys.stderr.write(f"hessreg: {' '.join(message.split())}\n")
    if is_alone:
        raise SystemExit(code)  # without waiting for the others, which do not know
    return code


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="hessreg", description=hessreg.__doc__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    _add_per_dataset(commands, "train", "train a GAN", _train_parser)
    commands.add_subcommand("resume", _resume_parser(), help="continue a run; also train --resume")
    _add_per_dataset(commands, "compare", "several methods at equal cost", _compare_parser)
    purpose = "eigenvalues, trace and density of a Hessian"
    commands.add_subcommand("spectrum", _spectrum_parser(), help=purpose)
    purpose = "how training methods move in small games, and why"
    commands.add_subcommand("dynamics", _dynamics_parser(), help=purpose)
    purpose = "paint a photograph in the style of another"
    commands.add_subcommand("style", _style_parser(), help=purpose)
    commands.add_subcommand("mmd", _mmd_parser(), help="maximum mean discrepancy of two samples")
    commands.add_subcommand("doctor", _doctor_parser(), help="versions, devices and self-tests")
    return parser


def _add_per_dataset(
    commands: Any, name: str, purpose: str, make: Callable[[str], ArgumentParser]
) -> None:
    """Add a command with a parser for each data set: each has defaults of its own."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description=purpose)
    commands.add_subcommand(name, parser, help=purpose)
    datasets = parser.add_subcommands(dest="dataset")
    for dataset in DEFAULTS:
        datasets.add_subcommand(dataset, make(dataset), help=f"{purpose} on {dataset}")


def _config_parser(dataset: str, description: str, skip: set[str]) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("--out", type=str, default="", help="New folder; by default in runs/.")
    # Hidden: it only lets --config be the config.yaml of a run.
    parser.add_argument("--dataset", choices=[dataset], default=dataset, help=argparse.SUPPRESS)
    parser.add_class_arguments(TrainConfig, skip={"dataset", *skip})
    defaults = _flat(DEFAULTS[dataset].to_dict())
    parser.set_defaults({k: v for k, v in defaults.items() if k not in {*skip, "seconds"}})
    return parser


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dots in the names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat.update({prefix + name: value} if inner is None else inner)
    return flat


def _train_parser(dataset: str) -> ArgumentParser:
    parser = _config_parser(dataset, f"Train a GAN on {dataset} and show what it draws.", set())
    parser.add_argument("--plain", action="store_true", help="Plain lines instead of a bar.")
    return parser


def _compare_parser(dataset: str) -> ArgumentParser:
    purpose = f"Train with several methods on {dataset} at equal cost."
    parser = _config_parser(dataset, purpose, {"regularizer", "orthogonal", "correction", "seed"})
    names = "With commas: none, or regularisers, a loss, hsc and orthogonal_MODE joined by +."
    parser.add_argument("--methods", type=str, default=_COMPARED, help=names)
    parser.add_argument("--seeds", type=str, default="0", help="Seeds, with commas.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at once.")
    return parser


def _spectrum_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        exit_on_error=False,
        description="Eigenvalues, trace and spectral density of a Hessian: of each network's own"
        " loss in its own parameters, or of any operator.",
    )
    parser.add_argument(
        "target",
        type=str,
        help="A run folder, a checkpoint in one, or module:factory; the factory returns a"
        " LinearOperator, (loss, params) or (loss, params, data).",
    )
    parser.add_argument("-k", "--k", type=int, default=5, help="Eigenvalues at each end.")
    parser.add_argument(
        "--which", choices=["both", *ENDS], default="both", help="End(s): both is LA and SA."
    )
    parser.add_argument(
        "--tol", type=float, default=0.0, help="Residual relative to the norm; 0: by precision."
    )
    parser.add_argument("--steps", type=int, default=60, help="Lanczos steps of a probe.")
    parser.add_argument("--probes", type=int, default=4, help="Random vectors of the density.")
    parser.add_argument("--seed", type=int, default=0, help="Of vectors, rows and noise.")
    parser.add_argument("--network", choices=["both", *NETWORKS], default="both", help="Of a run.")
    parser.add_argument("--rows", type=int, default=_ROWS, help="Rows of the data of a run.")
    parser.add_argument("--eval", action="store_true", help="Networks of a run in this mode.")
    parser.add_argument("--out", type=str, default="", help="Folder; by default in runs/.")
    parser.add_argument("--json", action="store_true", help="Print the JSON, not the table.")
    return parser


def _dynamics_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        exit_on_error=False,
        description="Play small games of two players by many methods; measured against theory.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("--out", type=str, default="", help="Folder; by default in runs/.")
    parser.add_class_arguments(DynamicsConfig)
    return parser


def _style_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    samples = "or sample:china, sample:flower, which come with scikit-learn"
    parser = ArgumentParser(
        exit_on_error=False, description="Paint a photograph in the style of others."
    )
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


def _mmd_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    files = "a .npy or .npz file [n, ...], or a folder of PNG or JPEG images"
    parser = ArgumentParser(
        exit_on_error=False, description="Squared maximum mean discrepancy of two samples."
    )
    parser.add_argument("real", type=str, help=f"First sample: {files}.")
    parser.add_argument("fake", type=str, help="Second sample, likewise.")
    parser.add_argument(
        "--sigma", type=str, default="median", help="median, or bandwidth(s): 0.5,1"
    )
    parser.add_argument("--estimator", choices=_ESTIMATORS, default="unbiased", help="Of MMD^2.")
    parser.add_argument("--permutations", type=int, default=0, help="For a p-value; 0: none.")
    parser.add_argument("--seed", type=int, default=0, help="Of the permutations.")
    parser.add_argument("--key", type=str, default=None, help="Array to take from .npz files.")
    return parser


def _resume_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, description="Continue an interrupted run.")
    parser.add_argument("out", type=str, help="Folder of the run.")
    parser.add_argument("--steps", type=int, default=0, help="New limit of steps.")
    parser.add_argument("--seconds", type=float, default=0.0, help="New limit of CPU time.")
    parser.add_argument("--plain", action="store_true", help="Plain lines instead of a bar.")
    return parser


def _doctor_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    purpose = "Show versions and devices, and test every operator where it runs."
    return ArgumentParser(exit_on_error=False, description=purpose)


_PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "resume": _resume_parser,
    "spectrum": _spectrum_parser,
    "dynamics": _dynamics_parser,
    "style": _style_parser,
    "mmd": _mmd_parser,
    "doctor": _doctor_parser,
}


def _parse(args: list[str]) -> tuple[str, dict[str, Any]]:
    from jsonargparse import ArgumentError

    if args[:2] == ["train", "--resume"]:
        args = ["resume", *args[2:]]
    args = [_underscored(arg) for arg in args]
    parser = _parser()
    try:
        options = parser.instantiate(parser.parse_args(args))
    except UnicodeDecodeError as error:
        raise _InputError(f"--config: not a text file ({error})") from None
    except (ArgumentError, ValueError, TypeError, OverflowError, RecursionError) as error:
        # Of an unknown name in a file, jsonargparse says only the command.
        nameless = str(error) == repr(args[0]) if args else False
        message = _unknown_name(args) if nameless else str(error)
        raise _InputError(_readable(message) + suggestion(message, _names(args))) from None
    chosen = options[options.command]
    per_dataset = options.command in ("train", "compare")
    return options.command, dict(vars(chosen[chosen.dataset] if per_dataset else chosen))


def _underscored(arg: str) -> str:
    """Names of options may have dashes, too."""
    return re.sub(r"^--[\w.-]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg)


def _innermost_parser(args: list[str]) -> ArgumentParser:
    """That of a command and its data set; a LookupError if there is none."""
    per_dataset = {"train": _train_parser, "compare": _compare_parser}
    if args[0] not in per_dataset:
        return _PARSERS[args[0]]()
    if args[1] not in DEFAULTS:
        raise LookupError(args[1])
    return per_dataset[args[0]](args[1])


def _names(args: list[str]) -> list[str]:
    """Every option that a command has."""
    try:
        options = _innermost_parser(args).get_defaults().as_dict()
    except LookupError:
        return []
    return ["config", "print_config", *_flat(options)]


def _unknown_name(args: list[str]) -> str:
    """What the innermost parser says, which names the unknown key."""
    from jsonargparse import ArgumentError

    per_dataset = args[0] in ("train", "compare")
    try:
        _innermost_parser(args).parse_args(args[2 if per_dataset else 1 :])
    except (ArgumentError, ValueError, TypeError) as error:
        return str(error)
    except LookupError:
        pass
    return "--config: unknown name"


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


def _name(config: TrainConfig) -> str:
    """What a folder of a run is called."""
    chosen = [] if config.correction == "none" else [config.correction]
    return "-".join([config.dataset, config.regularizer, *chosen])


def _train(options: dict[str, Any]) -> None:
    with _input():
        with together(current_shard()):
            config = _train_config(options)
        progress = make_progress(config.title, options["plain"])
        run = Run.create(_out(options, _name(config)), config)
    say(run.train(progress))


def _resume(options: dict[str, Any]) -> None:
    with _input():
        run = Run.resume(Path(options["out"]), options["steps"], options["seconds"])
    say(run.train(make_progress(run.config.title, options["plain"])))


def _compare(options: dict[str, Any]) -> None:
    names = [name.strip() for name in options["methods"].split(",")]
    with _input():
        config = _train_config(options)
        out = _out(options, f"{config.dataset}-compare")
        seeds = _seeds(options["seeds"])
        comparison = Comparison.create(out, names, config, seeds, options["jobs"])
    say(comparison.train())


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"seeds must be integers of at least 0 with commas, got {text!r:.40}")
    return [int(part) for part in parts]


def _spectrum(options: dict[str, Any]) -> None:
    with _input():
        wanted = _spectrum_options(options)
        operators = _operators(options)
        spectra = [measure(name, op(), wanted, options["json"]) for name, op in operators.items()]
    described = {name: options[name] for name in ("target", "seed", "tol", "steps", "probes")}
    content, files = write_spectra(_out(options, "spectrum"), spectra, described)
    if options["json"]:
        say(json.dumps(content, indent=2))
    else:
        _show(spectra, files)


def _show(spectra: Sequence[Spectrum], files: Sequence[Path]) -> None:
    for spectrum in spectra:
        say(f"{spectrum.describe()}\n")
    say(f"written: {', '.join(map(str, files))}")


def _spectrum_options(options: dict[str, Any]) -> SpectrumOptions:
    check_at_least(1, k=options["k"], probes=options["probes"])
    check_at_least(2, steps=options["steps"])
    check_not_negative(tol=options["tol"])
    _check_seed(options["seed"])
    ends = ("LA", "SA") if options["which"] == "both" else (options["which"],)
    chosen = {name: options[name] for name in ("k", "tol", "steps", "probes", "seed")}
    return SpectrumOptions(ends=ends, **chosen)


def _operators(options: dict[str, Any]) -> dict[str, Callable[[], LinearOperator]]:
    """What makes the operators of a target, by name; one is in memory at a time."""
    path, network = Path(options["target"]), options["network"]
    if path.exists():
        run = load_run(path, options["rows"], options["seed"], options["eval"])
        names = NETWORKS if network == "both" else (network,)
        return {name: partial(run.operator, name) for name in names}
    if options["eval"] or network != "both" or options["rows"] != _ROWS:
        raise ValueError(f"--network, --rows and --eval are for runs, and there is none at {path}")
    op = load_factory(options["target"])
    return {options["target"]: lambda: op}


def _dynamics(options: dict[str, Any]) -> None:
    with _input():
        config = DynamicsConfig.from_options(options)
        _check_seed(config.seed)
        lab = Lab(config)
    say(lab.run(_out(options, "dynamics")))


def _style(options: dict[str, Any]) -> None:
    with _input():
        config = StyleConfig.from_options(options)
        _check_seed(config.seed)
        content, styles, out = options["content"], options["styles"], Path(options["out"])
        _check_styles(styles, config.network)
        if config.network:
            say(draw_at_once(content, out, config))
            return
        progress = make_progress(config.title, options["plain"])
        run = StyleRun(content, styles, out, config)
    say(run.describe())
    say(run.train(progress))


def _check_styles(styles: Sequence[str], network: str) -> None:
    if network and styles:
        raise ValueError(f"{network} draws in its own style: leave out {' '.join(styles)}")
    if not network and not styles:
        raise ValueError("styles: name one picture or several, or --network FILE")


def _mmd(options: dict[str, Any]) -> None:
    with _input():
        real, fake = (
            load_samples(Path(options[name]), options["key"]) for name in ("real", "fake")
        )
        sigma = _sigma(options["sigma"], real, fake)
        value = mmd2(real, fake, sigma, estimator=options["estimator"])
        _check_result(sigma, value)
        test = _test(options, real, fake, sigma)
    shown = ", ".join(
        f"{s:.4g}" for s in torch.as_tensor(sigma, dtype=torch.float64).reshape(-1).tolist()
    )
    say(f"MMD^2: {value.item():.6g} ({options['estimator']})")
    say(f"sigma: {shown}{' (median)' if options['sigma'] == 'median' else ''}")
    say(f"n: {len(real)}, m: {len(fake)}, d: {real.shape[1]}")
    if test is not None:
        count = options["permutations"]
        say(f"p-value: {test.p_value.item():.4g} ({count} permutations of the unbiased estimate)")


def _sigma(text: str, real: Tensor, fake: Tensor) -> Tensor | list[float]:
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"samples must have equal dimensions: {real.shape[1]} in the first,"
            f" {fake.shape[1]} in the second"
        )
    values = parse_sigma(text, ("median",))
    return median_bandwidth(real, fake) if isinstance(values, str) else values


def _check_result(sigma: Tensor | list[float], value: Tensor) -> None:
    gamma = 0.5 / torch.as_tensor(sigma, dtype=torch.float64).square()
    if not (gamma.isfinite() & (gamma > 0)).all():
        raise ValueError("the median distance, or its square, is not positive and finite")
    if not value.isfinite():
        raise ValueError(f"MMD^2 is {value.item()}: the points are too far apart")


def _test(
    options: dict[str, Any], real: Tensor, fake: Tensor, sigma: Tensor | list[float]
) -> TwoSampleTest | None:
    if options["permutations"] == 0:
        return None
    _check_seed(options["seed"])
    generator = torch.Generator().manual_seed(options["seed"])
    return mmd2_test(real, fake, sigma, options["permutations"], generator)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {reprlib.repr(seed)}")


def _doctor(options: dict[str, Any]) -> None:
    for name, value in hessreg.build_info().items():
        say(f"{name}: {value}")
    for name in _PACKAGES:
        say(f"{name}: {_version(name)}")
    say(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        say(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    tests = []
    for device in tested_devices():
        for test in self_tests(device):
            say(str(test))
            tests.append(test)
    if failed := [f"{test.operator} on {test.device}" for test in tests if test.failure]:
        raise _SelfTestError(f"{len(failed)} of {len(tests)} self-tests fail: {', '.join(failed)}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install 'hessreg[gan]')"
