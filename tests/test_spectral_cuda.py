"""The CUDA kernels of csrc/spectral, emulated, against float64 on NumPy."""

import itertools

import numpy as np
import pytest

from tests import emulated
from tests.cuda_emulator.plugin import configured, redundant_barriers

DTYPES = ("float32", "float64")
# On both sides of the sizes of the kernels; in float64 the columns of 107 rows leave the chip.
SIZES = [1, 2, 3, 31, 32, 33, 64, 65]
LARGE = [107, 128]
SPECTRA = ("random", "clusters", "repeated", "graded", "low rank", "saddle", "identity", "zero")


@pytest.fixture(scope="module", params=["fast", "check"])
def kernels(request):
    return emulated.load_family("spectral", check=request.param == "check")


@pytest.fixture(scope="module")
def fast():
    return emulated.load_family("spectral")


@pytest.fixture(scope="module")
def checked():
    return emulated.load_family("spectral", check=True)


# ---- Matrices


def values_of(spectrum, n):
    i = np.arange(n)
    return {
        "random": np.random.default_rng(n).standard_normal(n),
        "clusters": 1.0 * (i % 3) + 1e-6 * i / n,
        "repeated": 1.0 * (i % 2) - 2.0 * (i == n - 1),
        "graded": 10.0 ** -(12.0 * i / n),
        "low rank": 1.0 * (i < 2) * (1 + i),
        "saddle": np.where(i % 2, 1.0, -1.0),
        "identity": np.ones(n),
        "zero": np.zeros(n),
    }[spectrum]


def symmetric(n, *, batch=1, dtype="float64", spectrum="random", seed=0):
    """Symmetric matrices of a spectrum; "identity" and "zero" to the last bit."""
    normal = np.random.default_rng(seed).standard_normal((batch, n, n))
    vectors = np.linalg.qr(normal)[0] if spectrum not in ("identity", "zero") else np.eye(n)
    a = vectors * values_of(spectrum, n) @ np.swapaxes(vectors, -1, -2)
    lower = np.tril(np.broadcast_to(a, (batch, n, n)))
    return np.ascontiguousarray(lower + np.swapaxes(np.tril(lower, -1), -1, -2), dtype)


def vectors(batch, n, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, n)).astype(dtype)


def norm_of(a):
    return np.maximum(np.linalg.norm(a.astype(float), axis=(-2, -1)), np.finfo(float).tiny)


# ---- Calls


def power(module, a, v0, num_iterations):
    out = [np.empty(shape, a.dtype) for shape in (a.shape[:1], v0.shape, a.shape[:1])]
    module.power_iteration(a, v0, num_iterations, *out)
    return out


def lanczos(module, a, v0, m):
    batch, n = v0.shape
    out = [np.empty(shape, a.dtype) for shape in ((batch, m), (batch, m), (batch, n, m))]
    module.lanczos(a, v0, *out)
    return out


def eigenvalues(module, a):
    values = np.empty(a.shape[:2], a.dtype)
    module.symmetric_eigh(a, values, None)
    return values


def eigenpairs(module, a):
    out = [np.empty(a.shape[:2], a.dtype), np.empty(a.shape, a.dtype)]
    module.symmetric_eigh(a, *out)
    return out


def tridiagonal_pairs(module, alpha, beta):
    batch, m = alpha.shape
    out = [np.empty(shape, alpha.dtype) for shape in ((batch, m), (batch, m, m))]
    module.tridiagonal_eigh(alpha, beta, *out)
    return out


def step(module, basis, w, largest=0.0):
    """The basis with its last row filled in, and the numbers of a step of Lanczos."""
    basis, count = basis.copy(), len(basis) - 1
    result = np.empty(count + 3)
    module.lanczos_step(basis, w, count, np.array([largest]), 4 * epsilon(basis), result)
    return basis, result


def tridiagonal(alpha, beta):
    return np.stack(
        [np.diag(d) + np.diag(e, 1) + np.diag(e, -1) for d, e in zip(alpha, beta, strict=True)]
    )


# ---- What must hold


def epsilon(array):
    return float(np.finfo(array.dtype).eps)


