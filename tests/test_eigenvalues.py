"""Eigenvalues against dense algebra and scipy: no ghosts, right multiplicities, honest flags."""

import gc
import resource

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn

from hessreg.curvature import (
    DenseOperator,
    HessianOperator,
    NonFiniteError,
    check_symmetric,
    eigenvalues,
)
from hessreg.curvature._krylov import KrylovSpace

DOUBLE = torch.float64
DTYPES = [torch.float32, DOUBLE]
SCALES = [1e-6, 1.0, 1e6]


def orthogonal(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator)).Q


def with_spectrum(values, seed=0):
    values = torch.as_tensor(values, dtype=DOUBLE)
    U = orthogonal(len(values), seed)
    H = U @ torch.diag(values) @ U.mT
    return (H + H.mT) / 2


def best(values, k, which):
    key = {"LA": values, "SA": -values, "LM": values.abs()}[which]
    return values[key.argsort(descending=True, stable=True)[:k]]


class Counting:
    """An operator that counts its products, and may spoil them."""

    def __init__(self, op, spoil=lambda product, count: product):
        self.op, self.spoil, self.count = op, spoil, 0
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device

    def matvec(self, v, *, create_graph=False):
        self.count += 1
        return self.spoil(self.op.matvec(v, create_graph=create_graph), self.count)


# --- right values with right multiplicities


SPECTRA = {
    "generic": torch.linspace(-1, 2, 120, dtype=DOUBLE) ** 3,
    "repeated": torch.tensor([3.0] * 5 + [2.0] * 4 + [1.0] * 60 + [-3.0] * 3, dtype=DOUBLE),
    "low_rank": torch.tensor([5.0, 5.0, -2.0] + [0.0] * 60, dtype=DOUBLE),
    "bulk": torch.cat(
        [torch.linspace(0, 1, 150, dtype=DOUBLE), torch.tensor([1.5, 1.5, 5.0, -4.0])]
    ),
    "identity": torch.ones(50, dtype=DOUBLE),
    "zero": torch.zeros(40, dtype=DOUBLE),
    "saddle": torch.tensor([1.0, -1.0], dtype=DOUBLE),
    "pairs": torch.tensor([3.0, -3.0, 2.0, -2.0, 0.0], dtype=DOUBLE),
    "single": torch.tensor([-2.0], dtype=DOUBLE),
}


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_of_a_known_spectrum(name, dtype, which):
    spectrum = SPECTRA[name]
    norm = spectrum.abs().max().item()
    for scale in SCALES:
        H = (scale * with_spectrum(spectrum)).to(dtype)
        for k in {1, 2, 6} & set(range(1, len(spectrum) + 1)):
            found = eigenvalues(DenseOperator(H), k, which)
            assert found.converged.all()
            values, vectors = found.values.double() / scale, found.vectors.double()
            truth = best(spectrum, k, which)
            if which == "LM":  # which of two signs comes first is left to rounding
                torch.testing.assert_close(values.abs(), truth.abs(), rtol=0, atol=1e-5 * norm)
                truth = values
            torch.testing.assert_close(values, truth, rtol=0, atol=1e-5 * norm)
            gram = vectors.mT @ vectors
            torch.testing.assert_close(gram, torch.eye(k, dtype=DOUBLE), rtol=0, atol=1e-5)
            residuals = (H.double() @ vectors / scale - vectors * values).norm(dim=0)
            stated = found.residuals.double() / scale
            rounding = 20 * torch.finfo(dtype).eps * norm
            assert (residuals <= stated + rounding).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_four_least_squares_has_no_ghosts(dtype, scale):
    """Four residuals, 120 parameters: peers return copies and zeros, flagged as converged."""
    truth = torch.tensor([81.1, 70.0, 55.9, 38.5], dtype=DOUBLE)
    J = ((scale * truth).sqrt() * orthogonal(120)[:, :4]).mT.to(dtype)
    theta = torch.zeros(120, dtype=dtype, requires_grad=True)
    op = HessianOperator(0.5 * (J @ theta - 1.0).square().sum(), theta)
    found = eigenvalues(op, 8)
    assert found.converged.all()
    values = found.values.double() / scale
    torch.testing.assert_close(values[:4], truth, rtol=1e-5, atol=0)
    assert values[4:].abs().max() < 1e-5 * truth[0]


