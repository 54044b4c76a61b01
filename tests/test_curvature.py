"""Operators, Lanczos and norms against dense algebra, scipy and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.checkpoint import checkpoint

from hessreg.curvature import (
    DenseOperator,
    GaussNewtonOperator,
    HessianOperator,
    LinearOperator,
    NonFiniteError,
    frobenius_norm,
    lanczos,
    norm,
    nuclear_norm,
    one_norm,
    power_iteration,
    spectral_norm,
    third_order_safe,
)
from hessreg.curvature.lanczos import deflated_lanczos

ORDERS = ["spectral", "nuclear", "one", "fro"]
NUMPY_ORD = {"spectral": 2, "nuclear": "nuc", "one": 1, "fro": "fro"}
DOUBLE = torch.float64


def random_orthogonal(n, seed=0):
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE)).Q


def with_spectrum(values, seed=0):
    values = torch.as_tensor(values, dtype=DOUBLE)
    U = random_orthogonal(len(values), seed)
    H = U @ torch.diag(values) @ U.mT
    return (H + H.mT) / 2


def tridiagonal(alpha, beta):
    return torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)


def mlp(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()


def mlp_problem(width=3):
    model = mlp(width)
    x, y = torch.randn(2, 16, 2, dtype=DOUBLE)
    params = list(model.parameters())
    return params, lambda: F.softplus(-model(x) * y[:, :1]).mean()


def dense_hessian(params, loss):
    """Row by row, by plain double backward."""
    grads = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)
    gradient = torch.cat([g.reshape(-1) for g in grads])
    rows = [
        torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in gradient
    ]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


# --- operators


def test_hessian_equals_torch_func():
    model = mlp()
    x = torch.randn(16, 2, dtype=DOUBLE)
    named = dict(model.named_parameters())
    rows = jacrev(jacrev(lambda p: functional_call(model, p, (x,)).tanh().sum()))(named)
    truth = [[rows[i][j].reshape(named[i].numel(), -1) for j in named] for i in named]
    truth = torch.cat([torch.cat(row, 1) for row in truth])
    op = HessianOperator(model(x).tanh().sum(), model.parameters())
    eye = torch.eye(op.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(op.matmat(eye), truth)
    torch.testing.assert_close(torch.stack([op.matvec(e) for e in eye]), truth)
    assert isinstance(op, LinearOperator)


def test_gradient_is_the_flat_gradient():
    params, loss = mlp_problem()
    op = HessianOperator(loss, params)
    truth = torch.autograd.grad(loss(), params)
    torch.testing.assert_close(op.gradient, torch.cat([g.reshape(-1) for g in truth]))
    assert not op.gradient.requires_grad


def test_scipy_finds_the_same_eigenvalues():
    params, loss = mlp_problem()
    truth = torch.linalg.eigvalsh(dense_hessian(params, loss))
    found = eigsh(HessianOperator(loss, params).to_scipy(), k=3, which="LA")[0]
    np.testing.assert_allclose(found, truth[-3:], rtol=1e-8)


def test_matmat_falls_back_without_a_batching_rule():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return Double.apply(grad * x)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(2 * grad.numpy())  # numpy knows no batches

    x = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    op = HessianOperator(Square.apply(x).sum(), x)
    for _ in range(2):
        torch.testing.assert_close(op.matmat(torch.eye(4, dtype=DOUBLE)), 2 * torch.eye(4).double())


def test_matmat_of_no_columns():
    op = HessianOperator(*reversed(mlp_problem()))
    assert op.matmat(torch.empty(op.shape[0], 0, dtype=DOUBLE)).shape == (op.shape[0], 0)


def test_unused_and_linear_parameters_have_zero_curvature():
    a, b, c = (torch.randn(2, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    op = HessianOperator((a**3).sum() + c.sum(), [c, a, b])
    v = torch.arange(1.0, 7.0, dtype=DOUBLE)
    zeros = torch.zeros(2, dtype=DOUBLE)
    expected = torch.cat([zeros, 6 * a.detach() * v[2:4], zeros])
    torch.testing.assert_close(op.matvec(v), expected)
    torch.testing.assert_close(op.matmat(v[:, None]), expected[:, None])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_products_where_a_parameter_is_unused(count):
    a, b, inside = (torch.randn(2, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    V = torch.randn(6, count, dtype=DOUBLE)
    expected = torch.cat([6 * a.detach()[:, None] * V[:2], torch.zeros_like(V[:4])])
    hessian = HessianOperator((a**3).sum() + 2 * b.sum(), [a, b, inside])
    torch.testing.assert_close(hessian.matmat(V), expected)
    newton = GaussNewtonOperator(a**2, lambda y: (y**2).sum(), [a, b])
    expected = torch.cat([8 * a.detach()[:, None] ** 2 * V[:2], torch.zeros_like(V[:2])])
    torch.testing.assert_close(newton.matmat(V[:4]), expected)


def test_scalar_parameters():
    """Such as the gates of residual branches, and temperatures."""
    gate = nn.Parameter(torch.tensor(0.7, dtype=DOUBLE))
    w = nn.Parameter(torch.randn(3, dtype=DOUBLE))
    op = HessianOperator(lambda: (gate * w).exp().sum(), [gate, w])
    scaled = (gate * w).exp().detach()
    expected = torch.diag(torch.cat([(w**2 * scaled).sum()[None], gate**2 * scaled]).detach())
    expected[0, 1:] = expected[1:, 0] = ((1 + gate * w) * scaled).detach()
    torch.testing.assert_close(op.matmat(torch.eye(4, dtype=DOUBLE)), expected)
    torch.testing.assert_close(op.matvec(torch.ones(4, dtype=DOUBLE)), expected.sum(1))
    torch.autograd.grad(norm(op, "fro"), [gate, w])


@pytest.mark.parametrize("ord", ORDERS)
def test_zero_hessian_whose_slope_depends_on_something(ord):
    """Its norm has a gradient of zero; another that depends on nothing was in its place."""
    a, slope = (torch.randn(3, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    value = norm(HessianOperator((a * slope).sum(), a), ord, num_steps=3)
    (gradient,) = torch.autograd.grad(value, a)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("ord", ORDERS)
def test_linear_loss_has_norm_zero(ord):
    a = torch.randn(5, dtype=DOUBLE, requires_grad=True)
    value = norm(HessianOperator(a.sum(), a), ord, num_steps=5)
    assert value == 0
    assert norm(DenseOperator(torch.zeros(5, 5)), ord) == 0


@pytest.mark.parametrize("ord", ORDERS)
def test_one_parameter(ord):
    a = torch.tensor([2.0], dtype=DOUBLE, requires_grad=True)
    value = norm(HessianOperator(-(a**3).sum(), a), ord, num_steps=5)
    assert value.item() == pytest.approx(12.0, rel=1e-6)
    assert torch.autograd.grad(value, a)[0].item() == pytest.approx(6.0, rel=1e-6)


def test_leaves_everything_as_it_was():
    """A callable that changes buffers, draws numbers and runs in training mode leaves no trace."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        nn.BatchNorm1d(4, momentum=None),
        nn.Dropout(0.5),
        nn.Linear(4, 1),
    )
    model(torch.randn(5, 3))
    model[3].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    x = torch.ones(6, 3).cumsum(0)
    for ord in ORDERS:
        op = HessianOperator(lambda: model(x).square().mean(), model.parameters())
        torch.autograd.grad(norm(op, ord, num_steps=4), op.params)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_puts_back_a_buffer_that_is_replaced():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self):
            self.calls = self.calls + 1
            return self.weight.square().sum()

    model = Counter()
    calls = model.calls
    HessianOperator(model, model.parameters())
    assert model.calls is calls
    assert calls == 0


