"""What was asked of the speed of each part, held against what the files say.

Ratios are medians of interleaved runs against a rival in the same run. Nothing here is typed in but
what was asked; what was measured, and whether that is enough, comes from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import Row, best_rival, cost, digits, percent, rivals, share_of_floor
from hessreg.gan import HSN1RConfig

Results = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure that was asked for.

    Args:
        what: In words.
        suite: Where it is measured.
        asked: The figure.
        measure: It, from the suite's results and the row; None where it was not measured.
        group: The row's table.
        case: The row.
        unit: Of the figure; by default how many times as long a rival takes.
        at_most: Whether less is better.
        why: The reason, where it is missed.
    """

    what: str
    suite: str
    asked: float
    measure: Callable[[Results, Row], float | None]
    group: str = ""
    case: str = ""
    unit: str = "x"
    at_most: bool = False
    why: Callable[[Row], str] = lambda row: ""

    def measured(self, suites: dict[str, Results]) -> float | None:
        """What the file says."""
        results = suites.get(self.suite)
        if results is None:
            return None
        row = self.row(results)
        return None if row is None else self.measure(results, row)

    def row(self, results: Results) -> Row | None:
        """The row that the figure is of; an empty one if it is of the whole suite."""
        if not self.group:
            return {}
        fitting = [
            row
            for row in results["cases"]
            if (row["group"], row["case"]) == (self.group, self.case) and "failed" not in row
        ]
        return fitting[0] if fitting else None

    def is_met(self, measured: float) -> bool:
        """Whether that is enough."""
        return measured <= self.asked if self.at_most else measured >= self.asked

    def reason(self, suites: dict[str, Results]) -> str:
        """Why it is missed, from the same row."""
        row = self.row(suites[self.suite])
        return self.why(row) if row else ""


# ---- how to measure ----------------------------------------------------------------------------


def than(*names: str) -> Callable[[Results, Row], float | None]:
    """How many times as long the fastest of these takes."""

    def measure(results: Results, row: Row) -> float | None:
        found = best_rival(row, names)
        return None if found is None else found[1]

    return measure


def no_less_exact(name: str) -> Callable[[Results, Row], float | None]:
    """The fastest way of a rival, in times of our fastest one with no larger an error."""

    def measure(results: Results, row: Row) -> float | None:
        found = best_rival(row, [name])
        if found is None:
            return None
        limit = 1.01 * row["errors"][found[0]]  # the same iteration rounds differently
        ways = [cost(row, who) for who in row["ours"] if row["errors"][who] <= limit]
        return cost(row, found[0]) / min(ways) if ways else None

    return measure


def relative_to(reference: str) -> Callable[[Results, Row], float | None]:
    """Our time for a unit of work in those of a reference."""
    return lambda results, row: cost(row, row["ours"][0]) / cost(row, reference)


def _floor(row: Row, rival: str) -> str:
    """How far a rival is from what memory allows."""
    share, found = share_of_floor(row), best_rival(row, [rival])
    if share is None or found is None:
        return ""
    return (
        f"memory is the limit: {percent(share)} of its floor is reached, and the floor itself is"
        f" {digits(found[1] / share)} times as fast as `{found[0]}`"
    )


# ---- the targets -------------------------------------------------------------------------------

_SMALL, _LARGE = "20 tensors, 3.6 million", "161 tensors, 25.6 million"


def _faster(
    suite: str,
    group: str,
    case: str,
    whom: str,
    names: Sequence[str],
    factor: float,
    why: Callable[[Row], str] = lambda row: "",
) -> Target:
    """Faster than the fastest of some rivals."""
    what = f"{group}, {case}: faster than {whom}"
    return Target(what, suite, factor, than(*names), group, case, why=why)


