"""Times the spectral operators against peers, as ``python -m benchmarks.bench_spectral``.

Batches of symmetric float32 matrices. All contestants of a case are compared with float64 first.
linear_operator (``pip install '.[bench]'`` brings it with gpytorch) is optional.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hessreg
from benchmarks.harness import Contest, Runs, Suite, run_suite
from benchmarks.limits import Work

OURS = "hessreg"
BATCH, STEPS = 256, 30
SIZES = (16, 32, 64, 128)


class Case(NamedTuple):
    """What is timed, and for which matrices."""

    operator: str
    n: int
    batch: int = BATCH

    def __str__(self) -> str:
        return f"{self.operator}, {self.batch} of n = {self.n}"


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
    """A loop of batched products: the recurrence, then once orthogonal to all before."""
    q = v0[..., None] / v0.norm(dim=1)[:, None, None]
    basis, alpha, beta = q, [], [torch.zeros_like(v0[:, :1])]
    before = torch.zeros_like(q)
    for _ in range(STEPS):
        w = torch.baddbmm(before * beta[-1][..., None], a, q, beta=-1)
        alpha.append((q * w).sum((1, 2)))
        w = w - q * alpha[-1][:, None, None]
        w = torch.baddbmm(w, basis, torch.bmm(basis.mT, w), alpha=-1)
        beta.append(torch.linalg.vector_norm(w, dim=1))
        before, q = q, w / beta[-1][..., None]
        basis = torch.cat([basis, q], -1)
    return torch.stack(alpha, 1), torch.cat(beta[1:], 1), basis[..., :-1]


def peer_lanczos(a: Tensor, v0: Tensor) -> Tensor:
    """The tridiagonal matrices of linear_operator, stored whole."""
    from linear_operator.utils.lanczos import lanczos_tridiag

    return lanczos_tridiag(
        lambda v: a @ v, STEPS, a.dtype, a.device, a.shape[1:], a.shape[:1], init_vecs=v0[..., None]
    )[1]


# ---- cases ---------------------------------------------------------------------------------------


def contestants(case: Case, a: Tensor, v0: Tensor) -> tuple[Runs, dict[str, str]]:
    """Every way to the result, and who is missing."""
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
            "eigvalsh": lambda: linalg.eigvalsh(a),
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
    if "linear_operator" in runs and importlib.util.find_spec("linear_operator") is None:
        runs.pop("linear_operator")
        return runs, {"linear_operator": "missing: not installed"}
    return runs, {}


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


# What a GPU is for.
MANY = [Case(operator, 32, 4096) for operator in ("power_iteration", "lanczos")]


def matrices(n: int, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Matrices with one eigenvalue well above the others, and start vectors."""
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(batch, n, n, generator=generator) / n**0.5
    top = torch.nn.functional.normalize(torch.randn(batch, n, 1, generator=generator), dim=1)
    a = (a + a.mT) / 2 + 4 * top @ top.mT
    return a.to(device), torch.randn(batch, n, generator=generator).to(device)


def error(case: Case, output: Any, truth: Tensor) -> float:
    """The largest error against float64: of all eigenvalues, their sum, or the largest of them."""
    if case.operator in ("lanczos", "power_iteration"):
        return (largest(output).double() - truth[:, -1]).abs().max().item()
    norms = case.operator == "symmetric_norm nuclear"
    return (output.double() - (truth.abs().sum(-1) if norms else truth)).abs().max().item()


def largest(output: Any) -> Tensor:
    """The largest eigenvalue, of what a contestant returned: values, pairs, or T."""
    if isinstance(output, tuple) and len(output) == 2:
        return output[0]
    if isinstance(output, tuple) or output.dim() == 3:
        return torch.linalg.eigvalsh(tridiagonal(output))[:, -1]
    return output[:, -1] if output.dim() == 2 else output


def tridiagonal(output: Any) -> Tensor:
    """T in float64 of what a contestant returned."""
    if isinstance(output, Tensor):
        return output.double()
    alpha, beta = output[0].double(), output[1][:, :-1].double()
    t = torch.diag_embed(alpha)
    return t + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)


TOLERANCE = 1e-4  # of the largest eigenvalue


def work(case: Case) -> Work:
    """Of the textbook algorithms; every matrix is read once."""
    n, m = case.n, STEPS
    flops = {
        "power_iteration": (m + 1) * 2 * n**2,
        "lanczos": m * 2 * n**2 + 2 * n * m**2,  # and orthogonalised once
        "symmetric_eigvalsh": 4 * n**3 / 3,  # to tridiagonal form
        "symmetric_eigh": 10 * n**3 / 3,  # and the vectors back
        "symmetric_norm nuclear": 4 * n**3 / 3,
    }
    return Work(bytes=4 * case.batch * n**2, flops=case.batch * flops[case.operator])


class Spectral(Suite):
    """Batched eigenproblems."""

    name = "spectral"
    rounds = 30

    def cases(self) -> list[Case]:
        """All, or the smallest of each."""
        cases = CASES + (MANY if self.device != "cpu" else [])
        return [case for case in cases if not self.args.quick or case.n == 32]

    def contest(self, case: Case) -> Contest:
        """Compares everyone with float64."""
        a, v0 = matrices(case.n, case.batch, self.device)
        truth = torch.linalg.eigvalsh(a.double())
        everyone, missing = contestants(case, a, v0)
        runs = self.admitted(everyone, [OURS])
        errors = {who: error(case, way(), truth) for who, way in runs.items()}
        for who, found in errors.items():
            most = TOLERANCE * truth.abs().max().item()
            if not found <= most:
                raise ArithmeticError(f"{case}: {who} is off by {found:.2g}")
        title = f"{case.batch} of n = {case.n}"
        return Contest(
            case.operator, title, runs, [OURS], work(case), (), missing, errors, again=True
        )


if __name__ == "__main__":
    run_suite(Spectral)
