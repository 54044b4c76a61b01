"""Times Hessian-vector products against what torch offers, as ``python -m benchmarks.bench_hvp``.

The unit of a product with the Hessian of a network is one gradient in plain torch: forward, loss
and backward. All contestants but those "from scratch" keep from one product to the next what they
can. Operations are those of the matrix products that a Hessian-vector product consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contest, Runs, Suite, run_suite
from benchmarks.limits import Work
from hessreg import MLPHessian, mlp_hvp, mlp_parameter_hvp, symmetric_matmul

Activation = str | tuple[str, float]

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

    def work(self, k: int) -> Work:
        """Of k products with the Hessian, what does not depend on the vectors being kept."""
        sizes = [2 * self.batch * n * out for n, out in pairwise(self.widths)]
        numbers = self.v.shape[1] * (1 + 2 * k) + 2 * self.batch * sum(self.widths)
        return Work(bytes=4 * numbers, flops=k * (2 * sizes[0] + 6 * sum(sizes[1:])))


# ---- cases ---------------------------------------------------------------------------------------

GRADIENT = "one gradient"


def one_vector(network: Network) -> Runs:
    """Products with one vector."""
    return {
        "hessreg": lambda: network.product(1),
        "hessreg, from scratch": network.from_scratch,
        "hessreg, Gauss-Newton": lambda: network.product(1, gauss_newton=True),
        "by hand": network.by_hand,
        "retained graph": network.retained,
        "jvp(grad)": network.jvp_of_grad,
        GRADIENT: network.gradient,
    }


def eight_vectors(network: Network) -> Runs:
    """Products with several vectors at once."""
    tensors = [t.detach() for t in network.leaves]
    vectors = network.unflatten(network.v)

    def product(*v: Tensor) -> list[Tensor]:
        return torch.func.jvp(torch.func.grad(network.loss), (tensors,), (list(v),))[1]

    together = torch.func.vmap(product)
    compiled = torch.compile(together, dynamic=False)

    def flat(run: Callable[..., list[Tensor]]) -> Tensor:
        return torch.cat([t.flatten(1) for t in run(*vectors)], 1)

    return {
        "hessreg": lambda: network.product(_VECTORS),
        "is_grads_batched": network.retained_batched,
        "jvp(grad)": lambda: flat(together),
        "compiled": lambda: flat(compiled),
        GRADIENT: network.gradient,
    }


PARAMETERS = {
    "one vector": (one_vector, 1, list(NETWORKS)),
    "eight vectors at once": (eight_vectors, _VECTORS, list(NETWORKS)[:2]),  # slow to compile
}


def check_products(network: Network, runs: Runs, k: int) -> None:
    """All who multiply by the Hessian against ours."""
    expected = network.product(_VECTORS)[:k]
    for name, run in runs.items():
        if name not in (GRADIENT, "hessreg, Gauss-Newton"):
            torch.testing.assert_close(run().view(k, -1), expected, rtol=1e-3, atol=1e-5)


class InputHessians:
    """All input Hessians of a batch, and one product with each."""

    def __init__(self, network: Network) -> None:
        self.network, self.n = network, network.widths[0]
        self.x = network.x.clone().requires_grad_()
        self.tensors = [t.detach() for t in network.leaves]
        y = network.forward(self.tensors, self.x).sum()
        self.graph = torch.autograd.grad(y, self.x, create_graph=True)[0]
        self.eye = torch.eye(self.n, device=self.x.device)
        self.one = torch.randn_like(network.x)

    @torch.no_grad()
    def ours(self, v: Tensor) -> Tensor:
        """By the fused operator."""
        net = self.network
        return mlp_hvp(net.weights, net.biases, net.activation, net.x, v)

    def product(self, v: Tensor) -> Tensor:
        """Through a retained graph."""
        return torch.autograd.grad(self.graph, self.x, v, retain_graph=True)[0]

    def gradient(self) -> Any:
        """The unit."""
        return torch.autograd.grad(self.network.forward(self.tensors, self.x).sum(), self.x)

    def columns(self) -> Runs:
        """Ways to all columns."""
        every = self.eye.expand(self.network.batch, self.n, self.n)
        hessian = torch.func.hessian(lambda row: self.network.forward(self.tensors, row)[0])
        dense = torch.func.vmap(hessian)
        return {
            "hessreg": lambda: self.ours(every),
            "n reverse passes": lambda: torch.stack(
                [self.product(e.expand_as(self.x)) for e in self.eye], -1
            ),
            "vmap(hessian)": lambda: dense(self.network.x),
        }

    def products(self) -> Runs:
        """Ways to one product."""
        return {
            "hessreg": lambda: self.ours(self.one),
            "retained graph": lambda: self.product(self.one),
        }

    def work(self, k: int) -> Work:
        """Of k products with each."""
        net = self.network
        layers = 2 * net.batch * sum(a * b for a, b in pairwise(net.widths))
        numbers = sum(t.numel() for t in net.leaves) + net.batch * self.n * (1 + 2 * k)
        return Work(bytes=4 * numbers, flops=2 * k * layers)


class HVP(Suite):
    """Products with Hessians and with symmetric matrices."""

    name = "hvp"

    def cases(self) -> list[tuple[Any, ...]]:
        """All, or the smallest of each kind."""
        if self.args.quick:
            return [("one vector", list(NETWORKS)[-1]), ("symmetric", *SYMMETRIC[0])]
        return [
            *((kind, name) for kind, (_, _, names) in PARAMETERS.items() for name in names),
            *((kind, name) for name in INPUTS for kind in ("columns", "products")),
            *(("symmetric", *sizes) for sizes in SYMMETRIC),
        ]

    def contest(self, case: tuple[Any, ...]) -> Contest:
        """Compares everyone with ours."""
        kind, *what = case
        if kind == "symmetric":
            return self.symmetric(*what)
        if kind in PARAMETERS:
            return self.parameters(kind, what[0])
        return self.inputs(kind, what[0])

    def parameters(self, kind: str, name: str) -> Contest:
        """The Hessian of a loss in the parameters of a network."""
        make, k, _ = PARAMETERS[kind]
        network = Network(*NETWORKS[name], self.device)
        everyone = make(network)
        ours = [who for who in everyone if who.startswith("hessreg")]
        runs = self.admitted(everyone, ours, [GRADIENT])
        check_products(network, runs, k)
        group = f"Products with the Hessian in the parameters, {kind}"
        return Contest(group, name, runs, ours, network.work(k), [GRADIENT])

    def inputs(self, kind: str, name: str) -> Contest:
        """The Hessians of the outputs in the inputs."""
        hessians = InputHessians(Network(*INPUTS[name], self.device))
        everyone = hessians.columns() if kind == "columns" else hessians.products()
        runs = self.admitted(everyone, ["hessreg"])
        expected = everyone["hessreg"]()
        for run in runs.values():
            torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
        runs[GRADIENT] = hessians.gradient
        group = f"Input Hessians, {'all columns' if kind == 'columns' else 'one product with each'}"
        work = hessians.work(hessians.n if kind == "columns" else 1)
        return Contest(group, name, runs, ["hessreg"], work, [GRADIENT])

    def symmetric(self, batch: int, n: int, k: int) -> Contest:
        """Products with symmetric matrices, of which we read one triangle."""
        a = torch.randn(batch, n, n, device=self.device)
        a, v = a + a.mT, torch.randn(batch, n, k, device=self.device)
        torch.testing.assert_close(symmetric_matmul(a, v), a @ v, rtol=1e-4, atol=1e-3)
        runs = {"hessreg": lambda: symmetric_matmul(a, v), "torch.matmul": lambda: a @ v}
        title = f"{batch} of n = {n}, k = {k}"
        numbers = batch * (n * (n + 1) / 2 + 2 * n * k)
        work = Work(bytes=4 * numbers, flops=batch * 2 * n**2 * k)
        runs = self.admitted(runs, ["hessreg"])
        return Contest("symmetric_matmul", title, runs, ["hessreg"], work)


if __name__ == "__main__":
    run_suite(HVP)
