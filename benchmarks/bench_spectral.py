"""Times the spectral operators against peers, as ``python -m benchmarks.bench_spectral``.

Batches of symmetric float32 matrices. All contestants of a case are compared with float64 first.
linear_operator (``pip install '.[bench]'`` brings it with gpytorch) is optional.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hessreg
from benchmarks.harness import measure, run_cases, save

OURS = "hessreg"
BATCH, STEPS = 256, 30
SIZES = (16, 32, 64, 128)
Runs = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """What is timed, and for which matrices."""

    operator: str
    n: int

    def __str__(self) -> str:
        return f"{self.operator} n={self.n}"


# How many times faster than whom it should be.
ASKED = [
    (Case("power_iteration", 32), "bmm", 18.0),
    (Case("power_iteration", 64), "bmm", 25.0),
    (Case("power_iteration", 32), "eigvalsh", 12.0),
    (Case("power_iteration", 64), "eigvalsh", 12.0),
    *((Case("lanczos", n), "linear_operator", 12.0) for n in (32, 64)),
    *((Case("symmetric_eigvalsh", n), "eigvalsh", 3.0) for n in (32, 64)),
]


# ---- rivals ------------------------------------------------------------------------------------


def bmm(a: Tensor, v0: Tensor) -> Tensor:
    """The loop of batched products, in memory that is there already."""
    v = v0[..., None] / v0[..., None].norm(dim=1, keepdim=True)
    y = torch.empty_like(v)
    for _ in range(STEPS):
        torch.bmm(a, v, out=y)
        torch.div(y, torch.linalg.vector_norm(y, dim=1, keepdim=True), out=v)
    return (v * torch.bmm(a, v)).sum((1, 2))


def elementwise(a: Tensor, v0: Tensor) -> Tensor:
    """The same by multiplying and summing."""
    v = v0 / v0.norm(dim=1, keepdim=True)
    for _ in range(STEPS):
        y = (a * v[:, None]).sum(-1)
        v = y / y.norm(dim=1, keepdim=True)
    return (v * (a * v[:, None]).sum(-1)).sum(-1)


def torch_lanczos(a: Tensor, v0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A loop of batched products, orthogonalised twice."""
    q = v0[..., None] / v0.norm(dim=1)[:, None, None]
    basis, alpha, beta = q, [], []
    for _ in range(STEPS):
        w = torch.bmm(a, q)
        alpha.append((q * w).sum((1, 2)))
        for _ in range(2):
            w = torch.baddbmm(w, basis, torch.bmm(basis.mT, w), alpha=-1)
        beta.append(torch.linalg.vector_norm(w, dim=1))
        q = w / beta[-1][..., None]
        basis = torch.cat([basis, q], -1)
    return torch.stack(alpha, 1), torch.cat(beta, 1), basis[..., :-1]


def peer_lanczos(a: Tensor, v0: Tensor) -> Tensor:
    """The tridiagonal matrices of linear_operator, stored whole."""
    from linear_operator.utils.lanczos import lanczos_tridiag

    return lanczos_tridiag(
        lambda v: a @ v, STEPS, a.dtype, a.device, a.shape[1:], a.shape[:1], init_vecs=v0[..., None]
    )[1]


# ---- cases ---------------------------------------------------------------------------------------


def contestants(case: Case, a: Tensor, v0: Tensor) -> Runs:
    """Every way to the result."""
    linalg = torch.linalg
    everyone: dict[str, Runs] = {
        "power_iteration": {
            OURS: lambda: hessreg.power_iteration(a, STEPS, v0),
            "bmm": lambda: bmm(a, v0),
            "elementwise": lambda: elementwise(a, v0),
            "eigvalsh": lambda: linalg.eigvalsh(a),
        },
        "lanczos": {
            OURS: lambda: hessreg.lanczos(a, STEPS, v0),
            "torch": lambda: torch_lanczos(a, v0),
            "linear_operator": lambda: peer_lanczos(a, v0),
        },
        "symmetric_eigvalsh": {
            OURS: lambda: hessreg.symmetric_eigvalsh(a),
            "eigvalsh": lambda: linalg.eigvalsh(a),
        },
        "symmetric_eigh": {
            OURS: lambda: hessreg.symmetric_eigh(a)[0],
            "eigh": lambda: linalg.eigh(a)[0],
        },
        "symmetric_norm nuclear": {
            OURS: lambda: hessreg.symmetric_norm(a, "nuclear"),
            "matrix_norm": lambda: linalg.matrix_norm(a, "nuc"),
        },
    }
    runs = everyone[case.operator]
    if importlib.util.find_spec("linear_operator") is None:
        runs.pop("linear_operator", None)
    return runs


OPERATORS = (
    *("power_iteration", "lanczos"),
    *("symmetric_eigvalsh", "symmetric_eigh", "symmetric_norm nuclear"),
)
CASES = [
    Case(operator, n)
    for operator in OPERATORS
    for n in SIZES
    if operator != "lanczos" or n > STEPS  # everyone does all steps
]