def test_callable_is_evaluated_once_and_restores_on_errors():
    model = nn.BatchNorm1d(2)

    def fail():
        model(torch.randn(4, 2))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        HessianOperator(fail, model.parameters())
    assert model.num_batches_tracked == 0
    assert not nn.modules.module._global_forward_pre_hooks
    calls = []
    x = torch.ones(2, requires_grad=True)
    op = HessianOperator(lambda: calls.append(1) or x.square().sum(), x)
    norm(op, "nuclear", num_steps=2)
    assert len(calls) == 1


def test_graph_of_the_loss_survives():
    params, loss = mlp_problem()
    value = loss()
    op = HessianOperator(value, params)
    (value + norm(op, "spectral", num_steps=4)).backward()
    assert all(p.grad.isfinite().all() for p in params)


@pytest.mark.parametrize(
    ("loss", "params", "error", "message"),
    [
        (lambda x: x, None, ValueError, r"loss must be a scalar, got shape \(2,\)"),
        (lambda x: torch.ones(()), None, ValueError, "loss must have a graph"),
        (lambda x: 3.0, None, TypeError, "loss must be a Tensor or a callable, got float"),
        (lambda x: lambda: 3.0, None, TypeError, "loss must be a Tensor or return one, got float"),
        (lambda x: x.sum() / 0, None, ValueError, "loss must be finite, got inf"),
        (lambda x: (x - 1).abs().sqrt().sum(), None, ValueError,
         r"gradient of params\[0\], shape \(2,\), is nan at \(0,\)"),
        (lambda x: x.sum(), lambda x: [], ValueError, "params must hold at least one number"),
        (lambda x: x.sum(), lambda x: [x, x], ValueError, r"params\[1\] is params\[0\]"),
        (lambda x: x.sum(), lambda x: [("a", x)], TypeError, "must be a Tensor, got tuple"),
        (lambda x: x.sum(), lambda x: nn.Linear(1, 1), TypeError, "pass module.parameters()"),
        (lambda x: x.sum(), lambda x: [torch.ones(1, dtype=torch.bfloat16, requires_grad=True)],
         TypeError, r"params\[0\] must be float32 or float64, got torch.bfloat16"),
        (lambda x: x.sum(), lambda x: [x.detach()], ValueError, "must require a gradient"),
        (lambda x: x.sum(), lambda x: [x, torch.ones(1, dtype=DOUBLE, requires_grad=True)],
         ValueError, r"params\[0\] has torch.float32 on cpu, params\[1\] has torch.float64"),
    ],
)  # fmt: skip
def test_hessian_operator_refuses(loss, params, error, message):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        HessianOperator(loss(x), params(x) if params else x)


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (torch.ones(3), ValueError, r"v must have shape \(2,\), got \(3,\)"),
        (torch.ones(2, 1), ValueError, r"v must have shape \(2,\), got \(2, 1\)"),
        (torch.ones(2, dtype=DOUBLE), TypeError, "dtype torch.float32, got torch.float64"),
        (torch.ones(2, device="meta"), ValueError, "v must be on cpu, got meta"),
        ([1.0, 2.0], TypeError, "v must be a Tensor, got list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["dense", "hessian"])
def test_operators_refuse_wrong_vectors(kind, v, error, message):
    x = torch.ones(2, requires_grad=True)
    dense = kind == "dense"
    op = DenseOperator(torch.eye(2)) if dense else HessianOperator(x.square().sum(), x)
    with pytest.raises(error, match=message):
        op.matvec(v)
    with pytest.raises((TypeError, ValueError), match="V must"):
        op.matmat(v[:, 0] if getattr(v, "ndim", 1) == 2 else v)


@pytest.mark.parametrize(
    ("H", "error", "message"),
    [
        (torch.ones(2, 3), ValueError, r"square and not empty, got shape \(2, 3\)"),
        (torch.empty(0, 0), ValueError, "square and not empty"),
        (
            torch.ones(2, 2, dtype=torch.long),
            TypeError,
            "H must be float32 or float64, got torch.int64",
        ),
        ([[1.0]], TypeError, "H must be a Tensor, got list"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), ValueError, r"max \|H - H'\| = 2"),
        (torch.tensor([[float("nan")]]), ValueError, "finite"),
    ],
)
def test_dense_operator_refuses(H, error, message):
    with pytest.raises(error, match=message):
        DenseOperator(H)


