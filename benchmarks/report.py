"""Writes docs/benchmarks.md from benchmarks/results: ``python -m benchmarks.report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

_HEAD = """# Benchmarks

Made by `python -m benchmarks.report` from the files in `benchmarks/results`, which
`python -m benchmarks.bench_projection --json FILE` and `bench_gaussian`, `bench_spectral`,
`bench_hvp`, `bench_curvature`, `bench_correction` and `bench_training`, likewise, write. Medians of
interleaved runs; in brackets the quartiles. On the CPU the allocator is told to keep its memory,
which makes eager torch 2 to 5 times faster on large matrices, and the same for all.

**Projection.** Contestants on large vectors start with nothing of theirs in the caches. The floor
is what the same bytes cost torch's own single passes over flat vectors in the same run: half a
`dot` for each vector read, and one `sub` into memory that is there already. With one direction a
loop over tensors is above it by what reading one of its vectors again costs, mostly from the
caches: where memory is the limit, that is about what there is to gain on it. `torchjd`,
`conflictfree` and `libmtl` start from lists of gradients, as we do, and leave lists, but for
"already flat". `--allocator-as-it-comes` leaves the allocator alone. Whether a
result then lies in new pages, which cost more than the arithmetic, depends on what the program
freed before; `project_orthogonal_`, in place, needs none.

**Gaussian kernels and MMD.** float32, n points in each sample, sigma = sqrt(d), the unbiased
estimator. Our milliseconds, then how many times as long each rival takes; "best torch" is the best
of the first five:

- `broadcast`: by definition; `expanded`: |x|^2 + |y|^2 - 2 x y by one matrix product, in place
  where autograd lets it; `cdist`: `torch.cdist`; `chunked`: `expanded` for 512 rows at a time,
  each with its derivatives before the next; `compiled`: `torch.compile` of `expanded`, without the
  time to compile.
- `pykeops`: LazyTensor sums; `gpytorch`: RBFKernel, evaluated; `geomloss`: SamplesLoss, which has
  half the biased estimator.

"hvp" is a Hessian-vector product by differentiating twice. All results are compared with float64
first. Not timed is who is *wrong* (more than 0.1 % off), *cannot* (raises), is *slow* (more than
20 s a run), needs too much *memory* (2 GB for `broadcast`, 4 GB for some 8 matrices) or is
*missing* (not installed). A run of more than 5 s is timed once. "% of mm": operations of the inner
products a second, each pair once (three times that with backward), as a share of what `torch.mm`
reaches at 2048 x 2048: low where exponentials take the time, above 100 % where `torch.mm` itself
stays below the peak of the processor.

**Symmetric eigenproblems.** Batches of 256 float32 matrices; 30 iterations or steps. Our
milliseconds and largest error against float64, then how many times as long each rival takes. The
first figure is of a call right after a rival's, with little of its code and data left in the
caches, the one behind the stroke of a second call right after that, for the rivals too.

**Corrected steps.** Batches of matrices, all contestants in float64: `eigh` is LAPACK's
eigendecomposition, `lanczos` our own Lanczos with its tridiagonal eigenproblem, `complex solve` the
shifted system, `cholesky` the normal equations. Our milliseconds, then how many times as long each
takes, and in brackets, as under "error", the largest relative error where |H| / eps is 1e6.

**Hessian-vector products.** The unit is one gradient of the loss in plain torch, forward and
backward, in the same run. All but those "from scratch" keep from product to product what they can;
`by hand` is the R-operator in plain torch.

**Curvature of networks.** The largest eigenvalue of the Hessian of a loss from at most 20 products,
the making of the operator included; the error is the median over random starts, against float64.
`hessreg power_iteration` starts where PyHessian starts, so it makes the same error. In "Asked for,
and measured" a rival's fastest way is compared with the fastest of ours that errs no more.

