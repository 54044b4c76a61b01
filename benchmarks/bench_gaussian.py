"""Times Gaussian kernels and MMD against peers, as ``python -m benchmarks.bench_gaussian``.

Every contestant computes the same numbers: all are compared with float64 by definition first, and
what is wrong, missing, too slow or too large is named with the reason and not timed. The rivals of
other packages (``pip install '.[bench]'``) are optional. A contestant yields its result in pieces,
each with its cotangent, so that what works in chunks may finish one before it begins the next.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hessreg
from benchmarks.harness import (
    Contest,
    Suite,
    as_it_comes,
    measure,
    run_suite,
    time_once,
)
from benchmarks.limits import Work
from benchmarks.processes import alone, giving_memory_back, peak_growth

OURS = "hessreg"
TORCH = ("broadcast", "expanded", "cdist", "chunked", "compiled")
PACKAGES = {"pykeops": "pykeops", "gpytorch": "gpytorch", "geomloss": "geomloss"}

SLOWEST = 8.0  # seconds a run; slower contestants are left out
SECONDS = 0.3  # for each contestant of a case, about
CHECKED = 1.0  # seconds: slower runs are checked at smaller sizes only
CHECKED_AT = 128  # points, for the comparison with float64
TOLERANCE = 1e-3
BROADCAST_BYTES, MATRIX_BYTES = 2 << 30, 4 << 30
MATRICES = 8  # of n x n that the derivatives of a dense contestant hold at once, about
CHUNK = 512

Piece = tuple[Tensor, Tensor | None]  # an output and its cotangent, None: 1
Pieces = Callable[..., Iterator[Piece]]


class Case(NamedTuple):
    """What is timed: an operator, its derivative, and the size of the points."""

    operator: str
    derivative: str
    d: int
    n: int

    def __str__(self) -> str:
        return f"{self.operator} {self.derivative} d={self.d} n={self.n}"


DERIVATIVES = ("forward", "forward+backward", "hvp")
CASES = [
    *(
        Case("mmd2", w, d, n)
        for d in (2, 64, 784)
        for n in (256, 1024, 4096, 16384)
        for w in DERIVATIVES
        if n <= 4096 or (w != "hvp" and d < 784)  # the rest takes minutes
    ),
    *(
        Case(operator, w, 64, n)
        for operator in ("gaussian_kernel", "gaussian_kernel_matvec")
        for n in (1024, 4096)
        for w in DERIVATIVES[:2]
    ),
]
FOR_A_GPU = [Case("gaussian_kernel", "forward", 128, 8192)]
LARGE = [
    Case(operator, w, 16, 100_000)
    for operator in ("mmd2", "gaussian_kernel_matvec")
    for w in DERIVATIVES[:2]
]
MEASURED_ALONE = Case("mmd2", "forward+backward", 64, 4096)  # memory, and torch as it comes

# ---- kernels in torch and elsewhere ------------------------------------------------------------


def broadcast(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """By definition."""
    return torch.exp(-gamma * (x[:, None] - y).square().sum(-1))


def expanded(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """``|x|^2 + |y|^2 - 2 x y`` by one matrix product, in place where autograd lets it."""
    xx, yy = (t.square().sum(-1) for t in (x, y))
    s = torch.addmm(yy[None], x, y.T, alpha=-2).add_(xx[:, None])
    return s.clamp_min(0).mul_(-gamma).exp_()


def cdist(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Torch's own distances."""
    return torch.exp(-gamma * torch.cdist(x, y).square())


