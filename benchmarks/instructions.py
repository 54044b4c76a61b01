"""Counts instructions of the CPU kernels under callgrind: ``python -m benchmarks.instructions``.

The same on a busy machine as on a quiet one, so a kernel that does more than it did is seen where
no timing could show it. The kernels are compiled for AVX2, the most that valgrind knows, and the
counts are held against the bounds in instructions.json, which ``--update`` sets 5 % above what it
finds. Exit code 1 if one is exceeded. Without valgrind, or with another compiler than that of the
bounds, there is nothing to check, and it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOUNDS = ROOT / "benchmarks" / "instructions.json"
SLACK = 1.05
_FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c")
_LINE = re.compile(r"^\s*([\d,]+)\s.*?[:/](\w+)(?:\(.*\))?(?: \[.*\])?$", re.MULTILINE)


def missing() -> str | None:
    """Why nothing can be counted here."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the bounds are for x86-64, this is {platform.machine()}"
    for name in ("valgrind", "callgrind_annotate", compiler()):
        if shutil.which(name) is None:
            return f"{name} is not installed"
    return None


def compiler() -> str:
    """The C++ compiler."""
    return os.environ.get("CXX") or "c++"


def count(folder: Path) -> dict[str, int]:
    """Instructions of each kernel, callees included."""
    program = build(folder)
    output = folder / "callgrind.out"
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={output}", str(program)]
    run(valgrind)
    text = run(["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(output)])
    return parse(text, names())


def build(folder: Path) -> Path:
    """The driver with the kernels of one instruction set, each file compiled beside the others."""
    sources = [Path(__file__).with_suffix(".cpp"), *sorted(ROOT.glob("csrc/*/*_cpu.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        run([compiler(), *_FLAGS, "-DHESSREG_ISA=avx2", "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    program = folder / "kernels"
    run([compiler(), *map(str, objects), "-o", str(program)])
    return program


def run(command: list[str]) -> str:
    """What a program prints; it ends this one if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:2])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def names() -> list[str]:
    """The functions of the driver that are counted."""
    text = Path(__file__).with_suffix(".cpp").read_text()
    return re.findall(r"^COUNTED (\w+)\(", text, flags=re.MULTILINE)


def parse(text: str, wanted: list[str]) -> dict[str, int]:
    """The counts of the wanted functions in what callgrind_annotate prints."""
    found = {name: int(number.replace(",", "")) for number, name in _LINE.findall(text)}
    absent = [name for name in wanted if name not in found]
    if absent:
        sys.exit(f"callgrind has not seen {', '.join(absent)}")
    return {name: found[name] for name in wanted}


def exceeded(counts: dict[str, int], bounds: dict[str, int]) -> list[str]:
    """Who does more than it may, or has no bound."""
    return [name for name, number in counts.items() if number > bounds.get(name, -1)]


def show(counts: dict[str, int], bounds: dict[str, int]) -> None:
    """Prints a table."""
    for name, number in counts.items():
        bound = bounds.get(name)
        against = f"at most {bound:12,d}, {100 * number / bound:5.1f} %" if bound else "no bound"
        print(f"{name:36s} {number:12,d} instructions, {against}")


def main() -> int:
    """Counts and compares, or sets the bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="set the bounds by what is counted")
    args = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"instruction counts are skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        counts = count(Path(folder))
    made = run([compiler(), "--version"]).splitlines()[0]
    if args.update:
        bounds = {name: round(SLACK * number) for name, number in counts.items()}
        BOUNDS.write_text(json.dumps({"compiler": made, "at most": bounds}, indent=2) + "\n")
    stated = json.loads(BOUNDS.read_text())
    show(counts, stated["at most"])
    if made != stated["compiler"]:
        print(f"not held against the bounds: they are of {stated['compiler']}, this is {made}")
        return 0
    too_many = exceeded(counts, stated["at most"])
    if too_many:
        print(f"more than the bounds: {', '.join(too_many)}")
        print("if that is meant, python -m benchmarks.instructions --update sets them anew")
    return 1 if too_many else 0


if __name__ == "__main__":
    sys.exit(main())
