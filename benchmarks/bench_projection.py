"""Times projections of gradients against plain torch, as ``python -m benchmarks.bench_projection``.

One direction, eight directions, PCGrad of two losses and OrthoGrad, on lists of tensors. The floor
is what the same bytes cost torch's own best single passes over flat tensors in the same run: for
each vector that is read half a ``dot``, and one ``sub`` into memory that is there already (two
vectors read, one written). OrthoGrad, tensor by tensor, may find in the caches what it needs again:
its floor is the ``sub`` alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Contest, Runs, Suite, run_suite
from benchmarks.limits import Work
from hessreg import pcgrad, project_orthogonal, project_orthogonal_

Vector = list[Tensor]

# The gradients of networks, largest first: name -> shapes of the parameters.
_MLP = [(784, 1024), (1024,), (1024, 1024), (1024,), (1024, 512), (512,), (512, 512), (512,)]
_HEADS = [(512, 512), (512,), (512, 512), (512,), (512, 256), (256,), (256, 256), (256,)]
_TAIL = [(256, 1024), (1024,), (256, 10), (10,)]
CASES = {
    "one vector of 10 thousand": [(10_000,)],
    "20 tensors, 3.6 million": [*_MLP, *_HEADS, *_TAIL],
    "161 tensors, 25.6 million": [(160_000,), (64,)] * 80 + [(12_800_000,)],
}


# ---- one direction -------------------------------------------------------------------------------


def dot_loop(g: Vector, v: Vector) -> Vector:
    """Inner products tensor by tensor, then the update."""
    gv = vv = torch.zeros((), device=g[0].device)
    for x, y in zip(g, v, strict=True):
        flat = y.view(-1)
        gv = gv + torch.dot(x.view(-1), flat)
        vv = vv + torch.dot(flat, flat)
    c = (gv / vv).item()
    return [torch.sub(x, y, alpha=c) for x, y in zip(g, v, strict=True)]


def foreach(g: Vector, v: Vector) -> Vector:
    """The multi-tensor operators of torch, with the coefficient on the host."""
    gv = torch.stack([p.sum() for p in torch._foreach_mul(g, v)]).sum()
    vv = torch.stack(torch._foreach_norm(v)).square().sum()
    return list(torch._foreach_sub(g, v, alpha=(gv / vv).item()))


def foreach_on_device(g: Vector, v: Vector) -> Vector:
    """The multi-tensor operators of torch, without reading the coefficient back."""
    gv = torch.stack([p.sum() for p in torch._foreach_mul(g, v)]).sum()
    vv = torch.stack(torch._foreach_norm(v)).square().sum()
    return list(torch._foreach_sub(g, torch._foreach_mul(v, gv / vv)))


def flattened(g: Vector, v: Vector) -> Vector:
    """One flat vector, and views of the result."""
    a, b = (torch.cat([t.view(-1) for t in tensors]) for tensors in (g, v))
    y = a.sub_(b, alpha=(torch.dot(a, b) / torch.dot(b, b)).item())
    parts = y.split([t.numel() for t in g])
    return [part.view_as(t) for part, t in zip(parts, g, strict=True)]


# ---- eight directions --------------------------------------------------------------------------


def gram_solve(g: Vector, directions: list[Vector]) -> Vector:
    """All in one flat matrix, and the normal equations."""
    V = torch.stack([torch.cat([t.view(-1) for t in v]) for v in directions])
    x = torch.cat([t.view(-1) for t in g])
    y = x.sub_(torch.linalg.solve(V @ V.T, V @ x) @ V)
    parts = y.split([t.numel() for t in g])
    return [part.view_as(t) for part, t in zip(parts, g, strict=True)]


def gram_solve_by_tensor(g: Vector, directions: list[Vector]) -> Vector:
    """The normal equations, tensor by tensor."""
    stacks = [torch.stack([t.view(-1) for t in ts]) for ts in zip(g, *directions, strict=True)]
    G = torch.stack([M @ M.T for M in stacks]).sum(0)
    weights = torch.cat([torch.ones(1, device=G.device), -torch.linalg.solve(G[1:, 1:], G[1:, 0])])
    return [(weights @ M).view_as(t) for M, t in zip(stacks, g, strict=True)]


def gram_schmidt(g: Vector, directions: list[Vector]) -> Vector:
    """Modified Gram-Schmidt, tensor by tensor."""
    basis: list[Vector] = []
    for v in [*directions, g]:
        w = [t.clone() for t in v]
        for q in basis:
            c = _dot(w, q).item()
            for x, y in zip(w, q, strict=True):
                x.sub_(y, alpha=c)
        if v is g:
            return w
        norm = _dot(w, w).sqrt().item()
        basis.append([x.div_(norm) for x in w])
    raise AssertionError


def foreach_gram_schmidt(g: Vector, directions: list[Vector]) -> Vector:
    """Modified Gram-Schmidt with the multi-tensor operators of torch."""
    basis: list[Vector] = []
    y = list(g)
    for v in directions:
        w = list(v)
        for q in basis:
            w = list(torch._foreach_sub(w, q, alpha=_foreach_dot(w, q).item()))
        w = list(torch._foreach_div(w, _foreach_dot(w, w).sqrt().item()))
        basis.append(w)
        y = list(torch._foreach_sub(y, w, alpha=_foreach_dot(y, w).item()))
    return y


def _dot(a: Vector, b: Vector) -> Tensor:
    pairs = zip(a, b, strict=True)
    return torch.stack([torch.dot(x.view(-1), y.view(-1)) for x, y in pairs]).sum()


def _foreach_dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([p.sum() for p in torch._foreach_mul(a, b)]).sum()


# ---- PCGrad of two losses ------------------------------------------------------------------------


def torchjd_contestants(g: Vector, v: Vector) -> Runs:
    """TorchJD on lists in its two ways, and on one flat matrix."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad

    aggregator = PCGrad()
    parameters = [torch.zeros_like(t, requires_grad=True) for t in g]
    jacobians = [torch.stack(pair) for pair in zip(g, v, strict=True)]
    flat = torch.stack([torch.cat([t.view(-1) for t in x]) for x in (g, v)])

    def from_lists(**how: bool) -> Vector:
        for parameter, jacobian in zip(parameters, jacobians, strict=True):
            parameter.jac, parameter.grad = jacobian, None
        jac_to_grad(parameters, aggregator, **how)
        return [p.grad for p in parameters if p.grad is not None]

    return {
        "torchjd jac_to_grad": from_lists,
        "torchjd jac_to_grad, by tensor": lambda: from_lists(optimize_gramian_computation=True),
        "torchjd, already flat": lambda: aggregator(flat),
    }