def test_infinite_product_is_located():
    a = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    b = torch.tensor([[1.0, 0.0]], dtype=DOUBLE, requires_grad=True)
    op = HessianOperator(a.square().sum() + (b.abs() ** 1.5).sum(), [a, b])
    for product in (
        lambda: op.matvec(torch.ones(4, dtype=DOUBLE)),
        lambda: op.matmat(torch.ones(4, 2, dtype=DOUBLE)),
        lambda: lanczos(op, 3),
        lambda: norm(op, "fro"),
    ):
        with pytest.raises(
            ValueError, match=r"product of params\[1\], shape \(1, 2\), is .* \(0, 1\)"
        ):
            product()


def test_lanczos_reports_an_operator_that_cannot_locate():
    class Broken(DenseOperator):
        def matvec(self, v, *, create_graph=False):
            return v * float("nan")

    with pytest.raises(ValueError, match="has NaN or infinity"):
        lanczos(Broken(torch.eye(3)), 2)


# --- Krylov iterations


def test_power_iteration_finds_the_largest_modulus():
    H = with_spectrum([-5.0, 3.0, 1.0, 0.5])
    value, vector = power_iteration(DenseOperator(H), 200)
    assert value.item() == pytest.approx(-5.0)
    torch.testing.assert_close(H @ vector, value * vector, rtol=1e-8, atol=1e-8)
    start = torch.linalg.eigh(H).eigenvectors[:, -1]
    assert power_iteration(DenseOperator(H), 1, v0=start)[0].item() == pytest.approx(3.0)
    assert power_iteration(DenseOperator(torch.zeros(3, 3)), 5)[0] == 0


