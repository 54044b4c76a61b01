"""Times Hessian-vector products against what torch offers, as ``python -m benchmarks.bench_hvp``.

The unit of a product with the Hessian of a network is one gradient in plain torch: forward, loss
and backward. All contestants but those "from scratch" keep from one product to the next what they
can. Operations are those of the matrix products that a Hessian-vector product consists of.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import keep_memory, machine, measure, options, save
from hessreg import MLPHessian, mlp_hvp, mlp_parameter_hvp, symmetric_matmul

Activation = str | tuple[str, float]
Run = Callable[[], Any]

# Activation in torch, its slope, and its second derivative from the value and the slope.
_TORCH: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (torch.tanh, lambda a: 1 - a * a),
    ("leaky_relu", 0.2): (lambda z: F.leaky_relu(z, 0.2), lambda a: torch.where(a > 0, 1.0, 0.2)),
}
# name -> widths, activation, batch
NETWORKS: dict[str, tuple[tuple[int, ...], Activation, int]] = {
    "784-512-256-1, leaky_relu, batch 64": ((784, 512, 256, 1), ("leaky_relu", 0.2), 64),
    "784-512-256-1, tanh, batch 64": ((784, 512, 256, 1), "tanh", 64),
    "2-128-128-1, tanh, batch 256": ((2, 128, 128, 1), "tanh", 256),
    "64-128-1, tanh, batch 64": ((64, 128, 1), "tanh", 64),
}
INPUTS = {"32-128-128-1, tanh, batch 256": ((32, 128, 128, 1), "tanh", 256)}
SYMMETRIC = [(256, 32, 1), (256, 64, 1), (256, 64, 8), (16, 256, 1), (2, 2048, 1), (2, 2048, 8)]
_VECTORS = 8


def _loss(y: Tensor) -> Tensor:
    return F.softplus(y).mean()


class Network:
    """One network with its batch and directions, and every way to multiply its Hessian."""

    def __init__(self, widths: Sequence[int], activation: Activation, batch: int, device: str):
        shapes = [(out, n) for n, out in pairwise(widths)]
        self.widths, self.batch, self.activation = widths, batch, activation
        self.weights = [torch.randn(shape, device=device) / shape[1] ** 0.5 for shape in shapes]
        self.biases = [torch.randn(out, device=device) for out, _ in shapes]
        self.x = torch.randn(batch, widths[0], device=device)
        pairs = zip(self.weights, self.biases, strict=True)
        self.leaves = [t.clone().requires_grad_() for pair in pairs for t in pair]
        self.v = torch.randn(_VECTORS, sum(t.numel() for t in self.leaves), device=device)
        self.graph = torch.autograd.grad(
            self.loss(self.leaves), self.leaves, create_graph=True
        )  # what the retained graph hangs on
        self.caches()

    def forward(self, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        """The outputs in plain torch."""
        f, _ = _TORCH[self.activation]
        for i in range(0, len(tensors) - 2, 2):
            x = f(F.linear(x, tensors[i], tensors[i + 1]))
        return F.linear(x, tensors[-2], tensors[-1])

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        """The loss in plain torch."""
        return _loss(self.forward(tensors, self.x))

    def unflatten(self, v: Tensor) -> list[Tensor]:
        """A flat vector as tensors like the parameters; k of them if it has k rows."""
        parts = v.split([t.numel() for t in self.leaves], -1)
        return [p.unflatten(-1, t.shape) for p, t in zip(parts, self.leaves, strict=True)]

    @torch.no_grad()
    def caches(self) -> None:
        """What ours and the one by hand keep from one product to the next."""
        f, slope = _TORCH[self.activation]
        self.ours = MLPHessian(self.weights, self.biases, self.activation, self.x)
        s = torch.sigmoid(self.ours.outputs)
        self.bend = s * (1 - s) / self.batch
        self.ours.linearize(s / self.batch)
        self.a = [self.x]
        for weight, bias in list(zip(self.weights, self.biases, strict=True))[:-1]:
            self.a.append(f(F.linear(self.a[-1], weight, bias)))
        self.first = [slope(a) for a in self.a[1:]]
        self.delta, self.s = [s / self.batch], []
        for weight, a, first in reversed(
            list(zip(self.weights[1:], self.a[1:], self.first, strict=True))
        ):
            g = self.delta[0] @ weight
            self.delta.insert(0, first * g)
            self.s.insert(0, -2 * a * first * g if self.activation == "tanh" else 0 * g)

    def head(self, moved: Tensor) -> Tensor:
        """The Hessian of the loss in the outputs."""
        return self.bend * moved

    # ---- contestants ----

    def gradient(self) -> Any:
        """The unit."""
        return torch.autograd.grad(self.loss(self.leaves), self.leaves)

    @torch.no_grad()
    def product(self, k: int, gauss_newton: bool = False) -> Tensor:
        """Ours."""
        return self.ours.product(self.v[:k], self.head, gauss_newton=gauss_newton)

    @torch.no_grad()
    def from_scratch(self) -> Tensor:
        """Ours with nothing kept."""
        weights, biases = self.weights, self.biases
        return mlp_parameter_hvp(weights, biases, self.activation, self.x, _loss, self.v[0])

    def retained(self) -> Tensor:
        """Reverse over reverse through a gradient graph that is kept."""
        product = torch.autograd.grad(
            self.graph, self.leaves, self.unflatten(self.v[0]), retain_graph=True
        )
        return torch.cat([t.flatten() for t in product])

    def retained_batched(self) -> Tensor:
        """The same for all vectors at once."""
        vectors = self.unflatten(self.v)
        product = torch.autograd.grad(
            self.graph, self.leaves, vectors, retain_graph=True, is_grads_batched=True
        )
        return torch.cat([t.flatten(1) for t in product], 1)

    def jvp_of_grad(self) -> Tensor:
        """Forward over reverse, as torch.func has it."""
        tensors = [t.detach() for t in self.leaves]
        moved = torch.func.jvp(
            torch.func.grad(lambda p: self.loss(p)), (tensors,), (self.unflatten(self.v[0]),)
        )[1]
        return torch.cat([t.flatten() for t in moved])

    @torch.no_grad()
    def by_hand(self) -> Tensor:
        """The R-operator in plain torch, with activations that are kept."""
        directions = self.unflatten(self.v[0])
        ra, moved = None, []
        for i, weight in enumerate(self.weights):
            rz = torch.addmm(directions[2 * i + 1], self.a[i], directions[2 * i].T)
            moved.append(rz if ra is None else rz.addmm_(ra, weight.T))
            ra = self.first[i] * moved[-1] if i < len(self.first) else None
        r, results = self.bend * moved[-1], []
        for i in reversed(range(len(self.weights))):
            results.append(r.sum(0))
            result = r.T @ self.a[i]
            if i > 0:
                result.addmm_(self.delta[i].T, self.first[i - 1] * moved[i - 1])
                rg = torch.addmm(self.delta[i] @ directions[2 * i], r, self.weights[i])
                r = self.first[i - 1] * rg + self.s[i - 1] * moved[i - 1]
            results.append(result.flatten())
        return torch.cat(results[::-1])

    def operations(self) -> float:
        """Of one product with the Hessian: sums and products."""
        sizes = [2 * self.batch * n * out for n, out in pairwise(self.widths)]
        return 2 * sizes[0] + 6 * sum(sizes[1:])


def run_network(network: Network, rounds: int, device: str) -> dict[str, Any]:
    """Measures products with the Hessian in the parameters."""
    runs: dict[str, tuple[int, Run]] = {
        "gradient": (1, network.gradient),
        "ours": (1, lambda: network.product(1)),
        f"ours, k = {_VECTORS}": (_VECTORS, lambda: network.product(_VECTORS)),
        "ours, from scratch": (1, network.from_scratch),
        "ours, Gauss-Newton": (1, lambda: network.product(1, gauss_newton=True)),
        "by hand": (1, network.by_hand),
        "retained graph": (1, network.retained),
        f"is_grads_batched, k = {_VECTORS}": (_VECTORS, network.retained_batched),
        "jvp(grad)": (1, network.jvp_of_grad),
    }
    expected = network.product(_VECTORS)
    for name, (k, run) in runs.items():
        if name not in ("gradient", "ours, Gauss-Newton"):
            torch.testing.assert_close(run().view(k, -1), expected[:k], rtol=1e-3, atol=1e-5)
    contestants = {name: run for name, (_, run) in runs.items()}
    times = measure(contestants, rounds=rounds, device=device, cold=False)
    unit = times["gradient"]["median"]
    return {
        "milliseconds": times,
        "gradients": {n: times[n]["median"] / k / unit for n, (k, _) in runs.items()},
        "gigaflops": {
            name: runs[name][0] * network.operations() / times[name]["median"] / 1e6
            for name in (n for n in runs if n not in ("gradient", "ours, Gauss-Newton"))
        },
    }


def run_inputs(network: Network, rounds: int, device: str) -> dict[str, Any]:
    """Measures all input Hessians of a batch, and one product with each."""
    n = network.widths[0]
    x = network.x.clone().requires_grad_()
    tensors = [t.detach() for t in network.leaves]
    graph = torch.autograd.grad(network.forward(tensors, x).sum(), x, create_graph=True)[0]
    eye = torch.eye(n, device=device)
    every, one = eye.expand(network.batch, n, n), torch.randn_like(network.x)

    @torch.no_grad()
    def ours(v: Tensor) -> Tensor:
        return mlp_hvp(network.weights, network.biases, network.activation, network.x, v)

    def passes() -> Tensor:
        rows = [torch.autograd.grad(graph, x, e.expand_as(x), retain_graph=True)[0] for e in eye]
        return torch.stack(rows, -1)

    dense = torch.func.vmap(torch.func.hessian(lambda row: network.forward(tensors, row)[0]))
    runs: dict[str, Run] = {
        "gradient": lambda: torch.autograd.grad(network.forward(tensors, x).sum(), x),
        "all columns: ours": lambda: ours(every),
        "all columns: n reverse passes": passes,
        "all columns: vmap(hessian)": lambda: dense(network.x),
        "one product: ours": lambda: ours(one),
        "one product: retained graph": lambda: torch.autograd.grad(
            graph, x, one, retain_graph=True
        )[0],
    }
    for name, run in runs.items():
        if name != "gradient":
            part = slice(0, 3)
            expected = ours(every) if "all" in name else ours(one)
            torch.testing.assert_close(run()[:, part], expected[:, part], rtol=1e-3, atol=1e-4)
    times = measure(runs, rounds=rounds, device=device, cold=False)
    unit = times["gradient"]["median"]
    layers = 2 * network.batch * sum(a * b for a, b in pairwise(network.widths))
    columns = {"all columns: ours": n, "one product: ours": 1}
    return {
        "milliseconds": times,
        "gradients": {name: t["median"] / unit for name, t in times.items()},
        "gigaflops": {
            name: 2 * k * layers / times[name]["median"] / 1e6 for name, k in columns.items()
        },
    }


def run_symmetric(batch: int, n: int, k: int, rounds: int, device: str) -> dict[str, Any]:
    """Measures products with symmetric matrices."""
    a, v = torch.randn(batch, n, n, device=device), torch.randn(batch, n, k, device=device)
    a = a + a.mT
    torch.testing.assert_close(symmetric_matmul(a, v), a @ v, rtol=1e-4, atol=1e-3)
    runs = {"ours": lambda: symmetric_matmul(a, v), "torch.matmul": lambda: a @ v}
    times = measure(runs, rounds=rounds, device=device, cold=False)
    ours = times["ours"]["median"]
    return {
        "milliseconds": times,
        "times faster than": {name: t["median"] / ours for name, t in times.items()},
    }


def matmul_gigaflops(rounds: int, device: str) -> float:
    """What torch.mm reaches at 2048 x 2048."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    times = measure({"mm": lambda: a @ b}, rounds=min(rounds, 10), device=device, cold=False)
    return 2 * 2048**3 / times["mm"]["median"] / 1e6