def conflictfree_contestant(g: Vector, v: Vector) -> Callable[[], Vector]:
    """The conflictfree package: gradients collected from a network and put back."""
    from conflictfree.grad_operator import PCGradOperator
    from conflictfree.utils import apply_gradient_vector, get_gradient_vector

    network = torch.nn.ParameterList(torch.zeros_like(t) for t in g)

    def run() -> Vector:
        vectors = []
        for gradients in (g, v):
            for parameter, gradient in zip(network, gradients, strict=True):
                parameter.grad = gradient
            vectors.append(get_gradient_vector(network))
        for parameter in network:  # it writes into the gradients that it finds
            parameter.grad = torch.empty_like(parameter)
        apply_gradient_vector(network, PCGradOperator().calculate_gradient(vectors))
        return [p.grad for p in network if p.grad is not None]

    return run


def libmtl_contestant(g: Vector, v: Vector) -> Callable[[], Vector]:
    """LibMTL's PCGrad, with gradients collected as its ``_compute_grad`` does."""
    parameters = [torch.zeros_like(t, requires_grad=True) for t in g]
    weighting: Any = _libmtl().PCGrad()

    def compute_grad(losses: list[Vector], mode: str) -> Tensor:
        grads = torch.zeros(len(losses), weighting.grad_dim).to(weighting.device)
        for task, gradients in enumerate(losses):
            grads[task] = torch.cat([t.view(-1) for t in gradients])
        return grads

    weighting.task_num, weighting.rep_grad, weighting.device = 2, False, g[0].device
    weighting.get_share_params = lambda: parameters
    weighting._compute_grad = compute_grad

    def run() -> Vector:
        for parameter, gradient in zip(parameters, g, strict=True):
            parameter.grad = gradient
        weighting.backward([g, v])
        return [p.grad for p in parameters if p.grad is not None]

    return run


@functools.cache
def _libmtl() -> ModuleType:
    """Its PCGrad without the rest of the package, which wants a torchvision that imports."""
    spec = importlib.util.find_spec("LibMTL")
    if spec is None or spec.origin is None:
        raise ImportError("LibMTL has no folder")
    for name in ("LibMTL", "LibMTL.weighting"):
        package = ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    return importlib.import_module("LibMTL.weighting.PCGrad")


# ---- OrthoGrad -----------------------------------------------------------------------------------


def published_orthograd(g: Vector, weights: Vector) -> Vector:
    """The steps of the paper's optimiser: tensor by tensor, in place of the gradients."""
    for gradient, weight in zip(g, weights, strict=True):
        flat, w = gradient.view(-1), weight.view(-1)
        projection = torch.dot(w, flat) / (torch.dot(w, w) + 1e-30)
        rest = flat - projection * w
        scaled = rest * (torch.norm(flat, 2) / (torch.norm(rest, 2) + 1e-30))
        gradient.copy_(scaled.view_as(gradient))
    return g


