"""The CUDA kernels of csrc/gaussian, emulated, against float64 on NumPy."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from tests import emulated
from tests.cuda_emulator.plugin import configured, redundant_barriers

DTYPES = ("float32", "float64", "float16", "bfloat16")
# Rounding of what is computed, and of what is stored.
EPSILON = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-24, "bfloat16": 2.0**-24}
STORED = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(scope="module", params=["fast", "check"])
def kernels(request):
    return emulated.load_family("gaussian", check=request.param == "check")


@pytest.fixture(scope="module")
def fast():
    return emulated.load_family("gaussian")


@pytest.fixture(scope="module")
def checked():
    return emulated.load_family("gaussian", check=True)


# ---- Arrays and their float64 values


def stored(x, dtype):
    """An array as the kernels take it: bfloat16 as its upper 16 bits."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(x, dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def value_of(array):
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(float)
    return array.astype(float)


def empty(shape, dtype):
    return np.empty(shape, np.uint16 if dtype == "bfloat16" else dtype)


def normal(*shape, dtype="float32", seed=0, shift=0.0):
    return stored(np.random.default_rng(seed).standard_normal(shape) + shift, dtype)


def gammas(batch, count, d):
    """Bandwidths at which weights are neither all zero nor all one."""
    scale = np.array([0.5, 0.1, 2.0])[:count] / max(d, 1)
    return scale * np.linspace(1, 1.5, batch)[:, None]


# ---- References


def squared_distances(x, y, compute=np.float64):
    difference = value_of(x).astype(compute)[:, :, None] - value_of(y).astype(compute)[:, None]
    return np.square(difference).sum(-1)


def mixture(s, gamma, coefficient):
    if coefficient is None:
        coefficient = np.full_like(gamma, 1 / max(gamma.shape[1], 1))
    terms = np.exp(-gamma[:, :, None, None].astype(s.dtype) * s[:, None])
    return (coefficient[:, :, None, None].astype(s.dtype) * terms).sum(1)


@dataclasses.dataclass
class SumProblem:
    x: np.ndarray
    y: np.ndarray
    gamma: np.ndarray
    coefficient: np.ndarray | None
    left: Sequence[np.ndarray]
    right: Sequence[np.ndarray]
    v: np.ndarray

    def run(self, module, dtype="float32", *, allow_tf32=False):
        out = empty((*self.x.shape[:2], self.v.shape[-1]), dtype)
        arguments = (self.x, self.y, self.gamma, self.coefficient, [*self.left], [*self.right])
        module.sum(*arguments, self.v, allow_tf32, out)
        return out

    def weights(self, compute=np.float64):
        weights = mixture(squared_distances(self.x, self.y, compute), self.gamma, self.coefficient)
        for left, right in zip(self.left, self.right, strict=True):
            a, b = value_of(left).astype(compute), value_of(right).astype(compute)
            weights = weights * (a @ b.transpose(0, 2, 1))
        return weights

    def expected(self, compute=np.float64):
        return self.weights(compute) @ value_of(self.v).astype(compute)

    def terms(self):
        """The sums of the absolute values of all that is added up."""
        s = squared_distances(self.x, self.y)
        weights = mixture(
            s, self.gamma, None if self.coefficient is None else abs(self.coefficient)
        )
        for left, right in zip(self.left, self.right, strict=True):
            weights = weights * (abs(value_of(left)) @ abs(value_of(right)).transpose(0, 2, 1))
        return weights @ abs(value_of(self.v))


def sum_problem(n, m, d, e, *, dtype="float32", ranks=(), batch=1, components=1, shift=0.0):
    kinds = {"dtype": dtype}
    return SumProblem(
        x=normal(batch, n, d, seed=1, shift=shift, **kinds),
        y=normal(batch, m, d, seed=2, shift=shift, **kinds),
        gamma=gammas(batch, components, d),
        coefficient=None if components == 1 else normal(batch, components, dtype="float64"),
        left=[normal(batch, n, rank, seed=3 + rank, **kinds) for rank in ranks],
        right=[normal(batch, m, rank, seed=4 + rank, **kinds) for rank in ranks],
        v=normal(batch, m, e, seed=5, **kinds),
    )


def in_units(error, terms, epsilon):
    return (np.abs(error) / np.maximum(terms, 1e-30)).max(initial=0) / epsilon