@pytest.mark.parametrize("steps", [1, 7, 30, 100])
def test_lanczos_decomposition(steps):
    n = 30
    H = with_spectrum(torch.linspace(-1, 2, n) ** 3)
    alpha, beta, Q = lanczos(DenseOperator(H), steps)
    m = min(steps, n)
    assert alpha.shape == beta.shape == (m,)
    assert Q.shape == (n, m)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(m, dtype=DOUBLE), rtol=0, atol=1e-13)
    residual = H @ Q - Q @ tridiagonal(alpha, beta)
    torch.testing.assert_close(
        residual[:, :-1], torch.zeros(n, m - 1, dtype=DOUBLE), rtol=0, atol=1e-12
    )
    assert residual[:, -1].norm().item() == pytest.approx(beta[-1].item(), abs=1e-12)


def test_full_lanczos_has_every_eigenvalue():
    truth = torch.linspace(-1, 2, 30, dtype=DOUBLE) ** 3
    alpha, beta, _ = lanczos(DenseOperator(with_spectrum(truth)), 30)
    torch.testing.assert_close(torch.linalg.eigvalsh(tridiagonal(alpha, beta)), truth.sort().values)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_low_rank_stops_at_the_invariant_subspace(dtype, scale):
    """Least squares with 4 residuals and 120 parameters: four eigenvalues, no ghosts."""
    eigenvalues = torch.tensor([81.1, 70.0, 55.9, 38.5], dtype=DOUBLE)
    U = random_orthogonal(120)[:, :4]
    J = ((scale * eigenvalues).sqrt() * U).mT.to(dtype)
    theta = torch.zeros(120, dtype=dtype, requires_grad=True)
    op = HessianOperator(0.5 * (J @ theta - scale**0.5).square().sum(), theta)
    alpha, beta, _ = lanczos(op, 20)
    assert beta[-1] == 0
    found = torch.linalg.eigvalsh(tridiagonal(alpha, beta).double() / scale).flip(0)
    tolerance = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[:4], eigenvalues, rtol=tolerance, atol=0)
    assert 5 <= len(found) <= 6  # the start has a part in the kernel
    assert found[4:].abs().max() < tolerance * eigenvalues[0]
    assert norm(op, "spectral").item() / scale == pytest.approx(81.1, rel=tolerance)


def test_lanczos_stops_at_an_eigenvector():
    H = with_spectrum([3.0, 2.0, 1.0])
    v = torch.linalg.eigh(H).eigenvectors[:, 0]
    alpha, beta, Q = lanczos(DenseOperator(H), 3, v0=5 * v)
    torch.testing.assert_close(alpha, torch.ones(1, dtype=DOUBLE))
    assert beta.tolist() == [0.0]
    torch.testing.assert_close(Q[:, 0], v)


@pytest.mark.parametrize("iteration", [lanczos, power_iteration])
def test_iterations_are_reproducible_and_refuse_bad_starts(iteration):
    op = DenseOperator(with_spectrum([3.0, 2.0, 1.0]))
    state = torch.get_rng_state()
    assert all(map(torch.equal, iteration(op, 2), iteration(op, 2)))
    other = iteration(op, 2, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other[0], iteration(op, 2)[0])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        iteration(op, 0)
    with pytest.raises(ValueError, match=r"v0 must have shape \(3,\), got \(2,\)"):
        iteration(op, 2, v0=torch.ones(2, dtype=DOUBLE))
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="v0 must be finite and not zero"):
            iteration(op, 2, v0=torch.full((3,), bad, dtype=DOUBLE))


# --- norms: values


