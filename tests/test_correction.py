"""Corrected steps against dense algebra that shares no code with them, and what they are good for.

Of f(H) g no method, and no eigendecomposition, knows more than to about eps_machine |H| / eps of
|g| / eps: that is what rounding errors of H itself change in it. Accuracies below are asked for
where this allows them, and where it does not, that the errors stated are honest.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import lsmr
from torch import nn

from hessreg.curvature import DenseOperator, HessianOperator, NonFiniteError
from hessreg.optim import correct, correction_step, diagonal_preconditioner, solve_corrected
from hessreg.optim._krylov_curvature import KrylovCurvature
from tests.test_eigenvalues import orthogonal, with_spectrum

DOUBLE = torch.float64
DTYPES = [torch.float32, DOUBLE]
METHODS = ["lanczos", "minres", "cg"]


def vector(n, dtype=DOUBLE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dtype=DOUBLE, generator=generator).to(dtype)


def by_eigenvalues(H, g, eps, mu, saddle_free=False):
    """f(H) g by its definition, in NumPy."""
    values, vectors = np.linalg.eigh(H.double().numpy())
    values = np.abs(values) if saddle_free else values
    weights = (values + mu * eps**2) / (values**2 + eps**2)
    return torch.from_numpy(vectors @ (weights * (vectors.T @ g.double().numpy())))


def by_least_squares(H, g, eps, mu):
    """The least |H p - g|^2 + eps^2 |p - mu g|^2, as one tall system."""
    H, g = H.double().numpy(), g.double().numpy()
    tall = np.concatenate([H, eps * np.eye(len(g))])
    return torch.from_numpy(np.linalg.lstsq(tall, np.concatenate([g, eps * mu * g]), rcond=None)[0])


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


class Counting:
    """An operator that counts its products."""

    def __init__(self, op):
        self.op, self.count = op, 0
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device

    def matvec(self, v, *, create_graph=False):
        self.count += 1
        return self.op.matvec(v)

    def matmat(self, V):
        self.count += V.shape[1]
        return self.op.matmat(V)


SIGNS = torch.tensor([1.0, -1.0], dtype=DOUBLE).repeat(30)
SPECTRA = {  # condition numbers of 1e12, the largest modulus 1
    "log-spaced": torch.logspace(-12, 0, 60, dtype=DOUBLE) * SIGNS,
    "positive": torch.logspace(-12, 0, 60, dtype=DOUBLE),
    "clustered": torch.tensor([1.0, -1.0, 0.3, 1e-3, -1e-6, 1e-12] * 10, dtype=DOUBLE),
    "kernel": torch.cat([torch.zeros(30, dtype=DOUBLE), torch.logspace(-12, 0, 30, dtype=DOUBLE)]),
    "negative": -torch.logspace(-12, 0, 60, dtype=DOUBLE),
}


# --- against dense algebra


@pytest.mark.parametrize("mu", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_explicit_steps_are_right_at_condition_numbers_of_1e12(device, spectrum, eps, mu):
    H, g = with_spectrum(SPECTRA[spectrum]), vector(60)
    found = solve_corrected(H.to(device), g.to(device), eps, mu=mu).cpu()
    assert relative(found, by_eigenvalues(H, g, eps, mu)) <= 1e-6
    assert relative(found, by_least_squares(H, g, eps, mu)) <= 1e-6
    found = solve_corrected(H.to(device), g.to(device), eps, mu=mu, saddle_free=True).cpu()
    assert relative(found, by_eigenvalues(H, g, eps, mu, saddle_free=True)) <= 1e-6


@pytest.mark.parametrize("mu", [0.0, 1.0])
@pytest.mark.parametrize(
    ("method", "eps"),
    [*itertools.product(["lanczos", "minres"], [1e-4, 1e-2, 1.0]), ("cg", 1e-2), ("cg", 1.0)],
)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_steps_from_products_are_right_at_condition_numbers_of_1e12(spectrum, method, eps, mu):
    H, g = with_spectrum(SPECTRA[spectrum]), vector(60)
    op = Counting(DenseOperator(H))
    found = correction_step(op, g, eps, mu=mu, method=method, num_steps=2000)
    wanted = by_eigenvalues(H, g, eps, mu)
    assert found.converged
    assert found.num_products == op.count
    assert relative(found.step, wanted) <= 1e-6
    assert (found.step - wanted).norm() <= found.error


@pytest.mark.parametrize("eps", [1e-2, 1.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_saddle_free_steps_from_products(spectrum, eps):
    H, g = with_spectrum(SPECTRA[spectrum]), vector(60)
    found = correction_step(DenseOperator(H), g, eps, saddle_free=True)
    wanted = by_eigenvalues(H, g, eps, 1.0, saddle_free=True)
    assert found.converged
    assert relative(found.step, wanted) <= 1e-6
    assert (found.step - wanted).norm() <= found.error
    assert found.step @ g > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_solver_of_least_squares_agrees(method):
    H, g = with_spectrum(SPECTRA["log-spaced"]), vector(60)
    found = correction_step(DenseOperator(H), g, 0.01, mu=0.0, method=method, num_steps=1000)
    wanted = lsmr(H.numpy(), g.numpy(), damp=0.01, atol=1e-14, btol=1e-14, maxiter=10_000)[0]
    assert relative(found.step, torch.from_numpy(wanted)) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20, 200])
@pytest.mark.parametrize("power", [0, 3, 6])
def test_the_bound_holds_whether_it_converged_or_not(power, num_steps, method, dtype):
    H = with_spectrum(SPECTRA["log-spaced"] * 10.0**power).to(dtype)
    g = vector(60, dtype)
    found = correction_step(DenseOperator(H), g, method=method, num_steps=num_steps)
    wanted = by_eigenvalues(H, g, 1.0, 1.0)
    assert (found.step - wanted).norm() <= found.error
    assert found.converged == (found.residual <= (1e-4 if dtype == torch.float32 else 1e-10))


@pytest.mark.parametrize("method", METHODS)
def test_the_residual_is_that_of_the_shifted_system(method):
    H, g, eps, mu = with_spectrum(SPECTRA["kernel"]), vector(60), 0.05, 0.7
    found = correction_step(DenseOperator(H), g, eps, mu=mu, method=method, num_steps=6)
    # The imaginary part of z belongs to the real one: exactly so for "cg" and "lanczos".
    squared = H @ H + eps**2 * torch.eye(60, dtype=DOUBLE)
    slope = H @ g + mu * eps**2 * g - squared @ found.step
    of_normal_equations = (slope.norm() / eps / g.norm() / math.hypot(1, mu * eps)).item()
    if method == "cg":
        assert found.residual == pytest.approx(of_normal_equations, rel=1e-9)
    assert not found.converged
    assert 1e-5 < found.residual < 1e-2


def test_galerkin_and_least_residuals_are_what_they_claim():
    # Lanczos: the residual from pivots against that of a projected dense solve.
    H, g, eps = with_spectrum(SPECTRA["log-spaced"]), vector(60), 0.02
    space = KrylovCurvature.build(DenseOperator(H), g, num_steps=8)
    Q = space.basis.mT
    A = H + 1j * eps * torch.eye(60, dtype=torch.complex128)
    b = (1 + 0.7j * eps) * g
    z = Q.to(A) @ torch.linalg.solve(Q.mT.to(A) @ A @ Q.to(A), Q.mT.to(A) @ b)
    wanted = ((b - A @ z).norm() / b.norm()).item()
    assert space.residual(eps) == pytest.approx(wanted, rel=1e-9)
    torch.testing.assert_close(space.correct(g, eps, mu=0.7), z.real)
    # MINRES: no z of the space has a smaller residual.
    found = correction_step(DenseOperator(H), g, eps, mu=0.7, method="minres", num_steps=8)
    image = (A @ Q.to(A)).numpy()
    least = np.linalg.lstsq(image, b.numpy(), rcond=None)[0]
    smallest = np.linalg.norm(b.numpy() - image @ least) / b.norm().item()
    assert found.residual == pytest.approx(smallest, rel=1e-9)
    assert found.residual <= wanted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_problem_does_not_matter(method, scale):
    H, g = with_spectrum(SPECTRA["log-spaced"]), vector(60)
    plain = correction_step(DenseOperator(H), g, 0.1, method=method, num_steps=500)
    scaled = correction_step(
        DenseOperator(scale * H), g / scale, 0.1 * scale, mu=1 / scale, method=method, num_steps=500
    )
    assert scaled.converged
    assert relative(scaled.step * scale**2, plain.step) <= 1e-9


# --- singular, indefinite, zero and huge


MODULI = [0.0, *(sign * 10.0**p for p in (-12, -6, 0, 6, 12) for sign in (1, -1))]
SWEEP = [
    *([value] * 3 for value in MODULI),
    *(list(mixed) for mixed in itertools.combinations([0, 1e-12, -1e-12, 1, -1, 1e12, -1e12], 3)),
    MODULI,
]


def every_result(H, g, mu, matrix_free=True):
    for saddle_free in (False, True):
        yield correct(H, mu=mu, saddle_free=saddle_free)
        yield solve_corrected(H, g, mu=mu, saddle_free=saddle_free)
    if matrix_free:
        for method in METHODS:
            yield correction_step(DenseOperator(H), g, mu=mu, method=method, num_steps=50).step
        yield correction_step(DenseOperator(H), g, mu=mu, saddle_free=True).step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mu", [0.0, 1.0])
@pytest.mark.parametrize("rotated", [False, True])
def test_no_matrix_makes_infinities(rotated, mu, dtype):
    for values in SWEEP:
        diagonal = torch.tensor(values, dtype=DOUBLE)
        H = (with_spectrum(values, seed=2) if rotated else torch.diag(diagonal)).to(dtype)
        g = vector(len(values), dtype)
        for result in every_result(H, g, mu):
            assert torch.isfinite(result).all(), values
            if result.dim() == 1:
                assert result.norm() <= 2 * g.norm(), values


@pytest.mark.parametrize(
    ("dtype", "scale"), [(DOUBLE, 1e150), (DOUBLE, 1e-150), (torch.float32, 1e30)]
)
def test_huge_and_tiny_matrices(dtype, scale):
    H, g = (scale * with_spectrum([1.0, -0.5, 0.25, 2.0])).to(dtype), vector(4, dtype)
    newton = torch.linalg.solve(H.double() / scale, g.double()) / scale
    for result in every_result(H, g, mu=0.0):
        assert torch.isfinite(result).all()
        if result.dim() == 1 and scale > 1:
            assert result.norm() <= 8 * newton.norm()
    if scale > 1:
        assert relative(solve_corrected(H, g, mu=0.0), newton) <= 1e-6
        assert relative(correct(H), H.double()) <= 1e-6
    found = correction_step(DenseOperator(H), g, mu=0.0)
    assert relative(found.step, solve_corrected(H, g, mu=0.0).double()) <= 1e-4


def test_tiny_and_huge_gradients():
    H = DenseOperator(with_spectrum(SPECTRA["kernel"]))
    for method in METHODS:
        one = correction_step(H, vector(60), method=method).step
        for scale in (1e-250, 1e250):
            other = correction_step(H, scale * vector(60), method=method).step
            assert relative(other / scale, one) <= 1e-8


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_the_kernel_gets_mu_g(mu):
    U = orthogonal(8)
    H = (U * torch.tensor([0.0, 0.0, 0.0, 2.0, -1.0, 3.0, 1.0, 5.0], dtype=DOUBLE)) @ U.mT
    H = (H + H.mT) / 2
    g = U[:, 0] + U[:, 2]
    for result in every_result(H, g, mu):
        if result.dim() == 1:
            torch.testing.assert_close(result, mu * g, atol=1e-12, rtol=0)
    if mu:
        torch.testing.assert_close(correct(H, mu=mu) @ g, g / mu)


def test_zero_gradients_and_zero_matrices():
    H, g = with_spectrum([1.0, -2.0, 0.0]), vector(3)
    for method in METHODS:
        still = correction_step(DenseOperator(H), 0 * g, method=method)
        assert (still.residual, still.error, still.num_products) == (0.0, 0.0, 0)
        assert still.converged
        assert not still.step.any()
        flat = correction_step(DenseOperator(0 * H), g, mu=0.5, method=method)
        assert flat.converged
        torch.testing.assert_close(flat.step, g / 2)
    torch.testing.assert_close(correct(0 * H, mu=0.5), 2 * torch.eye(3, dtype=DOUBLE))
    assert not correct(0 * H, mu=0.0).any()
    assert solve_corrected(torch.zeros(0, 0), torch.zeros(0)).shape == (0,)
    assert correct(torch.zeros(2, 0, 0)).shape == (2, 0, 0)


# --- explicit matrices


def test_a_corrected_matrix_is_the_article_s_formula(device):
    H = torch.stack([with_spectrum([3.0, -0.2, 1.0, 1e-3], seed) for seed in range(5)])
    found = correct(H.to(device)).cpu()
    torch.testing.assert_close(found, H + torch.linalg.inv(H), rtol=1e-9, atol=1e-9)
    values = torch.linalg.eigvalsh(found)
    assert (values.abs() >= 2 - 1e-9).all()
    assert ((values > 0).sum(-1) == 3).all()  # signs stay
    positive = torch.linalg.eigvalsh(correct(H.to(device), saddle_free=True).cpu())
    torch.testing.assert_close(positive, values.abs().sort().values)
    half = correct(H.float().to(device), eps=0.5).cpu()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), H + torch.linalg.inv(H) / 4, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("saddle_free", [False, True])
def test_steps_solve_the_corrected_system(saddle_free):
    H = with_spectrum([2.0, -0.3, 1e-3, -1e-5, 40.0])
    H, g = H.expand(3, 1, 5, 5), vector(10).reshape(2, 5)
    p = solve_corrected(H, g, 0.1, mu=0.0, saddle_free=saddle_free)
    assert p.shape == (3, 2, 5)
    corrected = correct(H, 0.1, saddle_free=saddle_free)
    torch.testing.assert_close((corrected @ p[..., None])[..., 0], g.expand(3, 2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_zero_to_rounding_is_at_most_n_epsilons_of_the_largest(size, dtype):
    unit = size * torch.finfo(dtype).eps
    H = torch.diag(torch.tensor([size, size, size, 3 * unit], dtype=dtype))
    assert correct(H, mu=0.5)[3, 3].item() == pytest.approx(3 * unit + 2, rel=1e-6)
    H[3, 3] = 5 * unit
    assert correct(H, mu=0.5)[3, 3].item() == pytest.approx(5 * unit + 1 / (5 * unit), rel=1e-6)


def test_float32_is_computed_in_float64():
    H, g = with_spectrum(torch.logspace(-3, 3, 40)).float(), vector(40, torch.float32)
    found = solve_corrected(H, g, 0.01)
    assert found.dtype == torch.float32
    assert relative(found, by_eigenvalues(H, g, 0.01, 1.0)) <= 1e-7


# Zeros too, but nothing whose inverse overflows.
positive = st.floats(1e-290, 1e3)
finite = st.just(0.0) | positive | positive.map(lambda value: -value)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(finite, min_size=1, max_size=6),
    st.floats(1e-2, 1e2),
    st.just(0.0) | st.floats(1e-290, 10),
    st.integers(-20, 20),
    st.booleans(),
)
def test_properties_of_explicit_steps(values, eps, mu, exponent, saddle_free):
    H, g, c = with_spectrum(values, seed=3), vector(len(values)), 2.0**exponent
    p = solve_corrected(H, g, eps, mu=mu, saddle_free=saddle_free)
    scaled = solve_corrected(c * H, g, c * eps, mu=mu / c, saddle_free=saddle_free)
    torch.testing.assert_close(c * scaled, p)
    size = g.norm() * (1 / (2 * eps) + mu)
    assert p.norm() <= size * (1 + 1e-9)
    assert (p - by_eigenvalues(H, g, eps, mu, saddle_free)).norm() <= 1e-9 * size
    if saddle_free:
        assert p @ g >= 0
    corrected = correct(H, eps, mu=mu, saddle_free=saddle_free)
    assert torch.equal(corrected, corrected.mT)


# --- derivatives


EIGENVALUES = {
    "distinct": [3.0, -1.0, 0.5, 1.2],
    "repeated": [2.0, 2.0, 2.0, -0.7],
    "nearly repeated": [2.0, 2.0 + 1e-9, 2.0 - 1e-12, -0.7],
    "opposite": [1.5, -1.5, 0.8, -0.8],
}


def symmetric(A):
    return (A + A.mT) / 2


@pytest.mark.parametrize("saddle_free", [False, True])
@pytest.mark.parametrize("values", EIGENVALUES)
def test_first_derivatives_are_exact(device, values, saddle_free):
    H = with_spectrum(EIGENVALUES[values]).to(device).requires_grad_()
    g = vector(4).to(device).requires_grad_()

    def matrix(A):
        return correct(symmetric(A), 0.7, saddle_free=saddle_free)

    def step(A, b):
        return solve_corrected(symmetric(A), b, 0.7, mu=1.3, saddle_free=saddle_free)

    assert torch.autograd.gradcheck(matrix, (H,))
    assert torch.autograd.gradcheck(step, (H, g))


@pytest.mark.parametrize("values", EIGENVALUES)
def test_second_and_third_derivatives_are_exact(values):
    H, g = with_spectrum(EIGENVALUES[values]).requires_grad_(), vector(4).requires_grad_()

    def matrix(A):
        return correct(symmetric(A), 0.7)

    def step(A, b):
        return solve_corrected(symmetric(A), b, 0.7, mu=1.3)

    assert torch.autograd.gradgradcheck(matrix, (H,))
    assert torch.autograd.gradgradcheck(step, (H, g))

    def slope(A):
        out = step(A, g)
        return torch.autograd.grad(out @ out, A, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, (H,))


def test_gradients_of_batches_and_float32():
    H = torch.stack([with_spectrum(v, seed) for seed, v in enumerate(EIGENVALUES.values())])
    H, g = H.requires_grad_(), vector(4).requires_grad_()
    of_batch = torch.autograd.grad(solve_corrected(H, g).square().sum(), (H, g))
    alone = [torch.autograd.grad(solve_corrected(A, g).square().sum(), (A, g)) for A in H.unbind()]
    torch.testing.assert_close(of_batch[0], torch.stack([a for a, _ in alone]))
    torch.testing.assert_close(of_batch[1], sum(b for _, b in alone))
    single = H.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(solve_corrected(single, g.detach().float()).sum(), single)
    (wanted,) = torch.autograd.grad(solve_corrected(H, g).sum(), H)
    assert found.dtype == torch.float32
    assert relative(found, wanted) <= 1e-5


def test_derivatives_are_finite_where_the_matrix_is_singular():
    for values in ([0.0, 0.0, 2.0, 2.0], [0.0] * 4, [1e-30, 0.0, 1.0, -1.0]):
        for saddle_free, function in itertools.product((False, True), (correct, solve_corrected)):
            H = torch.diag(torch.tensor(values, dtype=DOUBLE)).requires_grad_()
            g = () if function is correct else (vector(4),)
            function(H, *g, saddle_free=saddle_free).square().sum().backward()
            assert torch.isfinite(H.grad).all()


@pytest.mark.parametrize("function", [correct, lambda H, **o: solve_corrected(H, vector(3), **o)])
def test_saddle_free_refuses_a_second_derivative(function):
    H = with_spectrum([1.0, -2.0, 0.5]).requires_grad_()
    out = function(H, saddle_free=True).square().sum()
    (first,) = torch.autograd.grad(out, H, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(first.sum(), H)


# --- the space, and what reuses it


def test_a_space_serves_other_gradients():
    H, g, h = with_spectrum(SPECTRA["kernel"]), vector(60), vector(60, seed=5)
    space = KrylovCurvature.build(DenseOperator(H), g, num_steps=20)
    Q = space.basis.mT
    inside = Q @ (Q.mT @ h)
    projected = Q @ (Q.mT @ H @ Q) @ Q.mT  # H as the space knows it: zero outside
    wanted = by_eigenvalues(projected, inside, 0.1, 0.5) + 0.5 * (h - inside)
    torch.testing.assert_close(space.correct(h, 0.1, 0.5), wanted)
    torch.testing.assert_close(space.vectors.mT @ space.vectors, torch.eye(20, dtype=DOUBLE))
    torch.testing.assert_close(space.vectors.mT @ H @ space.vectors, torch.diag(space.values))
    after = space.corrected_values(0.1, 0.5)
    weights = (space.values + 0.5 * 0.1**2) / (space.values**2 + 0.1**2)
    torch.testing.assert_close(after * weights, torch.ones(20, dtype=DOUBLE))
    assert (space.corrected_values(0.1, 0.5, saddle_free=True) > 0).all()
    assert not space.correct(0 * h).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_errors_of_a_gradient_are_no_direction(dtype):
    # Along 1e6 the step is 1e-6 g; mu times what rounding leaves of g would be a tenth of that.
    H = with_spectrum([1e6] * 30 + [2e6] * 30).to(dtype)
    g = vector(60, dtype)
    space = KrylovCurvature.build(DenseOperator(H), g, num_steps=10)
    assert relative(space.correct(g), by_eigenvalues(H, g, 1.0, 1.0)) <= 1e-5


def test_a_space_of_nothing():
    space = KrylovCurvature.build(
        DenseOperator(with_spectrum([1.0, 2.0])), torch.zeros(2).double(), 5
    )
    assert (space.num_products, space.residual()) == (0, 0.0)
    torch.testing.assert_close(space.correct(vector(2), mu=0.3), 0.3 * vector(2))


def test_lanczos_stops_at_the_tolerance_and_where_rounding_begins():
    H, g = with_spectrum(SPECTRA["log-spaced"]), vector(60)
    counts = [
        correction_step(DenseOperator(H), g, 0.1, tol=tol).num_products for tol in (1e-2, 1e-6, 0.0)
    ]
    assert counts[0] < counts[1] < counts[2] == 60
    single = correction_step(DenseOperator(H.float()), g.float(), 0.1, tol=1e-15)
    assert single.num_products <= 20  # of 33 until the space is invariant to rounding
    assert not single.converged


@pytest.mark.parametrize(("scale", "most"), [(1e2, 200), (1e6, 5000)])
@pytest.mark.parametrize("method", ["minres", "cg"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_iterations_end_where_nothing_improves_any_more(method, dtype, scale, most):
    H = (scale * with_spectrum(SPECTRA["log-spaced"])).to(dtype)
    op = Counting(DenseOperator(H))
    found = correction_step(op, vector(60, dtype), method=method, num_steps=10**5, tol=0.0)
    assert op.count < most
    assert not found.converged
    assert found.step.norm() <= 2 * vector(60).norm()


# --- what it is good for


def test_far_fewer_iterations_than_gradient_descent_on_a_quadratic():
    values = torch.logspace(0, 4, 50, dtype=DOUBLE)
    U = orthogonal(50)
    H, start = symmetric((U * values) @ U.mT), vector(50)
    x, descent = U.mT @ start, 0  # in the eigenbasis, where a step is cheap
    rate = 2 / (values[0] + values[-1])
    while x.norm() > 1e-6 * start.norm():
        x, descent = x - rate * values * x, descent + 1
    y, corrected = start, 0
    while y.norm() > 1e-6 * start.norm():
        y, corrected = y - correction_step(DenseOperator(H), H @ y).step, corrected + 1
    assert corrected <= 10  # measured: 8
    assert descent >= 5000 * corrected  # measured: about 60,000


@pytest.mark.parametrize(("mu", "converges"), [(0.5, True), (2.7, True), (2.9, False)])
def test_full_steps_contract_every_convex_quadratic_while_mu_is_small(mu, converges):
    values = torch.logspace(-3, 3, 600, dtype=DOUBLE)  # mu eps < 2 sqrt(2) = 2.83
    gains = solve_corrected(torch.diag(values), torch.ones(600, dtype=DOUBLE), 1.0, mu=mu)
    assert ((1 - values * gains).abs().max() < 1) == converges


def rosenbrock(z):
    return (1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2


def descend_rosenbrock(rate, most):
    x, y = -1.2, 1.0
    for k in range(most):
        if math.hypot(x - 1, y - 1) < 1e-6:
            return k
        if abs(x) > 10:
            return most
        of_x, of_y = -2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)
        x, y = x - rate * of_x, y - rate * of_y
    return most


def iterate(function, z, most, **options):
    """Full corrected steps until the gradient vanishes; how many."""
    for k in range(most):
        w = z.clone().requires_grad_()
        loss = function(w)
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        if g.norm() < 1e-7:
            return z, k
        z = z - correction_step(HessianOperator(loss, [w]), g.detach(), **options).step
    return z, most


@pytest.mark.parametrize("saddle_free", [False, True])
@pytest.mark.parametrize(("eps", "most"), [(0.1, 12), (1.0, 40)])
def test_far_fewer_iterations_than_gradient_descent_on_rosenbrock(eps, most, saddle_free):
    descent = min(descend_rosenbrock(rate, 30_000) for rate in np.linspace(1e-3, 2.2e-3, 13))
    start = torch.tensor([-1.2, 1.0], dtype=DOUBLE)
    z, corrected = iterate(rosenbrock, start, 100, eps=eps, saddle_free=saddle_free)
    assert (z - 1).norm() < 1e-6  # as the descent's
    assert corrected <= most  # measured: 9 at eps = 0.1 and 31 at eps = 1
    assert descent >= 300 * corrected  # measured: about 18,000


def saddle(z):
    return z[0] ** 2 / 2 - z[1] ** 2 / 2 + z[1] ** 4 / 4


@pytest.mark.parametrize("eps", [0.1, 1.0])
@pytest.mark.parametrize("height", [1e-6, 0.3])
def test_saddle_free_leaves_a_strict_saddle_that_newton_is_drawn_to(height, eps):
    start = torch.tensor([1.0, height], dtype=DOUBLE)
    newton = start
    for _ in range(20):
        w = newton.clone().requires_grad_()
        (g,) = torch.autograd.grad(saddle(w), w)
        newton = newton - torch.linalg.solve(torch.func.hessian(saddle)(newton), g)
    assert newton.norm() < 1e-6
    z, steps = iterate(saddle, start, 60, eps=eps, saddle_free=True)
    assert steps < 40
    torch.testing.assert_close(z, torch.tensor([0.0, 1.0], dtype=DOUBLE), atol=1e-5, rtol=0)


# --- warm starts and preconditioning


def badly_scaled(n=120):
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(0, 1.5, n, dtype=DOUBLE)[torch.randperm(n, generator=generator)]
    coupling = symmetric(torch.randn(n, n, dtype=DOUBLE, generator=generator)) / n
    return symmetric(sizes[:, None] * (torch.eye(n, dtype=DOUBLE) + 0.3 * coupling) * sizes)


def test_a_diagonal_preconditioner_spares_products():
    H, g = badly_scaled(), vector(120)
    op = DenseOperator(H)
    options = {"method": "cg", "num_steps": 5000, "tol": 1e-6}
    plain = correction_step(op, g, **options)
    diagonal = diagonal_preconditioner(op, num_products=20)
    helped = correction_step(op, g, **options, preconditioner=diagonal)
    assert plain.converged
    assert helped.converged
    assert helped.num_products <= plain.num_products / 5
    assert relative(helped.step, by_eigenvalues(H, g, 1.0, 1.0)) <= 1e-5


def test_the_last_step_spares_products():
    op, g = DenseOperator(with_spectrum(SPECTRA["log-spaced"])), vector(60)
    options = {"eps": 0.02, "method": "cg", "num_steps": 2000, "tol": 1e-3}
    last = correction_step(op, g, **options).step
    moved = g + 1e-3 * vector(60, seed=7)
    cold = correction_step(op, moved, **options)
    warm = correction_step(op, moved, **options, x0=last)
    assert cold.converged
    assert warm.converged
    assert warm.num_products <= 0.6 * cold.num_products
    wanted = by_eigenvalues(op.H, moved, 0.02, 1.0)
    assert (warm.step - wanted).norm() <= warm.error


def test_the_diagonal_is_unbiased():
    H = with_spectrum(torch.linspace(-3, 2, 30))
    truth = (H @ H).diagonal() + 0.25
    errors = [
        relative(diagonal_preconditioner(DenseOperator(H), 0.5, num_products=k), truth)
        for k in (10, 1000)
    ]
    assert errors[1] <= 0.06
    assert errors[1] <= errors[0] / 4  # the root of 100, with margin
    exact = diagonal_preconditioner(DenseOperator(torch.diag(truth)), 0.5, num_products=1)
    torch.testing.assert_close(exact, truth.square() + 0.25)


# --- networks


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_a_network(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, labels = torch.randn(20, 4, dtype=DOUBLE), torch.arange(20) % 3
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), labels)
    g = torch.cat([v.flatten() for v in torch.autograd.grad(loss, parameters, retain_graph=True)])

    def of_flat(flat):
        parts = flat.split([p.numel() for p in parameters])
        w, b, u, c = (part.view(p.shape) for part, p in zip(parts, parameters, strict=True))
        return F.cross_entropy(F.linear(torch.tanh(F.linear(x, w, b)), u, c), labels)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    H = torch.func.hessian(of_flat)(flat)
    assert torch.linalg.eigvalsh(H)[0] < -1e-3  # indefinite, as losses of networks are
    op = HessianOperator(loss, parameters)
    found = correction_step(op, g, 0.1, method=method, num_steps=500)
    assert found.converged
    assert relative(found.step, by_eigenvalues(symmetric(H), g, 0.1, 1.0)) <= 1e-6
    explicit = solve_corrected(symmetric(H), g, 0.1)
    assert relative(found.step, explicit) <= 1e-6


# --- refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"H": [[1.0]]}, TypeError, "H must be a Tensor, got list"),
        ({"H": torch.eye(3).half()}, TypeError, "H must be float32 or float64, got torch.float16"),
        ({"H": torch.zeros(2, 3)}, ValueError, r"H must be matrices .*got shape \(2, 3\)"),
        ({"H": torch.zeros(3)}, ValueError, r"H must be matrices .*got shape \(3,\)"),
        ({"H": torch.eye(3).cumsum(0)}, ValueError, "H must be symmetric, got max .* = 1"),
        ({"H": torch.eye(3) * math.nan}, ValueError, "H must be finite"),
        ({"H": torch.eye(3) * math.inf}, ValueError, "H must be finite"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
        ({"mu": -1.0}, ValueError, "mu must be finite and not negative, got -1.0"),
        ({"mu": math.nan}, ValueError, "mu must be finite and not negative, got nan"),
        ({"eps": "1"}, TypeError, "eps must be a number, got '1'"),
    ],
)
def test_bad_matrices_are_refused(change, error, message):
    H = change.pop("H", torch.eye(3))
    for saddle_free in (False, True):
        with pytest.raises(error, match=message):
            correct(H, **change, saddle_free=saddle_free)
        with pytest.raises(error, match=message):
            solve_corrected(H, torch.ones(3), **change, saddle_free=saddle_free)


@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        ([1.0], TypeError, "g must be a Tensor, got list"),
        (torch.ones(3).double(), TypeError, "g must have the dtype of H, torch.float32, got"),
        (torch.ones(4), ValueError, r"g must be vectors \[..., 3\] to H, got shape \(4,\)"),
        (torch.ones(5, 3), ValueError, r"batches must broadcast, got \(2,\) of H and \(5,\) of g"),
        (torch.ones(3) * math.inf, ValueError, "g must be finite"),
        (torch.ones(3, device="meta"), ValueError, "g must be on cpu like H, got meta"),
    ],
)
def test_bad_vectors_are_refused(g, error, message):
    with pytest.raises(error, match=message):
        solve_corrected(torch.eye(3).expand(2, 3, 3), g)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"op": torch.eye(3)}, TypeError, r"op must be an operator .*pass DenseOperator\(A\)"),
        ({"g": [1.0]}, TypeError, "g must be a Tensor, got list"),
        ({"g": torch.ones(4)}, ValueError, r"g must have shape \(3,\), got \(4,\)"),
        ({"g": torch.ones(3).double()}, TypeError, "g must have dtype torch.float32, got"),
        ({"g": torch.ones(3, device="meta")}, ValueError, "g must be on cpu, got meta"),
        ({"g": torch.ones(3) * math.nan}, NonFiniteError, "g has NaN or infinity"),
        ({"eps": 0}, ValueError, "eps must be positive, got 0"),
        ({"mu": -1}, ValueError, "mu must be finite and not negative, got -1"),
        ({"tol": -1.0}, ValueError, "tol must be finite and not negative, got -1.0"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": 1.5}, TypeError, "num_steps must be an int, got 1.5"),
        ({"method": "newton"}, ValueError, "method must be one of .*got 'newton'"),
        (
            {"method": "cg", "saddle_free": True},
            ValueError,
            "saddle_free is for method 'lanczos' only, got 'cg'",
        ),
        ({"x0": torch.ones(3)}, ValueError, "x0 is for method 'cg' only, got 'lanczos'"),
        (
            {"preconditioner": torch.ones(3), "method": "minres"},
            ValueError,
            "preconditioner is for method 'cg' only, got 'minres'",
        ),
        (
            {"preconditioner": torch.tensor([1.0, 0.0, 1.0]), "method": "cg"},
            ValueError,
            "preconditioner must be positive, got 0",
        ),
        ({"x0": torch.ones(2), "method": "cg"}, ValueError, r"x0 must have shape \(3,\), got"),
    ],
)
def test_bad_arguments_of_a_step_are_refused(change, error, message):
    arguments = {"op": DenseOperator(torch.eye(3)), "g": torch.ones(3), **change}
    with pytest.raises(error, match=message):
        correction_step(**arguments)


class Spoiled(Counting):
    def __init__(self, op, spoil, after):
        super().__init__(op)
        self.spoil, self.after = spoil, after

    def matvec(self, v, *, create_graph=False):
        product = super().matvec(v)
        return self.spoil(product) if self.count > self.after else product


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite_is_reported(method, value, after):
    op = DenseOperator(with_spectrum(SPECTRA["log-spaced"]))
    spoiled = Spoiled(op, lambda product: product.index_fill(0, torch.tensor([7]), value), after)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        correction_step(spoiled, vector(60), 0.01, method=method)


def test_squares_that_overflow_are_reported():
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        diagonal_preconditioner(DenseOperator(torch.eye(2) * 1e30))


def test_an_operator_that_is_not_symmetric_is_refused():
    class Skew(Counting):
        def matvec(self, v, *, create_graph=False):
            return super().matvec(v) + torch.roll(v, 1)

    op = Skew(DenseOperator(with_spectrum(SPECTRA["log-spaced"])))
    with pytest.raises(ValueError, match="op must be symmetric"):
        correction_step(op, vector(60))


def test_a_loss_that_is_not_finite_is_named():
    w = torch.zeros(3, requires_grad=True)
    loss = w.square().sum().sqrt()  # whose second derivative at 0 is 0 / 0
    with pytest.raises(NonFiniteError):
        correction_step(HessianOperator(loss, [w]), torch.ones(3))
