"""Times curvature of networks against other packages, as ``python -m benchmarks.bench_curvature``.

The largest eigenvalue of a loss Hessian from a budget of products, building the operator included,
for a multilayer perceptron and for a convolutional discriminator. Everyone multiplies by the same
matrix: all networks are in evaluation mode, because PyHessian forces it. The unit is one gradient
of the loss, measured in the same rounds; the error is against a converged float64 computation, the
median over random starts.

And what HSN1R adds to the training steps of `hessreg train digits`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import keep_memory, machine, measure, options, save
from hessreg.curvature import HessianOperator, eigenvalues, power_iteration
from hessreg.gan import HSN1RConfig, TrainConfig
from hessreg.gan.building import build_trainer
from hessreg.gan.tasks import load_dataset
from hessreg.gan.trainer import Trainer

BUDGET = 20  # products

# Who must be how many times slower, best way of each: network -> rival -> factor.
ASKED = {
    "mlp": {"PyHessian": 1.6, "eigenthings": 2.5, "curvlinops": 4.0},
    "dcgan": {"PyHessian": 1.1, "eigenthings": 1.4, "curvlinops": 1.9},
}
VECTORS = 8
ASKED_PER_VECTOR = 1.2  # gradients
STARTS = 5  # random ones, for the errors
STEPS = 16  # of training at a time
ASKED_OF_TRAINING = {1: 4.0, 16: 1.3}  # every so many steps -> times a plain step


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


def compared(name: str, case: dict[str, Any]) -> float:
    """The fastest way of a rival, in times of our fastest one with no larger an error."""
    times = {who: t["median"] for who, t in case["milliseconds"].items()}
    errors = case["relative error"]
    rival = min((who for who in times if who.startswith(name)), key=lambda who: times[who])
    limit = 1.01 * errors[rival]  # the same iteration rounds differently
    ways = [t for who, t in times.items() if who.startswith("hessreg") and errors[who] <= limit]
    return times[rival] / min(ways)


# ---- measurements ------------------------------------------------------------------------------


def repeat(run: Callable[[], Any], times: int) -> None:
    """Calls, without keeping what comes back: memory in use would slow the next call down."""
    for _ in range(times):
        run()


def top_eigenvalue(name: str, rounds: int, device: str) -> dict[str, Any]:
    """Everyone's time, in milliseconds and in gradients, and error."""
    problem = NETWORKS[name](device)
    exact = eigenvalues(problem.double().operator(), tol=1e-10).values.item()
    errors = {who: error_of(run, problem, exact) for who, run in CONTESTANTS.items()}
    runs: dict[str, Callable[[], Any]] = {
        who: lambda run=run: run(problem, 0) for who, run in CONTESTANTS.items()
    }
    runs["20 gradients"] = lambda: repeat(problem.gradient, BUDGET)
    times = measure(runs, rounds=rounds, device=device, cold=False)
    unit = times.pop("20 gradients")["median"]
    return {
        "network": name,
        "milliseconds": times,
        "gradient, milliseconds": unit / BUDGET,
        "gradients per product": {who: t["median"] / unit for who, t in times.items()},
        "relative error": errors,
    }


def error_of(run: Callable[[Problem, int], float], problem: Problem, exact: float) -> float:
    """The median of the relative errors from some random starts."""
    errors = []
    for seed in range(STARTS):
        torch.manual_seed(seed)
        errors.append(abs(run(problem, seed) / exact - 1))
    return statistics.median(errors)


def several_vectors(rounds: int, device: str) -> dict[str, Any]:
    """The cost of each of k vectors multiplied at once, in gradients."""
    problem = mlp(device)
    op = problem.operator()
    V = torch.randn(op.shape[0], VECTORS, device=device)
    rows = V.mT.contiguous()
    params = problem.params
    grads = torch.autograd.grad(problem.loss(), params, create_graph=True)
    parts = [
        part.reshape(VECTORS, *p.shape)
        for part, p in zip(rows.split([p.numel() for p in params], 1), params, strict=True)
    ]
    runs: dict[str, Callable[[], Any]] = {
        "matmat": lambda: op.matmat(V),
        "matvec": lambda: torch.stack([op.matvec(v) for v in rows]),
        "is_grads_batched": lambda: torch.autograd.grad(
            grads, params, parts, retain_graph=True, is_grads_batched=True
        ),
        "gradients": lambda: repeat(problem.gradient, VECTORS),
    }
    times = measure(runs, rounds=rounds, device=device, cold=False)
    unit = times["gradients"]["median"]
    return {
        "milliseconds": times,
        "gradients per vector": {who: t["median"] / unit for who, t in times.items()},
    }