SPECTRA = {
    "generic": torch.linspace(-1, 2, 12) ** 3,
    "saddle": [1.0, -1.0],
    "pairs": [3.0, -3.0, 2.0, -2.0, 0.0],
    "low_rank": [5.0, -2.0, 0.0, 0.0, 0.0, 0.0],
    "negative": [-4.0, -1.0, -0.5],
    "single": [-2.0],
    "multiple": [3.0, 3.0, 3.0, -1.0, -1.0],
}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", SPECTRA)
def test_norms_equal_numpy(name, scale):
    H = scale * with_spectrum(SPECTRA[name])
    op, n = DenseOperator(H), len(H)
    truth = {ord: np.linalg.norm(H.numpy(), NUMPY_ORD[ord]) for ord in ORDERS}
    assert norm(op, "spectral", num_steps=n).item() == pytest.approx(truth["spectral"])
    nuclear = norm(op, "nuclear", num_steps=n, num_deflated=n, num_probes=500).item()
    # One Krylov space holds one vector of each eigenvalue: multiples are left to the probes.
    assert nuclear == pytest.approx(truth["nuclear"], rel=0.05 if name == "multiple" else 1e-6)
    assert truth["one"] / 3 < norm(op, "one").item() <= truth["one"] * (1 + 1e-12)
    assert norm(op, "fro", num_probes=2000).item() == pytest.approx(truth["fro"], rel=0.03)


def test_saddle_from_any_start():
    saddle = DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert norm(saddle, generator=generator).item() == pytest.approx(1.0)


def test_nuclear_probes_are_unbiased_and_converge():
    H = with_spectrum(torch.linspace(-1, 2, 12) ** 3)
    truth = np.linalg.norm(H.numpy(), "nuc")
    generator = torch.Generator().manual_seed(0)
    op = DenseOperator(H)
    draw = [nuclear_norm(op, smoothing=0.0, generator=generator).value for _ in range(800)]
    draws = torch.stack(draw)
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - truth) < 4 * error
    averaged = nuclear_norm(op, smoothing=0.0, num_probes=800).value
    assert abs(averaged - truth) < 4 * error


def test_deflation_may_leave_nothing_for_a_probe():
    H = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    found = nuclear_norm(DenseOperator(H), num_deflated=1, num_probes=8)
    assert abs(found.value.item() - 2.0) <= found.error <= 1e-6


def test_probes_see_nothing_of_what_is_deflated():
    """Without deflation eigenvalues return from rounding errors, or from inexact vectors."""
    A = with_spectrum([50.0, -40.0, *range(1, 20)])
    U = torch.linalg.eigh(A).eigenvectors[:, [0, -1]]
    U = torch.linalg.qr(U + 1e-4 * torch.ones_like(U)).Q
    v0 = torch.ones(len(A), dtype=A.dtype)
    v0 = v0 - U @ (U.mT @ v0)
    alpha, beta, Q = deflated_lanczos(DenseOperator(A), 40, v0 / v0.norm(), U)
    assert Q.shape[1] <= len(A) - 2
    assert (Q.mT @ U).abs().max() < 1e-13
    P = torch.eye(len(A), dtype=A.dtype) - U @ U.mT
    T = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
    torch.testing.assert_close(T, Q.mT @ P @ A @ P @ Q, rtol=0, atol=1e-11)


def test_deflation_lowers_the_variance():
    H = DenseOperator(with_spectrum([50.0, -40.0, 30.0] + [0.1, -0.1] * 20))
    generator = torch.Generator().manual_seed(0)

    def spread(k):
        draws = [nuclear_norm(H, num_deflated=k, generator=generator).value for _ in range(40)]
        return torch.stack(draws).std().item()

    assert spread(3) < 0.05 * spread(0)


def test_smoothing_lowers_the_nuclear_norm_by_less_than_it_says():
    spectrum = torch.linspace(-1, 2, 12, dtype=DOUBLE) ** 3
    op = DenseOperator(torch.diag(spectrum))
    delta = 0.1 * spectrum.abs().max()
    value = nuclear_norm(op, smoothing=0.1, num_probes=3).value
    smooth = (spectrum**2 / (spectrum**2 + delta**2).sqrt()).sum()
    torch.testing.assert_close(value, smooth)
    assert 0 < spectrum.abs().sum() - value < 0.31 * delta * len(spectrum)


