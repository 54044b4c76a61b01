"""Times curvature of networks against other packages, as ``python -m benchmarks.bench_curvature``.

The largest eigenvalue of a loss Hessian from a budget of products, building the operator included,
for a multilayer perceptron and for a convolutional discriminator. Everyone multiplies by the same
matrix: all networks are in evaluation mode, because PyHessian forces it. The unit is one gradient
of the loss, measured in the same rounds; the error is against a converged float64 computation, the
median over random starts.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Contest, Runs, Suite, run_suite
from benchmarks.limits import Work, counted_work
from hessreg.curvature import HessianOperator, eigenvalues, power_iteration

BUDGET = 20  # products
VECTORS = 8
STARTS = 5  # random ones, for the errors


class Problem:
    """A discriminator after a few steps of training, and the loss of one batch."""

    def __init__(self, model: nn.Module, x: Tensor, steps: int = 20) -> None:
        self.model, self.x = model, x
        self.y = (torch.arange(len(x), device=x.device) % 2 == 0).to(x.dtype).reshape(-1, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        model.zero_grad()
        model.eval()

    @property
    def params(self) -> list[Tensor]:
        """The network's parameters."""
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        """The mean cross-entropy of the batch."""
        return F.binary_cross_entropy_with_logits(self.model(self.x), self.y)

    def gradient(self) -> Any:
        """The unit of cost."""
        return torch.autograd.grad(self.loss(), self.params)

    def operator(self) -> HessianOperator:
        """The Hessian of the loss."""
        return HessianOperator(self.loss, self.params)

    def double(self) -> Problem:
        """The same in float64."""
        return Problem(copy.deepcopy(self.model).double(), self.x.double(), steps=0)


def mlp(device: str) -> Problem:
    """784-512-256-1, batch 64."""
    layers = [nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*layers, nn.Linear(256, 1)).to(device)
    return Problem(model, torch.randn(64, 784, device=device))


def dcgan(device: str) -> Problem:
    """Four strided convolutions with batch normalisation, batch 32 of 32 x 32 pixels."""
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2)]
    for width in (32, 64):
        layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width)]
        layers += [nn.LeakyReLU(0.2)]
    model = nn.Sequential(*layers, nn.Conv2d(128, 1, 4), nn.Flatten()).to(device)
    return Problem(model, torch.randn(32, 1, 32, 32, device=device))


NETWORKS = {"mlp": mlp, "dcgan": dcgan}

# ---- who takes part ----------------------------------------------------------------------------


def ours(problem: Problem, seed: int) -> float:
    """Lanczos, all of the budget unless it has converged before."""
    source = torch.Generator().manual_seed(seed)
    found = eigenvalues(problem.operator(), max_products=BUDGET, generator=source)
    return found.values.item()


def ours_rough(problem: Problem, seed: int) -> float:
    """The same until the residual is below 1 %, which is an error well below that."""
    source = torch.Generator().manual_seed(seed)
    found = eigenvalues(problem.operator(), max_products=BUDGET, tol=1e-2, generator=source)
    return found.values.item()


def ours_power(problem: Problem, seed: int) -> float:
    """Power iteration from the vector that PyHessian starts from."""
    start = torch.cat([v.flatten() for v in start_of(problem)])
    return power_iteration(problem.operator(), BUDGET, start)[0].item()


def start_of(problem: Problem) -> list[Tensor]:
    """A random vector, drawn as PyHessian does."""
    return [torch.randn(p.shape).to(p.device) for p in problem.params]


def retained_graph(problem: Problem, seed: int) -> float:
    """Power iteration in plain torch with one gradient graph: the best generic way."""
    params = problem.params
    grads = torch.autograd.grad(problem.loss(), params, create_graph=True)
    v = start_of(problem)
    value = torch.zeros(())
    for _ in range(BUDGET):
        size = torch.stack(torch._foreach_norm(v)).norm()
        v = torch._foreach_div(v, size)
        h = torch.autograd.grad(grads, params, v, retain_graph=True)
        value = sum((a * b).sum() for a, b in zip(v, h, strict=True))
        v = list(h)
    return value.item()


def pyhessian(problem: Problem, seed: int) -> float:
    """PyHessian's power iteration."""
    from pyhessian import hessian

    data = (problem.x, problem.y)
    cuda = problem.x.is_cuda
    with contextlib.redirect_stdout(io.StringIO()):
        curvature = hessian(
            problem.model, nn.BCEWithLogitsLoss(), data=data, cuda=cuda
        ).eigenvalues(maxIter=BUDGET, tol=0.0, top_n=1)
    problem.model.zero_grad(set_to_none=True)  # it leaves a graph in .grad
    return curvature[0][0]


def _eigenthings_operator(problem: Problem) -> Any:
    from hessian_eigenthings import HessianOperator as Theirs

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    return Theirs(problem.model, [(problem.x, problem.y)], loss)


def eigenthings_power(problem: Problem, seed: int) -> float:
    """hessian-eigenthings, power iteration."""
    from hessian_eigenthings import deflated_power_iteration

    found = deflated_power_iteration(
        _eigenthings_operator(problem), k=1, max_iter=BUDGET, tol=0.0, seed=seed
    )
    return found.eigenvalues[0].item()


def eigenthings_lanczos(problem: Problem, seed: int) -> float:
    """hessian-eigenthings, Lanczos."""
    from hessian_eigenthings import lanczos

    found = lanczos(_eigenthings_operator(problem), k=1, max_iter=BUDGET, which="LM", seed=seed)
    return found.eigenvalues[0].item()


def _curvlinops_operator(problem: Problem) -> Any:
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        problem.model, nn.BCEWithLogitsLoss(), problem.params, [(problem.x, problem.y)]
    )


