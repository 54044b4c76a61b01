"""What is ours under pytest-benchmark: ``python -m pytest benchmarks --benchmark-only``.

For its storage and its comparisons of runs of one machine (``--benchmark-autosave``,
``--benchmark-compare``) on small cases; rivals and floors are in ``hessreg bench``.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Suite

_OPTIONS = {"device": "cpu", "threads": 1, "rounds": 5, "seconds": 0.2, "case": "", "json": None}
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))


def suites() -> list[Suite]:
    """One of each."""
    args = argparse.Namespace(quick=True, only_ours=True, **_OPTIONS)
    modules = [import_module(f"benchmarks.{name}") for name in NAMES]
    return [
        found(args)
        for module in modules
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, Suite) and found.name
    ]


CASES = [(suite, case) for suite in suites() for case in suite.cases()]


@pytest.mark.parametrize(
    ("suite", "case"), CASES, ids=[f"{suite.name}: {case}" for suite, case in CASES]
)
def test_ours(benchmark: Any, suite: Suite, case: Any) -> None:
    """The first of our ways."""
    contest = suite.contest(case)
    benchmark.group = contest.group
    benchmark(contest.runs[contest.ours[0]])
