"""Times corrected steps of explicit matrices, as ``python -m benchmarks.bench_correction``.

Batches of symmetric matrices, the step f(H) g of each. Ours is one eigendecomposition of all; the
rivals are LAPACK's, our own Lanczos with its tridiagonal eigenproblem, the shifted complex system
(H + i eps) z = (1 + i mu eps) g, and the normal equations. All are compared with float64 first, and
once more where |H| / eps is 1e6, which the normal equations square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import hessreg
from benchmarks.harness import Contest, Runs, Suite, run_suite
from benchmarks.limits import Work
from hessreg.optim import solve_corrected

OURS = "hessreg"
BATCHES = (64, 1024)
SIZES = (8, 16, 32, 64)
EPS, MU = 1.0, 1.0
TOLERANCE = 1e-10  # of the step, for all who compute in float64


class Case(NamedTuple):
    """What is timed."""

    dtype: str
    batch: int
    n: int

    def __str__(self) -> str:
        return f"solve_corrected {self.dtype} {self.batch} x {self.n}"


CASES = [
    Case(dtype, batch, n) for dtype in ("float64", "float32") for batch in BATCHES for n in SIZES
]


# ---- rivals ------------------------------------------------------------------------------------


def weights(values: Tensor) -> Tensor:
    """f(l), plainly."""
    return (values + MU * EPS**2) / (values.square() + EPS**2)


def eigh(H: Tensor, g: Tensor) -> Tensor:
    """By LAPACK's eigendecomposition."""
    values, vectors = torch.linalg.eigh(H)
    return (vectors @ (weights(values)[..., None] * (vectors.mT @ g[..., None])))[..., 0]


def lanczos(H: Tensor, g: Tensor) -> Tensor:
    """|g| Q f(T) e_1, n steps."""
    alpha, beta, Q = hessreg.lanczos(H, H.shape[-1], g)
    values, S = hessreg.tridiagonal_eigh(alpha, beta[..., :-1])
    first = g.norm(dim=-1, keepdim=True) * S[..., 0, :]
    return (Q @ (S @ (weights(values) * first)[..., None]))[..., 0]


def complex_solve(H: Tensor, g: Tensor) -> Tensor:
    """The real part of the shifted system's solution."""
    shifted = torch.complex(H, EPS * torch.eye(H.shape[-1], dtype=H.dtype).expand_as(H))
    return torch.linalg.solve(shifted, (1 + 1j * MU * EPS) * g).real


def cholesky(H: Tensor, g: Tensor) -> Tensor:
    """H^2 + eps^2 I factorised: the square of the condition number."""
    identity = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    factor = torch.linalg.cholesky(H @ H + EPS**2 * identity)
    right = (H + MU * EPS**2 * identity) @ g[..., None]
    return torch.cholesky_solve(right, factor)[..., 0]


RIVALS = {
    "eigh": eigh,
    "lanczos": lanczos,
    "complex solve": complex_solve,
    "cholesky": cholesky,
}


# ---- cases ---------------------------------------------------------------------------------------


def problem(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Matrices with eigenvalues between about -40 and 40, and vectors."""
    generator = torch.Generator().manual_seed(case.n)
    H = 10 * torch.randn(case.batch, case.n, case.n, generator=generator) / case.n**0.5
    g = torch.randn(case.batch, case.n, generator=generator)
    dtype = getattr(torch, case.dtype)
    return (H + H.mT).to(device, dtype), g.to(device, dtype)


def ill_conditioned(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """A few matrices with eigenvalues between 1e-6 and 1e6 of both signs."""
    H, g = (t[:8].double() for t in problem(case, device))
    values = torch.logspace(-6, 6, case.n, dtype=torch.float64, device=device)
    values[::2] *= -1
    vectors = torch.linalg.eigh(H)[1]
    H = (vectors * values) @ vectors.mT
    dtype = getattr(torch, case.dtype)
    return ((H + H.mT) / 2).to(dtype), g.to(dtype)


def tall_least_squares(H: Tensor, g: Tensor) -> Tensor:
    """The least |H p - g|^2 + eps^2 |p - mu g|^2, by a QR decomposition that squares nothing."""
    identity = EPS * torch.eye(H.shape[-1], dtype=torch.float64, device=H.device)
    tall = torch.cat([H.double(), identity.expand(H.shape)], -2)
    right = torch.cat([g.double(), EPS * MU * g.double()], -1)
    return torch.linalg.lstsq(tall, right[..., None]).solution[..., 0]


def contestants(H: Tensor, g: Tensor) -> Runs:
    """Every way to the steps, all in float64 as ours is."""

    def wide(rival: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: rival(H.double(), g.double()).to(g.dtype)

    rivals = {name: wide(rival) for name, rival in RIVALS.items()}
    return {OURS: lambda: solve_corrected(H, g, EPS, mu=MU), **rivals}


def worst(steps: Tensor, truth: Tensor) -> float:
    """The largest relative error of a step."""
    return ((steps.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()


def work(case: Case) -> Work:
    """Of an eigendecomposition with its vectors, and two products with them, in float64."""
    n, size = case.n, 4 if case.dtype == "float32" else 8
    flops = case.batch * (10 * n**3 / 3 + 4 * n**2)
    return Work(bytes=size * case.batch * (n**2 + 2 * n), flops=flops, dtype="float64")


class Correction(Suite):
    """Corrected steps for batches of matrices."""

    name = "correction"
    rounds = 40
    seconds = 0.5

    def cases(self) -> list[Case]:
        """All, or a small one."""
        return [case for case in CASES if not self.args.quick or (case.batch, case.n) == (64, 16)]

    def contest(self, case: Case) -> Contest:
        """Compares everyone with float64 by definition."""
        H, g = problem(case, self.device)
        truth = eigh(H.double(), g.double())
        runs = self.admitted(contestants(H, g), [OURS])
        most = max(TOLERANCE, 8 * torch.finfo(g.dtype).eps)
        for who, way in runs.items():
            found = worst(way(), truth)
            if not found <= most:
                raise ArithmeticError(f"{case}: {who} is off by {found:.2g}")
        hard = ill_conditioned(case, self.device)
        truth, everyone = tall_least_squares(*hard), contestants(*hard)
        errors = {who: worst(everyone[who](), truth) for who in runs}
        title = f"{case.dtype}, {case.batch} of n = {case.n}"
        return Contest("solve_corrected", title, runs, [OURS], work(case), errors=errors)


if __name__ == "__main__":
    run_suite(Correction)
