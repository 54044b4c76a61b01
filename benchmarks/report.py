"""Writes docs/benchmarks.md and the README's table: ``python -m benchmarks.report``.

From the files in benchmarks/results, one for each machine and number of threads; never by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import (
    Row,
    best_rival,
    digits,
    group_table,
    groups,
    less_exact,
    limit_rows,
    table,
)
from benchmarks.targets import CPU, GPU, Target

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
_MARKS = "<!-- benchmarks: written by python -m benchmarks.report -->", "<!-- end of benchmarks -->"

_HEAD = """# Benchmarks

```
hessreg bench --quick                                   # a minute, on any machine
hessreg bench --family projection,spectral              # some of it, in full
hessreg bench --json runs/bench.json                    # all: tables, JSON and a picture
```

The command needs a checkout of the source; `pip install '.[bench]'` brings the rivals, and who is
not installed is named. `make bench` installs them and writes `runs/bench.json` in at most 20
minutes; what fails or has no time left is named, and `make bench FAMILY=curvature,hvp` measures it
into the same file. From the files in `benchmarks/results`, one for each machine,
`python -m benchmarks.report` makes this page and the table in the README. One suite alone:
`python -m benchmarks.bench_spectral --help`. Two commits against each other:
`python -m benchmarks.compare BASE HEAD`. Instructions of the CPU kernels, which do not depend on
what else a machine does, against stated bounds: `make instruction-check` (needs valgrind).

**How.** Medians of interleaved runs (rival, ours, rival, ours), in brackets the quartiles. All
contestants of a row are compared with float64, or with each other, before they are timed. Columns
of rivals have how many times as long as ours they take; below 1, in bold, they are faster. Columns
`hessreg, ...` are other ways of ours. On the CPU the allocator is told to keep its memory, which
makes eager torch 2 to 5 times faster on large matrices, and the same for all. Behind a stroke: a
second call right after the first, which finds its code and data in the caches.

**Floor.** What nobody could stay below on this machine: every input read and every output written
once, at the measured speed of memory of that size, or the multiply-adds and exponentials that the
result takes by the textbook algorithm, at the measured peak. "Reached" is the floor as a share of
our time. Of training steps only torch's matrix products are counted; small cases are far from it,
because calls from Python take longer than the arithmetic.

**Projection.** Contestants on large vectors start with nothing of theirs in the caches. The floor
is what the same bytes cost torch's own single passes over flat vectors in the same rounds: half a
`dot` for each vector read, and one `sub` into memory that is there already. With one direction a
loop over tensors is above it by what reading one of its vectors again costs, mostly from the
caches: where memory is the limit, that is about what there is to gain on it. OrthoGrad's floor is
the `sub` alone: tensor by tensor, what it needs again may still be in the caches. `torchjd`,
`conflictfree` and `libmtl` start from lists of gradients, as we do, and leave lists, but for
"already flat".

**Gaussian kernels and MMD.** float32, n points in each sample, sigma = sqrt(d), the unbiased
estimator. `broadcast`: by definition; `expanded`: |x|^2 + |y|^2 - 2 x y by one matrix product, in
place where autograd lets it; `cdist`: `torch.cdist`; `chunked`: `expanded` for 512 rows at a time,
each with its derivatives before the next; `compiled`: `torch.compile` of `expanded`, without the
time to compile; `pykeops`: LazyTensor sums; `gpytorch`: RBFKernel, evaluated; `geomloss`:
SamplesLoss, which has half the biased estimator. "hvp" is a Hessian-vector product by
differentiating twice. Not timed is who is *wrong* (more than 0.1 % off), *cannot* (raises), is
*slow* (more than 8 s a run), needs too much *memory* (2 GB for `broadcast`, 4 GB for some 8
matrices) or is *missing* (not installed). A run of more than 2 s is timed once.

**Symmetric eigenproblems.** Batches of float32 matrices; 30 iterations or steps.

**Corrected steps.** All contestants in float64: `eigh` is LAPACK's eigendecomposition, `lanczos`
our own Lanczos with its tridiagonal eigenproblem, `complex solve` the shifted system, `cholesky`
the normal equations. The errors are relative, where |H| / eps is 1e6.

**Hessian-vector products.** All but those "from scratch" keep from product to product what they
can; `by hand` is the R-operator in plain torch.

