from __future__ import annotations

import math

import pytest
import torch

from hessreg import gram_matrix, pcgrad, project_orthogonal, project_orthogonal_
from hessreg.ops.projection import (
    gram,
    gram_reference,
    linear_combination,
    linear_combination_reference,
    pcgrad_operator,
    pcgrad_reference,
    project,
    project_inplace_reference,
    project_reference,
)
from tests import emulated
from tests.check_op import check_accuracy, check_op
from tests.cuda_emulator.plugin import configured, redundant_barriers

SCOPES = {"global": 0, "tensor": 1, "row": 2}
SHAPES = [(2, 3), (3,), ()]
HALF = (torch.float16, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps


def lists(num_lists, shapes=SHAPES, dtype=torch.float64, device="cpu"):
    tensors = [
        torch.randn(shape, dtype=torch.float64) for _ in range(num_lists) for shape in shapes
    ]
    return [t.to(device=device, dtype=dtype) for t in tensors]


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def cosine(a, b):
    a, b = flat(a), flat(b)
    return ((a @ b) / (a.norm() * b.norm())).item()


# ---- the operators under everything torch may do ---------------------------------------------


@pytest.mark.parametrize(
    ("scope", "mode"), [("global", "always"), ("tensor", "conflict"), ("row", "always")]
)
def test_project_passes_every_check(device, scope, mode):
    tensors = lists(2, device=device)

    def op(*x):
        return project_orthogonal(x[:3], x[3:], mode=mode, scope=scope, strength=0.7)

    def reference(*x):
        return project_reference(x, 1, 0.7, mode == "conflict", False, SCOPES[scope], False)

    check_op(op, reference, tensors)


@pytest.mark.parametrize(
    ("num_directions", "rescale", "scope", "mode"),
    [
        (1, True, "tensor", "always"),
        (2, False, "global", "conflict"),
        (2, True, "row", "always"),
    ],
)
def test_projections_off_several_directions_pass_every_check(
    device, num_directions, rescale, scope, mode
):
    options = num_directions, 0.7, mode == "conflict", rescale, SCOPES[scope], False
    check_op(
        lambda *x: project(x, *options),
        lambda *x: project_reference(x, *options),
        lists(1 + num_directions, [(2, 2), (3,)], device=device),
    )


@pytest.mark.parametrize(("reduction", "scope"), [(0, "global"), (1, "row"), (2, "tensor")])
def test_pcgrad_passes_every_check(device, reduction, scope):
    order = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 0, 2]], device=device)
    options = 3, order, reduction, SCOPES[scope], False
    check_op(
        lambda *x: pcgrad_operator(x, *options),
        lambda *x: pcgrad_reference(x, *options),
        conflicting(3, device),
    )


def conflicting(num_tasks, device):
    """Gradients of which each conflicts with the others."""
    tensors = lists(num_tasks, [(2, 2), (3,)], device=device)
    means = [sum(tensors[i::2]) / num_tasks for i in range(2)]
    return [t - 1.2 * means[i % 2] for i, t in enumerate(tensors)]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_lists", [1, 3])