def gpytorch_kernel(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """GPyTorch's kernel, evaluated."""
    from gpytorch.kernels import RBFKernel

    kernel = RBFKernel().to(x.device).requires_grad_(False)
    kernel.lengthscale = (2 * gamma) ** -0.5
    return kernel(x, y).to_dense()


def keops_kernel(x: Tensor, y: Tensor, gamma: float) -> Any:
    """KeOps' symbolic matrix."""
    from pykeops.torch import LazyTensor

    squares = ((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1)
    return (-gamma * squares).exp()


DENSE = {
    "broadcast": broadcast,
    "expanded": expanded,
    "cdist": cdist,
    "gpytorch": gpytorch_kernel,
}

# ---- the operators made of them ----------------------------------------------------------------


def dense_mmd2(kernel: Callable[..., Tensor], gamma: float, x: Tensor, y: Tensor) -> Tensor:
    """The unbiased MMD^2 from three matrices."""
    n, m = len(x), len(y)
    xx, yy, xy = kernel(x, x, gamma), kernel(y, y, gamma), kernel(x, y, gamma)
    within_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return within_x + within_y - 2 * xy.mean()


def biased_mmd2(kernel: Callable[..., Tensor], gamma: float, x: Tensor, y: Tensor) -> Tensor:
    """The biased MMD^2, to check who computes that one."""
    return kernel(x, x, gamma).mean() + kernel(y, y, gamma).mean() - 2 * kernel(x, y, gamma).mean()


def chunked_mmd2(gamma: float, x: Tensor, y: Tensor) -> Iterator[Piece]:
    """The same from rows in chunks, each finished before the next begins."""
    n, m = len(x), len(y)
    for a, b, weight in (
        (x, x, 1 / (n * (n - 1))),
        (y, y, 1 / (m * (m - 1))),
        (x, y, -2 / (n * m)),
    ):
        for start in range(0, len(a), CHUNK):
            k = expanded(a[start : start + CHUNK], b, gamma)
            own = k.diagonal(start).sum() if a is b else 0.0
            yield weight * (k.sum() - own), None


def keops_mmd2(gamma: float, x: Tensor, y: Tensor) -> Tensor:
    """Sums that KeOps never stores; the diagonals are ones and have no derivative."""
    n, m = len(x), len(y)
    xx, yy, xy = (keops_kernel(a, b, gamma).sum(1).sum() for a, b in ((x, x), (y, y), (x, y)))
    return (xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * xy / (n * m)


def geomloss_mmd2(gamma: float, x: Tensor, y: Tensor) -> Tensor:
    """GeomLoss has half of the biased MMD^2."""
    from geomloss import SamplesLoss

    return 2 * SamplesLoss("gaussian", blur=(2 * gamma) ** -0.5, backend="tensorized")(x, y)


def chunked_matvec(
    gamma: float, cotangent: Tensor, x: Tensor, y: Tensor, v: Tensor
) -> Iterator[Piece]:
    """Rows in chunks, each finished before the next begins."""
    for rows, u in zip(x.split(CHUNK), cotangent.split(CHUNK), strict=True):
        yield expanded(rows, y, gamma) @ v, u


# ---- contestants -------------------------------------------------------------------------------


def whole(function: Callable[..., Tensor], cotangent: Tensor | None = None) -> Pieces:
    """A contestant that yields all of its result at once."""

    def pieces(*inputs: Tensor) -> Iterator[Piece]:
        yield function(*inputs), cotangent

    return pieces


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compile`` for one size."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def mmd2_contestants(gamma: float, cotangent: None) -> dict[str, Pieces]:
    """Every way to the MMD^2."""
    sigma = (2 * gamma) ** -0.5
    return {
        OURS: whole(partial(hessreg.mmd2, sigma=sigma)),
        **{who: whole(partial(dense_mmd2, kernel, gamma)) for who, kernel in DENSE.items()},
        "chunked": partial(chunked_mmd2, gamma),
        "compiled": whole(compiled(lambda x, y: dense_mmd2(expanded, gamma, x, y))),
        "pykeops": whole(partial(keops_mmd2, gamma)),
        "geomloss": whole(partial(geomloss_mmd2, gamma)),
    }


def kernel_contestants(gamma: float, cotangent: Tensor) -> dict[str, Pieces]:
    """Every way to a matrix that is stored."""
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: partial(hessreg.gaussian_kernel, sigma=(2 * gamma) ** -0.5),
        **{who: partial(kernel, gamma=gamma) for who, kernel in DENSE.items()},
        "compiled": compiled(lambda x, y: expanded(x, y, gamma)),
    }
    return {who: whole(function, cotangent) for who, function in functions.items()}


def matvec_contestants(gamma: float, cotangent: Tensor) -> dict[str, Pieces]:
    """Every way to the matrix times a vector."""

    def times(kernel: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda x, y, v: kernel(x, y, gamma) @ v

    functions: dict[str, Callable[..., Tensor]] = {
        OURS: partial(hessreg.gaussian_kernel_matvec, sigma=(2 * gamma) ** -0.5),
        **{who: times(kernel) for who, kernel in DENSE.items()},
        "compiled": compiled(times(expanded)),
        "pykeops": times(keops_kernel),
    }
    pieces = {who: whole(function, cotangent) for who, function in functions.items()}
    return {**pieces, "chunked": partial(chunked_matvec, gamma, cotangent)}


OPERATORS: dict[str, Callable[..., dict[str, Pieces]]] = {
    "mmd2": mmd2_contestants,
    "gaussian_kernel": kernel_contestants,
    "gaussian_kernel_matvec": matvec_contestants,
}


class Setting(NamedTuple):
    """Points, what multiplies them, and who takes part."""

    inputs: list[Tensor]
    directions: list[Tensor]
    cotangent: Tensor | None
    gamma: float


def setting(operator: str, d: int, n: int, device: str) -> Setting:
    """Two samples that differ, so that no gradient is noise; sigma is sqrt(d)."""
    generator = torch.Generator().manual_seed(n + d)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    inputs = [randn(n, d), 1.2 * randn(n, d) + 0.3]
    if operator == "gaussian_kernel_matvec":
        inputs.append(randn(n, 1))
    shapes = {"gaussian_kernel": (n, n), "gaussian_kernel_matvec": (n, 1)}
    cotangent = randn(*shapes[operator]) if operator in shapes else None
    directions = [randn(*t.shape) for t in inputs] if operator == "mmd2" else []
    return Setting([t.requires_grad_() for t in inputs], directions, cotangent, 0.5 / d)


# ---- derivatives -------------------------------------------------------------------------------


def forward(pieces: Pieces, inputs: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """The result, in its pieces."""
    with torch.no_grad():
        return [output for output, _ in pieces(*inputs)]


def forward_backward(
    pieces: Pieces, inputs: list[Tensor], directions: list[Tensor]
) -> list[Tensor]:
    """The gradients of the inputs."""
    return _total(
        torch.autograd.grad(output, inputs, u, materialize_grads=True)
        for output, u in pieces(*inputs)
    )


def hvp(pieces: Pieces, inputs: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """The Hessian times the directions, by differentiating twice."""

    def product(output: Tensor) -> Sequence[Tensor]:
        slopes = torch.autograd.grad(output, inputs, create_graph=True, materialize_grads=True)
        moved = [(s, v) for s, v in zip(slopes, directions, strict=True) if s.requires_grad]
        moving, along = zip(*moved, strict=True)
        return torch.autograd.grad(moving, inputs, along, materialize_grads=True)

    return _total(product(output) for output, _ in pieces(*inputs))


def _total(terms: Any) -> list[Tensor]:
    total = list(next(terms))
    for term in terms:
        for t, more in zip(total, term, strict=True):
            t.add_(more)
    return total


RUNS = dict(zip(DERIVATIVES, (forward, forward_backward, hvp), strict=True))


# ---- who may take part -------------------------------------------------------------------------


def relative_error(found: list[Tensor], expected: list[Tensor], *, summed: bool) -> float:
    """Of all tensors together, in the Euclidean norm."""
    a, b = (torch.cat([t.double().reshape(-1) for t in ts]) for ts in (found, expected))
    if summed:  # the pieces of a number
        a, b = a.sum(), b.sum()
    return ((a - b).norm() / b.norm()).item()


def reference(case: Case, who: str, device: str) -> list[Tensor]:
    """Float64 by definition."""
    s = setting(case.operator, case.d, CHECKED_AT, device)
    mmd2 = biased_mmd2 if who == "geomloss" else dense_mmd2
    functions: dict[str, Callable[..., Tensor]] = {
        "mmd2": partial(mmd2, broadcast, s.gamma),
        "gaussian_kernel": partial(broadcast, gamma=s.gamma),
        "gaussian_kernel_matvec": lambda x, y, v: broadcast(x, y, s.gamma) @ v,
    }
    inputs = [t.detach().double().requires_grad_() for t in s.inputs]
    cotangent = None if s.cotangent is None else s.cotangent.double()
    pieces = whole(functions[case.operator], cotangent)
    return RUNS[case.derivative](pieces, inputs, [v.double() for v in s.directions])


def why_wrong(case: Case, who: str, device: str) -> str | None:
    """What keeps a contestant from being timed at any size, if something does."""
    package = PACKAGES.get(who)
    if package and importlib.util.find_spec(package) is None:
        return "missing: not installed"
    if who == "compiled" and case.derivative != "hvp":
        return None  # compiling takes seconds, and it is compared at every size
    s = setting(case.operator, case.d, CHECKED_AT, device)
    torch._functorch.config.donated_buffer = False  # its message would hide what cannot be done
    try:
        contestant = OPERATORS[case.operator](s.gamma, s.cotangent)[who]
        found = RUNS[case.derivative](contestant, s.inputs, s.directions)
    except Exception as error:  # whatever a rival raises is its reason
        return "cannot: " + " ".join(str(error).split())[:120]
    finally:
        torch._functorch.config.donated_buffer = True
    summed = case.operator == "mmd2" and case.derivative == "forward"
    error = relative_error(found, reference(case, who, device), summed=summed)
    return None if error < TOLERANCE else f"wrong: relative error {error:.2g} against float64"


def why_too_large(case: Case, who: str) -> str | None:
    """Who would not fit."""
    if who in (OURS, "chunked", "pykeops"):
        return None
    matrix = 4 * case.n**2
    if who == "broadcast" and matrix * case.d > BROADCAST_BYTES:
        return f"memory: n n d floats are {matrix * case.d / 2**30:.0f} GB"
    if MATRICES * matrix > MATRIX_BYTES:
        return f"memory: some {MATRICES} matrices of {matrix / 2**30:.1f} GB"
    return None


class Field:
    """Who takes part in which case, and how long that should take."""

    def __init__(self, device: str):
        self.device = device
        self._wrong: dict[tuple[str, str, int, str], str | None] = {}
        self._last: dict[tuple[str, str, int, str], tuple[int, float]] = {}

    def why_not(self, case: Case, who: str) -> str | None:
        """The reason to leave a contestant out, if there is one."""
        key = (*case[:3], who)
        reason = why_too_large(case, who)
        if reason is None and self.seconds(case, who) > SLOWEST:
            reason = f"slow: about {self.seconds(case, who):.0f} s a run"
        if reason is None and key not in self._wrong:
            self._wrong[key] = why_wrong(case, who, self.device)
        return reason or self._wrong.get(key)

    def seconds(self, case: Case, who: str) -> float:
        """How long a run should take, from the last size that was timed; 0 where none was."""
        n, seconds = self._last.get((*case[:3], who), (case.n, 0.0))
        return seconds * (case.n / n) ** 2

    def timed(self, case: Case, times: dict[str, dict[str, float]]) -> None:
        """Keeps what was measured for the sizes to come."""
        for who, t in times.items():
            self._last[(*case[:3], who)] = case.n, t["median"] / 1e3


# ---- one case ----------------------------------------------------------------------------------


class Gaussian(Suite):
    """Gaussian kernels and MMD."""

    name = "gaussian"
    seconds = SECONDS

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        prepare(args.threads)
        self.field = Field(args.device)

    def cases(self) -> list[Case]:
        """All, or those of the smallest samples."""
        cases = CASES + (FOR_A_GPU if self.device != "cpu" else [])
        return [case for case in cases if not self.args.quick or (case.d, case.n) == (2, 256)]

    def contest(self, case: Case) -> Contest:
        """Those who agree with float64 and with each other."""
        s = setting(case.operator, case.d, case.n, self.device)
        everyone = OPERATORS[case.operator](s.gamma, s.cotangent)
        reasons = {
            who: self.field.why_not(case, who) for who in self.admitted(dict(everyone), [OURS])
        }
        everyone = OPERATORS[case.operator](s.gamma, s.cotangent)  # the checks have compiled others
        act = RUNS[case.derivative]
        if reasons[OURS]:  # nothing to compare with
            reasons = {who: reason or "alone: ours is left out" for who, reason in reasons.items()}
        runs = {
            who: partial(act, everyone[who], s.inputs, s.directions)
            for who, reason in reasons.items()
            if reason is None
        }
        reasons |= disagreements(case, self.field, runs)
        runs = {who: run for who, run in runs.items() if reasons[who] is None}
        runs.get("compiled", tuple)()  # large ones were not checked, so not compiled yet
        left_out = {who: reason for who, reason in reasons.items() if reason}
        group, title = f"{case.operator}, {case.derivative}", f"d = {case.d}, n = {case.n}"
        return Contest(group, title, runs, [OURS], work(case), left_out=left_out)

    def measured(self, case: Case, row: dict[str, Any]) -> None:
        """Keeps the times for the sizes to come."""
        self.field.timed(case, row["milliseconds"])

    def extras(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What takes processes of its own."""
        if self.args.quick:
            return {}
        results: dict[str, Any] = {}
        if self.device == "cpu":
            results["allocator as it comes"] = eager_as_it_comes(self.args)
        return {**results, "memory": memory(self.args), "large": large(self.args)}


def disagreements(case: Case, field: Field, runs: dict[str, Any]) -> dict[str, str | None]:
    """Who differs from ours at this size; geomloss, which is biased, was compared before."""
    quick = {who: run for who, run in runs.items() if field.seconds(case, who) < CHECKED}
    if OURS not in quick:
        return {}
    summed = case.operator == "mmd2" and case.derivative == "forward"
    expected = quick.pop(OURS)()
    reasons: dict[str, str | None] = {}
    for who, other in quick.items():
        error = relative_error(other(), expected, summed=summed)
        if who != "geomloss" and not error < TOLERANCE:
            reasons[who] = f"wrong: relative error {error:.2g} against ours"
    return reasons


# Inner products of length d for each pair: of the points; then of the weights with the points, for
# both gradients; then what the second derivative takes (t, and two sums for each sample).
_PRODUCTS = {"forward": 1, "forward+backward": 3, "hvp": 7}


def work(case: Case) -> Work:
    """Each pair once: two halves of a square, and the pairs across."""
    pairs = 2 * case.n**2 if case.operator == "mmd2" else case.n**2
    flops = pairs * 2 * case.d * _PRODUCTS[case.derivative]
    num_bytes = 4 * 2 * case.n * case.d
    if case.derivative != "forward":
        num_bytes *= 2
    if case.operator == "gaussian_kernel":  # written; then its cotangent is read
        num_bytes += 4 * case.n**2 * (1 if case.derivative == "forward" else 2)
    return Work(num_bytes, flops, pairs)


# ---- what needs a process of its own -----------------------------------------------------------


def in_process(job: str, who: str, case: Case, args: argparse.Namespace, env: Any) -> Any:
    """Runs one job elsewhere."""
    where = ["--threads", str(args.threads), "--device", args.device]
    return alone("benchmarks.bench_gaussian", [job, who, *map(str, case), *where], env)


def job_alone(job: str, who: str, *case: str, device: str) -> None:
    """The other side of ``alone``."""
    this = Case(case[0], case[1], int(case[2]), int(case[3]))
    jobs = {"memory": peak_memory, "times": times_as_it_comes}
    print(json.dumps(jobs[job](who, this, device)))


def times_as_it_comes(who: str, case: Case, device: str) -> dict[str, Any]:
    """Ours and one rival in turn, with the allocator's settings as they come."""
    s = setting(case.operator, case.d, case.n, device)
    everyone = OPERATORS[case.operator](s.gamma, s.cotangent)
    act = RUNS[case.derivative]
    runs = {name: partial(act, everyone[name], s.inputs, s.directions) for name in (OURS, who)}
    return measure(runs, rounds=40, device=device, cold=False, seconds=8 * SECONDS)


def peak_memory(who: str, case: Case, device: str) -> dict[str, Any]:
    """Time of one run, and its peak of memory beyond the inputs and the result, in MB."""
    tiny, s = (setting(case.operator, case.d, n, device) for n in (64, case.n))
    act = RUNS[case.derivative]
    for _ in range(2):  # load what is loaded at first use
        act(OPERATORS[case.operator](tiny.gamma, tiny.cotangent)[who], tiny.inputs, tiny.directions)
    contestant = OPERATORS[case.operator](s.gamma, s.cotangent)[who]
    once = partial(act, contestant, s.inputs, s.directions)
    if who == "compiled":
        once()  # compiles, which takes more memory than the run
    results: list[Tensor] = []
    times: list[float] = []
    growth = peak_growth(
        lambda: times.append(time_once(lambda: results.extend(once()), device)), device
    )
    result_bytes = sum(t.numel() * t.element_size() for t in results)
    return {"megabytes": (growth - result_bytes) / 1e6, "milliseconds": times[0]}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """The peak of each contestant, in a process that gives memory back at once."""
    whos = [OURS, *TORCH[1:], *PACKAGES]  # broadcast does not fit
    env = giving_memory_back()
    found = {who: in_process("memory", who, MEASURED_ALONE, args, env) for who in whos}
    print(f"\npeak memory beyond inputs and gradients, {MEASURED_ALONE}", flush=True)
    for who, result in found.items():
        print(f"  {who:10s} {_megabytes(result)}")
    return found


def _megabytes(result: dict[str, Any]) -> str:
    return result.get("left out") or f"{result['megabytes']:.1f} MB"


def large(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours once, at a size where the matrices of the rivals have 40 GB each."""
    print("\nlarge: ours once, rivals would store matrices of 40 GB", flush=True)
    results = []
    for case in LARGE:
        result = in_process("memory", OURS, case, args, as_it_comes())
        results.append({**case._asdict(), **result})
        seconds = result.get("milliseconds", 0) / 1e3
        print(f"  {case}: {seconds:.1f} s, {_megabytes(result)} beyond the result", flush=True)
    return results


def eager_as_it_comes(args: argparse.Namespace) -> dict[str, Any]:
    """The expanded rival without the allocator's settings, ours in turn with it."""
    result = in_process("times", "expanded", MEASURED_ALONE, args, as_it_comes())
    print(f"\nwith the allocator as it comes, {MEASURED_ALONE}")
    if "left out" in result:
        print(f"  left out: {result['left out']}")
        return result
    for who, t in result.items():
        print(f"  {who:10s} {t['median']:9.3f} ms ({t['low']:.3f} - {t['high']:.3f})", flush=True)
    return result


# ---- command line ------------------------------------------------------------------------------


def prepare(threads: int) -> None:
    """Threads for all; compilers work in a temporary folder and leave no process behind."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    folder = Path(tempfile.gettempdir()) / f"hessreg-bench-keops-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("KEOPS_CACHE_FOLDER", str(folder))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # KeOps loads an OpenMP of its own


def main() -> None:
    """Runs every case, or one job in a process of its own."""
    if "--alone" not in sys.argv:
        return run_suite(Gaussian)
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone", nargs=6)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    prepare(args.threads)
    return job_alone(*args.alone, device=args.device)


if __name__ == "__main__":
    main()
