"""Times two commits against each other: ``python -m benchmarks.compare BASE HEAD``.

Both are checked out and built in temporary folders. The suites of this checkout then time what is
ours in one and the other by turns, a process each time, so that a machine that drifts drifts for
both; printed are the ratios of neighbours, HEAD over BASE: above 1 it became slower, and it says so
where all of at least five pairs do. A row that one of the commits cannot run is left out.

    python -m benchmarks.compare main HEAD --family spectral,projection --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tables import cost, digits

ROOT = Path(__file__).resolve().parent.parent
Times = dict[str, float]  # milliseconds by title of a row


_FEWEST = 5  # pairs for a verdict


class Ratio(NamedTuple):
    """HEAD over BASE: the median of pairs, the extremes, and how many there are."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, base: list[float], head: list[float]) -> Ratio:
        """The pairs that lie side by side in time."""
        found = [after / before for before, after in zip(base, head, strict=True)]
        return cls(statistics.median(found), min(found), max(found), len(found))

    @property
    def verdict(self) -> str:
        """What all pairs say, if there are enough."""
        if self.pairs < _FEWEST or self.low <= 1 <= self.high:
            return ""
        return "slower" if self.low > 1 else "faster"


def ratios(base: list[Times], head: list[Times]) -> dict[str, Ratio]:
    """For the rows that all runs have."""
    common = [title for title in base[0] if all(title in times for times in (*base, *head))]
    return {t: Ratio.of([run[t] for run in base], [run[t] for run in head]) for t in common}


@contextlib.contextmanager
def built(commit: str, folder: Path) -> Iterator[Path]:
    """A folder with the package of a commit, built, and the benchmarks of this checkout."""
    tree, place = folder / "tree", folder / "place"
    _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
    try:
        print(f"building {commit} ({_git('rev-parse', '--short', commit).strip()})", flush=True)
        env = {**os.environ, "HESSREG_CUDA": os.environ.get("HESSREG_CUDA", "0")}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=tree, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{commit} does not build:\n{(done.stdout + done.stderr)[-2000:]}")
        place.mkdir()
        (place / "hessreg").symlink_to(tree / "hessreg")
        (place / "csrc").symlink_to(ROOT / "csrc")
        (place / "benchmarks").symlink_to(ROOT / "benchmarks")
        yield place
    finally:
        _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def timed(place: Path, families: list[str], more: list[str]) -> Times:
    """One process for each family; a family that fails has no rows."""
    found: Times = {}
    for name in families:
        path = place / f"{name}.json"
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--only-ours", *more]
        # Only what is in the place, not what is installed; -m puts the current folder first.
        done = subprocess.run(
            [*command, f"--json={path}"],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{name} at {place} failed: {done.stderr.strip()[-200:]}", file=sys.stderr)
        if path.exists():
            found |= times_of(json.loads(path.read_text())["suites"][name]["cases"])
    return found


def times_of(rows: list[dict[str, Any]]) -> Times:
    """Milliseconds of each of our ways in each row."""
    return {
        f"{row['group']}: {row['case']}" + ("" if who == row["ours"][0] else f" ({who})"): cost(
            row, who
        )
        for row in rows
        if "failed" not in row
        for who in row["ours"]
    }


def show(found: dict[str, Ratio]) -> None:
    """Prints the ratios, the largest first."""
    print("\nHEAD over BASE, median of pairs (extremes)")
    for title, ratio in sorted(found.items(), key=lambda pair: -pair[1].median):
        spread = f"{ratio.median:6.3f} ({digits(ratio.low)} - {digits(ratio.high)})"
        print(f"  {title[:96]:96s} {spread:24s} {ratio.verdict}".rstrip())


def main() -> None:
    """Builds and times both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("head", help="commit to judge")
    parser.add_argument("--family", default="projection,gaussian,spectral,hvp,correction")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes")
    parser.add_argument("--case", default="", help="only what holds this in its title")
    parser.add_argument("--quick", action="store_true", help="few small cases")
    args = parser.parse_args()
    families = args.family.split(",")
    more = [f"--case={args.case}", *(["--quick"] if args.quick else [])]
    base: list[Times] = []
    head: list[Times] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        places = []
        for name, commit in (("base", args.base), ("head", args.head)):
            (Path(folder) / name).mkdir()
            places.append(stack.enter_context(built(commit, Path(folder) / name)))
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", flush=True)
            base.append(timed(places[0], families, more))
            head.append(timed(places[1], families, more))
    show(ratios(base, head))


if __name__ == "__main__":
    main()
