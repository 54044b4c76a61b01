"""What every operator must pass: one check, used by the tests of every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

Op = Callable[..., Tensor | Sequence[Tensor]]


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(as_tuple(actual), as_tuple(expected), **tolerance)


def check_op(op: Op, reference: Op, inputs: Sequence[Tensor]) -> None:
    """Holds ``op`` to ``reference`` under everything torch may do to it.

    Args:
        op: takes the inputs, returns a tensor or several.
        reference: the same in plain torch.
        inputs: float64 tensors, small: derivatives are taken entry by entry.
    """
    check_values(op, reference, inputs)
    check_autograd(op, reference, inputs)
    check_func(op, reference, inputs)
    check_modes(op, reference, inputs)
    check_compile(op, reference, inputs)


def scalar(op: Op) -> Op:
    """A scalar of the outputs in which no derivative vanishes."""

    def fn(*inputs: Tensor) -> Tensor:
        return sum(((1 + i) * out).sin().sum() for i, out in enumerate(as_tuple(op(*inputs))))

    return fn


def check_values(op: Op, reference: Op, inputs: Sequence[Tensor]) -> None:
    expected = reference(*inputs)
    assert_close(op(*inputs), expected)
    strided = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    assert_close(op(*strided), expected)
    first, second = as_tuple(op(*inputs)), as_tuple(op(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not deterministic"


def check_autograd(op: Op, reference: Op, inputs: Sequence[Tensor]) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert gradcheck(op, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(op, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)
    assert_close(third_derivative(op, inputs), third_derivative(reference, inputs))
    one = [t.clone().requires_grad_(i == 0) for i, t in enumerate(inputs)]
    assert gradcheck(op, one)
    check_checkpointed(op, inputs)


def check_checkpointed(op: Op, inputs: Sequence[Tensor]) -> None:
    """Checkpointing hands out what was saved once only."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    plain = torch.autograd.grad(scalar(op)(*leaves), leaves)
    again = checkpoint(scalar(op), *leaves, use_reentrant=False)
    assert_close(torch.autograd.grad(again, leaves), plain)


def third_derivative(op: Op, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of v' H v for a fixed v."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    generator = torch.Generator().manual_seed(1)
    v = [torch.randn(t.shape, dtype=t.dtype, generator=generator).to(t.device) for t in inputs]
    first = torch.autograd.grad(scalar(op)(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(first, leaves, v, create_graph=True)
    return torch.autograd.grad(second, leaves, v)


def check_func(op: Op, reference: Op, inputs: Sequence[Tensor]) -> None:
    x, rest = inputs[0], inputs[1:]
    ours, theirs = (lambda z, f=f: scalar(f)(z, *rest) for f in (op, reference))
    v = torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
    assert_close(grad(ours)(x), grad(theirs)(x))
    assert_close(jvp(ours, (x,), (v,)), jvp(theirs, (x,), (v,)))
    assert_close(jvp(grad(ours), (x,), (v,)), jvp(grad(theirs), (x,), (v,)))
    assert_close(hessian(ours)(x), hessian(theirs)(x))
    batch = torch.stack([x, 2 * x, -x])
    assert_close(vmap(ours)(batch), vmap(theirs)(batch))
    tangents = torch.stack([v, x])
    hvp, expected = (vmap(lambda u, f=f: vjp(grad(f), x)[1](u)[0]) for f in (ours, theirs))
    assert_close(hvp(tangents), expected(tangents))
    nested = torch.stack([batch, batch + 1])
    assert_close(vmap(vmap(ours))(nested), vmap(vmap(theirs))(nested))
    every = tuple(range(len(inputs)))
    for outer, inner in ((jacfwd, jacfwd), (jacrev, jacfwd), (jacrev, jacrev)):
        blocks, expected = (
            outer(inner(scalar(f), argnums=every), argnums=every)(*inputs) for f in (op, reference)
        )
        for row, expected_row in zip(blocks, expected, strict=True):
            assert_close(row, expected_row)


def check_modes(op: Op, reference: Op, inputs: Sequence[Tensor]) -> None:
    expected = reference(*inputs)
    with torch.inference_mode():
        assert_close(op(*inputs), expected)
    with torch.no_grad():
        assert_close(op(*[t.clone().requires_grad_() for t in inputs]), expected)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        assert_close(op(*inputs), expected)


def check_compile(op: Op, reference: Op, inputs: Sequence[Tensor]) -> None:
    torch._dynamo.reset()
    leaves = [t.clone().requires_grad_() for t in inputs]
    compiled = torch.compile(scalar(op), backend="aot_eager", fullgraph=True)
    value, expected = compiled(*leaves), scalar(reference)(*leaves)
    assert_close(value, expected)
    assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))
    check_compiled_transforms(op, reference, inputs)


def check_compiled_transforms(op: Op, reference: Op, inputs: Sequence[Tensor]) -> None:
    x, rest = inputs[0], inputs[1:]
    ours, theirs = (lambda z, f=f: scalar(f)(z, *rest) for f in (op, reference))
    transforms = [
        (lambda f: lambda z: jvp(f, (z,), (z + 1,))[1], x),
        (grad, x),
        (lambda f: vmap(grad(f)), torch.stack([x, 2 * x])),
    ]
    for transform, argument in transforms:
        torch._dynamo.reset()
        compiled = torch.compile(transform(ours), backend="aot_eager", fullgraph=True)
        assert_close(compiled(argument), transform(theirs)(argument))


def check_accuracy(op: Op, inputs: Sequence[Tensor], plain: Op, dtype: torch.dtype) -> None:
    """The error in ``dtype`` is at most twice that of plain torch, both against float64."""
    rounded = [t.to(dtype) for t in inputs]
    truth = as_tuple(plain(*[t.double() for t in rounded]))
    ours, theirs = as_tuple(op(*rounded)), as_tuple(plain(*rounded))
    for exact, a, b in zip(truth, ours, theirs, strict=True):
        assert a.dtype == b.dtype
        floor = torch.finfo(dtype).eps * exact.abs().max()
        ours_error = (a.double() - exact).abs().max()
        assert ours_error <= 2 * (b.double() - exact).abs().max() + floor