def matrices(n: int, device: str) -> tuple[Tensor, Tensor]:
    """Matrices with one eigenvalue well above the others, and start vectors."""
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(BATCH, n, n, generator=generator) / n**0.5
    top = torch.nn.functional.normalize(torch.randn(BATCH, n, 1, generator=generator), dim=1)
    a = (a + a.mT) / 2 + 4 * top @ top.mT
    return a.to(device), torch.randn(BATCH, n, generator=generator).to(device)


def error(case: Case, output: Any, truth: Tensor) -> float:
    """The largest error against float64: of all eigenvalues, their sum, or the largest of them."""
    if case.operator == "lanczos":
        output = torch.linalg.eigvalsh(tridiagonal(output))[:, -1]
    elif case.operator == "power_iteration":
        output = output[0] if isinstance(output, tuple) else output
        output = output[:, -1] if output.dim() == 2 else output
    of_all = {"symmetric_norm nuclear": truth.abs().sum(-1)}
    of_one = truth[:, -1] if case.operator in ("lanczos", "power_iteration") else truth
    return (output.double() - of_all.get(case.operator, of_one)).abs().max().item()


def tridiagonal(output: Any) -> Tensor:
    """T in float64 of what a contestant returned."""
    if isinstance(output, Tensor):
        return output.double()
    alpha, beta = output[0].double(), output[1][:, :-1].double()
    t = torch.diag_embed(alpha)
    return t + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)


TOLERANCE = 1e-4  # of the largest eigenvalue


def run(case: Case, rounds: int, device: str) -> dict[str, Any]:
    """Checks and measures one case."""
    a, v0 = matrices(case.n, device)
    truth = torch.linalg.eigvalsh(a.double())
    runs = contestants(case, a, v0)
    errors = {who: error(case, way(), truth) for who, way in runs.items()}
    for who, found in errors.items():
        most = TOLERANCE * truth.abs().max().item()
        assert found <= most, f"{case}: {who} is off by {found:.2g}"
    times = measure(runs, rounds=rounds, device=device, cold=False, again=True)
    return {
        **case._asdict(),
        "milliseconds": times,
        "times ours": _ratios(times, "median"),
        "times ours again": _ratios(times, "again"),
        "largest error": errors,
    }


def _ratios(times: dict[str, dict[str, float]], figure: str) -> dict[str, float]:
    ours = times[OURS][figure]
    return {who: t[figure] / ours for who, t in times.items() if who != OURS}


def show(result: dict[str, Any]) -> None:
    """Prints one case as a table."""
    print(f"\n{result['operator']}, {BATCH} matrices, n = {result['n']}")
    for who, times in result["milliseconds"].items():
        found = [result[key].get(who) for key in ("times ours", "times ours again")]
        note = "" if who == OURS else "{:6.2f} x our time, again {:6.2f} x".format(*found)
        spread = f"({times['low']:.3f} - {times['high']:.3f}), again {times['again']:.3f}"
        off = f"error {result['largest error'][who]:.1e}"
        print(f"  {who:16s} {times['median']:9.3f} ms {spread:36s} {off}  {note}")


def requirements(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the numbers are held to, with what was measured; None where it was not.

    That is the first call after a rival's, as in a program that does other things in between.
    """
    rows = {Case(row["operator"], row["n"]): row for row in results}
    faster = [
        {
            "what": f"{case}, {who}",
            "asked": factor,
            "measured": rows[case]["times ours"].get(who) if case in rows else None,
            "again": rows[case]["times ours again"].get(who) if case in rows else None,
        }
        for case, who, factor in ASKED
    ]
    exact = [case for case in rows if case.operator == "symmetric_eigvalsh"]
    errors = {case: rows[case]["largest error"] for case in exact}
    smaller = [
        {"what": f"{case}, error of eigvalsh", "asked": 1.0, "measured": e["eigvalsh"] / e[OURS]}
        for case, e in errors.items()
    ]
    return [*faster, *smaller]


def show_requirements(found: list[dict[str, Any]]) -> None:
    """Prints what was asked and what was measured."""
    print("\nrequirements: times ours, at least")
    for row in found:
        found = [row[key] for key in ("measured", "again") if row.get(key) is not None]
        values = ", again ".join(f"{value:.2f}" for value in found) or "not measured"
        print(f"  {row['what']:45s} asked {row['asked']:5.1f}   {values}")


def main() -> None:
    """Runs every case."""
    args, card, cases = run_cases(__doc__.splitlines()[0], CASES, run, show)
    found = requirements(cases)
    show_requirements(found)
    if args.json:
        spectral = {"cases": cases, "requirements": found}
        save(args.json, {"machine": card, "threads": args.threads, "spectral": spectral})


if __name__ == "__main__":
    main()
