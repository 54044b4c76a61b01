"""Times ``project_orthogonal`` against plain torch, as ``python -m benchmarks.bench_projection``.

The floor is what the same bytes cost torch's own best single passes over flat tensors in the same
run: one ``dot`` (the two vectors read once) and one ``sub`` into memory that is there already (both
read again, one written).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import keep_memory, machine, measure, options, save
from hessreg import project_orthogonal

# The gradients of networks, largest first: name -> shapes of the parameters.
_MLP = [(784, 1024), (1024,), (1024, 1024), (1024,), (1024, 512), (512,), (512, 512), (512,)]
_HEADS = [(512, 512), (512,), (512, 512), (512,), (512, 256), (256,), (256, 256), (256,)]
_TAIL = [(256, 1024), (1024,), (256, 10), (10,)]
CASES = {
    "one vector of 10 thousand": [(10_000,)],
    "20 tensors, 3.6 million": [*_MLP, *_HEADS, *_TAIL],
    "161 tensors, 25.6 million": [(160_000,), (64,)] * 80 + [(12_800_000,)],
}


def dot_loop(g: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """Inner products tensor by tensor, then the update."""
    gv = vv = torch.zeros((), device=g[0].device)
    for x, y in zip(g, v, strict=True):
        flat = y.view(-1)
        gv = gv + torch.dot(x.view(-1), flat)
        vv = vv + torch.dot(flat, flat)
    c = (gv / vv).item()
    return [torch.sub(x, y, alpha=c) for x, y in zip(g, v, strict=True)]


def foreach(g: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """The multi-tensor operators of torch, with the coefficient on the host."""
    gv = torch.stack([p.sum() for p in torch._foreach_mul(g, v)]).sum()
    vv = torch.stack(torch._foreach_norm(v)).square().sum()
    return list(torch._foreach_sub(g, v, alpha=(gv / vv).item()))


def foreach_on_device(g: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """The multi-tensor operators of torch, without reading the coefficient back."""
    gv = torch.stack([p.sum() for p in torch._foreach_mul(g, v)]).sum()
    vv = torch.stack(torch._foreach_norm(v)).square().sum()
    return list(torch._foreach_sub(g, torch._foreach_mul(v, gv / vv)))


def flattened(g: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """One flat vector, and views of the result."""
    a, b = (torch.cat([t.view(-1) for t in tensors]) for tensors in (g, v))
    y = a.sub_(b, alpha=(torch.dot(a, b) / torch.dot(b, b)).item())
    parts = y.split([t.numel() for t in g])
    return [part.view_as(t) for part, t in zip(parts, g, strict=True)]


def contestants(g: list[Tensor], v: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Every way to project, and the two passes that make the floor."""
    a, b = (torch.cat([t.view(-1) for t in tensors]) for tensors in (g, v))
    out = torch.empty_like(a)
    rivals = (dot_loop, foreach, foreach_on_device, flattened)
    runs: dict[str, Callable[[], Any]] = {r.__name__: lambda r=r: r(g, v) for r in rivals}
    runs["project_orthogonal"] = lambda: project_orthogonal(g, v)
    runs["floor: dot"] = lambda: torch.dot(a, b)
    runs["floor: sub"] = lambda: torch.sub(a, b, alpha=0.5, out=out)
    return runs


def run(shapes: list[tuple[int, ...]], rounds: int, device: str) -> dict[str, Any]:
    """Measures one case and checks that all contestants agree."""
    g, v = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(2))
    expected = project_orthogonal(g, v)
    for rival in (dot_loop, foreach, foreach_on_device, flattened):
        torch.testing.assert_close(rival(g, v), expected, rtol=1e-3, atol=1e-4)
    cold = sum(t.numel() for t in g) > 1_000_000
    times = measure(contestants(g, v), rounds=rounds, device=device, cold=cold)
    ours = times["project_orthogonal"]["median"]
    floor = times["floor: dot"]["median"] + times["floor: sub"]["median"]
    bytes_moved = 5 * 4 * sum(t.numel() for t in g)
    return {
        "milliseconds": times,
        "times faster than": {
            name: t["median"] / ours for name, t in times.items() if "floor" not in name
        },
        "share of the floor": floor / ours,
        "gigabytes per second": bytes_moved / ours / 1e6,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Prints one case as a table."""
    print(f"\n{name}")
    for contestant, times in result["milliseconds"].items():
        ratio = result["times faster than"].get(contestant)
        note = "" if ratio is None else f"   {ratio:5.2f} x our time"
        spread = f"({times['low']:.3f} - {times['high']:.3f})"
        print(f"  {contestant:20s} {times['median']:9.3f} ms {spread:20s}{note}")
    print(
        f"  {result['gigabytes per second']:.1f} GB/s, "
        f"{100 * result['share of the floor']:.0f} % of the floor"
    )


def main() -> None:
    """Runs every case."""
    keep_memory()
    args = options(__doc__.splitlines()[0])
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = {name: run(shapes, args.rounds, args.device) for name, shapes in CASES.items()}
    card = machine(args.device)
    print(f"{card['processor']}, torch {card['torch']}, {args.threads} thread(s), {args.device}")
    for name, result in results.items():
        show(name, result)
    if args.json:
        save(args.json, {"machine": card, "threads": args.threads, "projection": results})


if __name__ == "__main__":
    main()
