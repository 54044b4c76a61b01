from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.func import hessian, jacfwd, jacrev

from hessreg import (
    lanczos,
    power_iteration,
    symmetric_eigh,
    symmetric_eigvalsh,
    symmetric_norm,
    tridiagonal_eigh,
)
from hessreg.ops.spectral import (
    _tridiagonal,
    lanczos_reference,
    lanczos_step,
    lanczos_step_reference,
    power_iteration_reference,
    symmetric_eigh_reference,
    symmetric_eigvalsh_reference,
    tridiagonal_eigh_reference,
)
from tests.check_op import check_op

HALF = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)
SIZES = [(1, 1), (3, 2), (17, 3), (5, 8), (33, 17), (2, 40), (3, 65)]
SCALES = [1e-18, 1e-6, 1.0, 1e6, 1e18]


def randn(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)


def symmetric(*shape, dtype=torch.float64, device="cpu"):
    a = randn(*shape, shape[-1])
    return ((a + a.mT) / 2).to(device=device, dtype=dtype)


def with_spectrum(values, dtype=torch.float64, device="cpu"):
    """A symmetric matrix with these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(randn(len(values), len(values)))[0]
    a = (q * values) @ q.mT
    return ((a + a.mT) / 2).to(device=device, dtype=dtype)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def eps(dtype):
    return torch.finfo(dtype).eps


def sym(m):
    return (m + m.mT) / 2


# ---- the operators under everything torch may do ---------------------------------------------

GAPPED = torch.tensor([-0.1, 0.2, -3.0])


def invariant(values, vectors):
    """What does not depend on the signs of the vectors, but on all else."""
    return values, vectors * vectors


def test_symmetric_eigh_passes_every_check(device):
    check_op(
        lambda m: invariant(*symmetric_eigh(sym(m))),
        lambda m: invariant(*symmetric_eigh_reference(sym(m))),
        [randn(2, 3, 3, device=device)],
    )


def test_symmetric_eigvalsh_passes_every_check(device):
    check_op(
        lambda m: symmetric_eigvalsh(sym(m)),
        lambda m: symmetric_eigvalsh_reference(sym(m)),
        [randn(2, 3, 3, device=device)],
    )


def test_tridiagonal_eigh_passes_every_check(device):
    check_op(
        lambda *x: invariant(*tridiagonal_eigh(*x)),
        lambda *x: invariant(*tridiagonal_eigh_reference(*x)),
        [randn(2, 3, device=device), randn(2, 2, device=device)],
    )


def test_power_iteration_passes_every_check(device):
    a = with_spectrum(GAPPED, device=device)
    v0 = randn(1, 3, device=device)

    def op(m):
        return power_iteration(sym(m), 24, v0.expand(len(m), -1))

    def reference(m):
        return power_iteration_reference(sym(m), v0.expand(len(m), -1), 24)[:2]

    check_op(op, reference, [a[None] + 0.02 * randn(1, 3, 3, device=device)])


def test_lanczos_passes_every_check(device):
    check_op(
        lambda m, v0: lanczos(sym(m), 2, v0),
        lambda m, v0: lanczos_reference(sym(m), v0, 2),
        [randn(1, 3, 3, device=device), randn(1, 3, device=device)],
    )


@pytest.mark.parametrize(
    "name",
    ["power_iteration", "lanczos", "tridiagonal_eigh", "symmetric_eigvalsh", "symmetric_eigh"],
)
def test_registration(name):
    a, v = symmetric(2, 3).requires_grad_(), randn(2, 3)
    arguments = {
        "power_iteration": (a, v, 60),
        "lanczos": (a, v, 2),
        "tridiagonal_eigh": (v.clone().requires_grad_(), randn(2, 2)),
        "symmetric_eigvalsh": (a,),
        "symmetric_eigh": (a,),
    }
    operator = getattr(torch.ops.hessreg, name).default
    assert set(torch.library.opcheck(operator, arguments[name]).values()) == {"SUCCESS"}


def test_torch_agrees_with_the_derivatives_of_regular_eigenpairs(device):
    a = symmetric(2, 4, device=device)

    def ours(m):
        return sum(((1 + i) * y).sin().sum() for i, y in enumerate(invariant(*symmetric_eigh(m))))

    def theirs(m):
        pairs = invariant(*torch.linalg.eigh(m))
        return sum(((1 + i) * y).sin().sum() for i, y in enumerate(pairs))

    torch.testing.assert_close(
        hessian(lambda m: ours(sym(m)))(a), hessian(lambda m: theirs(sym(m)))(a)
    )


def test_gradients_are_symmetric(device):
    a = symmetric(2, 5, device=device).requires_grad_()
    results = [
        power_iteration(a, 5)[1],
        lanczos(a, 3)[0],
        symmetric_eigvalsh(a),
        symmetric_eigh(a)[1],
    ]
    for result in results:
        (gradient,) = torch.autograd.grad(result.sin().sum(), a)
        torch.testing.assert_close(gradient, gradient.mT)


# ---- values and theorems -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("batch", "n"), SIZES)
def test_eigenpairs(device, batch, n, dtype):
    a = symmetric(batch, n, dtype=dtype, device=device)
    values, vectors = symmetric_eigh(a)
    bound = 8 * eps(dtype) * math.sqrt(n) * largest(values)
    eye = torch.eye(n, dtype=torch.float64, device=device)
    wide = vectors.double()
    assert largest(a.double() @ wide - wide * values.double()[:, None]) <= bound
    assert largest(wide.mT @ wide - eye) <= 16 * eps(dtype) * math.sqrt(n)
    assert (values.diff() >= 0).all()
    truth = np.linalg.eigvalsh(a.double().cpu().numpy())
    for found in (values, symmetric_eigvalsh(a)):
        assert np.abs(found.double().cpu().numpy() - truth).max() <= bound


@pytest.mark.parametrize("n", [5, 24, 48])
def test_error_is_at_most_twice_that_of_lapack(device, n):
    a = symmetric(40, n, dtype=torch.float32, device=device)
    truth = torch.linalg.eigvalsh(a.double())
    floor = eps(torch.float32) * truth.abs().max()
    for found in (symmetric_eigvalsh(a), symmetric_eigh(a)[0]):
        lapack = largest(torch.linalg.eigvalsh(a) - truth)
        assert largest(found - truth) <= 2 * lapack + floor


def wilkinson(n):
    return (
        torch.diag((torch.arange(n) - n // 2).abs().double())
        + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
        + torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    )


def graded(n, step):
    scale = step ** torch.arange(n, dtype=torch.float64)
    return symmetric(n) * scale * scale[:, None]


HARD = {
    "saddle": lambda: torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
    "zero": lambda: torch.zeros(7, 7, dtype=torch.float64),
    "identity": lambda: torch.eye(9, dtype=torch.float64),
    "wilkinson": lambda: wilkinson(21),
    "graded up": lambda: graded(12, 10.0),
    "graded down": lambda: graded(12, 0.1),
    "ones": lambda: torch.ones(20, 20, dtype=torch.float64),
    "rank two": lambda: with_spectrum([1.0, -2.0] + 14 * [0.0]),
    "repeated": lambda: with_spectrum(6 * [1.0] + 5 * [-1.0]),
    "clusters": lambda: with_spectrum(
        [1 + 1e-7 * i for i in range(8)] + [1e-9 * i for i in range(8)]
    ),
    "diagonal": lambda: torch.diag(torch.linspace(-1, 2, 18, dtype=torch.float64)),
    "arrow": lambda: (
        torch.diag(torch.arange(16).double())
        + torch.nn.functional.pad(torch.ones(1, 15), (1, 0, 0, 15)).double()
        + torch.nn.functional.pad(torch.ones(15, 1), (0, 15, 1, 0)).double()
    ),
    "subnormal couplings": lambda: _tridiagonal(
        torch.ones(1, 6, dtype=torch.float64), torch.full((1, 5), 1e-40, dtype=torch.float64)
    )[0],
}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", HARD)
def test_hard_matrices(device, name, dtype):
    a = HARD[name]().to(device=device, dtype=dtype)
    values, vectors = symmetric_eigh(a)
    size = max(a.double().norm().item(), 1e-300)
    eye = torch.eye(len(a), dtype=torch.float64, device=device)
    truth = torch.linalg.eigvalsh(a.double())
    wide = vectors.double()
    assert largest(symmetric_eigvalsh(a) - truth) <= 8 * eps(dtype) * size
    assert largest(values - truth) <= 8 * eps(dtype) * size
    assert largest(a.double() @ wide - wide * values.double()) <= 16 * eps(dtype) * size
    assert largest(wide.mT @ wide - eye) <= 64 * eps(dtype)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("m", [1, 2, 5, 19, 40])
def test_tridiagonal_eigh_against_scipy(device, m, dtype):
    alpha, beta = (
        randn(3, m, dtype=dtype, device=device),
        randn(3, m - 1, dtype=dtype, device=device),
    )
    values, vectors = tridiagonal_eigh(alpha, beta)
    for d, e, found in zip(alpha, beta, values, strict=True):
        expected = scipy.linalg.eigh_tridiagonal(
            d.double().cpu().numpy(), e.double().cpu().numpy(), eigvals_only=True
        )
        error = np.abs(found.double().cpu().numpy() - expected).max()
        assert error <= 8 * eps(dtype) * math.sqrt(m) * np.abs(expected).max()
    t, wide = _tridiagonal(alpha, beta).double(), vectors.double()
    assert largest(t @ wide - wide * values.double()[:, None]) <= 32 * eps(dtype)
    assert largest(wide.mT @ wide - torch.eye(m, device=device)) <= 32 * eps(dtype)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (9, 4), (20, 20), (40, 25)])
def test_lanczos_is_a_tridiagonalisation(device, n, m, scale, dtype):
    a = scale * symmetric(3, n, dtype=dtype, device=device)
    alpha, beta, q = (x.double() for x in lanczos(a, m, randn(3, n, dtype=dtype, device=device)))
    t = _tridiagonal(alpha, beta[:, :-1]) / scale
    rest = (a.double() / scale) @ q - q @ t
    tolerance = 64 * eps(dtype) * math.sqrt(n)
    assert largest(rest[..., :-1]) <= tolerance
    assert largest(rest[..., -1].norm(dim=-1) - beta[:, -1] / scale) <= tolerance
    assert largest(q.mT @ q - torch.eye(m, device=device)) <= tolerance
    assert (beta >= 0).all()


def test_lanczos_values_interlace_and_end_exact(device):
    a, v0 = symmetric(12, device=device), randn(12, device=device)
    truth = torch.linalg.eigvalsh(a)
    before = None
    for m in range(1, 13):
        alpha, beta, _ = lanczos(a, m, v0)
        ritz = tridiagonal_eigh(alpha, beta[:-1])[0]
        if before is not None:
            assert (ritz[:-1] <= before + 1e-12).all()
            assert (before <= ritz[1:] + 1e-12).all()
        before = ritz
    torch.testing.assert_close(before, truth)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    "values", [6 * [0.0], 6 * [1.0], [2.0, 2, 2, -1, -1, 0], [3.0, 0, 0, 0, 0, 0]]
)
def test_lanczos_goes_on_after_breakdown(device, values, dtype, scale):
    a = scale * with_spectrum(values, dtype, device)
    alpha, beta, q = (x.double() for x in lanczos(a, 6))
    t = _tridiagonal(alpha, beta[:-1])
    tolerance = 128 * eps(dtype)
    assert largest(q.mT @ q - torch.eye(6, device=device)) <= tolerance
    assert largest(a.double() @ q - q @ t) <= tolerance * scale * 3
    assert (beta == 0).sum() == max(values.count(v) for v in values)
    expected = scale * torch.tensor(sorted(values), dtype=torch.float64, device=device)
    assert largest(torch.linalg.eigvalsh(t) - expected) <= tolerance * scale * 3


def test_lanczos_from_an_eigenvector_or_nothing(device):
    a = torch.diag(torch.tensor([3.0, 1.0, 2.0], device=device))
    alpha, beta, q = lanczos(a, 3, torch.tensor([0.0, 1.0, 0.0], device=device))
    assert alpha.tolist() == [1, 3, 2]
    assert beta.tolist() == [0, 0, 0]
    assert q.argmax(0).tolist() == [1, 0, 2]
    assert lanczos(a, 3, torch.zeros(3, device=device))[0].tolist() == [3, 1, 2]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", [1, 2, 4, 20, 33, 70])
def test_power_iteration_finds_a_chosen_spectrum(device, n, scale, dtype):
    spectrum = torch.linspace(-0.5, 0.6, n, dtype=torch.float64)
    spectrum[0] = -2.0
    a = scale * with_spectrum(spectrum, dtype, device)
    value, vector, converged = power_iteration(a, 60, tol=1e-4)
    assert converged.item()
    assert abs(value.item() / scale + 2) <= 16 * eps(dtype)
    assert abs(vector.double().norm().item() - 1) <= 4 * eps(dtype)
    rest = (a.double() @ vector.double() - value.double() * vector.double()) / scale
    assert largest(rest) <= 64 * eps(dtype)


def test_power_iteration_is_the_loop(device):
    a, v0 = symmetric(5, 6, device=device), randn(5, 6, device=device)
    for iterations in (0, 1, 7):
        v = v0 / v0.norm(dim=-1, keepdim=True)
        for _ in range(iterations):
            v = torch.einsum("bij,bj->bi", a, v)
            v = v / v.norm(dim=-1, keepdim=True)
        value, vector = power_iteration(a, iterations, v0)
        torch.testing.assert_close(vector, v)
        torch.testing.assert_close(value, torch.einsum("bi,bij,bj->b", v, a, v))


def test_power_iteration_that_cannot_converge_says_so(device):
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device)
    value, vector, converged = power_iteration(
        a, 9, torch.tensor([1.0, 0.0], device=device), tol=0.1
    )
    assert (value.item(), vector.tolist(), converged.item()) == (0, [0, 1], False)
    zero = torch.zeros(3, 3, device=device)
    value, vector, converged = power_iteration(zero, 3, torch.ones(3, device=device), tol=0.0)
    assert (value.item(), converged.item()) == (0, True)
    assert torch.equal(vector, torch.full_like(vector, vector[0].item()))


def test_gradient_of_an_unconverged_vector_is_finite(device):
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device, dtype=torch.float64)
    a.requires_grad_()
    value, vector = power_iteration(a, 3)
    (gradient,) = torch.autograd.grad(value + vector.sum(), a)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
def test_eigenvalues_scale_with_the_matrix(device, scale):
    a = symmetric(3, 6, dtype=torch.float32, device=device)
    scaled = scale * a
    expected = torch.linalg.eigvalsh(scaled.double())
    for found in (symmetric_eigvalsh(scaled), symmetric_eigh(scaled)[0]):
        assert largest(found - expected) <= 8 * eps(torch.float32) * largest(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [2, 7, 20])
def test_what_is_not_finite_spoils_its_matrix_only(device, bad, n):
    a, v0 = symmetric(20, n, dtype=torch.float32, device=device), randn(20, n).float().to(device)
    spoilt = a.clone()
    spoilt[3, n - 1, 0] = spoilt[3, 0, n - 1] = bad
    others = torch.arange(20, device=device) != 3

    def run(x):
        alpha, beta, q = lanczos(x, 2, v0)
        vectors = [lanczos(x, 2, v0)[2], symmetric_eigh(x)[1]]
        return [
            *power_iteration(x, 5, v0), alpha, beta, q, symmetric_eigvalsh(x), *symmetric_eigh(x),
            *vectors,
        ]  # fmt: skip

    for found, expected in zip(run(spoilt), run(a), strict=True):
        assert torch.equal(found[others], expected[others])
        assert found[3].isnan().all()
    alpha = randn(20, n, device=device)
    alpha[5, 0] = bad
    for found in tridiagonal_eigh(alpha, randn(20, n - 1, device=device)):
        assert found[5].isnan().all()
        assert not found[torch.arange(20) != 5].isnan().any()


def test_only_the_lower_triangle_is_read(device):
    a = symmetric(6, device=device)
    garbage = a + torch.full((6, 6), math.nan, device=device, dtype=a.dtype).triu(1).nan_to_num(9e9)
    assert torch.equal(symmetric_eigvalsh(garbage), symmetric_eigvalsh(a))
    assert torch.equal(symmetric_eigh(garbage)[1], symmetric_eigh(a)[1])


@pytest.mark.parametrize("n", [3, 20, 64, 70])
def test_a_result_depends_on_its_matrix_alone(n):
    a, v0 = symmetric(70, n, dtype=torch.float32), randn(70, n, dtype=torch.float32)

    def run(x, v):
        return [
            *power_iteration(x, 9, v), *lanczos(x, 7, v), symmetric_eigvalsh(x), *symmetric_eigh(x)
        ]  # fmt: skip

    whole = run(a, v0)
    for part in (slice(0, 1), slice(5, 23), slice(69, 70)):
        for found, expected in zip(run(a[part], v0[part]), whole, strict=True):
            assert torch.equal(found, expected[part])
    torch.set_num_threads(3)
    try:
        again = run(a, v0)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, whole, again))


# ---- norms --------------------------------------------------------------------------------------

ORDS = {"spectral": 2, "nuclear": "nuc", "one": 1, "fro": "fro"}
DEGENERATE = {
    "signs and zeros": torch.diag(torch.tensor([1.0, -1.0, 0.0, 0.0])),
    "repeated": torch.diag(torch.tensor([2.0, 2.0, -1.0, -1.0])),
    "zero": torch.zeros(4, 4),
    "saddle": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
}


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("scale", SCALES)
def test_norms_are_those_of_torch(device, ord, scale):
    a = scale * symmetric(3, 2, 5, dtype=torch.float32, device=device)
    expected = torch.linalg.matrix_norm(a.double(), ORDS[ord])
    torch.testing.assert_close(symmetric_norm(a, ord).double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("ord", ORDS)
def test_derivatives_of_norms_at_regular_spectra(device, ord):
    a = with_spectrum([-2.0, -0.4, 0.7, 3.0], device=device)

    def ours(m):
        return symmetric_norm(sym(m), ord)

    def theirs(m):
        return torch.linalg.matrix_norm(sym(m), ORDS[ord])

    torch.testing.assert_close(torch.func.grad(ours)(a), torch.func.grad(theirs)(a))
    torch.testing.assert_close(hessian(ours)(a), hessian(theirs)(a), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_derivatives_of_norms_at_degenerate_spectra_are_finite(device, ord, name):
    a = DEGENERATE[name].double().to(device)

    def norm(m):
        return symmetric_norm(sym(m), ord)

    for derivative in (torch.func.grad(norm), hessian(norm), jacrev(jacrev(norm))):
        assert derivative(a).isfinite().all()
    leaf = a.clone().requires_grad_()
    (first,) = torch.autograd.grad(norm(leaf), leaf, create_graph=True)
    second = torch.autograd.grad(first.sin().sum(), leaf, allow_unused=True, materialize_grads=True)
    assert second[0].isfinite().all()


def test_repeated_eigenvalues_of_one_sign_have_exact_derivatives(device):
    """There the nuclear norm is smooth: the trace of |A|."""
    a = with_spectrum([2.0, 2.0, 2.0, -1.0, -1.0], device=device)

    def norm(m):
        return symmetric_norm(sym(m), "nuclear")

    v = symmetric(5, device=device)
    step = 1e-4
    slope = (norm(a + step * v) - norm(a - step * v)) / (2 * step)
    bend = (norm(a + step * v) + norm(a - step * v) - 2 * norm(a)) / step**2
    found = torch.func.jvp(norm, (a,), (v,))[1]
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-6)
    hvp = torch.func.jvp(torch.func.grad(norm), (a,), (v,))[1]
    torch.testing.assert_close((hvp * v).sum(), bend, rtol=1e-5, atol=1e-5)
    twice = jacfwd(jacfwd(lambda t: norm(a + t * v)))(a.new_zeros(()))
    torch.testing.assert_close(twice, bend, rtol=1e-5, atol=1e-5)


# ---- a step of Lanczos on long vectors -----------------------------------------------------------

STEP_SIZES = [
    (n, count) for n in (1, 3, 127, 5000, 70001) for count in (1, 2, 17, 40) if count <= n
]


def orthonormal_rows(count, n, dtype, device):
    """Two more rows than are orthonormal: one to fill, and one to leave alone."""
    basis = torch.full((count + 2, n), math.nan, dtype=dtype, device=device)
    basis[:count] = torch.linalg.qr(randn(n, count))[0].mT.to(basis)
    return basis


def run_step(basis, w, count, largest=0.0, step=lanczos_step):
    before = torch.full((1,), largest, dtype=torch.float64, device=w.device)
    kept = basis[:count].clone()
    result = step(basis, w, count, before, 4 * eps(w.dtype))
    assert torch.equal(basis[:count], kept)
    assert basis[count + 1 :].isnan().all()
    assert before.item() == largest
    return result


def assert_step(basis, w, count, result):
    """w = sum_i c_i q_i + r q with q a unit vector orthogonal to the rows before."""
    rows, q, rounding = basis[:count].double(), basis[count].double(), eps(w.dtype)
    coefficients, (residual, is_zero, product) = result[:count], result[count:]
    size = w.double().norm().item()
    assert result.dtype == torch.float64
    assert is_zero.item() == 0
    assert abs(product.item() / size - 1) <= 16 * rounding
    assert abs(q.norm().item() - 1) <= 16 * rounding
    assert largest(rows @ q) <= 10 * rounding
    rest = w.double() - rows.mT @ coefficients - residual * q
    assert rest.norm().item() <= 4 * rounding * size


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("n", "count"), [size for size in STEP_SIZES if size[0] > size[1]])
def test_lanczos_step(device, n, count, dtype):
    basis = orthonormal_rows(count, n, dtype, device)
    w = randn(n, dtype=dtype, device=device)
    assert_step(basis, w, count, run_step(basis, w, count))


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_lanczos_step_at_every_scale(device, scale):
    basis = orthonormal_rows(17, 5000, torch.float32, device)
    w = (scale * randn(5000)).to(basis)
    assert_step(basis, w, 17, run_step(basis, w, 17))


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("n", "count"), STEP_SIZES)
def test_lanczos_step_within_the_span(device, n, count, scale, dtype):
    """Nothing is left but rounding errors: the row is zero, and the result says so."""
    basis = orthonormal_rows(count, n, dtype, device)
    expected = randn(count, device=device)
    w = scale * (basis[:count].mT @ expected.to(basis))
    result = run_step(basis, w, count)
    assert not basis[count].any()
    assert result[count] <= 4 * eps(dtype) * w.double().norm()
    assert result[count + 1] == 1
    assert largest(result[:count] / scale - expected) <= 16 * eps(dtype) * expected.norm()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("n", [127, 5000])
def test_lanczos_step_when_most_cancels(device, n, dtype):
    """What the first pass leaves is mostly rounding error along the rows; another removes it."""
    basis = orthonormal_rows(17, n, dtype, device)
    inside, outside = basis[:17].mT @ randn(17).to(basis), randn(n).to(basis)
    left = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    w = inside + left * inside.norm() / outside.norm() * outside
    once = torch.addmv(w, basis[:17].mT, basis[:17] @ w, alpha=-1)
    assert largest(basis[:17] @ once) > 100 * eps(dtype) * once.norm()
    result = run_step(basis, w, 17)
    assert_step(basis, w, 17, result)
    assert 0.5 * left <= result[17] / w.double().norm() <= 2 * left


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [3, 5000])
def test_lanczos_step_of_what_is_not_finite(device, bad, n):
    basis, w = orthonormal_rows(2, n, torch.float32, device), torch.ones(n, device=device)
    w[n - 1] = bad
    result = run_step(basis, w, 2, largest=1.0)
    assert not result[[2, 4]].isfinite().any()


@pytest.mark.parametrize("dtype", WIDE)
def test_lanczos_step_breaks_down_relative_to_the_largest_product(device, dtype):
    basis, w = orthonormal_rows(2, 127, dtype, device), randn(127, dtype=dtype, device=device)
    size = w.double().norm().item()
    small, large = 0.5 * size, size / eps(dtype)
    assert run_step(basis, w, 2, small)[-1].item() == pytest.approx(size, rel=4 * eps(dtype))
    assert basis[2].any()
    result = run_step(basis, w, 2, large)
    assert (result[-2].item(), result[-1].item()) == (1, large)
    assert not basis[2].any()


@pytest.mark.parametrize(("n", "count"), [(3, 2), (127, 40), (5000, 17)])
def test_lanczos_step_is_its_reference(device, n, count):
    basis, w = orthonormal_rows(count, n, torch.float64, device), randn(n, device=device)
    expected = basis.clone()
    found = run_step(basis, w, count, 1.0)
    wanted = run_step(expected, w, count, 1.0, lanczos_step_reference)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(basis, expected, rtol=0, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("dtype", WIDE)
def test_lanczos_step_takes_strided_products_and_repeats_itself(device, dtype):
    basis = orthonormal_rows(17, 5000, dtype, device)
    w, again = randn(5000, 2, dtype=dtype, device=device)[:, 0], basis.clone()
    assert torch.equal(run_step(basis, w, 17), run_step(again, w, 17))
    assert torch.equal(basis[17], again[17])


def test_lanczos_step_does_not_depend_on_the_threads():
    basis, w = orthonormal_rows(9, 300_001, torch.float32, "cpu"), randn(300_001).float()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(torch.cat([run_step(basis, w, 9), basis[9].double()]))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- shapes, dtypes, start vectors ---------------------------------------------------------------


def test_batches_broadcast_and_strides_do_not_matter(device):
    a = symmetric(2, 1, 4, device=device)
    v0 = randn(3, 4, device=device)
    value, vector = power_iteration(a, 4, v0)
    assert value.shape == (2, 3)
    assert vector.shape == (2, 3, 4)
    alpha, beta, q = lanczos(a, 3, v0)
    assert (alpha.shape, beta.shape, q.shape) == ((2, 3, 3), (2, 3, 3), (2, 3, 4, 3))
    single = lanczos(a[1, 0], 3, v0[2])
    for found, expected in zip((alpha, beta, q), single, strict=True):
        torch.testing.assert_close(found[1, 2], expected)
    strided = torch.stack([a, a], -1)[..., 0].mT
    torch.testing.assert_close(symmetric_eigvalsh(strided), symmetric_eigvalsh(a))
    values, vectors = tridiagonal_eigh(randn(2, 1, 3, device=device), randn(4, 2, device=device))
    assert (values.shape, vectors.shape) == ((2, 4, 3), (2, 4, 3, 3))


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 3, 3), (2, 0, 3, 3)])
def test_empty(device, shape):
    a = torch.empty(shape, device=device, requires_grad=True)
    batch, n = shape[:-2], shape[-1]
    value, vector = power_iteration(a, 3)
    assert (value.shape, vector.shape) == (batch, (*batch, n))
    assert not value.any()
    alpha, beta, q = lanczos(a, 2)
    m = min(2, n)
    assert (alpha.shape, beta.shape, q.shape) == ((*batch, m), (*batch, m), (*batch, n, m))
    assert symmetric_eigvalsh(a).shape == (*batch, n)
    values, vectors = symmetric_eigh(a)
    assert (values.shape, vectors.shape) == ((*batch, n), shape)
    for ord in ORDS:
        assert symmetric_norm(a, ord).shape == batch
        assert not symmetric_norm(a, ord).any()
    (values.sum() + vectors.sum()).backward()
    assert a.grad.shape == shape


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(device, dtype):
    a = symmetric(3, 6, dtype=dtype, device=device)
    wide = a.float()
    assert torch.equal(symmetric_eigvalsh(a), symmetric_eigvalsh(wide).to(dtype))
    for narrow, expected in zip(lanczos(a, 3), lanczos(wide, 3, _start_of(a)), strict=True):
        assert narrow.dtype == dtype
        assert torch.equal(narrow, expected.to(dtype))
    for ord in ORDS:
        assert symmetric_norm(a, ord).dtype == dtype


def _start_of(a):
    from hessreg.ops.spectral import _start

    return _start(a, None).float()


def test_large_matrices(device):
    a = symmetric(150, device=device).requires_grad_()
    torch.testing.assert_close(symmetric_eigvalsh(a), torch.linalg.eigvalsh(a))
    (found,) = torch.autograd.grad(symmetric_eigvalsh(a).sin().sum(), a)
    (expected,) = torch.autograd.grad(torch.linalg.eigvalsh(a).sin().sum(), a)
    torch.testing.assert_close(found, expected)
    alpha, beta, q = (x.detach() for x in lanczos(a.detach(), 20))
    rest = a.detach() @ q - q @ _tridiagonal(alpha, beta[:-1])
    assert largest(rest[:, :-1]) <= 1e-13


def test_default_start_is_always_the_same_and_draws_nothing(device):
    a = symmetric(2, 4, device=device)
    state = torch.get_rng_state()
    first, second = lanczos(a, 2), lanczos(a, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first[2][0, :, 0], first[2][1, :, 0])
    drawn = [lanczos(a, 2, generator=torch.Generator().manual_seed(s))[2] for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])


def test_default_start_under_transforms(device):
    a = symmetric(3, 4, device=device)
    expected = power_iteration(a, 5)[0]
    torch.testing.assert_close(torch.vmap(lambda m: power_iteration(m, 5)[0])(a), expected)
    compiled = torch.compile(
        lambda m: power_iteration(m, 5)[0], backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(a), expected)


# ---- wrong input ---------------------------------------------------------------------------------

SQUARE = torch.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: power_iteration([1], 3), TypeError, "A must be a tensor, got <class 'list'>"),
        (lambda: lanczos(SQUARE.int(), 3), TypeError, "A must be a dense tensor of .* torch.int32"),
        (lambda: symmetric_eigvalsh(SQUARE.to_sparse()), TypeError, "A must be a dense tensor"),
        (lambda: symmetric_eigh(torch.ones(3)), ValueError, r"\[..., n, n\], got shape \(3,\)"),
        (lambda: symmetric_norm(torch.ones(2, 3)), ValueError, r"got shape \(2, 3\)"),
        (lambda: symmetric_norm(SQUARE, "nuc"), ValueError, "ord must be one of spectral, .*'nuc'"),
        (lambda: power_iteration(SQUARE, -1), ValueError, "num_iterations must be at least 0"),
        (lambda: power_iteration(SQUARE, 1.0), TypeError, "num_iterations must be a whole number"),
        (lambda: power_iteration(SQUARE, 1, tol="a"), TypeError, "tol must be a number"),
        (lambda: power_iteration(SQUARE, 1, tol=math.nan), ValueError, "tol must not be negative"),
        (lambda: lanczos(SQUARE, 0), ValueError, "num_steps must be at least 1, got 0"),
        (lambda: lanczos(SQUARE, 1, torch.ones(4)), ValueError, r"v0 must be vectors \[..., 3\]"),
        (lambda: lanczos(SQUARE, 1, SQUARE[0].double()), ValueError, "v0 must have the dtype and"),
        (lambda: lanczos(SQUARE.expand(2, 3, 3), 1, torch.ones(5, 3)), ValueError, "broadcast"),
        (
            lambda: tridiagonal_eigh(torch.ones(3), torch.ones(3)),
            ValueError,
            r"\[..., 2\] to alpha",
        ),
        (lambda: tridiagonal_eigh(torch.tensor(1.0), torch.ones(1)), ValueError, "alpha must be"),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


OPS = torch.ops.hessreg
BATCH = torch.ones(2, 3, 3)
ZERO = torch.zeros(1, dtype=torch.float64)


def bad_step(basis=SQUARE, w=SQUARE[0], count=1, largest=ZERO):
    return lambda: OPS.lanczos_step(basis, w, count, largest, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.symmetric_eigh(torch.ones(3, 3)), r"a must be \[batch, n, n\], got 2"),
        (lambda: OPS.symmetric_eigvalsh(torch.ones(2, 3, 4)), "not square"),
        (lambda: OPS.symmetric_eigvalsh(BATCH.half()), "expected float32 or float64"),
        (lambda: OPS.power_iteration(BATCH, torch.ones(2, 4), 1), r"v0 must be \[2, 3\]"),
        (lambda: OPS.lanczos(BATCH, torch.ones(2, 3).double(), 1), "v0 differs from the first"),
        (lambda: OPS.power_iteration(BATCH, torch.ones(2, 3), -1), "must not be negative, got -1"),
        (lambda: OPS.lanczos(BATCH, torch.ones(2, 3), -1), "must not be negative, got -1"),
        (lambda: OPS.tridiagonal_eigh(torch.ones(3), torch.ones(2)), r"\[batch, m\], got 1"),
        (
            lambda: OPS.tridiagonal_eigh(torch.ones(1, 3), torch.ones(1, 3)),
            r"beta must be \[1, 2\]",
        ),
        (bad_step(basis=SQUARE[0]), r"basis must be \[rows, n\] and contiguous"),
        (bad_step(basis=torch.ones(3, 6)[:, ::2]), r"basis must be \[rows, n\] and contiguous"),
        (bad_step(SQUARE.half(), SQUARE[0].half()), "expected float32 or float64"),
        (bad_step(count=0), "count must be a row of the basis after the first, got 0"),
        (bad_step(count=3), "count must be a row of the basis after the first, got 3"),
        (bad_step(w=torch.ones(4)), "w must be like a row of the basis"),
        (bad_step(w=torch.ones(6)[::2]), "w must be like a row of the basis"),
        (bad_step(w=SQUARE[0].double()), "w must be like a row of the basis"),
        (bad_step(largest=torch.zeros(1)), "largest must be one float64 number"),
        (bad_step(largest=torch.zeros(2).double()), "largest must be one float64 number"),
    ],
)
def test_binding_refuses_what_python_should_not_have_passed(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
