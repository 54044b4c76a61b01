"""Norms with their errors and gradients against dense algebra, at kinks of the norms as well."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

from hessreg.curvature import (
    ConvergenceWarning,
    DenseOperator,
    HessianOperator,
    eigenvalues,
    estimate_norm,
    exact_norm,
    frobenius_norm,
    lanczos,
    norm,
    nuclear_norm,
    one_norm,
    spectral_norm,
    trace,
)
from tests.test_eigenvalues import DTYPES, SCALES, Counting, with_spectrum

DOUBLE = torch.float64
ORDERS = ["spectral", "nuclear", "one", "fro"]
NUMPY_ORD = {"spectral": 2, "nuclear": "nuc", "one": 1, "fro": "fro"}

SPECTRA = {
    "generic": torch.linspace(-1, 2, 20) ** 3,
    "saddle": [1.0, -1.0],
    "pairs": [3.0, -3.0, 2.0, -2.0, 0.0],
    "low_rank": [5.0, -2.0, 0.0, 0.0, 0.0, 0.0],
    "multiple": [3.0, 3.0, 3.0, -1.0, -1.0],
    "negative": [-4.0, -1.0, -0.5],
    "near_singular": [2.0, 1e-5, -1e-5, 1e-6],
    "zero": [0.0, 0.0, 0.0],
    "single": [-2.0],
}


def dense(H, ord):
    return float(np.linalg.norm(H.detach().numpy(), NUMPY_ORD[ord]))


# --- values


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_defaults_are_exact_for_a_small_operator(name, dtype, ord):
    for scale in SCALES:
        H = (scale * with_spectrum(SPECTRA[name])).to(dtype)
        found, truth = estimate_norm(DenseOperator(H), ord), dense(H.double(), ord)
        assert found.converged
        assert abs(found.value.item() - truth) <= found.error.item() + 1e-14 * truth
        assert found.error.item() <= 1e-4 * truth


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_norm_of_a_large_operator_converges(dtype):
    spectrum = torch.cat([torch.linspace(-1, 1, 600), torch.tensor([1.5, -1.51])])
    found = estimate_norm(DenseOperator(with_spectrum(spectrum).to(dtype)))
    assert found.converged
    assert found.value.item() == pytest.approx(1.51, rel=1e-6)
    assert found.error < 1e-5


@pytest.mark.parametrize("ord", ["nuclear", "fro"])
@pytest.mark.parametrize("bulk", [1.0, 0.01])
def test_defaults_hold_their_error_for_a_large_operator(ord, bulk):
    spectrum = torch.cat([torch.tensor([9.0, 4.0, -3.0]), bulk * torch.linspace(-1, 1, 297) ** 3])
    op = DenseOperator(torch.diag(spectrum.double()))
    truth, hits, errors = dense(op.H, ord), 0, []
    for seed in range(20):
        with torch.no_grad():
            found = estimate_norm(op, ord, generator=torch.Generator().manual_seed(seed))
        assert found.converged
        hits += abs(found.value.item() - truth) <= found.error.item()
        errors.append(found.error.item() / truth)
    assert hits >= 19
    assert np.median(errors) < 0.15


@pytest.mark.parametrize("deflated", [0, 3])
def test_nuclear_norm_lies_within_its_error(deflated):
    spectrum = torch.cat([torch.tensor([9.0, 4.0, -3.0]), torch.linspace(-1, 1, 97) ** 3])
    op = DenseOperator(with_spectrum(spectrum))
    truth, hits, values, errors = dense(op.H, "nuclear"), 0, [], []
    for seed in range(100):
        found = nuclear_norm(
            op, num_steps=25, num_probes=8, num_deflated=deflated,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        hits += abs(found.value.item() - truth) <= found.error.item()
        values.append(found.value.item())
        errors.append(found.error.item())
    assert hits >= 95
    assert np.mean(errors) < 8 * np.std(values) + 0.05 * truth  # the error is no excuse


def test_frobenius_norm_lies_within_its_error():
    op = DenseOperator(with_spectrum(torch.cat([torch.tensor([4.0]), torch.linspace(-1, 2, 99)])))
    truth = dense(op.H, "fro")
    found = [
        frobenius_norm(op, num_probes=20, generator=torch.Generator().manual_seed(seed))
        for seed in range(100)
    ]
    assert sum(abs(f.value.item() - truth) <= f.error.item() for f in found) >= 95
    spread = np.std([f.value.item() for f in found])
    assert np.mean([f.error.item() for f in found]) < 4 * spread


def test_too_few_steps_and_smoothing_show_in_the_error_of_the_nuclear_norm():
    op = DenseOperator(with_spectrum(torch.linspace(-1, 1, 200)))
    truth = dense(op.H, "nuclear")
    for arguments in ({"num_steps": 4}, {"num_steps": 30, "smoothing": 0.5}):
        found = nuclear_norm(op, num_probes=40, **arguments)
        assert abs(found.value.item() - truth) <= found.error.item()


@pytest.mark.parametrize(
    ("estimate", "converged", "finite"),
    [
        (lambda op: spectral_norm(op, num_steps=2), False, True),
        (lambda op: spectral_norm(op, num_steps=100), True, True),
        (lambda op: nuclear_norm(op, num_probes=1), False, False),
        (lambda op: nuclear_norm(op, num_probes=2), True, True),
        (lambda op: frobenius_norm(op), False, False),
        (lambda op: frobenius_norm(op, num_probes=2), True, True),
        (lambda op: one_norm(op), False, False),
        (lambda op: estimate_norm(op, "one"), True, True),
    ],
)
def test_says_what_is_not_known(estimate, converged, finite):
    found = estimate(DenseOperator(with_spectrum(torch.linspace(-1, 2, 100) ** 3)))
    assert found.converged is converged
    assert math.isfinite(found.error.item()) is finite
    assert not found.error.requires_grad


def test_warns_of_what_is_not_known():
    large = DenseOperator(with_spectrum(torch.linspace(-1, 2, 300)))
    with pytest.warns(ConvergenceWarning, match="the one norm is a lower bound"):
        value = norm(large, "one")
    assert value.item() <= dense(large.H, "one")
    clustered = torch.cos(torch.linspace(0, math.pi, 4000, dtype=DOUBLE))

    class Diagonal(Counting):
        shape, dtype, device = (4000, 4000), DOUBLE, torch.device("cpu")

        def __init__(self):
            pass

        def matvec(self, v, *, create_graph=False):
            return clustered * v

    with pytest.warns(ConvergenceWarning, match="the spectral norm is not converged"):
        norm(Diagonal())


def test_budgets_are_kept():
    op = Counting(DenseOperator(with_spectrum(torch.linspace(-1, 2, 50) ** 3)))
    for call, products in (
        (lambda: spectral_norm(op, num_steps=7), 8),
        (lambda: nuclear_norm(op, num_steps=7, num_probes=3), 24),
        (lambda: nuclear_norm(op, num_steps=7, num_deflated=2), 7 + 2 + 8),
        (lambda: one_norm(op, num_steps=8), 9),
        (lambda: frobenius_norm(op, num_probes=5), 5),
    ):
        op.count = 0
        call()
        assert op.count == products


# --- gradients


def problem(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 1)).double()
    x, y = torch.randn(12, 3, dtype=DOUBLE), torch.randn(12, 1, dtype=DOUBLE).sign()
    return model, lambda p: F.softplus(-functional_call(model, p, (x,)) * y).mean()


def dense_hessian(model, loss):
    """By torch.func, as a matrix over the flat parameters."""
    params = {k: p.detach() for k, p in model.named_parameters()}
    blocks = hessian(loss)(params)
    rows = [
        torch.cat([blocks[i][j].reshape(params[i].numel(), -1) for j in params], 1) for i in params
    ]
    return torch.cat(rows)


ACTIVATIONS = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "silu": nn.SiLU()}


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradient_equal_torch_func_and_finite_differences(activation, ord):
    model, loss = problem(ACTIVATIONS[activation])
    params = list(model.parameters())
    value = norm(HessianOperator(loss(dict(model.named_parameters())), params), ord)
    assert value.item() == pytest.approx(dense(dense_hessian(model, loss), ord), rel=1e-9)
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(value, params))
    origin = nn.utils.parameters_to_vector(params).detach()
    direction = torch.randn_like(origin)
    slopes = []
    for step in (1e-5, -1e-5):
        nn.utils.vector_to_parameters(origin + step * direction, params)
        slopes.append(dense(dense_hessian(model, loss), ord))
    slope = (slopes[0] - slopes[1]) / 2e-5
    assert (gradient @ direction).item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("name", SPECTRA)
def test_gradient_is_a_subgradient(name, ord):
    """A norm lies above the plane that a subgradient spans, wherever it has a kink or not."""
    H = with_spectrum(SPECTRA[name])
    leaf = H.clone().requires_grad_()
    value = norm(DenseOperator(leaf), ord)
    (G,) = torch.autograd.grad(value, leaf)
    assert G.isfinite().all()
    for seed in range(20):
        E = torch.randn(H.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        E = (E + E.mT) * (10.0 ** -(seed % 4))
        assert dense(H + E, ord) >= value.item() + (G * E).sum().item() - 1e-9


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("name", SPECTRA)
def test_derivatives_stay_finite(name, ord):
    """Of the norm of a matrix that depends on its parameters to second order."""
    H = with_spectrum(SPECTRA[name])
    t = torch.zeros(len(H), dtype=DOUBLE, requires_grad=True)
    M = H * (1 + t.sum()) + torch.diag(t**3 + t**2)
    value = norm(DenseOperator(M), ord)
    (first,) = torch.autograd.grad(value, t, create_graph=True)
    assert first.isfinite().all()
    (second,) = torch.autograd.grad(first.square().sum() + first.sum(), t, materialize_grads=True)
    assert second.isfinite().all()


@pytest.mark.parametrize("ord", ORDERS)
def test_derivatives_at_a_kink_of_a_network_stay_finite(ord):
    """Zero weights: symmetric units, a singular Hessian with repeated eigenvalues."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    x = torch.randn(8, 2, dtype=DOUBLE)
    params = list(model.parameters())
    value = norm(HessianOperator(lambda: F.softplus(model(x)).mean(), params), ord)
    first = torch.autograd.grad(value, params, create_graph=True)
    assert all(g.isfinite().all() for g in first)
    total = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(total, params, materialize_grads=True)
    assert all(g.isfinite().all() for g in second)