def test_one_norm_is_a_good_lower_bound():
    ratios = []
    for seed in range(30):
        H = with_spectrum(torch.linspace(-1, 2, 25) ** 3, seed)
        ratios.append(norm(DenseOperator(H), "one").item() / np.linalg.norm(H.numpy(), 1))
    assert max(ratios) <= 1 + 1e-12
    assert min(ratios) > 0.6
    assert np.mean(ratios) > 0.9


def test_a_start_is_used():
    H = with_spectrum(torch.linspace(-1, 2, 40) ** 3)
    op = DenseOperator(H)
    eigenvector = torch.linalg.eigh(H).eigenvectors[:, -1]
    assert spectral_norm(op, num_steps=1, v0=eigenvector).value.item() == pytest.approx(8.0)
    column = torch.eye(40, dtype=DOUBLE)[int(H.abs().sum(0).argmax())]
    found = one_norm(op, num_steps=1, v0=column)
    assert found.value.item() == pytest.approx(np.linalg.norm(H.numpy(), 1))
    assert torch.equal(found.start, column)


def test_norm_refuses():
    op = DenseOperator(torch.eye(2))
    with pytest.raises(ValueError, match=r"ord must be one of .*'spectral'.*, got 'two'"):
        norm(op, "two")
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        norm(op, "one", num_steps=0)
    for ord in ("nuclear", "fro"):
        with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
            norm(op, ord, num_probes=0)


# --- norms: gradients


def dcgan_discriminator(norm_layer):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, 2, 1), norm_layer, nn.Softplus(), nn.Conv2d(3, 1, 3), nn.Flatten()
    ).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(6, 1, 6, 6, dtype=DOUBLE)
    return list(model.parameters()), lambda: F.softplus(-model(x)).mean()


PROBLEMS = {
    "mlp": mlp_problem,
    "batch": lambda: dcgan_discriminator(nn.BatchNorm2d(3)),
    "layer": lambda: dcgan_discriminator(nn.LayerNorm([3, 3, 3])),
    "instance": lambda: dcgan_discriminator(nn.InstanceNorm2d(3, affine=True)),
    "group": lambda: dcgan_discriminator(nn.GroupNorm(3, 3)),
}


def shifted(params, direction, step, function):
    origin = nn.utils.parameters_to_vector(params).detach()
    nn.utils.vector_to_parameters(origin + step * direction, params)
    value = function()
    nn.utils.vector_to_parameters(origin, params)
    return value


def finite_difference(params, direction, function, step=1e-5):
    up, down = (shifted(params, direction, s, function) for s in (step, -step))
    return (up - down) / (2 * step)


def exact_norm(op, ord):
    n = op.shape[0]
    exact = {
        "spectral": lambda: spectral_norm(op, num_steps=n),
        "nuclear": lambda: nuclear_norm(op, num_steps=n, num_deflated=n),
        "one": lambda: one_norm(op),
        "fro": lambda: frobenius_norm(op, num_probes=3),
    }
    return exact[ord]().value


def dense_norm(params, loss, ord):
    """The number whose gradient is meant, by other means."""
    H = dense_hessian(params, loss)
    if ord == "fro":
        generator = torch.Generator().manual_seed(0)
        Z = [torch.randint(0, 2, H.shape[:1], generator=generator) * 2.0 - 1 for _ in range(3)]
        return (H @ torch.stack(Z, 1).double()).square().sum().div(3).sqrt().item()
    if ord == "one":
        column = one_norm(DenseOperator(H)).start
        return (H @ column).abs().sum().item()
    return np.linalg.norm(H.numpy(), NUMPY_ORD[ord])


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradient_of_a_hessian_norm(problem, ord):
    params, loss = PROBLEMS[problem]()
    value = exact_norm(HessianOperator(loss, params), ord)
    assert value.item() == pytest.approx(dense_norm(params, loss, ord), rel=1e-6)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, params)])
    torch.manual_seed(3)
    direction = torch.randn_like(gradient)
    slope = finite_difference(params, direction, lambda: dense_norm(params, loss, ord))
    assert (gradient @ direction).item() == pytest.approx(slope, rel=2e-5)