def assert_eigenvalues(a, values, slack=4.0):
    expected = np.linalg.eigvalsh(a.astype(float))
    plain = np.abs(np.linalg.eigvalsh(a) - expected).max(-1, initial=0)
    error = np.abs(values - expected).max(-1, initial=0)
    largest = np.maximum(np.abs(expected).max(-1, initial=0), np.finfo(float).tiny)
    rounding = slack * (1 + 0.1 * a.shape[-1]) if a.dtype == np.float64 else slack
    assert (np.diff(values) >= 0).all()
    assert (error <= 2 * plain + rounding * epsilon(a) * largest).all()


def assert_eigenpairs(a, values, vectors):
    wide, v = a.astype(float), vectors.astype(float)
    residual = np.abs(wide @ v - v * values[:, None]).max((-2, -1), initial=0)
    overlaps = np.swapaxes(v, -1, -2) @ v - np.eye(a.shape[-1])
    assert_eigenvalues(a, values)
    assert np.abs(overlaps).max(initial=0) <= 8 * epsilon(a)
    assert (residual <= 16 * epsilon(a) * norm_of(a)).all()


def assert_lanczos(a, v0, alpha, beta, q):
    """A Q = Q T + r e_m' with orthonormal Q, and r of norm beta_m."""
    m = alpha.shape[-1]
    wide, q = a.astype(float), q.astype(float)
    rest = wide @ q - q @ tridiagonal(alpha.astype(float), beta[:, :-1].astype(float))
    last = np.linalg.norm(rest[..., -1], axis=-1)
    first = v0 / np.linalg.norm(v0.astype(float), axis=-1, keepdims=True)
    tolerance = 80 * epsilon(a) * norm_of(a)
    assert np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(m)).max() <= 16 * epsilon(a)
    assert (np.abs(rest[..., :-1]).max((-2, -1), initial=0) <= tolerance).all()
    assert (np.abs(last - beta[:, -1]) <= tolerance).all()
    assert np.abs(q[..., 0] - first).max() <= 8 * epsilon(a)


# ---- Power iteration


def expected_power(a, v0, num_iterations):
    wide, v = a.astype(float), v0.astype(float)[..., None]
    for _ in range(num_iterations):
        v = wide @ v
        v = v / np.linalg.norm(v, axis=-2, keepdims=True)
    v = v / np.linalg.norm(v, axis=-2, keepdims=True)
    product = wide @ v
    value = (v * product).sum((-2, -1))
    residual = np.linalg.norm(product - value[:, None, None] * v, axis=(-2, -1))
    return value, v[..., 0], residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SIZES, 128, 129, 150])
@pytest.mark.parametrize("num_iterations", [0, 1, 10])
def test_power_iteration(kernels, n, dtype, num_iterations):
    a, v0 = symmetric(n, batch=2, dtype=dtype), vectors(2, n, dtype)
    value, vector, residual = power(kernels, a, v0, num_iterations)
    expected = expected_power(a, v0, num_iterations)
    tolerance = 16 * epsilon(a) * norm_of(a)
    assert (np.abs(value - expected[0]) <= tolerance).all()
    assert (np.abs(residual - expected[2]) <= tolerance).all()
    # An error of a product grows by |A| / |A v| when the result is normalised.
    assert np.abs(vector - expected[1]).max() <= 200 * epsilon(a)
    assert np.abs(np.linalg.norm(vector.astype(float), axis=-1) - 1).max() <= 2 * epsilon(a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 33, 130])
def test_power_iteration_finds_the_dominant_pair(fast, n, dtype):
    values = np.append(np.linspace(-0.5, 0.5, n - 1), -2)
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    a = np.ascontiguousarray((q * values @ q.T)[None], dtype)
    value, vector, residual = power(fast, a, vectors(1, n, dtype), 60)
    assert value == pytest.approx(-2, rel=8 * epsilon(a))
    assert abs(vector[0] @ q[:, -1]) == pytest.approx(1, rel=16 * epsilon(a))
    assert residual <= 16 * epsilon(a) * norm_of(a)


@pytest.mark.parametrize("n", [3, 130])
def test_power_iteration_stays_where_the_product_is_zero(fast, n):
    a = np.zeros((2, n, n))
    a[0, 0, 0] = 1
    v0 = np.zeros((2, n))
    v0[:, 1] = 3
    value, vector, residual = power(fast, a, v0, 5)
    assert value.tolist() == residual.tolist() == [0, 0]
    np.testing.assert_array_equal(vector, v0 / 3)