def _projection() -> Iterator[Target]:
    asked = [  # kind, than whom, by what factor in the small and in the large case
        ("one direction", "the loop over tensors", ("dot_loop",), (1.9, 1.9)),
        ("one direction", "the best of `_foreach`", ("foreach",), (2.4, 2.4)),
        ("eight directions", "the Gram solve in torch", ("gram_solve",), (3.6, 3.6)),
        ("eight directions", "Gram-Schmidt by tensor", ("gram_schmidt",), (2.5, 2.5)),
        ("PCGrad of two losses", "TorchJD's fastest", ("torchjd",), (2.4, 2.2)),
        ("PCGrad of two losses", "LibMTL and conflictfree", ("libmtl", "conflictfree"), (9.0, 8.0)),
        ("OrthoGrad", "the published one", ("published",), (5.0, 5.0)),
    ]
    for kind, whom, names, factors in asked:
        for case, factor in zip((_SMALL, _LARGE), factors, strict=True):
            yield _faster("projection", kind, case, whom, names, factor, _why_memory(names[0]))
    for case in (_SMALL, _LARGE):
        what = f"one direction, {case}: time over the floor of two passes"
        yield Target(
            what,
            "projection",
            1.15,
            lambda results, row: 1 / (share_of_floor(row) or float("nan")),
            "one direction",
            case,
            at_most=True,
        )


def _why_memory(name: str) -> Callable[[Row], str]:
    return lambda row: _floor(row, name)


_TORCH = ("broadcast", "expanded", "cdist", "chunked", "compiled")


def _gaussian() -> Iterator[Target]:
    faster = [  # derivative, d, than whom, by what factor, at n = 4096
        ("forward+backward", 2, "the best of torch", _TORCH, 11.0),
        ("forward+backward", 64, "the best of torch", _TORCH, 2.2),
        ("forward+backward", 784, "the best of torch", _TORCH, 1.0),
        ("forward+backward", 2, "KeOps", ("pykeops",), 25.0),
        ("forward+backward", 64, "KeOps", ("pykeops",), 35.0),
        ("forward", 2, "the best of torch", _TORCH, 12.0),
        ("forward", 64, "the best of torch", _TORCH, 3.8),
        ("forward", 784, "the best of torch", _TORCH, 1.5),
    ]
    for derivative, d, whom, names, factor in faster:
        group, case = f"mmd2, {derivative}", f"d = {d}, n = 4096"
        yield _faster("gaussian", group, case, whom, names, factor)
    for derivative in ("forward", "forward+backward", "hvp"):
        for d in (2, 64, 784):
            group, case = f"mmd2, {derivative}", f"d = {d}, n = 256"
            yield _faster("gaussian", group, case, "the best of torch", _TORCH, 1.0)
    where = "mmd2, forward+backward, d = 64, n = 4096"
    yield Target(f"{where}: faster than eager torch as it comes", "gaussian", 5.0, _eager)
    memory = f"{where}: peak memory"
    yield Target(memory, "gaussian", 10.0, _megabytes, unit="MB", at_most=True)
    for i, which in enumerate(("mmd2", "mmd2, with backward")):
        what = f"{which}, d = 16, n = 100 000: peak memory (a matrix has 40 GB)"
        yield Target(what, "gaussian", 1000.0, _large(i), unit="MB", at_most=True)


def _eager(results: Results, row: Row) -> float | None:
    times = results.get("allocator as it comes", {})
    return times["expanded"]["median"] / times["hessreg"]["median"] if "expanded" in times else None


def _megabytes(results: Results, row: Row) -> float | None:
    return results.get("memory", {}).get("hessreg", {}).get("megabytes")


def _large(index: int) -> Callable[[Results, Row], float | None]:
    def measure(results: Results, row: Row) -> float | None:
        cases = results.get("large", [])
        return cases[index].get("megabytes") if index < len(cases) else None

    return measure


def _spectral() -> Iterator[Target]:
    asked = [
        ("power_iteration", 32, "the loop of `bmm`", "bmm", 18.0),
        ("power_iteration", 64, "the loop of `bmm`", "bmm", 25.0),
        *(("power_iteration", n, "`eigvalsh`", "eigvalsh", 12.0) for n in (32, 64)),
        *(("lanczos", n, "linear_operator", "linear_operator", 12.0) for n in (32, 64)),
        *(("symmetric_eigvalsh", n, "`eigvalsh`", "eigvalsh", 3.0) for n in (32, 64)),
    ]
    for operator, n, whom, rival, factor in asked:
        case, why = f"256 of n = {n}", _why_cold(rival)
        yield _faster("spectral", operator, case, whom, (rival,), factor, why)
    for n in (32, 64):
        yield Target(
            f"symmetric_eigvalsh, 256 of n = {n}: error over that of `eigvalsh`",
            "spectral",
            1.0,
            lambda results, row: row["errors"]["hessreg"] / row["errors"]["eigvalsh"],
            "symmetric_eigvalsh",
            f"256 of n = {n}",
            at_most=True,
        )