**Training.** A step of `hessreg train` at constant rates against a hand-written loop with the same
networks, noise, batches, fused Adam and averaged generator, whose weights are checked to be the
same. `by hand` checks and sums its losses; `by hand, norms` logs the norms of gradients and the
penalties, too, as the trainer does.
"""


def page() -> str:
    """The whole page."""
    machines = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return _HEAD + "".join(_machine(results) for results in machines)


def _machine(results: dict[str, Any]) -> str:
    card = results["machine"]
    where = card.get("gpu") or f"{card['processor']}, {card['build']['isa']}"
    title = f"\n## {where}, torch {card['torch']}, {results['threads']} thread(s)\n"
    cases = results.get("projection", {}).items()
    projection = "".join(_case(name, result) for name, result in cases)
    families = [_gaussian(results.get("gaussian")), _spectral(results), _correction(results)]
    families.append(_hvp(results))
    families += [_curvature(results.get("curvature")), _training(results.get("training"))]
    return title + projection + "".join(families)


def _training(results: dict[str, Any] | None) -> str:
    if results is None:
        return ""
    rows = [
        [
            f"{case['dataset']}, {case['regularizer']}",
            *(_spread(t) for t in case["milliseconds"].values()),
            f"{case['checkpoint']['milliseconds']:.1f}",
        ]
        for case in results["cases"]
    ]
    head = ["a step, ms", *(f"`{who}`" for who in results["cases"][0]["milliseconds"])]
    return "\n**Training steps**\n" + _table([*head, "a checkpoint, ms"], rows) + _asked(results)


def _case(name: str, result: dict[str, Any]) -> str:
    ratios = result["times faster than"]
    rows = [
        f"| `{who}` | {t['median']:.3f} ({t['low']:.3f} - {t['high']:.3f}) | {ratios[who]:.2f} |"
        for who, t in result["milliseconds"].items()
        if who in ratios
    ]
    share = (
        f"{result['gigabytes per second']:.0f} GB/s, {100 * result['share of the floor']:.0f} % of"
        " the floor"
    )
    head = f"\n**Projection, {name}** ({share})\n\n| | ms | times ours |\n| --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n"


_RIVALS = (
    *("broadcast", "expanded", "cdist", "chunked", "compiled"),
    *("pykeops", "gpytorch", "geomloss"),
)


def _gaussian(results: dict[str, Any] | None) -> str:
    if results is None:
        return ""
    kinds = dict.fromkeys((row["operator"], row["derivative"]) for row in results["cases"])
    tables = "".join(_operator(results, *kind) for kind in kinds)
    note = f"\n**{results['note']}**\n" if "note" in results else ""
    return note + tables + _processes(results) + _large(results["large"]) + _asked(results)


def _spectral(results: dict[str, Any]) -> str:
    rows = results.get("spectral", {}).get("cases", [])
    operators = dict.fromkeys(row["operator"] for row in rows)
    return "".join(_spectral_operator(rows, operator) for operator in operators)


def _spectral_operator(rows: list[dict[str, Any]], operator: str) -> str:
    cases = [row for row in rows if row["operator"] == operator]
    rivals = list(cases[0]["times ours"])
    head = ["n", "ours, ms", "error", *(f"`{who}`" for who in rivals), "smallest error of these"]
    return f"\n**`{operator}`**\n" + _table(head, [_spectral_row(row) for row in cases])


def _spectral_row(row: dict[str, Any]) -> list[str]:
    t, errors = row["milliseconds"]["hessreg"], dict(row["largest error"])
    ours = f"{t['median']:.3f} ({t['low']:.3f} - {t['high']:.3f}) / {t['again']:.3f}"
    again = row["times ours again"]
    ratios = [f"{ratio:.1f} / {again[who]:.1f}" for who, ratio in row["times ours"].items()]
    own = f"{errors.pop('hessreg'):.1e}"
    return [str(row["n"]), ours, own, *ratios, f"{min(errors.values()):.1e}"]


def _correction(results: dict[str, Any]) -> str:
    rows = results.get("correction", {}).get("cases", [])
    if not rows:
        return ""
    rivals = list(rows[0]["times ours"])
    head = ["", "ours, ms", "error", *(f"`{who}`" for who in rivals)]
    return "\n**`solve_corrected`**\n" + _table(head, [_correction_row(row) for row in rows])


def _correction_row(row: dict[str, Any]) -> list[str]:
    errors = row["error at 1e6"]
    ratios = [f"{ratio:.2f} ({errors[who]:.0e})" for who, ratio in row["times ours"].items()]
    where = f"{row['dtype']}, {row['batch']} of n = {row['n']}"
    ours = row["milliseconds"]["hessreg"]
    return [where, _spread(ours), f"{errors['hessreg']:.0e}", *ratios]


def _hvp(results: dict[str, Any]) -> str:
    cases = results.get("hvp", {}).get("cases", {})
    return "".join(_hvp_case(name, case) for name, case in cases.items())


def _hvp_case(name: str, case: dict[str, Any]) -> str:
    key, unit = ("gradients", "gradients for each vector")
    if key not in case:
        key, unit = "times faster than", "times ours"
    rows = [[f"`{who}`", _spread(t), f"{case[key][who]:.2f}"] for who, t in _times(case)]
    return f"\n**Products, {name}**\n" + _table(["", "ms", unit], rows)


def _times(case: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return list(case["milliseconds"].items())


def _spread(t: dict[str, float]) -> str:
    return f"{_digits(t['median'])} ({_digits(t['low'])} - {_digits(t['high'])})"


def _curvature(results: dict[str, Any] | None) -> str:
    if results is None:
        return ""
    tables = "".join(_top_eigenvalue(case) for case in results["top eigenvalue"])
    vectors, training = results["several vectors"], results["training"]
    tables += "\n**Eight vectors at once, mlp**\n" + _table(
        ["", "ms", "gradients for each vector"],
        [[f"`{w}`", _spread(t), f"{vectors[_PER_VECTOR][w]:.2f}"] for w, t in _times(vectors)],
    )
    tables += "\n**A training step of `hessreg train digits` with HSN1R**\n" + _table(
        ["", "ms", "plain steps"],
        [[f"`{w}`", _spread(t), f"{training['plain steps'][w]:.2f}"] for w, t in _times(training)],
    )
    return tables + _asked(results)


_PER_VECTOR = "gradients per vector"


def _top_eigenvalue(case: dict[str, Any]) -> str:
    cost, errors = case["gradients per product"], case["relative error"]
    rows = [
        [f"`{who}`", _spread(t), f"{cost[who]:.2f}", f"{errors[who]:.1e}"]
        for who, t in _times(case)
    ]
    head = ["", "ms", "gradients for each of 20 products", "error"]
    return f"\n**Largest eigenvalue, {case['network']}**\n" + _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def _operator(results: dict[str, Any], operator: str, derivative: str) -> str:
    rows = [
        row
        for row in results["cases"]
        if (row["operator"], row["derivative"]) == (operator, derivative)
    ]
    present = [who for who in _RIVALS if any(who in _everyone(row) for row in rows)]
    head = ["d", "n", "ours, ms", "best torch", *(f"`{who}`" for who in present)]
    if derivative != "hvp":
        head.append("% of mm")
    return f"\n**`{operator}`, {derivative}**\n" + _table(head, [_row(r, present) for r in rows])


def _everyone(row: dict[str, Any]) -> dict[str, Any]:
    return {**row["milliseconds"], **row["left out"]}


def _row(row: dict[str, Any], rivals: list[str]) -> list[str]:
    start = [str(row["d"]), str(row["n"])]
    if "hessreg" not in row["milliseconds"]:
        return [*start, row["left out"]["hessreg"].split(":")[0], "", *("" for _ in rivals)]
    t = row["milliseconds"]["hessreg"]
    ours = f"{_digits(t['median'])} ({_digits(t['low'])} - {_digits(t['high'])})"
    best = "" if row["best torch"] is None else f"**{_digits(row['best torch'])}**"
    cells = [_cell(row, who) for who in rivals]
    share = [f"{100 * row['share of torch.mm']:.0f}"] if "share of torch.mm" in row else []
    return [*start, ours, best, *cells, *share]


def _cell(row: dict[str, Any], who: str) -> str:
    if who in row["times ours"]:
        return _digits(row["times ours"][who])
    return row["left out"].get(who, "").split(":")[0]


def _digits(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.{max(0, 2 - len(str(int(number))) + 1)}f}"


def _processes(results: dict[str, Any]) -> str:
    eager = results.get("allocator as it comes", {})
    note = ""
    if "expanded" in eager:
        ours, theirs = (eager[who]["median"] for who in ("hessreg", "expanded"))
        note = (
            "\nWith the allocator as it comes, `mmd2` forward+backward at d = 64, n = 4096 takes "
            f"{_digits(ours)} ms, `expanded` {_digits(theirs)} ms: "
            f"{theirs / ours:.1f} times ours.\n"
        )
    rows = [[f"`{who}`", _megabytes(found)] for who, found in results["memory"].items()]
    title = (
        "\n**Peak memory beyond inputs and gradients**, `mmd2` forward+backward, d = 64, n = 4096\n"
    )
    return note + title + _table(["", "MB"], rows)


def _megabytes(found: dict[str, Any]) -> str:
    return found["left out"] if "left out" in found else f"{found['megabytes']:.1f}"


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
    return title + _table(["", "seconds", "MB beyond the result"], rows)


def _asked(results: dict[str, Any]) -> str:
    rows = [
        [row["what"], f"{row['asked']:g} {row.get('unit', '')}".strip(), _measured(row)]
        for row in results["requirements"]
    ]
    return "\n**Asked for, and measured**\n" + _table(["", "asked", "measured"], rows)


def _measured(row: dict[str, Any]) -> str:
    value = row["measured"]
    return "not measured" if value is None else f"{_digits(value)} {row.get('unit', '')}".strip()


if __name__ == "__main__":
    PAGE.write_text(page())
