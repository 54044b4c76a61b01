"""``hessreg spectrum``: eigenvalues, trace and density of a Hessian."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessreg.commands._errors import bad_input
from hessreg.commands._options import check_seed, new_parser, out_folder
from hessreg.curvature import LinearOperator
from hessreg.curvature._checks import check_at_least, check_not_negative
from hessreg.gan.curvature_targets import NETWORKS, load_factory, load_run
from hessreg.gan.progress import say
from hessreg.gan.spectrum import ENDS, Spectrum, SpectrumOptions, measure, write_spectra

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]

_ROWS = 512  # of the data of a run


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Eigenvalues, trace and spectral density of a Hessian: of each network's own"
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


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    with bad_input():
        wanted = _spectrum_options(options)
        operators = _operators(options)
        spectra = [measure(name, op(), wanted, options["json"]) for name, op in operators.items()]
    described = {name: options[name] for name in ("target", "seed", "tol", "steps", "probes")}
    with out_folder(options, "spectrum") as out:
        content, files = write_spectra(out, spectra, described)
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
    check_seed(options["seed"])
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