def _why_cold(rival: str) -> Callable[[Row], str]:
    def why(row: Row) -> str:
        again = rivals(row, "again").get(rival)
        return (
            f"the rival has driven our code and data from the caches; a second call: {again:.1f} x"
            if again is not None
            else ""
        )

    return why


def _curvature() -> Iterator[Target]:
    asked = {
        "mlp": {"PyHessian": 1.6, "eigenthings": 2.5, "curvlinops": 4.0},
        "dcgan": {"PyHessian": 1.1, "eigenthings": 1.4, "curvlinops": 1.9},
    }
    group = "Largest eigenvalue of a loss Hessian, 20 products"
    for network, factors in asked.items():
        for rival, factor in factors.items():
            what = f"largest eigenvalue, {network}: faster than {rival} at no larger an error"
            measure = no_less_exact(rival)
            yield Target(what, "curvature", factor, measure, group, network)
    yield Target(
        "8 vectors at once, mlp: cost of each",
        "curvature",
        1.2,
        relative_to("as many gradients"),
        "8 vectors at once, times a Hessian of the loss",
        "mlp",
        "gradients",
        at_most=True,
    )


def _step(every: int, factor: float) -> Target:
    return Target(
        f"a step of `hessreg train digits` with HSN1R, every={every}",
        "regularizers",
        factor,
        relative_to("none"),
        "16 training steps on digits",
        f"HSN1R, every={every}",
        "plain steps",
        at_most=True,
        why=_why_products,
    )


def _training() -> Iterator[Target]:
    yield _step(1, 4.0)
    yield _step(16, 1.3)
    for dataset in ("digits", "ring"):
        for name in ("none", "r1"):
            yield Target(
                f"overhead of the trainer over a loop that logs the same, {dataset}, {name}",
                "training",
                5.0,
                _overhead,
                "20 training steps",
                f"{dataset}, {name}",
                "%",
                at_most=True,
            )


def _overhead(results: Results, row: Row) -> float:
    return 100 * (cost(row, "hessreg") / cost(row, "by hand, norms") - 1)


def _why_products(row: Row) -> str:
    config = HSN1RConfig()
    return (
        f"each of the two networks' norms takes {config.num_steps} Hessian-vector products, each"
        " of about a gradient, and the gradient of one, which takes several"
    )


def _share_of_copy(row: Row) -> float | None:
    copying = row.get("copy, milliseconds")
    return None if copying is None else 100 * copying / cost(row, row["ours"][0])


def _gpu() -> Iterator[Target]:
    yield Target(
        f"one direction, {_LARGE}: share of the bandwidth of a copy",
        "projection",
        85.0,
        lambda results, row: _share_of_copy(row),
        "one direction",
        _LARGE,
        "%",
    )
    kernel, many = ("gaussian_kernel, forward", "d = 128, n = 8192"), "4096 of n = 32"
    products = "Products with the Hessian in the parameters, eight vectors at once"
    network = "784-512-256-1, leaky_relu, batch 64"
    asked: list[tuple[str, str, str, str, Sequence[str], float]] = [
        ("gaussian", *kernel, "cdist and exp", ("cdist",), 3.0),
        ("gaussian", *kernel, "torch.compile", ("compiled",), 1.5),
        (
            "gaussian",
            "mmd2, forward+backward",
            "d = 64, n = 16384",
            "the best of torch and KeOps",
            (*_TORCH, "pykeops"),
            2.0,
        ),
        ("spectral", "power_iteration", many, "the loop of `bmm`", ("bmm",), 20.0),
        ("spectral", "power_iteration", many, "`eigvalsh`", ("eigvalsh",), 10.0),
        ("spectral", "lanczos", many, "the loop of `bmm`", ("torch",), 20.0),
        ("spectral", "lanczos", many, "`eigvalsh`", ("eigvalsh",), 10.0),
        ("hvp", products, network, "torch.func", ("jvp(grad)",), 5.0),
        ("hvp", products, network, "torch.compile", ("compiled",), 2.0),
    ]
    for each in asked:
        yield _faster(*each)
    yield _step(1, 2.5)


CPU = [*_projection(), *_gaussian(), *_spectral(), *_curvature(), *_training()]

# What was asked of an H200, in words until it is measured.
GPU = [*_gpu()]