@pytest.mark.parametrize("ord", ["nuclear", "fro"])
def test_a_large_operator_is_differentiable(ord):
    """The mean gradient is within the noise of its probes of the exact one."""
    spectrum = torch.cat([torch.tensor([9.0, 4.0, -3.0]), 0.01 * torch.linspace(-1, 1, 297)])
    H = with_spectrum(spectrum).requires_grad_()
    (G,) = torch.autograd.grad(norm(DenseOperator(H), ord), H)
    values, U = torch.linalg.eigh(H.detach())
    slope = (U.mT @ G @ U).diagonal()[values.abs() > 1]
    kept = values[values.abs() > 1]
    truth = kept.sign() if ord == "nuclear" else kept / dense(H, "fro")
    torch.testing.assert_close(slope, truth, rtol=0, atol=0.01)


# --- surroundings


@pytest.mark.parametrize("ord", ["spectral", "nuclear", "one", "fro"])
def test_a_loss_without_curvature_has_a_norm_with_a_gradient_of_zero(ord):
    x = torch.ones(3, requires_grad=True)
    value = norm(HessianOperator((2 * x).sum(), x), ord)
    assert value == 0
    assert torch.autograd.grad(value, x)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("ord", ["spectral", "nuclear", "one", "fro"])
@pytest.mark.parametrize("activation", [torch.nn.Tanh(), torch.nn.Mish()])
def test_autocast_is_for_the_loss_only(ord, activation):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), activation, torch.nn.Linear(4, 1))
    x, w = torch.randn(8, 3), torch.randn(21)
    op = HessianOperator(net(x).tanh().sum(), net.parameters())
    expected = [norm(op, ord), norm(op, ord, num_steps=10), op.bilinear(w, w), op.matvec(w).sum()]
    with torch.autocast("cpu", torch.bfloat16):
        found = [norm(op, ord), norm(op, ord, num_steps=10), op.bilinear(w, w), op.matvec(w).sum()]
    assert found == expected


@pytest.mark.parametrize("function", [norm, estimate_norm, eigenvalues, lanczos, trace])
def test_a_matrix_is_no_operator(function):
    with pytest.raises(TypeError, match=r"got a Tensor: pass DenseOperator\(A\)"):
        function(torch.eye(3))


def test_eigenvalues_that_are_rounding_errors_get_no_gradient():
    u = torch.nn.functional.normalize(torch.arange(1.0, 7.0, dtype=torch.float64), dim=0)
    A = (3 * u[:, None] * u).requires_grad_()
    found = exact_norm(DenseOperator(A), "nuclear")
    torch.testing.assert_close(found.value.detach(), torch.tensor(3.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.value, A)
    torch.testing.assert_close(gradient, u[:, None] * u)