# ---- measuring -----------------------------------------------------------------------------------


def pair_contestants(g: Vector, v: Vector) -> Runs:
    """Every way to project off one direction."""
    rivals = (dot_loop, foreach, foreach_on_device, flattened)
    runs: Runs = {rival.__name__: lambda r=rival: r(g, v) for rival in rivals}
    return {"project_orthogonal": lambda: project_orthogonal(g, v), **runs}


def span_contestants(g: Vector, v: Vector) -> Runs:
    """Every way to project off eight directions."""
    directions = [v, *([torch.randn_like(t) for t in g] for _ in range(7))]
    rivals = (gram_solve, gram_solve_by_tensor, gram_schmidt, foreach_gram_schmidt)
    runs: Runs = {rival.__name__: lambda r=rival: r(g, directions) for rival in rivals}
    return {"project_orthogonal": lambda: project_orthogonal(g, directions), **runs}


def surgery_contestants(g: Vector, v: Vector) -> Runs:
    """Every PCGrad of two gradients, which conflict."""
    v = [y - 0.2 * x for x, y in zip(g, v, strict=True)]
    runs: Runs = {"pcgrad": lambda: pcgrad([g, v])}
    if _is_installed("torchjd"):
        runs |= torchjd_contestants(g, v)
    if _is_installed("conflictfree"):
        runs["conflictfree"] = conflictfree_contestant(g, v)
    if _is_installed("LibMTL"):
        runs["libmtl"] = libmtl_contestant(g, v)
    return runs


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def missing_packages(kind: str) -> dict[str, str]:
    """Who would take part if it were installed."""
    packages = {"torchjd": "torchjd", "conflictfree": "conflictfree", "libmtl": "LibMTL"}
    wanted = packages if kind == SURGERY else {}
    return {
        who: "missing: not installed" for who, name in wanted.items() if not _is_installed(name)
    }


def orthograd_contestants(g: Vector, v: Vector) -> Runs:
    """Both OrthoGrads, in place: the gradient stays orthogonal, which changes no work."""
    first, second = ([t.clone() for t in g] for _ in range(2))

    def ours() -> Vector:
        project_orthogonal_(first, v, scope="tensor", rescale=True)
        return first

    return {
        "project_orthogonal_": ours,
        "published orthograd": lambda: published_orthograd(second, v),
    }


SURGERY, ORTHOGRAD = "PCGrad of two losses", "OrthoGrad"
KINDS = {
    "one direction": (pair_contestants, 2),
    "eight directions": (span_contestants, 9),
    SURGERY: (surgery_contestants, 2),
    ORTHOGRAD: (orthograd_contestants, 2),
}
DOT, SUB = "floor: dot", "floor: sub"


def floors(g: Vector, v: Vector) -> Runs:
    """Two vectors read; two read and one written."""
    a, b = (torch.cat([t.view(-1) for t in tensors]) for tensors in (g, v))
    out = torch.empty_like(a)
    return {
        DOT: lambda: torch.dot(a, b),
        SUB: lambda: torch.sub(a, b, alpha=0.5, out=out),
    }


def check_agreement(runs: Runs) -> None:
    """All contestants against the first."""
    flat = [torch.cat([t.reshape(-1) for t in _as_list(run())]) for run in runs.values()]
    for other in flat[1:]:
        torch.testing.assert_close(other, flat[0], rtol=1e-3, atol=1e-3)


def _as_list(result: Tensor | Vector) -> Vector:
    return [result] if isinstance(result, Tensor) else result


class Projection(Suite):
    """Lists of gradients made orthogonal."""

    name = "projection"
    seconds = 1.5

    def cases(self) -> list[tuple[str, str]]:
        """All, or those of the smallest vectors."""
        names = list(CASES)[: 1 if self.args.quick else None]
        return [(kind, name) for kind in KINDS for name in names]

    def contest(self, case: tuple[str, str]) -> Contest:
        """Everyone, and torch's own passes over as much memory, in the same rounds."""
        kind, name = case
        make, num_lists = KINDS[kind]
        g, v = ([torch.randn(shape, device=self.device) for shape in CASES[name]] for _ in range(2))
        made = make(g, v)
        ours = [next(iter(made))]
        runs = self.admitted(made, ours)
        check_agreement(runs)
        size = sum(t.numel() for t in g)
        return Contest(
            kind,
            name,
            {**runs, **floors(g, v)},
            ours,
            Work(bytes=4 * (2 * num_lists + 1) * size, flops=4 * num_lists * size),
            references=[DOT, SUB],
            left_out=missing_packages(kind),
            floor=lambda t: t[SUB] + (0 if kind == ORTHOGRAD else (num_lists - 1) * t[DOT]),
            cold=size > 1_000_000,
        )


if __name__ == "__main__":
    run_suite(Projection)
