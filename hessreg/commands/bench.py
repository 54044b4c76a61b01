"""``hessreg bench``: time everything against its rivals and against the limits of the machine."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hessreg
from hessreg.commands._errors import FailedError, InputError
from hessreg.commands._options import new_parser
from hessreg.gan.building import resolve_device
from hessreg.gan.progress import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["FAMILIES", "make_parser", "run"]

FAMILIES = (
    *("projection", "spectral", "hvp", "curvature"),
    *("correction", "regularizers", "training", "gaussian"),
)
_MAX_THREADS = 1024


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Time the operators and methods against their rivals and the limits of this machine."
        " Needs a checkout of the source."
    )
    names = ", ".join(FAMILIES)
    parser.add_argument("--family", type=str, default="all", help=f"all, or some of {names}.")
    parser.add_argument("--quick", action="store_true", help="Few small cases: a minute or two.")
    parser.add_argument(
        "--json", type=str, default="", help="File for the measurements; by default in runs/."
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="Where.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--minutes", type=float, default=20.0, help="At most, for all together.")
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    root = _checkout()
    families, command = _families(options["family"]), _arguments(options)
    path = _results_file(options["json"])
    end = time.monotonic() + 60 * options["minutes"]
    outcomes = {name: _suite(root, name, [*command, f"--json={path}"], end) for name in families}
    if path.exists() and (code := _python(root, ["-m", "benchmarks.summary", str(path)], math.inf)):
        outcomes["summary"] = f"exit code {code}"
    failed = [f"{name} ({why})" for name, why in outcomes.items() if why]
    if failed:
        raise FailedError(f"not everything was measured: {', '.join(failed)}")


def _checkout() -> Path:
    """Where the benchmarks lie: they are no part of the installed package."""
    root = Path(hessreg.__file__).resolve().parent.parent
    if not (root / "benchmarks" / "harness.py").exists():
        raise InputError(f"bench needs a checkout of the source: no benchmarks folder in {root}")
    return root


def _families(text: str) -> list[str]:
    names = list(FAMILIES) if text == "all" else text.split(",")
    for name in names:
        if name not in FAMILIES:
            wanted = ", ".join(FAMILIES)
            raise InputError(
                f"family must be all, or some of {wanted} joined by commas, got {name!r}"
            )
    return list(dict.fromkeys(names))


def _arguments(options: dict[str, Any]) -> list[str]:
    """The options of each suite."""
    threads, minutes = options["threads"], options["minutes"]
    if not 1 <= threads <= _MAX_THREADS:
        raise InputError(f"threads must be in [1, {_MAX_THREADS}], got {threads}")
    if not (math.isfinite(minutes) and minutes > 0):
        raise InputError(f"minutes must be positive and finite, got {minutes}")
    try:
        device = resolve_device(options["device"])
    except ValueError as error:
        raise InputError(str(error)) from None
    quick = ["--quick"] if options["quick"] else []
    return [f"--device={device}", f"--threads={threads}", *quick]


def _results_file(text: str) -> Path:
    path = Path(text or time.strftime("runs/bench-%Y%m%d-%H%M%S.json"))
    if path.suffix != ".json":
        raise InputError(f"json must be a file name that ends in .json, got {text!r}")
    if path.is_dir():
        raise InputError(f"json: {path} is a folder, not a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def _suite(root: Path, name: str, arguments: list[str], end: float) -> str:
    """Run one; what was measured until it fails stays. Returns why it did not end well."""
    if time.monotonic() >= end:
        return "no time left"
    say(f"\n==== {name}")
    start = time.monotonic()
    try:
        code = _python(root, ["-m", f"benchmarks.bench_{name}", *arguments], end - start)
    except subprocess.TimeoutExpired:
        return "no time left"
    say(f"\n{name}: {time.monotonic() - start:.0f} s")
    return "" if code == 0 else f"exit code {code}"


def _python(root: Path, arguments: list[str], seconds: float) -> int:
    """Run Python with the checkout on its path, and nothing of it goes on after this."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        return process.wait(None if math.isinf(seconds) else seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