def test_gram_passes_every_check(device, scope, num_lists):
    check_op(
        lambda *x: gram(x, num_lists, SCOPES[scope], False),
        lambda *x: gram_reference(x, num_lists, SCOPES[scope], False),
        lists(num_lists, device=device),
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_linear_combination_passes_every_check(device, scope):
    segments = {"global": 1, "tensor": 3, "row": 4}[scope]
    weights = torch.randn(segments, 2, 2, dtype=torch.float64, device=device)
    check_op(
        lambda w, *x: linear_combination(x, w, SCOPES[scope], False),
        lambda w, *x: linear_combination_reference(x, w, SCOPES[scope], False),
        [weights, *lists(2, device=device)],
    )


@pytest.mark.parametrize("name", ["gram", "linear_combination", "project", "project_", "pcgrad"])
def test_registration(name):
    tensors = [t.requires_grad_() for t in lists(2)]
    weights = torch.randn(1, 1, 2, dtype=torch.float64, requires_grad=True)
    plain = lists(3)
    arguments = {
        "gram": (tensors, 2, 0, False),
        "linear_combination": (tensors, weights, 0, False),
        "project": (tensors, 1, 1.0, False, False, 0, False),
        "project_": (plain[:3], plain[3:], 2, 1.0, False, False, 1),
        "pcgrad": (tensors, 2, torch.arange(2).repeat(2, 1), 1, 0, False),
    }
    operator = getattr(torch.ops.hessreg, name).default
    assert set(torch.library.opcheck(operator, arguments[name]).values()) == {"SUCCESS"}


# ---- values, sizes, dtypes ---------------------------------------------------------------------

LARGE = [(1, 1), (257,), (3, 4097), (2, 5, 1030), (0,), (4, 0), (16385,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("num_lists", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("scope", SCOPES)
def test_gram_equals_definition_across_pieces(device, scope, num_lists, dtype):
    tensors = lists(num_lists, LARGE, dtype, device)
    actual = gram(tensors, num_lists, SCOPES[scope], False)
    expected = gram_reference(tensors, num_lists, SCOPES[scope], False)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("num_lists", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("scope", SCOPES)
def test_combination_equals_definition_across_pieces(device, scope, num_lists, dtype):
    tensors = lists(num_lists, LARGE, dtype, device)
    segments = gram(tensors, num_lists, SCOPES[scope], False).shape[0]
    weights = torch.randn(segments, 2, num_lists, dtype=torch.float64).to(device)
    actual = linear_combination(tensors, weights, SCOPES[scope], False)
    expected = linear_combination_reference(tensors, weights, SCOPES[scope], False)
    rounding = torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2 * rounding, atol=8 * rounding)


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_tensors(device, offset):
    storage = torch.randn(2, 700, device=device)
    g, v = storage[0, offset:], storage[1, offset:700]
    expected = project_reference([g, v], 1, 1.0, False, False, 0, False)[0]
    torch.testing.assert_close(project_orthogonal(g, v), expected)


def test_many_tensors_and_many_lists(device):
    tensors = lists(2, [(3,)] * 150, device=device)
    expected = project_reference(tensors, 1, 1.0, False, False, 0, False)
    torch.testing.assert_close(project_orthogonal(tensors[:150], tensors[150:]), expected)
    wide = lists(40, [(7,)], device=device)
    torch.testing.assert_close(gram(wide, 40, 0, False), gram_reference(wide, 40, 0, False))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_that_of_plain_torch(device, dtype):
    def plain(g, v):
        return g - (g * v).sum() / (v * v).sum() * v

    check_accuracy(project_orthogonal, lists(2, [(5000,)], device=device), plain, dtype)


def test_half_precision_conversions_are_exact(device):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in HALF:
        x = bits.view(dtype).to(device)
        x = x[x.isfinite()]
        one = torch.ones(1, 1, 1, dtype=torch.float64, device=device)
        copied = linear_combination([x], one, 0, False)[0]
        assert torch.equal(copied, x)
        halved = linear_combination([x], one / 3, 0, False)[0]
        torch.testing.assert_close(halved, (x.double() / 3).to(dtype), rtol=1e-7, atol=0)


def test_result_does_not_depend_on_the_number_of_threads():
    tensors = lists(2, [(300_000,), (700, 100)], torch.float32)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(project_orthogonal(tensors[:2], tensors[2:]))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("num_directions", [1, 2])
def test_segments_that_are_combined_run_by_run(scope, num_directions):
    shapes = [(200_000,), (0,), (7,), (90, 3000), (3, 4), (150_000,), (0, 2)]  # over 1 MB each run
    tensors = lists(1 + num_directions, shapes, torch.float32)
    options = num_directions, 1.0, False, False, SCOPES[scope]
    expected = project_reference(tensors, *options, False)
    assert_close_lists(project(tensors, *options, False), expected, EPS)
    g, directions = [t.clone() for t in tensors[:7]], tensors[7:]
    split = [directions[7 * j :][:7] for j in range(num_directions)]
    found = project_orthogonal_(g, split, scope=scope)
    assert_close_lists(g, expected, EPS)
    cosines = project_inplace_reference([t.clone() for t in tensors[:7]], directions, *options)
    torch.testing.assert_close(found, cosines, rtol=0, atol=1e-12)
    try:
        torch.set_num_threads(3)
        again = project(tensors, *options, False)
    finally:
        torch.set_num_threads(1)
    pairs = zip(again, project(tensors, *options, False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_streaming_stores_change_nothing():
    g, v = torch.randn(2, 3_000_001)  # past the caches: results are written around them
    (expected,) = project_reference([g, v], 1, 1.0, False, False, 0, False)
    torch.testing.assert_close(project_orthogonal(g, v), expected, rtol=1e-6, atol=1e-6)


def assert_close_lists(actual, expected, rounding):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2 * rounding, atol=16 * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mode", ["always", "conflict"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_directions", [1, 4, 8])
def test_projection_equals_definition_across_pieces(
    device, num_directions, scope, mode, rescale, dtype
):
    tensors = lists(1 + num_directions, [(3, 4097), (257,), (0,)], dtype, device)
    options = num_directions, 1.0, mode == "conflict", rescale, SCOPES[scope], False
    actual, expected = project(tensors, *options), project_reference(tensors, *options)
    assert_close_lists(actual, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_pcgrad_equals_definition_across_pieces(device, scope, reduction, dtype):
    tensors = lists(5, [(3, 4097), (257,), (0,)], dtype, device)
    order = torch.rand(5, 5).argsort(-1).to(device)
    options = 5, order, reduction, SCOPES[scope], False
    actual, expected = pcgrad_operator(tensors, *options), pcgrad_reference(tensors, *options)
    assert_close_lists(actual, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_directions", "mode", "strength", "rescale"),
    [(1, "always", 1.0, False), (1, "conflict", 0.5, True), (3, "conflict", 1.0, True)],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_in_place_gives_the_same_and_the_cosines(
    device, scope, num_directions, mode, strength, rescale, dtype
):
    shapes = [(3, 4097), (1,), (257,)]
    tensors = lists(1 + num_directions, shapes, dtype, device)
    options = num_directions, strength, mode == "conflict", rescale, SCOPES[scope]
    expected = [t.clone() for t in tensors[:3]]
    cosines = project_inplace_reference(expected, tensors[3:], *options)
    g, directions = tensors[:3], [tensors[3 * (j + 1) :][:3] for j in range(num_directions)]
    alone = [t.clone() for t in g]
    before = [t.data_ptr() for t in g], [t._version for t in g]
    found = project_orthogonal_(g, directions, mode, scope, strength, rescale)
    assert_close_lists(g, expected, torch.finfo(dtype).eps)
    assert [t.data_ptr() for t in g] == before[0]
    assert all(t._version > version for t, version in zip(g, before[1], strict=True))
    cosines = cosines[0] if scope == "global" else cosines
    torch.testing.assert_close(found, cosines, rtol=0, atol=1e-12)
    one = project_orthogonal_(alone, directions[0], scope=scope)
    torch.testing.assert_close(one, cosines[..., 0], rtol=0, atol=1e-12)


def test_in_place_refuses_to_overwrite_what_it_reads_later():
    s, a, b = torch.randn(101), torch.randn(5), torch.randn(5)
    with pytest.raises(RuntimeError, match="tensor 0 of g shares memory with a direction at"):
        project_orthogonal_(s[1:], s[:-1])
    with pytest.raises(RuntimeError, match=r"tensor [01] of g shares memory with a direction at"):
        project_orthogonal_([a, b], [b, a])
    with pytest.raises(RuntimeError, match=r"tensors [01] and [01] of g share memory"):
        project_orthogonal_([a, a], [b, b])
    project_orthogonal_(a, [b, a])
    assert not a.any()


def test_in_place_refuses_transforms(device):
    g, v = (torch.randn(3, device=device) for _ in range(2))

    def project(x):
        y = x.clone()
        project_orthogonal_(y, v)
        return y

    with pytest.raises(ValueError, match=r"transformed by torch\.func .* use project_orthogonal"):
        torch.func.jvp(project, (g,), (v,))


def test_in_place_on_views_and_other_layouts(device):
    g, v = (torch.randn(4, 6, device=device) for _ in range(2))
    expected = project_orthogonal(g, v)
    transposed = g.mT.contiguous().mT
    project_orthogonal_(transposed, v)
    torch.testing.assert_close(transposed, expected)
    project_orthogonal_([g[:2], g[2:]], [v[:2], v[2:]])
    torch.testing.assert_close(g, expected)


def test_in_place_compiles():
    g, v = (torch.randn(2, 5) for _ in range(2))
    expected = project_orthogonal(list(g), list(v))
    compiled = torch.compile(project_orthogonal_, backend="aot_eager", fullgraph=True)
    compiled(list(g), list(v))
    torch.testing.assert_close(list(g), expected)


def test_in_place_refuses_what_gradients_flow_through(device):
    g, v = (torch.randn(3, device=device, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="g must not require gradients or be transformed"):
        project_orthogonal_(g, v)
    expected = project_orthogonal(g, v)
    with torch.no_grad():
        project_orthogonal_(g, v)
    torch.testing.assert_close(g, expected)
    project_orthogonal_(torch.ones(3, device=device), v)  # the weights themselves, say
    assert v.grad is None


def test_positions_without_a_gradient(device):
    a, b, c = (torch.randn(4, dtype=torch.float64, device=device) for _ in range(3))
    first, none, last = project_orthogonal([a, None, b], [b, c, None])
    torch.testing.assert_close([first, last], project_orthogonal([a, b], [b, 0 * c]))
    assert none is None
    assert project_orthogonal([None], [a]) == [None]
    assert project_orthogonal_([None], [a]).shape == ()
    assert project_orthogonal_([None], [[a], [b]], scope="row").shape == (0, 2)
    summed = pcgrad([[a, None, b], [None, None, c]])
    torch.testing.assert_close([summed[0], summed[2]], pcgrad([[a, b], [0 * a, c]]))
    assert summed[1] is None
    expected = gram_matrix([torch.cat([a, b]), torch.cat([0 * a, c])])
    torch.testing.assert_close(gram_matrix([[a, b], [None, c]]), expected)


def test_mixed_dtypes_are_one_vector(device):
    dtypes = torch.float32, torch.bfloat16, torch.float64
    tensors = lists(9, [(40,)], device=device)
    g, v, w = ([tensors[3 * j + i].to(d) for i, d in enumerate(dtypes)] for j in range(3))
    wide = [[t.double() for t in x] for x in (g, v, w)]
    expected = project_orthogonal(wide[0], wide[1:])
    for y, e, d in zip(project_orthogonal(g, [v, w]), expected, dtypes, strict=True):
        torch.testing.assert_close(y, e.to(d))
    summed = pcgrad([g, v, w])
    assert [y.dtype for y in summed] == list(dtypes)
    assert_close_lists([summed[0]], [pcgrad(wide)[0].float()], 1e-7)
    project_orthogonal_(g, [v, w])
    assert [y.dtype for y in g] == list(dtypes)
    torch.testing.assert_close(g[1], expected[1].to(torch.bfloat16))


def test_a_thousand_tensors(device):
    g, v, w = (lists(1, [(3,), (2, 2)] * 500, device=device) for _ in range(3))
    flat_g, flat_v, flat_w = (torch.cat([t.flatten() for t in x]) for x in (g, v, w))
    expected = project_orthogonal(flat_g, [flat_v, flat_w])
    torch.testing.assert_close(flat(project_orthogonal(g, [v, w])), expected)


# ---- the theorem ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_result_is_orthogonal_and_projection_idempotent(device, scope):
    tensors = lists(2, [(40, 50), (100,)], torch.float32, device)
    g, v = tensors[:2], tensors[2:]
    once = project_orthogonal(g, v, scope=scope)
    products = gram([*once, *v], 2, SCOPES[scope], False)
    norms = products[:, 0, 0].sqrt() * products[:, 1, 1].sqrt()
    assert (products[:, 0, 1].abs() <= 1e-7 * norms).all()
    torch.testing.assert_close(project_orthogonal(once, v, scope=scope), once)


@pytest.mark.parametrize("mode", ["always", "conflict"])
def test_zero_and_repeated_directions_add_nothing(device, mode):
    g, v, w = lists(3, [(50,)], torch.float32, device)
    v, w = -v * (v @ g).sign(), -w * (w @ g).sign()
    several = project_orthogonal(g, [v, torch.zeros_like(v), w, 3 * v, v + w], mode=mode)
    torch.testing.assert_close(several, project_orthogonal(g, [v, w], mode=mode))
    zeros = [torch.zeros_like(v)] * 2
    assert torch.equal(project_orthogonal(g, zeros, mode=mode), g)


def test_span_agrees_with_qr(device):
    g, *directions = lists(9, [(5, 40), (100,)], device=device)[::2]
    V = torch.stack([v.flatten() for v in directions], -1)
    Q = torch.linalg.qr(V).Q
    expected = g.flatten() - Q @ (Q.mT @ g.flatten())
    y = project_orthogonal(g, directions)
    torch.testing.assert_close(y.flatten(), expected, rtol=0, atol=1e-13)


def test_rescaled_result_has_the_norm_of_the_gradient(device):
    g, v, w = lists(3, [(7, 30), (64,)], torch.float32, device)[::2]
    y = project_orthogonal(g, [v, w], rescale=True)
    torch.testing.assert_close(y.norm(), g.norm())
    torch.testing.assert_close(
        y / y.norm(), torch.nn.functional.normalize(project_orthogonal(g, [v, w]), dim=(0, 1))
    )
    assert not project_orthogonal(2 * v, v, rescale=True).any()  # not rounding errors, enlarged
    half = project_orthogonal(g, v, strength=0.5, rescale=True)
    torch.testing.assert_close(half.norm(), g.norm())


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_rescaled_result_is_as_orthogonal_near_the_direction(device, distance):
    v, w = (torch.randn(20_000, dtype=torch.float64).to(device) for _ in range(2))
    g = (v + distance * w).float()
    y = project_orthogonal(g, v.float(), rescale=True)
    assert abs(cosine([y], [v.float()])) < 1e-7
    torch.testing.assert_close(y.norm(), g.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_directions", [2, 3, 4])
def test_nothing_is_rescaled_where_the_directions_span_everything(device, num_directions):
    for seed in range(20):
        torch.manual_seed(seed)
        g, *directions = lists(1 + num_directions, [(2,)], device=device)
        assert not project_orthogonal(g, directions, rescale=True).any()


def by_least_squares(g, *directions, strength, rescale):
    """The definition, for independent directions."""
    V = torch.stack(directions, -1)
    y = g - strength * V @ torch.linalg.solve(V.mT @ V, V.mT @ g)
    return y * (g.norm() / y.norm()) if rescale else y


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_derivatives_where_coefficients_are_zero(device, strength, rescale):
    rows = [[1.0, 0, 1, 0.5], [1.0, 0, 0, 0], [1.0, 1, 0, 0]]  # P g = the first direction
    x = [torch.tensor(row, dtype=torch.float64, device=device) for row in rows]

    def ours(*x):
        return project_orthogonal(x[0], list(x[1:]), strength=strength, rescale=rescale)

    def definition(*x):
        return by_least_squares(*x, strength=strength, rescale=rescale)

    torch.testing.assert_close(ours(*x), definition(*x))
    for function in (torch.func.jacrev, torch.func.hessian):
        for i in range(3):
            found, expected = (function(f, argnums=i)(*x) for f in (ours, definition))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["always", "conflict"])
@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_directions_that_are_left_out_have_no_gradient(device, value, mode, request):
    if value != 0 and request.node.callspec.params["device"] == "reference":
        pytest.skip("plain torch multiplies infinity by zero in its derivatives")
    g, v, w = lists(3, [(5,)], device=device)
    v = -v * (v @ g).sign()
    w = (
        torch.zeros_like(w)
        if value == 0
        else w.index_fill(0, torch.tensor([2], device=device), value)
    )
    leaves = [t.clone().requires_grad_() for t in (g, v, w)]
    alone = [t.clone().requires_grad_() for t in (g, v)]
    y = project_orthogonal(leaves[0], leaves[1:], mode=mode)
    found = torch.autograd.grad(y.sin().sum(), leaves)
    expected = torch.autograd.grad(project_orthogonal(*alone, mode=mode).sin().sum(), alone)
    torch.testing.assert_close(found[:2], expected)
    assert not found[2].any()


def test_a_task_that_is_not_finite_spoils_no_other(device):
    a, b, c = conflicting(3, device)[::2]
    alone = pcgrad([a, b], reduction="none")
    c = c.clone()
    c[0, 0] = math.inf
    torch.testing.assert_close(pcgrad([a, b, c], reduction="none")[:2], alone)


@pytest.mark.parametrize("sine", [1e-4, 1e-6])
def test_nearly_dependent_directions_in_float64(device, sine):
    g, v, w = lists(3, [(50,)], device=device)
    w = v + sine * w
    y = project_orthogonal(g, [v, w])
    for direction in (v, w):
        assert abs(y @ direction) <= 1e-15 / sine * g.norm() * direction.norm()


def test_pcgrad_projects_each_task(device):
    a, b, c = conflicting(3, device)[::2]
    projected = pcgrad([a, b, c], reduction="none")
    first = project_orthogonal(project_orthogonal(a, b, mode="conflict"), c, mode="conflict")
    torch.testing.assert_close(projected[0], first)
    torch.testing.assert_close(sum(projected), pcgrad([a, b, c]))
    drawn = [
        pcgrad([a, b, c], generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert any(not torch.equal(drawn[0], y) for y in drawn[2:])


def test_nearly_parallel_gradients_leave_an_orthogonal_residual(device):
    v = torch.randn(10_000, dtype=torch.float64).to(device)
    g = (v + 1e-3 * torch.randn(10_000, dtype=torch.float64).to(device)).float()
    assert abs(cosine([project_orthogonal(g, v.float())], [v.float()])) < 1e-6


@pytest.mark.parametrize("scale", [1e-18, 1e-4, 1e4, 1e18])
def test_result_scales_with_the_gradient(device, scale):
    g, v = (t.float() for t in lists(2, [(64,)], device=device))
    expected = project_orthogonal(g.double(), v.double())
    torch.testing.assert_close((project_orthogonal(scale * g, v) / scale).double(), expected)
    torch.testing.assert_close(project_orthogonal(g, scale * v).double(), expected)


def test_conflict_projects_only_conflicting_segments(device):
    g = torch.tensor([[1.0, 1.0], [1.0, 1.0]], device=device)
    v = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], device=device)
    expected = torch.tensor([[0.0, 1.0], [1.0, 1.0]], device=device)
    assert torch.equal(project_orthogonal(g, v, mode="conflict", scope="row"), expected)


def test_strength_interpolates(device):
    g, v = lists(2, [(9,)], device=device)
    assert torch.equal(project_orthogonal(g, v, strength=0), g)
    reflected = project_orthogonal(g, v, strength=2)
    torch.testing.assert_close(reflected.norm(), g.norm())
    torch.testing.assert_close(reflected @ v, -(g @ v))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_collinear_vectors_leave_exactly_nothing(device, dtype):
    v = torch.randn(1000).to(device=device, dtype=dtype)
    assert not project_orthogonal(v, v).any()
    assert not project_orthogonal(-2 * v, v).any()


def test_collinear_float64_vectors_leave_rounding_error(device):
    v = torch.randn(1000, dtype=torch.float64).to(device)
    assert project_orthogonal(3 * v, v).norm() <= 16 * 2.3e-16 * 3 * v.norm()


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_direction_without_a_direction_changes_nothing(device, value):
    g = torch.randn(5, device=device)
    assert torch.equal(project_orthogonal(g, torch.full((5,), value, device=device)), g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_infinite_gradient_stays_where_nothing_is_projected(device, dtype, where, strength):
    g = torch.randn(37).to(device=device, dtype=dtype)
    g[where] = math.inf
    assert torch.equal(project_orthogonal(g, torch.zeros_like(g), strength=strength), g)
    assert torch.equal(project_orthogonal(g, g.sign(), mode="conflict", strength=strength), g)
    assert torch.equal(project_orthogonal(g, torch.ones_like(g), strength=0), g)


@pytest.mark.parametrize(("of_g", "of_v"), [(1, 1e-18), (1e18, 1e18), (1e-30, 1e18), (1e15, 1e-25)])
def test_any_ratio_of_scales(device, of_g, of_v):
    g = (of_g * torch.randn(64)).to(device).requires_grad_()
    v = (of_v * torch.randn(64)).to(device).requires_grad_()
    wide_g, wide_v = (t.detach().double().requires_grad_() for t in (g, v))
    y, expected = project_orthogonal(g, v), project_orthogonal(wide_g, wide_v)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * of_g)
    for a, e in zip(
        torch.autograd.grad(y.sum(), (g, v)),
        torch.autograd.grad(expected.sum(), (wide_g, wide_v)),
        strict=True,
    ):
        largest = e.abs().max()
        if 1e-37 < largest < 1e38:
            assert (a.double() - e).abs().max() <= 1e-5 * largest


def test_schedules_of_strength_compile():
    g, v = lists(2, [(5,)])
    compiled = torch.compile(project_orthogonal, backend="aot_eager", fullgraph=True, dynamic=True)
    for strength in (0.5, 0.7, 1.0):
        expected = project_orthogonal(g, v, strength=strength)
        torch.testing.assert_close(compiled(g, v, strength=strength), expected)


def test_batched_gradients_in_another_thread(device):
    g, v = (t.requires_grad_() for t in lists(2, [(4,)], device=device))
    eye = torch.eye(4, dtype=torch.float64, device=device)

    @torch.enable_grad()
    def jacobian():
        return torch.autograd.grad(project_orthogonal(g, v), (g, v), eye, is_grads_batched=True)

    class Deep(torch.autograd.Function):  # torch moves deeply nested backwards to other threads
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, y):
            if ctx.depth:
                x = torch.ones((), requires_grad=True)
                with torch.enable_grad():
                    Deep.apply(x, ctx.depth - 1).backward()
            else:
                found.append(jacobian())
            return y, None

    found: list[tuple[torch.Tensor, ...]] = []
    Deep.apply(torch.ones((), requires_grad=True), 80).backward()
    for actual, expected in zip(found[0], jacobian(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_empty_batches():
    empty = torch.zeros(0, 2, 3)
    one = torch.ones(3)
    shape = torch.vmap(torch.vmap(lambda g: project_orthogonal(g, one)))(empty).shape
    assert shape == (0, 2, 3)


def test_zero_direction_has_zero_gradient(device):
    g = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    v = torch.zeros(5, dtype=torch.float64, device=device, requires_grad=True)
    for_g, for_v = torch.autograd.grad(project_orthogonal(g, v).sum(), (g, v))
    assert torch.equal(for_g, torch.ones_like(g))
    assert not for_v.any()


def test_empty_tensors_and_lists(device):
    empty = torch.empty(0, 3, device=device)
    assert project_orthogonal(empty, empty).shape == (0, 3)
    assert project_orthogonal(empty, empty, scope="row").shape == (0, 3)
    assert project_orthogonal([], []) == []


# ---- the CUDA kernels on the emulator -----------------------------------------------------------


def test_every_barrier_of_the_emulated_kernels_is_needed():
    module = emulated.load_family("projection", check=True)
    tensors = lists(4, [(300,), (2, 5)])
    order = torch.arange(4).repeat(4, 1)
    expected = project_reference(tensors, 3, 1.0, False, False, 0, False)
    summed = pcgrad_reference(tensors, 4, order, 1, 0, False)

    def run():
        torch.testing.assert_close(project(tensors, 3, 1.0, False, False, 0, False), expected)
        torch.testing.assert_close(pcgrad_operator(tensors, 4, order, 1, 0, False), summed)

    with emulated.kernels(check=True):
        run()
        assert redundant_barriers(module, emulated.kernel_file("projection"), run) == []


@pytest.mark.parametrize("seed", range(3))
def test_emulated_kernels_give_equal_bits_in_any_order(seed):
    module = emulated.load_family("projection")
    tensors = lists(2, LARGE)
    with emulated.kernels():
        expected = gram(tensors, 2, 0, False)
        with configured(module, order="sticky", seed=seed, resident=4):
            assert torch.equal(gram(tensors, 2, 0, False), expected)


def test_emulated_kernels_are_what_runs():
    module = emulated.load_family("projection")
    before = module.emulator.statistics()["blocks"]
    with emulated.kernels():
        project_orthogonal(torch.ones(3), torch.ones(3))
    assert module.emulator.statistics()["blocks"] == before + 6
    project_orthogonal(torch.ones(3), torch.ones(3))
    assert module.emulator.statistics()["blocks"] == before + 6


# ---- wrong input ---------------------------------------------------------------------------------

ONE = torch.ones(3)
WEIGHT = torch.ones(1, 1, dtype=torch.float64).expand(2, 1, 1)


@pytest.mark.parametrize(
    ("g", "against", "options", "error", "message"),
    [
        (1.0, ONE, {}, TypeError, "g must be a tensor or a sequence of tensors, got"),
        (ONE, None, {}, TypeError, "against must be a tensor or a sequence of tensors"),
        ([ONE, 2], [ONE, ONE], {}, TypeError, r"g\[1\] must be a tensor or None, got"),
        (ONE, [], {}, ValueError, "against must hold at least one direction, got none"),
        (ONE, [ONE, 1], {}, TypeError, r"against\[1\] must be a tensor or a sequence"),
        (ONE, [ONE, ONE.int()], {}, TypeError, r"against\[1\] must be a dense .* got torch.int32"),
        (
            [ONE],
            [[ONE], [ONE, ONE]],
            {},
            ValueError,
            r"against\[1\] must hold as many tensors as g",
        ),
        ([ONE], [[torch.ones(4)]], {}, ValueError, r"against\[0\]\[0\] must have the shape of"),
        (
            [None, ONE],
            [ONE, torch.ones(4)],
            {},
            ValueError,
            r"against\[1\] must have the shape of its counterpart in g",
        ),
        (ONE, ONE, {"rescale": 1}, TypeError, "rescale must be True or False"),
        (
            ONE.int(),
            ONE,
            {},
            TypeError,
            r"g\[0\] must be .* or float64, got torch.int",
        ),
        (ONE, ONE.to_sparse(), {}, TypeError, r"against\[0\] must be a dense .* torch.sparse_coo"),
        ([ONE], [ONE, ONE], {}, ValueError, "as many tensors as g, got 2 against 1"),
        (ONE, torch.ones(4), {}, ValueError, r"shape of its counterpart in g, \(3,\), got \(4,\)"),
        (
            ONE,
            ONE.double(),
            {},
            ValueError,
            "dtype and device torch.float32 on cpu as in g, got torch.float64",
        ),
        (ONE, ONE.to("meta"), {}, ValueError, "dtype and device .* on cpu as in g, .* on meta"),
        (ONE, ONE, {"mode": "never"}, ValueError, "mode must be one of always, conflict"),
        (ONE, ONE, {"scope": "all"}, ValueError, "scope must be one of global, tensor, row"),
        (ONE, ONE, {"strength": math.nan}, ValueError, "strength must be finite, got nan"),
        (ONE, ONE, {"strength": "1"}, TypeError, "strength must be a number"),
        (ONE, ONE, {"strength": 10**400}, ValueError, "strength must be finite"),
    ],
)
def test_wrong_input_is_named(g, against, options, error, message):
    with pytest.raises(error, match=message):
        project_orthogonal(g, against, **options)


@pytest.mark.parametrize(
    ("gradients", "options", "error", "message"),
    [
        (ONE, {}, TypeError, "gradients must be a sequence of vectors"),
        ([], {}, ValueError, "gradients must hold at least one vector"),
        ([ONE, [ONE]], {}, ValueError, r"gradients\[1\] must hold as many tensors as"),
        ([[ONE], [ONE, ONE]], {}, ValueError, r"gradients\[1\] must hold as many tensors as"),
        (
            [ONE, torch.ones(4)],
            {},
            ValueError,
            r"gradients\[1\] must have the shape of .* gradients\[0\]",
        ),
        ([[ONE], [2]], {}, TypeError, r"gradients\[1\]\[0\] must be a tensor or None, got"),
        ([ONE, ONE], {"scope": "all"}, ValueError, "scope must be one of"),
    ],
)
def test_wrong_gradients_are_named(gradients, options, error, message):
    for function in (pcgrad, gram_matrix):
        with pytest.raises(error, match=message):
            function(gradients, **options)


def test_wrong_reduction_and_no_gradients():
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean, got 'max'"):
        pcgrad([ONE], reduction="max")
    with pytest.raises(ValueError, match="gradients must hold at least one tensor"):
        gram_matrix([[None], [None]])
    assert pcgrad([[None], [None]]) == [None]
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got"):
        pcgrad([ONE, ONE, ONE], generator=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.gram([ONE, ONE, ONE], 2, 0, False), "3 tensors do not make 2 lists"),
        (lambda op: op.gram([ONE, torch.ones(4)], 2, 0, False), "differs in shape"),
        (lambda op: op.gram([ONE, ONE.double()], 2, 0, False), "differs in dtype"),
        (lambda op: op.gram([ONE.int()], 1, 0, False), "expected float16, bfloat16, float32"),
        (lambda op: op.linear_combination([ONE], ONE, 0, False), "weights must be float64"),
        (lambda op: op.linear_combination([ONE], WEIGHT, 0, False), "one matrix for each of 1"),
        (lambda op: op.gram([torch.ones(2, 3), torch.ones(5, 3)], 1, 0, True), "batch size"),
        (lambda op: op.gram([ONE], 1, 7, False), "scope must be 0, 1 or 2, got 7"),
        (lambda op: op.pcgrad([ONE], 1, ONE, 1, 0, False), "order must hold 1 x 1 integers"),
        (lambda op: op.pcgrad([ONE], 1, torch.zeros(1, 1).long(), 3, 0, False), "reduction must"),
        (
            lambda op: op.project_(
                [torch.ones(2, 3).mT], [torch.ones(3, 2)], 1, 1, False, False, 0
            ),
            "tensor 0 of g must be contiguous",
        ),
    ],
)
def test_binding_refuses_what_python_should_not_have_passed(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.hessreg)