**Curvature of networks.** The largest eigenvalue of the Hessian of a loss from at most 20 products,
the making of the operator included; the error is the median over random starts, against float64.
`hessreg power_iteration` starts where PyHessian starts, so it makes the same error. Under "What was
asked" a rival's fastest way is compared with the fastest of ours that errs no more.

**Training.** A step of `hessreg train` at constant rates against a hand-written loop with the same
networks, noise, batches, fused Adam and averaged generator, whose weights are checked to be the
same. `by hand` checks and sums its losses; `by hand, norms` logs the norms of gradients and the
penalties, too, as the trainer does.

**Regularisers in a step.** The methods of `hessreg compare` with the defaults of `hessreg train`,
against the step without any.

What whole programs were asked to do in a time has its figures elsewhere: eight modes with 90 % of
the samples in two minutes in [training.md](training.md), style transfer in five in
[style.md](style.md), twenty trials of a search by two workers in ten in [tuning.md](tuning.md).
"""


def page() -> str:
    """The whole page."""
    machines = load()
    on_gpu = [results for results in machines if "gpu" in results["machine"]]
    tables = "".join(_machine(results) for results in machines)
    return _HEAD + tables + ("" if on_gpu else _no_gpu())


def load() -> list[dict[str, Any]]:
    """What was measured, a machine and a number of threads each."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def _no_gpu() -> str:
    rows = [[target.what, _figure(target.asked, target), "not yet measured"] for target in GPU]
    title = "\n## On a GPU\n\nNo GPU has run any of this yet. Asked for, on an H200:\n"
    return title + table(["", "asked", "measured"], rows)


# ---- one machine -------------------------------------------------------------------------------


def _machine(results: dict[str, Any]) -> str:
    suites = results["suites"]
    parts = [_title(results), _limits(results.get("limits", {}))]
    parts.append(asked(suites, GPU if "gpu" in results["machine"] else CPU, results["threads"]))
    for name, suite in suites.items():
        parts.append(f"\n### {name.capitalize()}\n\n{_when(name, suite)}\n")
        parts += [_group(*group) for group in groups(suite["cases"]).items()]
        parts += [_EXTRAS[key](suite[key]) for key in _EXTRAS if key in suite]
    return "".join(parts)


def _title(results: dict[str, Any]) -> str:
    card = results["machine"]
    where = card.get("gpu") or f"{card['processor']}, {card['build']['isa']}"
    return f"\n## {where}, torch {card['torch']}, {results['threads']} thread(s)\n"


def _when(name: str, suite: dict[str, Any]) -> str:
    minutes = f", {suite['seconds'] / 60:.1f} min" if "seconds" in suite else ""
    made = f"`python -m benchmarks.bench_{name}`"
    return f"{made}, {suite['date']}, commit {suite['commit']}{minutes}."


def _group(name: str, rows: Sequence[Row]) -> str:
    return f"\n**{name}**\n{group_table(rows)}"


def _limits(limits: dict[str, Any]) -> str:
    if not limits:
        return "\nThe limits of this machine were not measured.\n"
    return "\n**Limits**, measured\n" + table(["", ""], limit_rows(limits))


def asked(suites: dict[str, Any], targets: Sequence[Target], threads: int) -> str:
    """Every target, with what was measured: met, or missed and why.

    They are for one thread; with more, those are shown that were measured.
    """
    chosen = [target for target in targets if threads == 1 or target.suite in suites]
    rows = [_target_row(target, suites) for target in chosen]
    title = "\n**What was asked, and what was measured**\n"
    return title + table(["", "asked", "measured", "", "suite"], rows)


def _target_row(target: Target, suites: dict[str, Any]) -> list[str]:
    measured = target.measured(suites)
    start = [target.what, _figure(target.asked, target)]
    if measured is None:
        return [*start, "not measured", "", target.suite]
    verdict = "met"
    if not target.is_met(measured):
        reason = target.reason(suites)
        verdict = f"**missed**: {reason}" if reason else "**missed**"
    return [*start, f"{digits(measured)} {target.unit}", verdict, target.suite]


def _figure(number: float, target: Target) -> str:
    return f"{'at most' if target.at_most else 'at least'} {number:g} {target.unit}"


# ---- what is measured once in a suite ----------------------------------------------------------


def _memory(found: dict[str, Any]) -> str:
    rows = [[f"`{who}`", _megabytes(result)] for who, result in found.items()]
    return "\n**Peak memory beyond what was there before**\n" + table(["", "MB"], rows)