def training(rounds: int, device: str) -> dict[str, Any]:
    """What a step of `hessreg train digits` takes, with and without HSN1R."""
    trainers = {"plain": digits_trainer("none", 1, device)}
    for every in ASKED_OF_TRAINING:
        trainers[f"every={every}"] = digits_trainer("hsn1r", every, device)
    runs = {name: lambda t=t: repeat(t.step, STEPS) for name, t in trainers.items()}
    times = measure(runs, rounds=rounds, device=device, cold=False)
    return {
        "milliseconds": {
            name: {k: ms / STEPS for k, ms in each.items()} for name, each in times.items()
        },
        "plain steps": {
            name: each["median"] / times["plain"]["median"] for name, each in times.items()
        },
    }


def digits_trainer(regularizer: str, every: int, device: str) -> Trainer:
    """The trainer of the command line."""
    config = TrainConfig(regularizer=regularizer, device=device, hsn1r=HSN1RConfig(every=every))
    return build_trainer(config, load_dataset(config.dataset))


def requirements(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the numbers are held to, with what was measured."""
    found = []
    for case in results["top eigenvalue"]:
        for rival, factor in ASKED[case["network"]].items():
            what = f"{case['network']}, top eigenvalue: times as slow as ours is {rival}"
            found.append({"what": what, "asked": factor, "measured": compared(rival, case)})
    measured = results["several vectors"]["gradients per vector"]["matmat"]
    what = f"mlp, {VECTORS} vectors at once: gradients per vector, at most"
    found.append({"what": what, "asked": ASKED_PER_VECTOR, "measured": measured})
    for every, factor in ASKED_OF_TRAINING.items():
        what = f"digits, HSN1R with every={every}: plain steps, at most"
        measured = results["training"]["plain steps"][f"every={every}"]
        found.append({"what": what, "asked": factor, "measured": measured})
    return found


# ---- output ------------------------------------------------------------------------------------


def show(case: dict[str, Any]) -> None:
    """Prints one network as a table."""
    print(f"\n{case['network']}: one gradient {case['gradient, milliseconds']:.2f} ms")
    for who, t in case["milliseconds"].items():
        spread = f"({t['low']:.1f} - {t['high']:.1f})"
        cost = case["gradients per product"][who]
        print(
            f"  {who:24s} {t['median']:8.1f} ms {spread:18s} {cost:5.2f} gradients per product"
            f"   error {case['relative error'][who]:.1e}"
        )


def show_requirements(results: dict[str, Any]) -> None:
    """Prints what was asked and what was measured."""
    print("\nrequirements")
    for row in results["requirements"]:
        print(f"  {row['what']:60s} asked {row['asked']:5.2f}   {row['measured']:.2f}")


def main() -> None:
    """Runs every case."""
    keep_memory()
    args = options(__doc__.splitlines()[0])
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # PyHessian's create_graph
    card = machine(args.device)
    print(f"{card['processor']}, torch {card['torch']}, {args.threads} thread(s), {args.device}")
    results: dict[str, Any] = {"top eigenvalue": []}
    for name in NETWORKS:
        torch.manual_seed(0)
        results["top eigenvalue"].append(top_eigenvalue(name, args.rounds, args.device))
        show(results["top eigenvalue"][-1])
    results["several vectors"] = several_vectors(args.rounds, args.device)
    results["training"] = training(args.rounds, args.device)
    results["requirements"] = requirements(results)
    show_requirements(results)
    if args.json:
        save(args.json, {"machine": card, "threads": args.threads, "curvature": results})


if __name__ == "__main__":
    main()
