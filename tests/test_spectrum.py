"""Trace, spectral density and functions of an operator against dense algebra."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.linalg import expm
from torch import nn

from hessreg.curvature import (
    DenseOperator,
    Estimate,
    HessianOperator,
    NonFiniteError,
    lanczos,
    matrix_function,
    spectral_density,
    trace,
)
from hessreg.curvature._statistics import half_width, student_t_99
from tests.test_eigenvalues import DTYPES, SCALES, Counting, with_spectrum

DOUBLE = torch.float64

# As those of networks: a bulk about zero, a few outliers, negative ones as well.
SPECTRUM = torch.cat(
    [torch.tensor([9.0, 4.0, -3.0, 2.0]), torch.linspace(-1, 1, 96).double() ** 3]
).double()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def operator(dtype=DOUBLE, scale=1.0):
    return DenseOperator((scale * with_spectrum(SPECTRUM)).to(dtype))


# --- Student's t


def test_student_t_equals_scipy():
    freedoms = [*range(1, 40), 99, 200, 201, 1000, 10**6]
    truth = scipy.stats.t.ppf(0.995, freedoms)
    np.testing.assert_allclose([student_t_99(f) for f in freedoms], truth, rtol=1e-6)


def test_half_width_is_that_of_the_textbook():
    samples = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0], dtype=DOUBLE)
    interval = scipy.stats.t.interval(
        0.99, 4, loc=samples.mean().item(), scale=scipy.stats.sem(samples.numpy())
    )
    assert half_width(samples).item() == pytest.approx((interval[1] - interval[0]) / 2)
    assert half_width(samples[:1]) == math.inf


def test_estimate_is_a_number_with_an_error():
    estimate = Estimate(2.5, 0.25)
    assert float(estimate) == 2.5
    assert str(estimate) == "2.5 ± 0.25"
    with pytest.raises(AttributeError):
        estimate.value = 3.0


# --- trace


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_trace_lies_within_its_error(method):
    op = operator()
    truth = SPECTRUM.sum().item()
    found = [
        trace(op, method=method, num_products=30, generator=seeded(seed)) for seed in range(100)
    ]
    assert sum(abs(float(e) - truth) <= e.error for e in found) >= 95
    spread = np.std([float(e) for e in found])
    assert 1.0 < np.mean([e.error for e in found]) / spread < 6.0  # and the error is no excuse
    assert abs(np.mean([float(e) for e in found]) - truth) < 4 * spread / 10  # unbiased


def test_hutch_plus_plus_is_better_where_few_eigenvalues_dominate():
    op = DenseOperator(with_spectrum([100.0, 50.0, -30.0, 20.0] + [0.01, -0.01] * 60))
    errors = {m: trace(op, method=m, num_products=30).error for m in ("hutch++", "hutchinson")}
    assert errors["hutch++"] < 0.01 * errors["hutchinson"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trace_is_exact_from_n_products_on(dtype, scale):
    op = operator(dtype, scale)
    counting = Counting(op)
    counting.matmat = lambda V: torch.stack([counting.matvec(v) for v in V.unbind(1)], 1)
    found = trace(counting, num_products=100)
    assert counting.count == 100
    assert abs(float(found) - op.H.double().trace().item()) <= found.error
    assert found.error < 1e-4 * scale


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trace_of_low_rank_is_exact_to_rounding(dtype, scale):
    truth = scale * (81.1 + 70.0 + 55.9 + 38.5)
    H = (scale * with_spectrum([81.1, 70.0, 55.9, 38.5] + [0.0] * 116)).to(dtype)
    found = trace(DenseOperator(H), num_products=24)
    assert abs(float(found) - truth) <= found.error < 1e-3 * truth
    assert float(trace(DenseOperator(0 * H), num_products=24)) == 0


def test_trace_spends_what_it_was_given():
    counting = Counting(operator())
    counting.matmat = lambda V: torch.stack([counting.matvec(v) for v in V.unbind(1)], 1)
    for method, products in (("hutch++", 50), ("hutchinson", 50)):
        counting.count = 0
        trace(counting, method=method, num_products=products)
        assert products - 3 < counting.count <= products


# --- spectral density


def blurred(x, bandwidth):
    distance = x[:, None] - SPECTRUM
    return torch.exp(-0.5 * (distance / bandwidth) ** 2).mean(1) / (
        bandwidth * math.sqrt(2 * math.pi)
    )


def blurred_fraction(x, bandwidth):
    return torch.special.ndtr((x[:, None] - SPECTRUM) / bandwidth).mean(1)


@pytest.mark.parametrize("num_probes", [1, 6])
def test_density_and_cumulative_lie_within_their_errors(num_probes):
    """At each point by itself, outliers, gaps and the ends of the spectrum included."""
    op = operator()
    grid = torch.cat([torch.linspace(-4, 10, 57).double(), SPECTRUM[:4]])
    density_hits, fraction_hits, density_widths = 0, 0, []
    for seed in range(100):
        found = spectral_density(
            op, num_steps=30, num_probes=num_probes, grid=grid, generator=seeded(seed)
        )
        off = (found.density - blurred(grid, found.bandwidth)).abs()
        density_hits = density_hits + (off <= found.error).int()
        fraction, error = found.cumulative(grid)
        off = (fraction - blurred_fraction(grid, found.bandwidth)).abs()
        fraction_hits = fraction_hits + (off <= error).int()
        density_widths.append(found.error)
    assert density_hits.min() >= 95
    assert fraction_hits.min() >= 95
    # The error is no excuse: in the bulk it falls as the root of the probes.
    bulk = torch.stack(density_widths).mean(0)[(grid.abs() < 0.5)]
    assert (bulk < 1.2 * num_probes**-0.5 + 0.2).all()


def test_too_small_a_bandwidth_shows_in_the_error():
    op = operator()
    grid = torch.linspace(-1, 1, 101).double()
    found = spectral_density(op, num_steps=10, num_probes=20, bandwidth=0.02, grid=grid)
    off = (found.density - blurred(grid, 0.02)).abs()
    assert (off <= found.error).float().mean() > 0.9
    resolved = spectral_density(op, num_steps=60, num_probes=20, bandwidth=0.02, grid=grid)
    assert resolved.error.mean() < 0.5 * found.error.mean()


def test_density_integrates_to_one_and_to_the_cumulative():
    found = spectral_density(operator(), num_steps=40, num_probes=3)
    step = found.grid[1] - found.grid[0]
    assert (found.density.sum() * step).item() == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(found.rule.weights.sum(1), torch.ones(3, dtype=DOUBLE))
    half = len(found.grid) // 2
    fraction, _ = found.cumulative(found.grid[half])
    assert fraction.shape == ()
    partial = (found.density[:half].sum() + found.density[half] / 2) * step
    assert partial.item() == pytest.approx(fraction.item(), abs=2e-3)
    assert found.cumulative(found.grid.reshape(10, -1))[1].shape == (10, 100)
    assert found.cumulative(1e9)[0].item() == pytest.approx(1.0)


def test_gauss_rule_is_exact_for_polynomials():
    """Of degree below twice the number of steps: its theorem."""
    op = operator()
    found = spectral_density(op, num_steps=6, num_probes=1, generator=seeded(3))
    u = torch.randn(100, dtype=DOUBLE, generator=seeded(3))
    u /= u.norm()
    power = u
    for degree in range(12):
        moment = (found.rule.weights * found.rule.nodes**degree).sum()
        assert moment.item() == pytest.approx((u @ power).item(), rel=1e-10, abs=1e-12)
        power = op.H @ power


@pytest.mark.parametrize("scale", SCALES)
def test_density_scales_with_the_operator(scale):
    a, b = (spectral_density(operator(scale=s), num_steps=20, num_probes=2) for s in (1.0, scale))
    torch.testing.assert_close(b.grid, a.grid * scale)
    torch.testing.assert_close(b.density * scale, a.density)
    torch.testing.assert_close(b.error * scale, a.error)


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_density_of_a_multiple_of_the_identity(value):
    found = spectral_density(DenseOperator(value * torch.eye(50)), num_steps=20, num_probes=2)
    assert found.grid[found.density.argmax()].item() == pytest.approx(value, abs=found.bandwidth)
    assert found.density.isfinite().all()
    assert found.rule.nodes.shape == (2, 1)


def test_picture_of_a_density(tmp_path):
    from PIL import Image

    found = spectral_density(operator(), num_steps=30, num_probes=2)
    for value in (found, spectral_density(DenseOperator(torch.zeros(5, 5)))):
        value.plot(tmp_path / "density.png", title="A density")
        with Image.open(tmp_path / "density.png") as image:
            assert image.format == "PNG"
            assert image.size == (988, 572)
            colours = image.convert("RGB").getcolors(1 << 24)
        assert any(rgb == (31, 119, 180) and count > 500 for count, rgb in colours)
    assert [p.name for p in tmp_path.iterdir()] == ["density.png"]


# --- functions of an operator


FUNCTIONS = {
    "exp": torch.exp,
    "square": torch.square,
    "sign": torch.sign,
    "shifted_inverse": lambda x: 1 / (x - 12.0),
    "damped_inverse": lambda x: x / (x**2 + 0.01),
}


@pytest.mark.parametrize("num_steps", [10, 25, 60, 90, 200])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_matrix_function_lies_within_its_error(name, num_steps):
    op, f = operator(), FUNCTIONS[name]
    values, U = torch.linalg.eigh(op.H)
    for seed in range(5):
        v = torch.randn(100, dtype=DOUBLE, generator=seeded(seed))
        found = matrix_function(op, f, v, num_steps=num_steps, tol=0.0)
        truth = U @ (f(values) * (U.mT @ v))
        off = (found.value - truth).norm().item()
        assert off <= 1.5 * found.error + 1e-10 * truth.norm().item()
        assert found.num_products == min(num_steps, 100)


def test_matrix_function_agrees_with_scipy():
    op, v = operator(), torch.randn(100, dtype=DOUBLE)
    found = matrix_function(op, torch.exp, v)
    np.testing.assert_allclose(found.value, expm(op.H.numpy()) @ v.numpy(), rtol=1e-9, atol=1e-9)
    assert found.num_products < 50


def test_matrix_function_stops_at_the_tolerance():
    op, v = operator(), torch.randn(100, dtype=DOUBLE)
    truth = matrix_function(op, torch.exp, v, num_steps=100, tol=0.0).value
    spent = []
    for tol in (1e-1, 1e-4, 1e-8):
        found = matrix_function(op, torch.exp, v, tol=tol)
        assert (found.value - truth).norm() <= found.error <= tol * truth.norm() * 1.01
        spent.append(found.num_products)
    assert spent[0] < spent[1] < spent[2]


def test_matrix_function_is_exact_for_polynomials():
    op, v = operator(), torch.randn(100, dtype=DOUBLE)
    found = matrix_function(op, lambda x: x**3 - 2 * x, v, num_steps=4).value
    torch.testing.assert_close(found, op.H @ (op.H @ (op.H @ v)) - 2 * op.H @ v)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_on_an_invariant_subspace(dtype, scale):
    H = (scale * with_spectrum([3.0, 3.0, -2.0, 1.0, 1.0])).to(dtype)
    v = torch.randn(5, dtype=dtype)
    found = matrix_function(DenseOperator(H), torch.reciprocal, v)
    truth = torch.linalg.solve(H.double(), v.double())
    torch.testing.assert_close(
        found.value.double(), truth, rtol=0,
        atol=50 * torch.finfo(dtype).eps * truth.norm().item(),
    )  # fmt: skip
    assert found.error < 1e-4 * truth.norm()


def test_square_root_twice_is_the_operator():
    op = DenseOperator(with_spectrum(torch.linspace(0.5, 3, 60)))
    v = torch.randn(60, dtype=DOUBLE)
    root = matrix_function(op, torch.sqrt, matrix_function(op, torch.sqrt, v).value).value
    torch.testing.assert_close(root, op.H @ v, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_first_steps_have_no_error_estimate(num_steps):
    v = torch.ones(100, dtype=DOUBLE)
    assert matrix_function(operator(), torch.exp, v, num_steps=num_steps).error == math.inf


# --- what they refuse, what they leave alone


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda op: trace(op, method="xtrace"), ValueError, "method must be one of .*, got 'xtr"),
        (lambda op: trace(op, num_products=5), ValueError, "num_products must be at least 6, got"),
        (lambda op: trace(op, num_products=9.5), TypeError, "num_products must be an int"),
        (lambda op: spectral_density(op, num_steps=1), ValueError, "num_steps must be at least 2"),
        (lambda op: spectral_density(op, num_probes=0), ValueError, "num_probes must be at least"),
        (lambda op: spectral_density(op, bandwidth=0.0), ValueError, "bandwidth must be finite"),
        (lambda op: spectral_density(op, grid=torch.ones(2, 2)), ValueError,
         r"grid must be a finite vector, got shape \(2, 2\)"),
        (lambda op: matrix_function(op, torch.exp, torch.ones(4).double()), ValueError,
         r"v0 must have shape \(100,\), got \(4,\)"),
        (lambda op: matrix_function(op, torch.exp, torch.ones(100), num_steps=0), ValueError,
         "num_steps must be at least 1"),
        (lambda op: matrix_function(op, torch.sum, torch.ones(100)), ValueError,
         r"f must return shape \(5,\), got \(\)"),
        (lambda op: matrix_function(op, torch.log, torch.ones(100)), NonFiniteError,
         "f must be finite on the spectrum, it is not at -"),
    ],
)  # fmt: skip
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(operator())


@pytest.mark.parametrize(
    "call",
    [
        lambda op: trace(op, num_products=12),
        lambda op: spectral_density(op, num_steps=3, num_probes=1),
        lambda op: matrix_function(op, torch.exp, torch.ones(100)),
    ],
)
def test_products_that_are_not_finite_are_reported(call):
    op = operator(torch.float32)
    op.H = op.H * math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        call(op)


def test_are_reproducible_and_leave_everything_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.ones(6, 3).cumsum(0)
    state = torch.get_rng_state()
    op = HessianOperator(lambda: model(x).square().mean(), model.parameters())
    assert trace(op, num_products=12) == trace(op, num_products=12)
    found = [spectral_density(op, num_steps=5, num_probes=2).density for _ in range(2)]
    assert torch.equal(*found)
    matrix_function(op, torch.exp, torch.ones(op.shape[0]))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_quadrature_of_the_full_space_is_the_spectrum():
    alpha, beta, _ = lanczos(operator(), 100)
    found = spectral_density(operator(), num_steps=100, num_probes=1)
    assert len(alpha) == found.rule.nodes.shape[1] == 100
    torch.testing.assert_close(found.rule.nodes[0], SPECTRUM.sort().values, rtol=0, atol=1e-8)
    assert all(torch.equal(found.rule.nodes, rule.nodes) for rule in found.coarse_rules)
    assert beta[-1] < 1e-10