def assert_as_exact(actual, problem_or_terms, expected, plain, dtype, slack=8.0):
    """The error is at most twice that of plain differences in the same precision, and slack."""
    terms = problem_or_terms
    epsilon = EPSILON[dtype]
    ours = value_of(actual) - expected
    stored_error = STORED[dtype] * np.abs(expected) + (6e-8 if dtype == "float16" else 0)
    beyond = np.maximum(np.abs(ours) - 1.01 * stored_error, 0)
    allowed = 2 * in_units(plain - expected, terms, epsilon) + slack
    assert np.isfinite(value_of(actual)).all()
    assert in_units(beyond, terms, epsilon) <= allowed


def precision(dtype):
    return np.float64 if dtype == "float64" else np.float32


# ---- Matrices

# n, m, d, batch, components
SHAPES = [
    *((1, 1, 0, 1, 1), (2, 33, 1, 1, 3), (33, 2, 2, 2, 1), (70, 33, 3, 1, 1), (1, 70, 5, 2, 3)),
    *((33, 70, 8, 1, 1), (70, 2, 9, 1, 1), (130, 70, 15, 1, 1), (33, 1, 16, 2, 1)),
    *((2, 130, 17, 1, 3), (70, 70, 32, 1, 1), (65, 64, 40, 2, 3), (64, 65, 75, 1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matrix(kernels, shape, dtype):
    n, m, d, batch, components = shape
    p = sum_problem(n, m, d, 1, dtype=dtype, batch=batch, components=components)
    out = empty((batch, n, m), dtype)
    kernels.matrix(p.x, p.y, p.gamma, p.coefficient, False, out)
    coefficient = None if p.coefficient is None else abs(p.coefficient)
    terms = mixture(squared_distances(p.x, p.y), p.gamma, coefficient)
    # An exponent's absolute error is the relative error of its power.
    slack = 8 + 4 * (p.gamma.max() * squared_distances(p.x, p.y)).max(initial=0)
    assert_as_exact(out, terms, p.weights(), p.weights(precision(dtype)), dtype, slack)


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_empty_matrix(kernels, n, m):
    out = empty((2, n, m), "float32")
    kernels.matrix(normal(2, n, 3), normal(2, m, 3), gammas(2, 1, 3), None, False, out)


# ---- Sums

# n, m, d, e, ranks, batch, components
SUMS = [
    *((1, 1, 0, 1, (), 1, 1), (2, 33, 1, 3, (1,), 1, 3), (33, 2, 2, 1, (2, 5), 2, 1)),
    *((70, 130, 3, 3, (), 1, 1), (33, 70, 5, 70, (5,), 1, 1), (70, 65, 5, 40, (), 2, 3)),
    *((33, 33, 9, 17, (40, 1), 1, 1), (130, 70, 17, 1, (17,), 1, 1), (70, 33, 17, 20, (), 1, 3)),
    *((33, 130, 40, 3, (40, 0), 2, 1), (65, 64, 40, 70, (3,), 1, 1), (2, 200, 36, 130, (), 1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SUMS)
def test_sum(kernels, shape, dtype):
    n, m, d, e, ranks, batch, components = shape
    problem = sum_problem(n, m, d, e, dtype=dtype, ranks=ranks, batch=batch, components=components)
    plain = problem.expected(precision(dtype))
    out = problem.run(kernels, dtype)
    assert_as_exact(out, problem.terms(), problem.expected(), plain, dtype, slack=30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_over_nothing_is_zero(kernels, dtype):
    out = sum_problem(33, 0, 3, 5, dtype=dtype, ranks=(2,)).run(kernels, dtype)
    assert (value_of(out) == 0).all()


@pytest.mark.parametrize(("n", "e"), [(0, 3), (3, 0)])
def test_empty_sum(kernels, n, e):
    assert sum_problem(n, 5, 3, e).run(kernels).size == 0


@pytest.mark.parametrize("d", [5, 36])
def test_most_factors(kernels, d):
    problem = sum_problem(33, 70, d, 2, ranks=(1,) * kernels.max_factors)
    plain = problem.expected(np.float32)
    out = problem.run(kernels)
    assert_as_exact(out, problem.terms(), problem.expected(), plain, "float32", 30)


def test_too_many_factors(fast):
    problem = sum_problem(2, 3, 4, 1, ranks=(1,) * (fast.max_factors + 1))
    with pytest.raises(ValueError, match="at most 8 factors"):
        problem.run(fast)


def test_too_many_components(fast):
    out = empty((1, 2, 2), "float32")
    with pytest.raises(ValueError, match="at most 128 components"):
        fast.matrix(normal(1, 2, 3), normal(1, 2, 3), np.ones((1, 129)), None, False, out)


def test_many_components(kernels):
    x, gamma = normal(1, 33, 3), np.linspace(0.1, 3, 128)[None]
    out = empty((1, 33, 33), "float32")
    kernels.matrix(x, x, gamma, None, False, out)
    np.testing.assert_allclose(out, mixture(squared_distances(x, x), gamma, None), rtol=2e-6)


# ---- Energies


@dataclasses.dataclass
class EnergyProblem:
    z: np.ndarray
    gamma: np.ndarray
    first: int
    weights: tuple[float, float, float] = (0.3, -0.7, 0.5)

    def run(self, module, dtype="float32", *, gradient=True, allow_tf32=False):
        value = np.empty(len(self.z))
        out = np.empty(self.z.shape, precision(dtype)) if gradient else None
        arguments = (self.z, self.gamma, self.first, *self.weights, allow_tf32)
        module.energy(*arguments, value, out)
        return value, out

    def pair_weights(self):
        count = self.z.shape[1]
        first = np.arange(count) < self.first
        within_first, across, within_rest = self.weights
        same = np.where(first, within_first, within_rest)
        weights = np.where(first[:, None] == first, same[:, None], across)
        return weights * (1 - np.eye(count))

    def expected(self, compute=np.float64):
        """Value and gradient, and for both what they are sums of, in absolute values."""
        z, gamma = value_of(self.z).astype(compute), self.gamma.astype(compute)
        w, s = self.pair_weights().astype(compute), squared_distances(self.z, self.z, compute)
        phi = mixture(s, gamma, None)
        slope = mixture(s, gamma, gamma / max(gamma.shape[1], 1))
        value, value_terms = (w * phi).sum((1, 2)), (abs(w) * phi).sum((1, 2))
        difference = z[:, :, None] - z[:, None]
        gradient = -4 * ((w * slope)[..., None] * difference).sum(2)
        gradient_terms = (
            4
            * (abs(w) * slope).sum(2, keepdims=True)
            * abs(difference).max((1, 2), initial=0)[:, None]
        )
        return value, gradient, value_terms, np.broadcast_to(gradient_terms, z.shape)


def energy_problem(count, first, d, *, dtype="float32", batch=1, components=1, shift=0.0):
    z = normal(batch, count, d, dtype=dtype, shift=shift)
    return EnergyProblem(z, gammas(batch, components, d), first)


# count, first, d, batch, components
ENERGIES = [
    *((1, 1, 2, 1, 1), (2, 1, 0, 2, 1), (33, 20, 1, 1, 3), (70, 0, 3, 1, 1), (130, 65, 5, 2, 1)),
    *((70, 70, 8, 1, 3), (33, 10, 9, 1, 1), (70, 33, 15, 1, 1), (130, 100, 17, 1, 1)),
    *((70, 20, 40, 2, 3), (65, 64, 70, 1, 1), (140, 70, 150, 1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ENERGIES)
def test_energy(kernels, shape, dtype):
    count, first, d, batch, components = shape
    problem = energy_problem(count, first, d, dtype=dtype, batch=batch, components=components)
    expected, gradient, terms, gradient_terms = problem.expected()
    plain, plain_gradient, *_ = problem.expected(precision(dtype))
    kind = "float64" if dtype == "float64" else "float32"
    for with_gradient in (False, True):
        value, out = problem.run(kernels, dtype, gradient=with_gradient)
        assert_as_exact(value, terms, expected, plain, kind, slack=16)
        if with_gradient:
            assert_as_exact(out, gradient_terms, gradient, plain_gradient, kind, slack=16)


@pytest.mark.parametrize("d", [3, 20])
def test_energy_of_no_points_is_zero(kernels, d):
    for gradient in (False, True):
        value, _ = energy_problem(0, 0, d, batch=3).run(kernels, gradient=gradient)
        assert value.tolist() == [0, 0, 0]


def test_energy_of_no_batch(fast):
    energy_problem(5, 2, 3, batch=0).run(fast)


def test_energy_of_many_tiles(fast):
    """More tiles than blocks, so that some blocks go on along the triangle."""
    problem = energy_problem(200, 100, 1, batch=100)
    expected, *_ = problem.expected()
    np.testing.assert_allclose(problem.run(fast, gradient=False)[0], expected, rtol=1e-5)


# ---- Accuracy


@pytest.mark.parametrize("d", [3, 24, 40])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_from_the_origin(fast, d, dtype):
    problem = sum_problem(70, 130, d, 20, dtype=dtype, shift=1000.0)
    expected, plain = problem.expected(), problem.expected(precision(dtype))
    out = problem.run(fast, dtype)
    assert_as_exact(out, problem.terms(), expected, plain, dtype, slack=30)
    problem = energy_problem(130, 60, d, dtype=dtype, shift=1000.0)
    _, gradient, _, terms = problem.expected()
    _, plain, *_ = problem.expected(precision(dtype))
    assert_as_exact(problem.run(fast, dtype)[1], terms, gradient, plain, dtype, slack=30)


@pytest.mark.parametrize("allow_tf32", [False, True])
@pytest.mark.parametrize("d", [2, 9, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_points_have_distance_zero(fast, d, dtype, allow_tf32):
    x = normal(1, 70, d, dtype=dtype, shift=5.0)
    y = np.ascontiguousarray(x[:, ::-1])
    out = empty((1, 70, 70), dtype)
    fast.matrix(x, y, np.full((1, 1), 1e4), None, allow_tf32, out)
    assert (value_of(out)[0, ::-1].diagonal() == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_near_points(fast, dtype):
    """Clusters: distances are far below the norms and are taken again."""
    centres, noise = normal(1, 5, 40, dtype="float64"), normal(1, 70, 40, dtype="float64")
    x = stored(np.tile(centres, (1, 14, 1)) + 1e-4 * noise, dtype)
    out, gamma = empty((1, 70, 70), dtype), np.full((1, 1), 1e6)
    fast.matrix(x, x, gamma, None, False, out)
    expected = mixture(squared_distances(x, x), gamma, None)
    plain = mixture(squared_distances(x, x, precision(dtype)), gamma, None)
    assert np.abs(out - expected).max() <= 2 * np.abs(plain - expected).max() + 4 * EPSILON[dtype]


def test_tf32_is_used_only_where_allowed(fast):
    problem = sum_problem(70, 70, 40, 20)
    expected, terms = problem.expected(), problem.terms()
    errors = [
        in_units(problem.run(fast, allow_tf32=allow) - expected, terms, EPSILON["float32"])
        for allow in (False, True)
    ]
    assert errors[0] < 30 < 300 < errors[1] < 2.0**13 * 2


def test_tf32_does_not_concern_float64(fast):
    problem = sum_problem(70, 70, 40, 20, dtype="float64")
    exact, allowed = (problem.run(fast, "float64", allow_tf32=allow) for allow in (False, True))
    np.testing.assert_array_equal(exact, allowed)


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", [0, 7])
def test_points_that_are_not_finite(fast, special, d, dtype, row):
    """An infinite point has weight zero; what NaN touches is NaN, and nothing else is."""
    problem = energy_problem(70, 30, d, dtype=dtype)
    problem.z[0, row, 1] = special
    kept = np.delete(np.arange(70), row)
    rest = EnergyProblem(problem.z[:, kept], problem.gamma, 30 - 1)
    expected, expected_gradient, *_ = rest.expected()
    out = np.empty((1, 70, 70), dtype)
    fast.matrix(problem.z, problem.z, problem.gamma, None, False, out)
    for gradient in (False, True):
        value, slopes = problem.run(fast, dtype, gradient=gradient)
        if np.isnan(special):
            assert np.isnan(value).all()
        else:
            np.testing.assert_allclose(value, expected, rtol=1e-5)
    if np.isnan(special):
        assert np.isnan(slopes).all()
        assert np.isnan(out[0, row]).all()
        assert np.isnan(out[0, :, row]).all()
    else:
        assert (slopes[0, row] == 0).all()
        np.testing.assert_allclose(slopes[:, kept], expected_gradient, rtol=1e-3, atol=1e-6)
        assert (out[0, row, kept] == 0).all()
        assert (out[0, kept, row] == 0).all()
    assert np.isfinite(out[0][np.ix_(kept, kept)]).all()


@pytest.mark.parametrize("d", [4, 20, 21])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_that_are_not_aligned(kernels, d, dtype):
    problem = sum_problem(33, 70, d, 20, dtype=dtype)
    aligned = problem.run(kernels, dtype)
    for name in ("x", "y", "v"):
        array = getattr(problem, name)
        room = np.empty(array.size + 1, array.dtype)
        room[1:] = array.ravel()
        setattr(problem, name, room[1:].reshape(array.shape))
    np.testing.assert_array_equal(problem.run(kernels, dtype), aligned)


# ---- The kernels themselves

CASES = {
    "direct": lambda: sum_problem(70, 140, 5, 3, ranks=(4,)),
    "direct wide": lambda: sum_problem(70, 70, 5, 70),
    "tensor": lambda: sum_problem(70, 140, 36, 3, ranks=(40,)),
    "tensor wide": lambda: sum_problem(33, 70, 36, 70),
    "float64": lambda: sum_problem(33, 70, 20, 3, dtype="float64", ranks=(4,)),
    "float64 wide": lambda: sum_problem(33, 70, 40, 40, dtype="float64"),
}


def results(module, case):
    """All that the kernels compute of a case, as one list of arrays."""
    problem = CASES[case]()
    dtype = problem.x.dtype.name
    energy = EnergyProblem(problem.y, problem.gamma, 20)
    out = empty((1, problem.x.shape[1], problem.y.shape[1]), dtype)
    module.matrix(problem.x, problem.y, problem.gamma, None, False, out)
    value_alone, _ = energy.run(module, dtype, gradient=False)
    return [problem.run(module, dtype), out, value_alone, *energy.run(module, dtype)]


@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_the_order_of_threads(kernels, case):
    expected = results(kernels, case)
    for order, seed in itertools.product(("descending", "random", "sticky"), (1, 2)):
        with configured(kernels, order=order, seed=seed, resident=2 * seed):
            for actual, wanted in zip(results(kernels, case), expected, strict=True):
                np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("case", ["direct", "tensor", "float64"])
def test_a_batch_is_computed_as_its_entries(fast, case):
    """Up to rounding: how a row is split depends on how many there are."""
    problem = CASES[case]()
    fields = dataclasses.fields(problem)
    twice = {f.name: getattr(problem, f.name) for f in fields}
    double = lambda x: np.concatenate([x, x[:, ::-1]])  # noqa: E731
    for name in ("x", "y", "v"):
        twice[name] = double(twice[name])
    twice["left"], twice["right"] = ([double(x) for x in twice[k]] for k in ("left", "right"))
    twice["gamma"] = np.tile(twice["gamma"], (2, 1))
    dtype = problem.x.dtype.name
    out = SumProblem(**twice).run(fast, dtype)
    once = problem.run(fast, dtype)
    np.testing.assert_allclose(out[0], once[0], rtol=0, atol=1e-5 * np.abs(once).max())
    np.testing.assert_allclose(out[1, ::-1], once[0], rtol=0, atol=1e-5 * np.abs(once).max())


@pytest.mark.parametrize("file", ["steps.cuh", "pair_tile.cuh", "gaussian_cuda.cu"])
def test_no_barrier_is_redundant(checked, file):
    cases = ("direct", "float64 wide")
    references = {case: results(checked, case) for case in cases}

    def run():
        for case in cases:
            for actual, wanted in zip(results(checked, case), references[case], strict=True):
                np.testing.assert_array_equal(actual, wanted)

    source = emulated.kernel_file("gaussian").with_name(file)
    assert redundant_barriers(checked, source, run) == []


@pytest.mark.parametrize(
    ("d", "e", "dtype"),
    [(8, 64, "float32"), (64, 3, "float32"), (64, 64, "float32"), (8, 3, "float64")],
)
def test_shared_memory_has_no_bank_conflicts(checked, d, e, dtype):
    """Whole tiles, so that the lanes of a warp do the same."""
    options = {"order": "ascending", "resident": 1, "preempt": 0, "profile": True}
    checked.emulator.take_profile()
    with configured(checked, **options):
        sum_problem(64, 128, d, e, dtype=dtype, ranks=(d,)).run(checked, dtype)
        for gradient in (False, True):
            energy_problem(128, 64, d, dtype=dtype).run(checked, dtype, gradient=gradient)
    entries = [
        entry
        for entry in checked.emulator.take_profile()
        if (entry["space"], entry["access"]) == ("shared", "load")
        and entry["where"].startswith("pair_tile.cuh")  # not what a block does once
    ]
    assert sum(entry["requests"] for entry in entries) > 1000
    assert [e for e in entries if e["transactions"] != e["fewest_possible"]] == []