def test_saddle_from_any_start():
    op = DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert eigenvalues(op, 1, "LA", generator=generator).values.item() == pytest.approx(1.0)
        assert eigenvalues(op, 1, "SA", generator=generator).values.item() == pytest.approx(-1.0)
        both = eigenvalues(op, 2, "LM", generator=generator)
        assert sorted(both.values.tolist()) == pytest.approx([-1.0, 1.0])
        assert both.converged.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiplicities_from_any_start(dtype):
    """Copies beyond the first come from rounding or from a new search only."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        n, copies = 60 + 3 * seed, 2 + seed % 4
        spectrum = torch.rand(n, dtype=DOUBLE, generator=generator) * 0.8
        spectrum[:copies] = 1.0
        op = DenseOperator(torch.diag(spectrum).to(dtype))
        found = eigenvalues(op, 4, generator=generator)
        assert found.converged.all()
        torch.testing.assert_close(
            found.values.double(), best(spectrum, 4, "LA"), rtol=0, atol=1e-5
        )


def test_agrees_with_scipy_on_a_network():
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    x = torch.randn(32, 8, dtype=DOUBLE)
    op = HessianOperator(lambda: F.softplus(-model(x)).mean(), model.parameters())
    for which in ("LA", "SA", "LM"):
        found = eigenvalues(op, 5, which)
        assert found.converged.all()
        truth = torch.from_numpy(eigsh(op.to_scipy(), k=5, which=which)[0].copy())
        torch.testing.assert_close(found.values, best(truth, 5, which), rtol=1e-9, atol=0)


def test_float32_agrees_with_float64():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1))
    x = torch.randn(32, 8)

    def top(dtype):
        model.to(dtype)
        loss = F.softplus(-model(x.to(dtype))).mean()
        return eigenvalues(HessianOperator(loss, model.parameters()), 4).values.double()

    torch.testing.assert_close(top(torch.float32), top(DOUBLE), rtol=1e-5, atol=0)


def test_many_restarts_keep_the_basis_orthonormal():
    spectrum = torch.linspace(0, 1, 1500, dtype=torch.float32)
    found = eigenvalues(DenseOperator(torch.diag(spectrum)), 8)
    assert found.num_products > 400
    assert found.converged.all()
    torch.testing.assert_close(found.values, spectrum.flip(0)[:8], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(8), rtol=0, atol=5e-6)


# --- the decomposition


@pytest.mark.parametrize("dtype", DTYPES)
def test_krylov_relation_survives_restarts_and_new_searches(dtype):
    n = 80
    H = with_spectrum(torch.linspace(-1, 2, n) ** 3).to(dtype)
    deflated = torch.linalg.eigh(H).eigenvectors[:, -2:]
    start = torch.randn(n, dtype=dtype)
    start -= deflated @ (deflated.mT @ start)
    space = KrylovSpace(DenseOperator(H), 20, deflated, start / start.norm())
    tolerance = 30 * torch.finfo(dtype).eps * 8
    for round in range(4):
        space.extend(20 - space.size)
        pairs = space.ritz_pairs().take(slice(12, 20))
        space.restart(pairs.values, pairs.coordinates)
        if round == 1:
            space.search_anew(torch.randn(n, dtype=dtype))
        Q = space.basis[2 : 2 + space.size].mT
        following = space.basis[2 + space.size]
        everything = space.basis[: 3 + space.size]
        torch.testing.assert_close(
            everything @ everything.mT, torch.eye(len(everything), dtype=dtype), rtol=0,
            atol=tolerance,
        )  # fmt: skip
        torch.testing.assert_close(Q.mT @ H @ Q, space.projection.to(dtype), rtol=0, atol=tolerance)
        known = deflated @ space.outside[:, :2].to(dtype).mT
        known += following[:, None] * space.coupling.to(dtype)
        rest = (H @ Q - Q @ space.projection.to(dtype) - known).norm(dim=0)
        assert (rest <= space.outside[:, 2:].norm(dim=1) + tolerance).all()
    assert space.outside.shape[1] == 3
    assert space.asymmetry < tolerance + space.outside.norm()


# --- options


def test_stops_as_soon_as_the_residual_allows():
    op = Counting(DenseOperator(with_spectrum([10.0] + [1.0, 0.5] * 100)))
    found = eigenvalues(op)
    assert found.num_products == op.count <= 6
    assert found.converged.all()


@pytest.mark.parametrize("k", [1, 3])
def test_gives_up_and_says_so(k):
    spectrum = torch.linspace(0, 1, 400, dtype=DOUBLE)
    op = Counting(DenseOperator(torch.diag(spectrum)))
    found = eigenvalues(op, k, max_products=15)
    assert found.num_products == op.count == 15
    assert not found.converged.any()
    torch.testing.assert_close(
        found.residuals,
        (op.op.H @ found.vectors - found.vectors * found.values).norm(dim=0),
    )


def test_what_was_not_verified_is_not_called_converged():
    """Both residuals vanish after a few products, but a third copy might have been missed."""
    op = DenseOperator(torch.diag(torch.tensor([5.0, 3.0] + [0.0] * 60, dtype=DOUBLE)))
    found = eigenvalues(op, 2, max_products=6)
    assert found.residuals.max() < 1e-6
    assert not found.converged.any()
    assert eigenvalues(op, 2).converged.all()


def test_values_that_were_not_approached_are_nan():
    op = DenseOperator(torch.eye(40, dtype=DOUBLE))
    found = eigenvalues(op, 4, max_products=5)
    assert found.values[0] == 1
    assert found.values[1:].isnan().all()
    assert not found.converged.any()
    assert found.vectors.shape == (40, 4)
    assert found.residuals[1:].isinf().all()


def test_a_warm_start_saves_products_and_cannot_mislead():
    H = with_spectrum(torch.cat([torch.linspace(0, 1, 300), torch.tensor([1.3, 1.2])]))
    op = DenseOperator(H)
    cold = eigenvalues(op, 2)
    moved = DenseOperator(H + 1e-4 * with_spectrum(torch.linspace(-1, 1, 302), seed=1))
    warm = eigenvalues(moved, 2, v0=cold.vectors)
    assert warm.converged.all()
    top = eigenvalues(op)
    assert eigenvalues(moved, v0=top.vectors[:, 0]).num_products < top.num_products
    wrong = torch.linalg.eigh(H).eigenvectors[:, -2]
    assert eigenvalues(op, v0=wrong).values.item() == pytest.approx(1.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deflation_goes_on_where_an_earlier_call_ended(dtype):
    spectrum = torch.tensor([9.0, 7.0, 7.0, 5.0, 4.0] + [1.0, 0.5] * 30, dtype=DOUBLE)
    op = DenseOperator(with_spectrum(spectrum).to(dtype))
    first = eigenvalues(op, 2)
    second = eigenvalues(op, 3, deflate=first.vectors)
    assert second.converged.all()
    torch.testing.assert_close(second.values.double(), spectrum[2:5], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        first.vectors.mT @ second.vectors, torch.zeros(2, 3, dtype=dtype), rtol=0, atol=1e-5
    )
    rest = DenseOperator(op.H[:4, :4])
    everything = eigenvalues(rest, 4)
    assert eigenvalues(rest, 1, deflate=everything.vectors[:, :3]).converged.all()


def test_deflating_what_is_no_eigenvector_shows_in_the_residual():
    op = DenseOperator(with_spectrum(torch.linspace(-1, 2, 30) ** 3))
    found = eigenvalues(op, deflate=torch.eye(30, dtype=DOUBLE)[:, :1])
    assert not found.converged.any()
    value, v = found.values[0], found.vectors[:, 0]
    assert found.residuals.item() == pytest.approx((op.H @ v - value * v).norm().item())
    assert found.residuals.item() > 0.01


def test_is_reproducible_and_leaves_the_random_state():
    op = DenseOperator(with_spectrum(SPECTRA["generic"]))
    state = torch.get_rng_state()
    assert all(map(torch.equal, eigenvalues(op, 3)[:4], eigenvalues(op, 3)[:4]))
    assert torch.equal(torch.get_rng_state(), state)


# --- what is reported


def random_asymmetry(n, size):
    N = torch.randn(n, n, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    return size * (N - N.mT) / n**0.5


@pytest.mark.parametrize("call", [lambda op: eigenvalues(op, 2), check_symmetric])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_asymmetric_operator_is_reported(dtype, scale, call):
    H = with_spectrum(SPECTRA["generic"])
    size = 0.1 if dtype == torch.float32 else 1e-4
    op = DenseOperator((scale * H).to(dtype))
    op.H = (scale * (H + random_asymmetry(120, size))).to(dtype)
    with pytest.raises(ValueError, match=r"op must be symmetric, .* differ by .* where \|H\|"):
        call(op)


@pytest.mark.parametrize("call", [eigenvalues, check_symmetric])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_reported(dtype, call):
    """A mask drawn anew for each product, as where the loss is evaluated anew."""
    op = Counting(
        DenseOperator(with_spectrum(SPECTRA["generic"]).to(dtype)),
        lambda product, count: F.dropout(product, 0.1),
    )
    with pytest.raises(ValueError, match=r"must be (symmetric|deterministic)"):
        call(op)


@pytest.mark.parametrize("call", [eigenvalues, check_symmetric])
def test_product_that_changes_with_each_call_is_reported(call):
    """As with a new batch for each product; with one row there is nothing else to compare."""
    for n in (1, 30):
        op = Counting(
            DenseOperator(torch.eye(n, dtype=DOUBLE)), lambda product, count: product * (1 + count)
        )
        with pytest.raises(ValueError, match=r"must be deterministic, .* differ by"):
            call(op)


def test_rounding_is_no_asymmetry():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.BatchNorm2d(8),
        nn.Tanh(), nn.Flatten(), nn.Linear(32, 1),
    )  # fmt: skip
    x = torch.randn(16, 1, 8, 8)
    for scale in SCALES:
        op = HessianOperator(lambda s=scale: s * F.softplus(model(x)).mean(), model.parameters())
        assert 0 < check_symmetric(op) < 1e-5
        assert eigenvalues(op, 2).converged.all()


def test_dropout_with_one_mask_is_accepted():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(16, 3)
    op = HessianOperator(lambda: model(x).square().mean(), model.parameters())
    assert check_symmetric(op) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [1, 4, 50])
def test_products_that_are_not_finite_are_reported(when, bad):
    op = Counting(
        DenseOperator(torch.diag(torch.linspace(0, 1, 300))),
        lambda product, count: product * (bad if count >= when else 1.0),
    )
    with pytest.raises(NonFiniteError, match="has NaN or infinity"):
        eigenvalues(op, 3)


def test_non_finite_product_is_located():
    a = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    b = torch.tensor([[1.0, 0.0]], dtype=DOUBLE, requires_grad=True)
    op = HessianOperator(a.square().sum() + (b.abs() ** 1.5).sum(), [a, b])
    with pytest.raises(NonFiniteError, match=r"product of params\[1\], shape \(1, 2\), is .*"):
        eigenvalues(op)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 6}, ValueError, "k must be at most 5, n less the deflated vectors, got 6"),
        ({"k": 1.5}, TypeError, "k must be an int, got 1.5"),
        ({"which": "BE"}, ValueError, r"which must be one of .*'LA'.*, got 'BE'"),
        ({"tol": -1.0}, ValueError, "tol must be finite and not negative, got -1.0"),
        ({"max_products": 1}, ValueError, "max_products must be at least 2, got 1"),
        ({"v0": torch.ones(4)}, ValueError, r"v0 must have shape \(5, j\), got \(4, 1\)"),
        ({"v0": torch.zeros(5)}, ValueError, "v0 must be finite, and no column zero"),
        ({"v0": torch.full((5,), torch.nan)}, ValueError, "v0 must be finite"),
        ({"v0": torch.ones(5, dtype=DOUBLE)}, TypeError, "v0 must have dtype torch.float32"),
        ({"v0": torch.ones(5, device="meta")}, ValueError, "v0 must be on cpu, got meta"),
        ({"deflate": torch.ones(5)}, ValueError, r"deflate must have shape \(5, j\), got \(5,\)"),
        ({"deflate": torch.ones(5, 2)}, ValueError, "deflate must have linearly independent"),
        ({"deflate": torch.eye(5)}, ValueError, "k must be at most 0, n less the deflated"),
    ],
)  # fmt: skip
def test_eigenvalues_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        eigenvalues(DenseOperator(torch.eye(5)), **arguments)


# --- no traces


def test_leaves_everything_as_it_was():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)
    )
    model[4].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    x = torch.ones(6, 3).cumsum(0)
    op = HessianOperator(lambda: model(x).square().mean(), model.parameters())
    eigenvalues(op, 2)
    check_symmetric(op)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_memory_does_not_grow():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    x = torch.randn(32, 64)
    op = HessianOperator(lambda: model(x).square().mean(), model.parameters())

    def spend(products):
        while products > 0:
            products -= eigenvalues(op, 3, tol=0.0, max_products=100).num_products

    spend(300)
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spend(1000)
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) == tensors
    # 1000 products of 4289 numbers would be 17 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 8_000