def show(name: str, result: dict[str, Any], peak: float | None) -> None:
    """Prints one case as a table."""
    print(f"\n{name}")
    for contestant, times in result["milliseconds"].items():
        spread = f"({times['low']:.3f} - {times['high']:.3f})"
        line = f"  {contestant:30s} {times['median']:9.3f} ms {spread:20s}"
        if "gradients" in result:
            line += f" {result['gradients'][contestant]:6.2f} gradients"
        else:
            line += f" {result['times faster than'][contestant]:6.2f} x our time"
        speed = result.get("gigaflops", {}).get(contestant)
        if speed is not None:
            line += f"   {speed:5.0f} GFLOP/s"
            line += f", {100 * speed / peak:3.0f} % of the peak" if peak else ""
        print(line)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peak", type=float, help="GFLOP/s of float32 that the threads could reach, for shares"
    )


def main() -> None:
    """Runs every case."""
    keep_memory()
    args = options(__doc__.splitlines()[0], _more)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = args.rounds, args.device
    results: dict[str, Any] = {"mm, GFLOP/s": matmul_gigaflops(*where), "cases": {}}
    for name, case in NETWORKS.items():
        results["cases"][name] = run_network(Network(*case, args.device), *where)
    for name, case in INPUTS.items():
        results["cases"][f"inputs of {name}"] = run_inputs(Network(*case, args.device), *where)
    for batch, n, k in SYMMETRIC:
        title = f"symmetric, batch {batch}, n {n}, k {k}"
        results["cases"][title] = run_symmetric(batch, n, k, *where)
    card = machine(args.device)
    print(f"{card['processor']}, torch {card['torch']}, {args.threads} thread(s), {args.device}")
    print(f"torch.mm at 2048 x 2048: {results['mm, GFLOP/s']:.0f} GFLOP/s")
    for name, result in results["cases"].items():
        show(name, result, args.peak)
    if args.json:
        save(args.json, {"machine": card, "threads": args.threads, "hvp": results})


if __name__ == "__main__":
    main()