def _megabytes(found: dict[str, Any] | float) -> str:
    if isinstance(found, float):
        return digits(found)
    return found["left out"] if "left out" in found else digits(found["megabytes"])


def _large(cases: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"`{c['operator']}`, {c['derivative']}",
            f"{c.get('milliseconds', 0) / 1e3:.1f}",
            _megabytes(c),
        ]
        for c in cases
    ]
    title = "\n**100 000 points in each sample, d = 16**, ours once; a matrix would have 40 GB\n"
    return title + table(["", "seconds", "MB beyond the result"], rows)


def _as_it_comes(times: dict[str, Any]) -> str:
    if "expanded" not in times:
        return ""
    ours, theirs = (times[who]["median"] for who in ("hessreg", "expanded"))
    return (
        "\nWith the allocator as it comes, `mmd2` forward+backward at d = 64, n = 4096 takes"
        f" {digits(ours)} ms, `expanded` {digits(theirs)} ms: {theirs / ours:.1f} times ours.\n"
    )


_EXTRAS = {"memory": _memory, "large": _large, "allocator as it comes": _as_it_comes}


# ---- the README --------------------------------------------------------------------------------

# Rows of the README: what, suite, group, case, rivals.
_TORCH = ("broadcast", "expanded", "cdist", "chunked", "compiled")
_HIGHLIGHTS = [
    (
        "project gradients of 25.6 million parameters",
        *("projection", "one direction", "161 tensors, 25.6 million"),
    ),
    (
        "the same against eight directions",
        "projection",
        "eight directions",
        "161 tensors, 25.6 million",
    ),
    ("PCGrad of two losses", "projection", "PCGrad of two losses", "161 tensors, 25.6 million"),
    ("MMD of 4096 points, d = 2", "gaussian", "mmd2, forward+backward", "d = 2, n = 4096"),
    ("MMD of 4096 points, d = 784", "gaussian", "mmd2, forward+backward", "d = 784, n = 4096"),
    ("power iteration, 256 matrices of 64", "spectral", "power_iteration", "256 of n = 64"),
    ("all eigenvalues of 256 matrices of 32", "spectral", "symmetric_eigvalsh", "256 of n = 32"),
    (
        "a Hessian-vector product of 784-512-256-1",
        "hvp",
        "Products with the Hessian in the parameters, one vector",
        "784-512-256-1, leaky_relu, batch 64",
    ),
    (
        "the largest eigenvalue of its Hessian",
        *("curvature", "Largest eigenvalue of a loss Hessian, 20 products", "mlp"),
    ),
    ("steps for 64 matrices of 16", "correction", "solve_corrected", "float64, 64 of n = 16"),
]


def readme_table() -> str:
    """Ours against the fastest rival, on the first machine with one thread."""
    chosen = [results for results in load() if results["threads"] == 1]
    if not chosen:
        return "\nNot yet measured.\n"
    suites, card = chosen[0]["suites"], chosen[0]["machine"]
    rows = [line for highlight in _HIGHLIGHTS for line in _highlight(suites, *highlight)]
    head = ["one thread", "ours, ms", "the fastest rival takes"]
    where = card.get("gpu") or f"{card['processor']} ({card['build']['isa']})"
    return f"{table(head, rows)}\nMeasured on {where} with torch {card['torch']}.\n"


def _highlight(suites: Any, what: str, suite: str, group: str, case: str) -> list[list[str]]:
    target = Target(what, suite, 0.0, lambda results, row: None, group, case)
    row = target.row(suites[suite]) if suite in suites else None
    rival = best_rival(row) if row else None
    if row is None or rival is None:
        return []
    own = digits(row["milliseconds"][row["ours"][0]]["median"])
    return [[what, own, f"{digits(rival[1])} x (`{rival[0]}`{less_exact(row, rival[0])})"]]


def with_table(readme: str) -> str:
    """The README with the table that there is now between its marks."""
    start, end = map(re.escape, _MARKS)
    made = f"{_MARKS[0]}\n{readme_table()}\n{_MARKS[1]}"
    return re.sub(f"{start}.*?{end}", lambda _: made, readme, flags=re.DOTALL)


def main() -> None:
    """Writes both."""
    PAGE.write_text(page())
    README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    main()