@pytest.mark.parametrize("problem", ["batch", "layer", "instance"])
def test_native_layers_are_refused_and_would_be_wrong(problem, monkeypatch):
    params, loss = PROBLEMS[problem]()
    op = HessianOperator(loss(), params)
    with pytest.raises(ValueError, match="third_order_safe"):
        norm(op, "spectral")
    with torch.no_grad():
        value = norm(op, "spectral", num_steps=60).item()
    assert value == pytest.approx(dense_norm(params, loss, "spectral"))
    with third_order_safe():
        safe = loss()
    monkeypatch.setattr(
        "hessreg.curvature.parameter_operator.require_third_order_safe", lambda *a, **k: None
    )
    gradients = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(exact_norm(o, "spectral"), params)])
        for o in (op, HessianOperator(safe, params))
    ]
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    if error < 1e-4:
        pytest.skip(f"torch {torch.__version__} has a right third derivative: the check can go")
    assert error > 0.01


def test_evaluation_mode_batch_norm_is_not_refused():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).eval()
    norm(HessianOperator(model(torch.randn(5, 2)).sum(), model.parameters())).backward()


def test_mean_gradient_of_nuclear_probes():
    """A probe's gradient is noisy, the mean over probes is the gradient of the norm."""
    H = with_spectrum([3.0, -2.0, 1.0, -0.5]).requires_grad_()
    value = nuclear_norm(DenseOperator(H), num_probes=2000, smoothing=0.0).value
    (gradient,) = torch.autograd.grad(value, H)
    values, U = torch.linalg.eigh(H.detach())
    truth = U @ torch.diag(values.sign()) @ U.mT
    torch.testing.assert_close((gradient + gradient.mT) / 2, truth, rtol=0, atol=0.1)


def test_norm_is_differentiable_in_what_the_hessian_depends_on():
    torch.manual_seed(0)
    B = torch.randn(4, 4, dtype=DOUBLE, requires_grad=True)
    x = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    op = HessianOperator(0.5 * x @ (B + B.mT) @ x, x)
    found = torch.autograd.grad(exact_norm(op, "nuclear"), [B, x], materialize_grads=True)
    truth = torch.autograd.grad(torch.linalg.eigvalsh(B + B.mT).abs().sum(), B)
    torch.testing.assert_close(found, (*truth, torch.zeros_like(x)))


@pytest.mark.parametrize("ord", ORDERS)
def test_no_graph_without_gradients(ord):
    params, loss = mlp_problem()
    op = HessianOperator(loss, params)
    with torch.no_grad():
        assert not norm(op, ord).requires_grad
    assert norm(op, ord).requires_grad


# --- what cannot be differentiated, counts that are none


def test_reentrant_checkpoint_is_refused():
    first, last = nn.Linear(3, 4), nn.Linear(4, 1)
    x = torch.randn(6, 3, requires_grad=True)
    params = [*first.parameters(), *last.parameters()]

    def loss(reentrant):
        return last(checkpoint(first, x, use_reentrant=reentrant)).square().mean()

    for refused in (loss(True), lambda: loss(True)):
        with pytest.raises(ValueError, match="pass use_reentrant=False"):
            HessianOperator(refused, params)
    assert HessianOperator(loss(False), params).gradient[:12].any()


@pytest.mark.filterwarnings("ignore")
def test_compiled_module_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match="pass the module before it is compiled"):
        HessianOperator(lambda: compiled(x).square().mean(), model.parameters())
    linear = torch.compile(model[0], backend="aot_eager")
    with pytest.raises(ValueError, match="pass the module before it is compiled"):
        HessianOperator(linear(x).square().mean(), model[0].parameters())


def test_non_finite_values_have_their_own_error():
    x = torch.ones(2, requires_grad=True)
    op = HessianOperator(x.square().sum(), x)
    for call in (
        lambda: HessianOperator(x.sum() / 0, x),
        lambda: HessianOperator((x - 1).abs().sqrt().sum(), x),
        lambda: op.check_finite(torch.tensor([0.0, float("nan")])),
    ):
        with pytest.raises(NonFiniteError):
            call()


@pytest.mark.parametrize("bad", [2.5, True, "2"])
def test_counts_must_be_integers(bad):
    op = DenseOperator(torch.eye(3))
    for call in (
        lambda: lanczos(op, bad),
        lambda: power_iteration(op, bad),
        lambda: norm(op, "nuclear", num_steps=bad),
        lambda: norm(op, "one", num_steps=bad),
        lambda: norm(op, "nuclear", num_deflated=bad),
        lambda: norm(op, "fro", num_probes=bad),
    ):
        with pytest.raises(TypeError, match="must be an int, got"):
            call()
