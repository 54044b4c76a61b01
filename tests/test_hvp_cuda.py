"""The CUDA kernels of csrc/hvp, emulated, both ways through the layers, against the references."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hessreg.ops import hvp
from tests import emulated
from tests.cuda_emulator.plugin import configured, redundant_barriers

DTYPES = (torch.float32, torch.float64)
# Shared memory of a block: enough for all layers at once, or for none.
PATHS = {"at once": 227 << 10, "by layer": 0}


@pytest.fixture(scope="module", params=["fast", "check"])
def kernels(request):
    return emulated.load_family("hvp", check=request.param == "check")


@pytest.fixture(scope="module")
def fast():
    return emulated.load_family("hvp")


@pytest.fixture(scope="module")
def checked():
    return emulated.load_family("hvp", check=True)


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


# ---- Problems


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def converted(x: Any, dtype: torch.dtype) -> Any:
    """The same arguments, with all tensors in another dtype."""
    if isinstance(x, Tensor):
        return x.to(dtype)
    return [converted(y, dtype) for y in x] if isinstance(x, (list, tuple)) else x


@dataclasses.dataclass
class Problem:
    """A network with all that its operators take, in float64."""

    widths: Sequence[int]
    batch: int
    directions: int = 1
    activation: Any = "tanh"
    bias: bool = True
    moves_input: bool = False  # a direction in x
    with_input: bool = False  # the product for x
    gauss_newton: bool = False
    offsets: tuple[list[int], list[int], int] | None = None  # of weights, of biases; length

    def arguments(self) -> dict[str, tuple[Any, ...]]:
        """The arguments of each operator; of the later ones, from the references."""
        pairs = list(itertools.pairwise(self.widths))
        weights = [normal(o, i, seed=i + o) / max(i, 1) ** 0.5 for i, o in pairs]
        biases = [normal(o if self.bias else 0, seed=o) for _, o in pairs]
        x, hidden = normal(self.batch, self.widths[0]), len(pairs) - 1
        forward = x, weights, biases, *hvp._checked_activations(self.activation, hidden)
        _, *kept = hvp.forward_reference(*forward, True)
        a, d1, d2, d3 = (kept[i * hidden : (i + 1) * hidden] for i in range(4))
        backward = normal(self.batch, self.widths[-1], seed=1), weights, d1, d2
        bent = hvp.backward_reference(*backward, d3)
        delta, s, t = bent[: hidden + 1], bent[hidden + 1 : 2 * hidden + 1], bent[2 * hidden + 1 :]
        in_order = hvp._offsets_in_order(weights, biases)
        *offsets, length = self.offsets or (
            *in_order,
            sum(t.numel() for t in [*weights, *biases]),
        )
        v = normal(self.directions, length, seed=2)
        moved = self.directions, self.batch, self.widths[0]
        u = normal(*moved, seed=3) if self.moves_input else x.new_empty(0)
        tangent = x, weights, a, d1, u, v, *offsets
        ry, *rz = hvp.tangent_reference(*tangent)
        second = ([], [], []) if self.gauss_newton else (delta, s, rz)
        adjoint = x, weights, a, d1, *second, u, v, normal(*ry.shape, seed=4), *offsets
        pair = x, weights, a, d1, d2, normal(2, length, seed=5), *offsets
        _, *both = hvp.second_tangent_reference(*pair)
        last = delta, s, t, both[:hidden], both[hidden:], pair[5], normal(3, *ry.shape[1:], seed=6)
        return {
            "mlp_forward": (*forward, False),
            "mlp_forward with third": (*forward, True),
            "mlp_backward": (*backward, []),
            "mlp_backward with third": (*backward, d3),
            "mlp_tangent": tangent,
            "mlp_adjoint": (*adjoint, self.gauss_newton, self.with_input),
            "mlp_second_tangent": pair,
            "mlp_second_adjoint": (*pair[:5], *last, *offsets),
        }

    def run(self, module: ModuleType, path: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        operators = emulated.Hvp(module)
        with configured(module, shared=PATHS[path]):
            return {
                name: run(operators, name, converted(arguments, dtype))
                for name, arguments in self.arguments().items()
            }


def run(operators: emulated.Hvp, name: str, arguments: Any) -> list[Tensor]:
    outputs = getattr(operators, name.split()[0])(*arguments)
    return [outputs] if isinstance(outputs, Tensor) else outputs


REFERENCES = {
    "mlp_forward": hvp.forward_reference,
    "mlp_forward with third": hvp.forward_reference,
    "mlp_backward": hvp.backward_reference,
    "mlp_backward with third": hvp.backward_reference,
    "mlp_tangent": hvp.tangent_reference,
    "mlp_adjoint": hvp.adjoint_reference,
    "mlp_second_tangent": hvp.second_tangent_reference,
    "mlp_second_adjoint": lambda *arguments: [hvp.second_adjoint_reference(*arguments)],
}


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest element of a result; that of a result of zeros is absolute."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    scale = float(expected.abs().max()) or 1.0
    return float((actual.double() - expected).abs().max()) / scale


def assert_as_exact(actual: Tensor, expected: Tensor, plain: Tensor) -> None:
    """The error is at most twice that of torch in the same precision, and some roundings.

    In float64, where the expected result is no better, the roundings of both.
    """
    slack = 16 if actual.dtype == torch.float32 else 48
    assert actual.isfinite().all()
    allowed = 2 * error(plain, expected) + slack * torch.finfo(actual.dtype).eps
    assert error(actual, expected) <= allowed


def check(problem: Problem, module: ModuleType, path: str, dtype: torch.dtype) -> None:
    actual = problem.run(module, path, dtype)
    for name, arguments in problem.arguments().items():
        given = converted(arguments, dtype)
        expected = REFERENCES[name](*converted(given, torch.float64))
        plain = REFERENCES[name](*given)
        for results in zip(actual[name], expected, plain, strict=True):
            assert_as_exact(*results)


# ---- Networks

PROBLEMS = {
    "one layer": Problem((4, 3), 5, 2),
    "one wide layer": Problem((70, 65), 33, 1, with_input=True),
    "two layers": Problem((2, 5, 1), 3, 1, "sigmoid"),
    "tails of tiles": Problem((3, 33, 40, 2), 37, 2, moves_input=True, with_input=True),
    "whole tiles": Problem((32, 64, 32), 64, 1, "silu"),
    "without biases": Problem((3, 9, 9, 1), 17, 2, "gelu", bias=False),
    "Gauss-Newton": Problem((3, 9, 9, 2), 17, 2, "softplus", gauss_newton=True),
    "Gauss-Newton in x": Problem(
        (3, 9, 2), 17, 2, moves_input=True, with_input=True, gauss_newton=True
    ),
    "parts fixed": Problem((2, 4, 4, 3), 20, 3, offsets=([3, -1, 50], [-1, 40, -1], 70)),
    "all fixed": Problem(
        (2, 4, 3), 20, 2, moves_input=True, with_input=True, offsets=([-1] * 2, [-1] * 2, 0)
    ),
    "the first ones fixed": Problem(
        (2, 4, 5, 3, 2), 20, 2, offsets=([-1, -1, 0, -1], [-1] * 4, 15)
    ),
    "the last ones fixed": Problem((2, 4, 5, 3), 20, 2, offsets=([0, -1, -1], [8, -1, -1], 12)),
    "nothing moves": Problem((2, 4, 3), 20, 2, offsets=([-1, -1], [-1, 5], 9)),
    "activations by layer": Problem(
        (3, 9, 8, 2), 17, 2, ["tanh", ("softplus", 2.0)], with_input=True
    ),
    "deep": Problem((3, *[5] * 9, 2), 6, 1, "elu", with_input=True),
    "at most 128 wide": Problem((128, 7, 128), 5, 1),
    "wider than 128": Problem((3, 129, 2), 5, 1),
    "sums over the batch in parts": Problem((2, 6, 6, 1), 530, 1, moves_input=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_networks(kernels, name, path, dtype):
    check(PROBLEMS[name], kernels, path, dtype)


@pytest.mark.parametrize("activation", hvp._NAMES)
def test_activations(fast, activation, path):
    for dtype in DTYPES:
        check(Problem((3, 6, 5, 1), 21, 1, activation, with_input=True), fast, path, dtype)


def test_many_tiles(fast):
    """Enough for tiles of 64 x 64; in all, every direction and layer has tails."""
    problem = Problem((130, 70, 66), 70, 17, moves_input=True, with_input=True)
    check(problem, fast, "by layer", torch.float32)
    check(dataclasses.replace(problem, directions=18), fast, "by layer", torch.float64)


def test_many_samples(fast, path):
    """More tiles of samples than blocks, and a batch above 65,535."""
    check(Problem((1, 2, 1), 65_600, 1, "sigmoid"), fast, path, torch.float32)


def test_blocks_that_go_on_to_other_samples(checked):
    arguments = Problem((2, 3, 1), 40, 133).arguments()["mlp_tangent"]
    for actual, expected in zip(
        emulated.Hvp(checked).mlp_tangent(*arguments),
        hvp.tangent_reference(*arguments),
        strict=True,
    ):
        assert_as_exact(actual, expected, expected)


@pytest.mark.parametrize(
    "problem",
    [
        Problem((2, 4, 4, 3), 0, 3, moves_input=True, with_input=True),
        Problem((2, 4, 4, 3), 0, 1, gauss_newton=True),
        Problem((2, 4, 4, 3), 4, 0, moves_input=True, with_input=True),
        Problem((0, 4, 3), 4, 2, offsets=([-1, 4], [0, -1], 16), with_input=True),
        Problem((3, 0, 3), 4, 2, offsets=([-1, -1], [-1, 0], 3), with_input=True),
        Problem((3, 4, 0), 4, 2, offsets=([0, -1], [12, -1], 16)),
    ],
    ids=["no samples", "no samples, Gauss-Newton", "no directions", "no inputs", "none", "no out"],
)
def test_sizes_of_zero(kernels, problem, path):
    check(problem, kernels, path, torch.float32)


@pytest.mark.parametrize(
    ("shared", "dtype", "blocks"),
    [
        (227 << 10, torch.float32, 1),  # of sm_90: all layers at once
        (163 << 10, torch.float32, 4 + 4 + 1),  # of sm_80: a block a tile and layer
        (227 << 10, torch.float64, 4 + 4 + 1),
    ],
    ids=str,
)
def test_layers_are_taken_at_once_where_they_fit(fast, shared, dtype, blocks):
    arguments = converted(Problem((2, 128, 128, 1), 3).arguments()["mlp_tangent"], dtype)
    before = fast.emulator.statistics()["blocks"]
    with configured(fast, shared=shared):
        actual = emulated.Hvp(fast).mlp_tangent(*arguments)
    assert fast.emulator.statistics()["blocks"] - before == blocks
    expected = hvp.tangent_reference(*converted(arguments, torch.float64))
    for results in zip(actual, expected, hvp.tangent_reference(*arguments), strict=True):
        assert_as_exact(*results)


# ---- Symmetric matrices

# batch, n, columns
MATRICES = [
    *((1, 1, 1), (2, 5, 3), (3, 33, 1), (1, 70, 33), (1, 130, 2), (2, 64, 65), (1, 32, 32)),
    *((1, 600, 2), (70, 65, 65), (0, 3, 1), (2, 0, 3), (2, 3, 0)),
]


def symmetric_arguments(
    batch: int, n: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """With NaN above the diagonal."""
    a = normal(batch, n, n).to(dtype)
    lower = torch.ones_like(a, dtype=torch.bool).tril()
    return torch.where(lower, a, torch.nan), normal(batch, n, columns, seed=1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_symmetric_matrices(fast, shape, dtype):
    a, v = symmetric_arguments(*shape, dtype)
    actual = emulated.Hvp(fast).symmetric_matmul(a, v)
    expected = hvp.symmetric_matmul_reference(a.double(), v.double())
    assert_as_exact(actual, expected, hvp.symmetric_matmul_reference(a, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 35, 3), (1, 66, 33), (1, 520, 1)], ids=str)
def test_symmetric_matrices_checked(checked, shape, dtype):
    a, v = symmetric_arguments(*shape, dtype)
    actual = emulated.Hvp(checked).symmetric_matmul(a, v)
    expected = hvp.symmetric_matmul_reference(a.double(), v.double())
    assert_as_exact(actual, expected, hvp.symmetric_matmul_reference(a, v))


# ---- The kernels themselves

TAILS = Problem((3, 33, 18, 2), 21, 2, moves_input=True, with_input=True)
PARTS = Problem((2, 2), 520, 1, moves_input=True, with_input=True)  # of the batch


def results(module: ModuleType, problem: Problem, path: str, dtype: torch.dtype) -> list[Tensor]:
    """All that the kernels compute of a problem, and of a symmetric matrix."""
    outputs = problem.run(module, path, dtype)
    symmetric = emulated.Hvp(module).symmetric_matmul(*symmetric_arguments(1, 70, 3, dtype))
    return [symmetric, *itertools.chain.from_iterable(outputs.values())]


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("problem", "path", "dtype"),
    [
        (TAILS, "at once", torch.float32),
        (TAILS, "by layer", torch.float32),
        (PARTS, "by layer", torch.float64),
    ],
    ids=["at once", "by layer", "in parts"],
)
def test_results_do_not_depend_on_the_order_of_threads(kernels, problem, path, dtype):
    expected = results(kernels, problem, path, dtype)
    for order, seed in itertools.product(("descending", "random", "sticky"), (1, 2)):
        with configured(kernels, order=order, seed=seed, resident=2 * seed):
            assert_equal(results(kernels, problem, path, dtype), expected)


def test_directions_do_not_see_each_other(fast, path):
    """What is infinite in one stays there."""
    problem = dataclasses.replace(TAILS, directions=3)
    operators, arguments = emulated.Hvp(fast), problem.arguments()
    x, weights, a, d1, u, v, *offsets = arguments["mlp_tangent"]
    delta, s, rz, r_delta = (arguments["mlp_adjoint"][i] for i in (4, 5, 6, 9))
    spoilt = [t.clone() for t in (u, v, r_delta, *rz)]
    for tensor in spoilt:
        tensor[1] = torch.inf
    with configured(fast, shared=PATHS[path]):
        pairs = [
            (
                *operators.mlp_tangent(x, weights, a, d1, u, v, *offsets),
                *operators.mlp_adjoint(
                    x, weights, a, d1, delta, s, rz, u, v, r_delta, *offsets, False, True
                ),
            )
            for u, v, r_delta, *rz in ((u, v, r_delta, *rz), spoilt)
        ]
    for clean, dirty in zip(*pairs, strict=True):
        torch.testing.assert_close(dirty[::2], clean[::2], rtol=0, atol=0)
        assert not dirty[1].isfinite().any()


@pytest.mark.parametrize(("file", "path"), [("product.cuh", "by layer"), ("chain.cuh", "at once")])
def test_no_barrier_is_redundant(checked, file, path):
    problem = Problem((3, 18, 18, 18, 2), 300, 1, moves_input=True, with_input=True)
    expected = results(checked, problem, path, torch.float32)
    source = emulated.kernel_file("hvp").with_name(file)

    def run():
        assert_equal(results(checked, problem, path, torch.float32), expected)

    assert redundant_barriers(checked, source, run) == []


# Tiles of 32 x 32, tiles of 64 x 64 (chosen where there are many), and all layers at once; whole
# ones where it matters, so that the lanes of a warp do the same.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("problem", "path"),
    [
        (Problem((32, 32, 32), 32), "by layer"),
        (Problem((16, 16), 16, 132), "by layer"),
        (Problem((64, 64, 64), 16, 2), "at once"),
    ],
    ids=["small tiles", "large tiles", "at once"],
)
def test_shared_memory_has_no_bank_conflicts(checked, problem, path, dtype):
    options = {"order": "ascending", "resident": 1, "preempt": 0, "profile": True}
    operators, arguments = emulated.Hvp(checked), problem.arguments()
    names = ["mlp_tangent"] if problem.directions > 2 else list(REFERENCES)
    checked.emulator.take_profile()
    with configured(checked, **options, shared=PATHS[path]):
        for name in names:
            run(operators, name, converted(arguments[name], dtype))
    loads = [
        entry
        for entry in checked.emulator.take_profile()
        if (entry["space"], entry["access"]) == ("shared", "load")
    ]
    assert sum(entry["requests"] for entry in loads) > 1000
    assert [e for e in loads if e["transactions"] != e["fewest_possible"]] == []