@pytest.mark.parametrize("n", [3, 130])
def test_a_start_vector_of_zero_is_the_first_unit_vector(fast, n):
    a = symmetric(n)
    zero, unit = np.zeros((1, n)), np.eye(n)[:1].copy()
    for run in (power, lanczos):
        for actual, expected in zip(run(fast, a, zero, 3), run(fast, a, unit, 3), strict=True):
            np.testing.assert_array_equal(actual, expected)


# ---- Lanczos


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SIZES, 129])
@pytest.mark.parametrize("most", [1, 6, 40])
def test_lanczos(kernels, n, dtype, most):
    a, v0 = symmetric(n, batch=2, dtype=dtype), vectors(2, n, dtype)
    assert_lanczos(a, v0, *lanczos(kernels, a, v0, min(n, most)))


@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    [(128, 93, "float64"), (128, 94, "float64"), (128, 128, "float32"), (150, 150, "float64")],
)
def test_lanczos_on_and_off_the_chip(fast, n, m, dtype):
    a, v0 = symmetric(n, dtype=dtype), vectors(1, n, dtype)
    assert_lanczos(a, v0, *lanczos(fast, a, v0, m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 33, 70, 129])
@pytest.mark.parametrize("spectrum", ["repeated", "low rank", "saddle", "identity", "zero"])
def test_lanczos_goes_on_after_a_breakdown(fast, n, dtype, spectrum):
    m = min(n, 40)
    a, v0 = symmetric(n, batch=2, dtype=dtype, spectrum=spectrum), vectors(2, n, dtype)
    alpha, beta, q = lanczos(fast, a, v0, m)
    assert_lanczos(a, v0, alpha, beta, q)
    distinct = len(np.unique(values_of(spectrum, n)))
    assert (beta[:, : distinct + 1] == 0).any(1).all()  # rounding may take it one step further
    again = lanczos(fast, a, v0, m)
    np.testing.assert_array_equal(q, again[2])


def test_the_new_vector_is_the_one_held_least(fast):
    a, v0 = np.eye(4)[None].copy(), np.array([[0.0, 2.0, 1.0, 0.0]])
    _, beta, q = lanczos(fast, a, v0, 4)
    assert (beta == 0).all()
    np.testing.assert_allclose(q[0, :, 1], [1, 0, 0, 0], atol=1e-15)
    np.testing.assert_allclose(q[0, :, 2], [0, 0, 0, 1], atol=1e-15)


# ---- A step of Lanczos on long vectors


def orthonormal_rows(count, n, dtype, seed=0):
    """The rows of a basis, and one more to fill."""
    normal = np.random.default_rng(seed).standard_normal((n, count))
    rows = np.full((count + 1, n), np.nan, dtype)
    rows[:count] = np.linalg.qr(normal)[0].T
    return rows


def assert_step(w, basis, result):
    rows, q, w = basis[:-1].astype(float), basis[-1].astype(float), w.astype(float)
    residual, is_zero, product = result[-3:]
    rounding, size = epsilon(basis), np.linalg.norm(w)
    assert is_zero == 0
    assert product == pytest.approx(size, rel=4 * rounding)
    assert np.linalg.norm(q) == pytest.approx(1, rel=4 * rounding)
    assert np.abs(rows @ q).max() <= 10 * rounding
    assert np.linalg.norm(w - result[:-3] @ rows - residual * q) <= 4 * rounding * size