def curvlinops_power(problem: Problem, seed: int) -> float:
    """Power iteration on curvlinops' operator."""
    op = _curvlinops_operator(problem)
    v = torch.randn(op.shape[1], device=problem.x.device)
    value = torch.zeros(())
    for _ in range(BUDGET):
        v = v / v.norm()
        h = op @ v
        value, v = v @ h, h
    return value.item()


def curvlinops_eigsh(problem: Problem, seed: int) -> float:
    """ARPACK on curvlinops' operator, one cycle of as many products."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    op = _curvlinops_operator(problem).to_scipy()
    try:
        found = eigsh(op, k=1, which="LA", ncv=BUDGET, maxiter=1, tol=1e-3)[0]
    except ArpackNoConvergence as error:
        found = error.eigenvalues
    return float(found[0]) if len(found) else float("nan")


CONTESTANTS: dict[str, Callable[[Problem, int], float]] = {
    "hessreg eigenvalues": ours,
    "hessreg eigenvalues, tol 1e-2": ours_rough,
    "hessreg power_iteration": ours_power,
    "retained graph": retained_graph,
    "PyHessian": pyhessian,
    "eigenthings, power": eigenthings_power,
    "eigenthings, Lanczos": eigenthings_lanczos,
    "curvlinops, power": curvlinops_power,
    "curvlinops, eigsh": curvlinops_eigsh,
}


# Where to find the rivals: in the names of their contestants -> package.
PACKAGES = {"PyHessian": "pyhessian", "eigenthings": "hessian_eigenthings"}
PACKAGES |= {"curvlinops": "curvlinops"}


def missing_packages() -> dict[str, str]:
    """Who is not installed."""
    missing = [who for who, name in PACKAGES.items() if importlib.util.find_spec(name) is None]
    return {who: "missing: not installed" for who in CONTESTANTS if who.startswith(tuple(missing))}


# ---- measurements ------------------------------------------------------------------------------


def repeat(run: Callable[[], Any], times: int) -> None:
    """Calls, without keeping what comes back: memory in use would slow the next call down."""
    for _ in range(times):
        run()


def error_of(run: Callable[[Problem, int], float], problem: Problem, exact: float) -> float:
    """The median of the relative errors from some random starts."""
    errors = []
    for seed in range(STARTS):
        torch.manual_seed(seed)
        errors.append(abs(run(problem, seed) / exact - 1))
    return statistics.median(errors)


TOP = "Largest eigenvalue of a loss Hessian, 20 products"
GRADIENTS = "as many gradients"


class Curvature(Suite):
    """Curvature of networks."""

    name = "curvature"
    rounds = 20
    seconds = 2.0

    def cases(self) -> list[str]:
        """Networks, and several vectors at once."""
        return ["mlp"] if self.args.quick else [*NETWORKS, "several vectors"]

    def contest(self, case: str) -> Contest:
        """Prepares a network."""
        warnings.filterwarnings("ignore", category=UserWarning)  # PyHessian's create_graph
        torch.manual_seed(0)
        return self.vectors() if case == "several vectors" else self.top_eigenvalue(case)

    def top_eigenvalue(self, name: str) -> Contest:
        """Everyone's time and error."""
        problem = NETWORKS[name](self.device)
        missing = missing_packages()
        ours = [who for who in CONTESTANTS if who.startswith("hessreg")]
        everyone = {
            who: lambda run=run: run(problem, 0)
            for who, run in CONTESTANTS.items()
            if who not in missing
        }
        runs = self.admitted(everyone, ours)
        exact = eigenvalues(problem.double().operator(), tol=1e-10).values.item()
        errors = {who: error_of(CONTESTANTS[who], problem, exact) for who in runs}
        runs[GRADIENTS] = lambda: repeat(problem.gradient, BUDGET)
        work = counted_work(lambda: retained_graph(problem, 0), problem.params)
        return Contest(TOP, name, runs, ours, work, [GRADIENTS], left_out=missing, errors=errors)

    def vectors(self) -> Contest:
        """Each of k vectors multiplied at once."""
        problem = mlp(self.device)
        op, params = problem.operator(), problem.params
        V = torch.randn(op.shape[0], VECTORS, device=self.device)
        rows = V.mT.contiguous()
        grads = torch.autograd.grad(problem.loss(), params, create_graph=True)
        cut = rows.split([p.numel() for p in params], 1)
        parts = [part.reshape(VECTORS, *p.shape) for part, p in zip(cut, params, strict=True)]

        def batched() -> Any:
            how = {"retain_graph": True, "is_grads_batched": True}
            return torch.autograd.grad(grads, params, parts, **how)

        one_by_one = "hessreg, one by one"
        runs: Runs = {
            "hessreg": lambda: op.matmat(V),
            one_by_one: lambda: torch.stack([op.matvec(v) for v in rows]),
            "is_grads_batched": batched,
            GRADIENTS: lambda: repeat(problem.gradient, VECTORS),
        }
        work = _several(counted_work(lambda: retained_product(grads, params, parts), params))
        runs = self.admitted(runs, ["hessreg", one_by_one], [GRADIENTS])
        group = f"{VECTORS} vectors at once, times a Hessian of the loss"
        return Contest(group, "mlp", runs, ["hessreg", one_by_one], work, [GRADIENTS])


def retained_product(grads: Any, params: list[Tensor], parts: list[Tensor]) -> Any:
    """One of the products."""
    return torch.autograd.grad(grads, params, [p[0] for p in parts], retain_graph=True)


def _several(work: Work) -> Work:
    return replace(work, bytes=VECTORS * work.bytes, flops=VECTORS * work.flops)


if __name__ == "__main__":
    run_suite(Curvature)