# One tile or several, whole and not, and more of them than blocks (70001); rows that are aligned
# and not; as many rows as a warp takes at once, and more.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "count"),
    [(3, 2), (64, 1), (127, 17), (128, 64), (129, 65), (260, 130), (5000, 40), (70001, 2)],
)
def test_lanczos_step(kernels, n, count, dtype):
    basis, w = orthonormal_rows(count, n, dtype), vectors(1, n, dtype)[0]
    assert_step(w, *step(kernels, basis, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [1e-2, 1e-5, 1e-6])
def test_lanczos_step_when_most_cancels(kernels, left, dtype):
    basis, w = orthonormal_rows(9, 300, dtype), vectors(1, 300, dtype)[0]
    w = (vectors(1, 9, dtype)[0] @ basis[:9] + left * w / np.linalg.norm(w)).astype(dtype)
    filled, result = step(kernels, basis, w)
    assert_step(w, filled, result)
    assert result[9] == pytest.approx(left, rel=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanczos_step_within_the_span(kernels, dtype):
    basis = orthonormal_rows(9, 300, dtype)
    w = vectors(1, 9, dtype)[0] @ basis[:9]
    filled, result = step(kernels, basis, w)
    assert not filled[9].any()
    assert result[-2] == 1
    assert result[-1] == pytest.approx(np.linalg.norm(w.astype(float)), rel=4 * epsilon(w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["basis", "w"])
def test_lanczos_step_with_memory_that_is_not_aligned(checked, which, dtype):
    """The loads are narrower, and the sums differ by rounding."""
    basis, w = orthonormal_rows(3, 512, dtype), vectors(1, 512, dtype)[0]
    aligned, expected = step(checked, basis, w)
    arrays = {"basis": basis, "w": w}
    given = arrays[which]
    shifted = np.empty(given.size + 1, dtype)[1:].reshape(given.shape)
    shifted[...] = given
    assert shifted.ctypes.data % 16
    arrays[which] = shifted
    result = np.empty(6)
    tolerance = 4 * epsilon(basis)
    checked.lanczos_step(arrays["basis"], arrays["w"], 3, np.zeros(1), tolerance, result)
    np.testing.assert_allclose(arrays["basis"], aligned, rtol=0, atol=tolerance)
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance * expected[-1])


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [3, 300])
def test_lanczos_step_of_what_is_not_finite(kernels, special, n):
    basis, w = orthonormal_rows(2, n, "float32"), vectors(1, n, "float32")[0]
    w[n - 1] = special
    filled, result = step(kernels, basis, w, largest=1.0)
    assert not np.isfinite(result[[2, 4]]).any()
    assert result[3] == 1
    assert not filled[2].any()


@pytest.mark.parametrize(("n", "count", "dtype"), [(70001, 2, "float32"), (257, 70, "float64")])
def test_lanczos_step_does_not_depend_on_the_order_of_threads(fast, n, count, dtype):
    basis, w = orthonormal_rows(count, n, dtype), vectors(1, n, dtype)[0]
    expected = step(fast, basis, w)
    for order, seed in itertools.product(("descending", "random", "sticky"), (1, 2)):
        with configured(fast, order=order, seed=seed, resident=2 * seed):
            for actual, wanted in zip(step(fast, basis, w), expected, strict=True):
                np.testing.assert_array_equal(actual, wanted)


def test_lanczos_step_on_too_many_rows(fast):
    rows = fast.max_step_rows + 1
    with pytest.raises(ValueError, match="a basis of up to 12288 rows, got 12289"):
        step(fast, np.zeros((rows + 1, 1)), np.ones(1))


# ---- All eigenvalues


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_eigenvalues(kernels, n, dtype):
    a = symmetric(n, batch=2, dtype=dtype)
    assert_eigenvalues(a, eigenvalues(kernels, a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_eigenpairs(kernels, n, dtype):
    a = symmetric(n, batch=2, dtype=dtype)
    assert_eigenpairs(a, *eigenpairs(kernels, a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_eigenpairs_of_tridiagonal_matrices(kernels, n, dtype):
    alpha, beta = vectors(2, n, dtype), vectors(2, n - 1, dtype, seed=2)
    assert_eigenpairs(tridiagonal(alpha, beta), *tridiagonal_pairs(kernels, alpha, beta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LARGE)
@pytest.mark.parametrize("spectrum", ["random", "clusters"])
def test_large(fast, n, dtype, spectrum):
    a = symmetric(n, dtype=dtype, spectrum=spectrum)
    alpha, beta = a.diagonal(0, 1, 2).copy(), a.diagonal(1, 1, 2).copy()
    assert_eigenvalues(a, eigenvalues(fast, a))
    assert_eigenpairs(a, *eigenpairs(fast, a))
    assert_eigenpairs(tridiagonal(alpha, beta), *tridiagonal_pairs(fast, alpha, beta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LARGE)
def test_large_under_the_checker(checked, n, dtype):
    """Nearly diagonal, so that few sweeps converge."""
    beta = np.zeros((1, n - 1), dtype)
    beta[0, ::10] = 0.01
    alpha = np.linspace(1, 2, n, dtype=dtype)[None]
    a = tridiagonal(alpha, beta)
    assert_eigenpairs(a, *eigenpairs(checked, a))
    assert_eigenpairs(a, *tridiagonal_pairs(checked, alpha, beta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 33, 50])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectra(fast, n, dtype, spectrum):
    a = symmetric(n, batch=2, dtype=dtype, spectrum=spectrum)
    assert_eigenvalues(a, eigenvalues(fast, a))
    assert_eigenpairs(a, *eigenpairs(fast, a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 32, 64])
def test_tridiagonal_matrices_that_fall_apart(fast, n, dtype):
    """Glued copies: every eigenvalue several times, to working precision."""
    alpha = np.tile(np.array([2.0, -1.0, 0.5, 2.0], dtype), n)[None, :n].copy()
    beta = np.tile(np.array([1.0, 0.3, 1e-9, 0.0], dtype), n)[None, : n - 1].copy()
    assert_eigenpairs(tridiagonal(alpha, beta), *tridiagonal_pairs(fast, alpha, beta))


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_lower_triangle_is_read(kernels, n, dtype):
    a = symmetric(n, dtype=dtype)
    poisoned = np.where(np.triu(np.ones((n, n)), 1) > 0, np.nan, a).astype(dtype)
    np.testing.assert_array_equal(eigenvalues(kernels, poisoned), eigenvalues(kernels, a))
    for actual, expected in zip(eigenpairs(kernels, poisoned), eigenpairs(kernels, a), strict=True):
        np.testing.assert_array_equal(actual, expected)


# ---- Extremes


def results(module, a, v0):
    """All that the kernels compute of matrices, as one list of arrays."""
    n = a.shape[-1]
    found = [*power(module, a, v0, 4), *lanczos(module, a, v0, min(n, 9))]
    if n <= module.max_size:
        diagonals = a.diagonal(0, 1, 2).copy(), a.diagonal(1, 1, 2).copy()
        found += [eigenvalues(module, a), *eigenpairs(module, a)]
        found += tridiagonal_pairs(module, *diagonals)
    return found


@pytest.mark.parametrize("n", [3, 33, 130])
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [("float32", 120), ("float32", -100), ("float64", 1000), ("float64", -900)],
)
def test_results_scale_with_the_matrix(fast, n, dtype, exponent):
    """To the last bit: entries are scaled by powers of two."""
    a, v0 = symmetric(n, dtype=dtype), vectors(1, n, dtype)
    factor = np.array(2.0**exponent, dtype)
    small, large = results(fast, a, v0), results(fast, a * factor, v0 * factor)
    is_scaled = [True, False, True, True, True, False, True, True, False, True, False]
    for x, y, scaled in zip(small, large, is_scaled[: len(small)], strict=True):
        np.testing.assert_array_equal(x * factor if scaled else x, y)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [2, 33, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_that_are_not_finite(fast, special, n, dtype):
    """All results of such a matrix are NaN, and those of the others are not touched."""
    a, v0 = symmetric(n, batch=3, dtype=dtype), vectors(3, n, dtype)
    a[1, 1, 0] = a[1, 0, 1] = special
    for actual, expected in zip(
        results(fast, a, v0), results(fast, a[::2].copy(), v0[::2].copy()), strict=True
    ):
        assert np.isnan(actual[1]).all()
        np.testing.assert_array_equal(actual[::2], expected)


@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize("n", [2, 33, 130])
def test_start_vectors_that_are_not_finite(fast, special, n):
    a, v0 = symmetric(n, batch=2), vectors(2, n, "float64")
    v0[1, 1] = special
    for run in (power, lanczos):
        found, expected = run(fast, a, v0, 2), run(fast, a[:1], v0[:1], 2)
        for actual, wanted in zip(found, expected, strict=True):
            assert np.isnan(actual[1]).all()
            np.testing.assert_array_equal(actual[:1], wanted)


@pytest.mark.parametrize(("batch", "n"), [(0, 3), (2, 0), (0, 0), (0, 200)])
def test_empty(fast, batch, n):
    a, v0 = np.ones((batch, n, n)), np.ones((batch, n))
    value, vector, residual = power(fast, a, v0, 3)
    assert value.tolist() == residual.tolist() == [0] * batch
    assert [*lanczos(fast, a, v0, min(n, 2))][2].size == vector.size == 0
    if n <= fast.max_size:
        assert eigenvalues(fast, a).size == eigenpairs(fast, a)[1].size == 0
        assert tridiagonal_pairs(fast, v0, v0[:, : max(n - 1, 0)].copy())[1].size == 0


def test_matrices_too_large_for_all_eigenvalues(fast):
    n = fast.max_size + 1
    a, v0 = np.ones((1, n, n)), np.ones((1, n))
    for run in (eigenvalues, eigenpairs):
        with pytest.raises(ValueError, match="up to n = 128, got n = 129"):
            run(fast, a)
    with pytest.raises(ValueError, match="up to n = 128, got n = 129"):
        tridiagonal_pairs(fast, v0, v0[:, 1:].copy())


def test_large_batch(fast):
    """More matrices than a grid has blocks along its second axis."""
    batch = 70_000
    a, v0 = symmetric(2, dtype="float32", batch=3), vectors(3, 2, "float32")
    tiled = np.resize(a, (batch, 2, 2)), np.resize(v0, (batch, 2))
    found, expected = power(fast, *tiled, 1), power(fast, a, v0, 1)
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(actual, np.resize(wanted, actual.shape))


# ---- The kernels themselves

CASES = {
    "warp": ("float32", 20, "random"),
    "odd": ("float64", 33, "clusters"),
    "streamed": ("float32", 140, "low rank"),
    "breakdown": ("float64", 40, "saddle"),
}


def results_of_case(module, case):
    dtype, n, spectrum = CASES[case]
    a, v0 = symmetric(n, dtype=dtype, spectrum=spectrum), vectors(1, n, dtype)
    return [*results(module, a, v0), *step(module, orthonormal_rows(9, n, dtype), v0[0])]


@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_the_order_of_threads(kernels, case):
    expected = results_of_case(kernels, case)
    for order, seed in itertools.product(("descending", "random", "sticky"), (1, 2)):
        with configured(kernels, order=order, seed=seed, resident=2 * seed):
            for actual, wanted in zip(results_of_case(kernels, case), expected, strict=True):
                np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("n", [20, 70, 130])
def test_a_batch_is_computed_as_its_entries(fast, n):
    a, v0 = symmetric(n, batch=3), vectors(3, n, "float64")
    together = results(fast, a, v0)
    for i in range(3):
        alone = results(fast, a[i : i + 1], v0[i : i + 1])
        for actual, wanted in zip(together, alone, strict=True):
            np.testing.assert_array_equal(actual[i], wanted[0])


@pytest.mark.parametrize(
    "file", ["block.cuh", "krylov.cuh", "eigenvalues.cuh", "jacobi.cuh", "lanczos_step.cuh"]
)
def test_no_barrier_is_redundant(checked, file):
    cases = ("odd", "breakdown")
    references = {case: results_of_case(checked, case) for case in cases}

    def run():
        for case in cases:
            for actual, wanted in zip(
                results_of_case(checked, case), references[case], strict=True
            ):
                np.testing.assert_array_equal(actual, wanted)

    source = emulated.kernel_file("spectral").with_name(file)
    assert redundant_barriers(checked, source, run) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [32, 64, 128])
def test_shared_memory_has_no_bank_conflicts(checked, n, dtype):
    """What is read over and over; results are copied once."""
    a, v0 = symmetric(n, dtype=dtype), vectors(1, n, dtype)
    checked.emulator.take_profile()
    with configured(checked, order="ascending", resident=1, preempt=0, profile=True):
        power(checked, a, v0, 20)
        lanczos(checked, a, v0, 20)
        eigenvalues(checked, a)
        if n < 128:
            eigenpairs(checked, a)
    entries = [
        entry
        for entry in checked.emulator.take_profile()
        if (entry["space"], entry["access"]) == ("shared", "load") and entry["requests"] > 500
    ]
    assert sum(entry["requests"] for entry in entries) > 1000
    assert [e for e in entries if e["transactions"] != e["fewest_possible"]] == []
