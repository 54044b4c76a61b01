"""Gaussian kernel matrices, sums and MMD: right in every derivative, size and dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import hessian, vmap

from hessreg import gaussian_kernel, gaussian_kernel_matvec, mmd2
from hessreg.ops.gaussian import gaussian_energy, gaussian_matrix, gaussian_sum
from tests.check_op import assert_close, check_accuracy, check_op

DOUBLE = torch.float64


def points(*shape: int, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def broadcast(x: torch.Tensor, y: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """The definition, one difference at a time."""
    s = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return torch.exp(-s[..., None] / (2 * sigma.reshape(-1).square())).mean(-1)


def broadcast_matvec(x, y, v, sigma):
    return broadcast(x, y, sigma) @ v


def broadcast_mmd2(x, y, sigma, estimator="unbiased"):
    n, m = x.shape[-2], y.shape[-2]
    own, other = broadcast(x, x, sigma), broadcast(y, y, sigma)
    cross = 2 * broadcast(x, y, sigma).mean((-2, -1))
    if estimator == "biased":
        return own.mean((-2, -1)) + other.mean((-2, -1)) - cross
    total = [k.sum((-2, -1)) - k.diagonal(dim1=-2, dim2=-1).sum(-1) for k in (own, other)]
    return total[0] / (n * (n - 1)) + total[1] / (m * (m - 1)) - cross


def to(device, *tensors):
    return [t.to(device) for t in tensors]


# ---- every derivative, under every transform ---------------------------------------------------


def test_kernel_op(device):
    sigma = torch.tensor([0.8, 1.7], dtype=DOUBLE)
    check_op(gaussian_kernel, broadcast, to(device, points(3, 2), points(2, 2), sigma))


def test_kernel_of_one_sample(device):
    def ours(x):
        return gaussian_kernel(x, sigma=1.3)

    check_op(ours, lambda x: broadcast(x, x, 1.3), to(device, points(3, 2)))


def test_matvec_op(device):
    sigma = torch.tensor([0.8, 1.7], dtype=DOUBLE)
    inputs = to(device, points(3, 2), points(2, 2), points(2, 1), sigma)
    check_op(gaussian_kernel_matvec, broadcast_matvec, inputs)


def test_matvec_op_with_several_vectors(device):
    def ours(x, y, v):
        return gaussian_kernel_matvec(x, y, v, sigma=1.3)

    def plain(x, y, v):
        return broadcast_matvec(x, y, v, 1.3)

    check_op(ours, plain, to(device, points(2, 2), points(3, 2), points(3, 2)))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_mmd2_op(device, estimator):
    def ours(x, y, sigma):
        return mmd2(x, y, sigma, estimator)

    def plain(x, y, sigma):
        return broadcast_mmd2(x, y, sigma, estimator)

    sigma = torch.tensor([0.8, 1.7], dtype=DOUBLE)
    check_op(ours, plain, to(device, points(2, 2), points(3, 2), sigma))


def test_mmd2_op_beyond_few_dimensions(device):
    def ours(x, y):
        return mmd2(x, y, sigma=2.0)

    def plain(x, y):
        return broadcast_mmd2(x, y, 2.0)

    check_op(ours, plain, to(device, points(3, 9), points(2, 9)))


def test_linear_estimator_op(device):
    def ours(x, y, sigma):
        return mmd2(x, y, sigma, "linear")

    def plain(x, y, sigma):
        def k(a, b):
            return broadcast(a[:, None], b[:, None], sigma)[:, 0, 0]

        a, b, c, d = x[0:4:2], x[1:4:2], y[0:4:2], y[1:4:2]
        return (k(a, b) + k(c, d) - k(a, d) - k(b, c)).mean()

    sigma = torch.tensor([0.8, 1.7], dtype=DOUBLE)
    check_op(ours, plain, to(device, points(5, 2), points(4, 2), sigma))


def test_sum_operator_with_factors(device):
    gamma = torch.tensor([[0.5, 0.2]], dtype=DOUBLE)

    def ours(x, y, gamma, coefficient, left, right, v):
        both = [left, left[..., :1]], [right, right[..., :1]]
        return gaussian_sum(x, y, gamma, coefficient, *both, v, False)

    def plain(x, y, gamma, coefficient, left, right, v):
        s = (x[:, :, None] - y[:, None]).square().sum(-1)
        phi = (coefficient[0] * torch.exp(-gamma[0] * s[..., None])).sum(-1)
        return (phi * (left @ right.mT) * (left[..., :1] @ right[..., :1].mT)) @ v

    left, right = points(1, 2, 2), points(1, 3, 2)
    inputs = [points(1, 2, 2), points(1, 3, 2), gamma, points(1, 2), left, right, points(1, 3, 1)]
    check_op(ours, plain, to(device, *inputs))


def test_energy_operator_gives_its_gradient(device):
    """The gradient is an output of its own: differentiable, and that of the value."""
    (z,) = to(device, points(1, 5, 2))
    gamma = torch.tensor([[0.5, 0.2]], dtype=DOUBLE, device=device)

    def ours(z, gamma):
        return gaussian_energy(z, gamma, 2, 0.3, -0.2, 0.7, False, True)

    def plain(z, gamma):
        first = torch.arange(5, device=device) < 2
        table = torch.tensor([[0.7, -0.2], [-0.2, 0.3]], dtype=DOUBLE, device=device)
        weights = table[first.long()[:, None], first.long()]
        weights = weights * (1 - torch.eye(5, dtype=DOUBLE, device=device))
        difference = z[:, :, None] - z[:, None]
        s = difference.square().sum(-1)[..., None]
        phi, slope = (torch.exp(-gamma * s) * c for c in (0.5, 0.5 * gamma))
        pulls = (weights * slope.sum(-1))[..., None] * difference
        return [(weights * phi.sum(-1)).sum((1, 2)), -4 * pulls.sum(2)]

    check_op(ours, plain, [z, gamma])
    z.requires_grad_()
    value, gradient = ours(z, gamma)
    assert_close(torch.autograd.grad(value.sum(), z), (gradient,))


def test_hvp_of_mmd2_in_all_arguments(device):
    x, y = to(device, points(6, 3), points(4, 3))

    def flat(op):
        return lambda w: op(w[:18].view(6, 3), w[18:30].view(4, 3), w[30:])

    w = torch.cat([x.flatten(), y.flatten(), torch.tensor([1.2, 0.7], dtype=DOUBLE, device=device)])
    assert_close(hessian(flat(mmd2))(w), hessian(flat(broadcast_mmd2))(w))


# ---- every size --------------------------------------------------------------------------------

SIZES = [(1, 1), (2, 3), (33, 7), (70, 130)]
LARGE_SIZES = [(193, 12), (250, 401)]
DIMENSIONS = [1, 2, 3, 4, 5, 8, 9, 17, 40]


def sizes_for(request) -> list[tuple[int, int]]:
    emulated = "cuda_emulated" in request.node.name
    return SIZES if emulated else [*SIZES, *LARGE_SIZES]


@pytest.mark.parametrize("d", DIMENSIONS)
def test_values_at_every_size(device, request, d):
    for n, m in sizes_for(request):
        x, y, v = to(device, points(n, d), points(m, d), points(m, 5))
        sigma = [0.7 * d**0.5, 2.0 * d**0.5]
        assert_close(gaussian_kernel(x, y, sigma), broadcast(x, y, sigma))
        expected = broadcast_matvec(x, y, v, sigma)
        assert_close(gaussian_kernel_matvec(x, y, v, sigma), expected)
        assert_close(mmd2(x, y, sigma, "biased"), broadcast_mmd2(x, y, sigma, "biased"))


@pytest.mark.parametrize("d", DIMENSIONS)
def test_derivatives_at_every_size(device, request, d):
    for n, m in sizes_for(request)[1:]:
        leaves = [t.requires_grad_() for t in to(device, points(n, d), points(m, d))]
        v = to(device, points(n, d), points(m, d))
        ours, expected = (hvp(f, leaves, v, d**0.5) for f in (mmd2, broadcast_mmd2))
        assert_close(ours, expected)


def hvp(op, leaves, v, sigma):
    """The gradient, and the Hessian times v."""
    first = torch.autograd.grad(op(*leaves, sigma), leaves, create_graph=True)
    return *first, *torch.autograd.grad(first, leaves, v)


@pytest.mark.parametrize("d", [257, 600])
def test_many_dimensions(device, d):
    leaves = [t.requires_grad_() for t in to(device, points(40, d), points(30, d))]
    v = to(device, points(40, d), points(30, d))
    x, y = (t.detach() for t in leaves)
    assert_close(gaussian_kernel(x, y, 20.0), broadcast(x, y, 20.0))
    assert_close(hvp(mmd2, leaves, v, 20.0), hvp(broadcast_mmd2, leaves, v, 20.0))


@pytest.mark.parametrize("e", [0, 1, 4, 11, 12, 13, 29])
def test_any_number_of_vectors(device, e):
    x, y, v = to(device, points(20, 3), points(15, 3), points(15, e))
    assert_close(gaussian_kernel_matvec(x, y, v, 1.5), broadcast_matvec(x, y, v, 1.5))


@pytest.mark.parametrize(("n", "m", "d"), [(0, 3, 2), (3, 0, 2), (0, 0, 2), (3, 2, 0)])
def test_empty_sizes(device, n, m, d):
    x, y, v = to(device, points(n, d), points(m, d), points(m, 2))
    leaves = [t.requires_grad_() for t in (x, y, v)]
    matrix, product = gaussian_kernel(x, y), gaussian_kernel_matvec(x, y, v)
    assert matrix.shape == (n, m)
    assert_close(matrix, torch.ones(n, m, dtype=DOUBLE, device=device) if d == 0 else matrix)
    assert_close(product, broadcast_matvec(x, y, v, 1.0))
    if n and m:
        assert_close(mmd2(x, y, 1.0, "biased"), torch.zeros((), dtype=DOUBLE, device=device))
    gradients = torch.autograd.grad(matrix.sum() + product.sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]


def test_batches_broadcast(device):
    x, y, v = to(device, points(2, 1, 5, 3), points(4, 6, 3), points(2, 4, 6, 2))
    assert_close(gaussian_kernel(x, y, 1.2), broadcast(x, y, 1.2))
    assert_close(gaussian_kernel_matvec(x, y, v, 1.2), broadcast_matvec(x, y, v, 1.2))
    assert_close(mmd2(x, y, [1.2, 0.5]), broadcast_mmd2(x, y, [1.2, 0.5]))
    assert gaussian_kernel(x[:0], y).shape == (0, 4, 5, 6)


def test_energy_of_nothing(device):
    gamma = torch.ones(1, 1, dtype=DOUBLE, device=device)
    empty = torch.zeros(1, 0, 3, device=device)
    value, gradient = gaussian_energy(empty, gamma, 0, 1.0, 1.0, 1.0, False, True)
    assert value.tolist() == [0.0]
    assert gradient.shape == (1, 0, 3)


def test_any_strides(device):
    wide = points(12, 9).to(device)
    x, y = wide[::2, ::3], wide.mT[:6, :].mT[::3, ::2]
    assert_close(gaussian_kernel(x, y, 1.5), broadcast(x, y, 1.5))
    assert_close(mmd2(x, y, 1.5), broadcast_mmd2(x, y, 1.5))
    repeated = wide[:1].expand(4, 9)
    assert_close(mmd2(repeated, wide, 3.0), broadcast_mmd2(repeated, wide, 3.0))


# ---- accuracy ----------------------------------------------------------------------------------

DATA = {
    "near the origin": lambda n, d: torch.randn(n, d, dtype=DOUBLE),
    "far from the origin": lambda n, d: 1000 + torch.randn(n, d, dtype=DOUBLE),
    "duplicates": lambda n, d: torch.randn(n // 4, d, dtype=DOUBLE).repeat(4, 1),
    "two tight clusters": lambda n, d: (
        10.0 * (torch.arange(n) % 2)[:, None] + 0.1 * torch.randn(n, d, dtype=DOUBLE)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [2, 6, 40])
@pytest.mark.parametrize("data", DATA)
def test_value_is_as_accurate_as_differences(device, data, d, dtype):
    x, y = to(device, DATA[data](64, d), DATA[data](48, d))
    sigma = (0.1 if data == "two tight clusters" else 1.0) * d**0.5
    check_accuracy(lambda x, y: gaussian_kernel(x, y, sigma), [x, y], plain_for(sigma), dtype)


def plain_for(sigma):
    def plain(x, y):
        wide = torch.promote_types(x.dtype, torch.float32)
        return broadcast(x.to(wide), y.to(wide), sigma).to(x.dtype)

    return plain


@pytest.mark.parametrize("d", [2, 6, 40])
@pytest.mark.parametrize("data", ["near the origin", "far from the origin", "duplicates"])
def test_derivatives_are_as_accurate_as_differences(device, data, d):
    """Value, gradient and Hessian-vector product of MMD, against the definition in float32."""
    inputs = [t.float() for t in to(device, DATA[data](64, d), DATA[data](48, d))]
    v = [t.float() for t in to(device, points(64, d), points(48, d))]

    def outputs(op, dtype):
        leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
        derivatives = hvp(op, leaves, [t.to(dtype) for t in v], d**0.5)
        parts = op(*leaves, d**0.5)[None], torch.cat(derivatives[:2]), torch.cat(derivatives[2:])
        return [part.detach() for part in parts]

    exact = outputs(broadcast_mmd2, DOUBLE)
    kernel_sums = torch.ones(1)  # what the value is a small difference of
    scales = [kernel_sums.norm(), exact[1].norm(), exact[2].norm()]
    for truth, a, b, scale in zip(
        exact,
        outputs(mmd2, torch.float32),
        outputs(broadcast_mmd2, torch.float32),
        scales,
        strict=True,
    ):
        error, their_error = ((t.double() - truth).norm() for t in (a, b))
        assert error <= 2 * their_error + torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("d", [784, 1500])
def test_many_dimensions_of_one_sign(device, d):
    """Sums of sums: the error of a distance does not grow with the dimensions."""
    x, y = to(device, *(torch.rand(n, d, dtype=DOUBLE) for n in (40, 33)))
    rounded = [t.float() for t in (x, y)]
    exact = broadcast(*[t.double() for t in rounded], (d / 6) ** 0.5)
    error = (gaussian_kernel(*rounded, (d / 6) ** 0.5).double() - exact).abs().max()
    assert error < 1.5e-6 * exact.max()


@pytest.mark.parametrize("op", [gaussian_kernel, mmd2])
def test_one_far_point_costs_the_others_nothing(device, op):
    x, y = to(device, torch.randn(60, 2), torch.randn(50, 2))
    x[0] = 1e6
    v = to(device, torch.randn(60, 2), torch.randn(50, 2))
    ours = hvp(lambda x, y, s: op(x, y, s).sum(), [t.requires_grad_() for t in (x, y)], v, 1.4)
    plain = broadcast if op is gaussian_kernel else broadcast_mmd2
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    wide = [t.double() for t in v]
    for a, b in zip(ours, hvp(lambda x, y, s: plain(x, y, s).sum(), exact, wide, 1.4), strict=True):
        torch.testing.assert_close(
            a[1:].double(), b[1:], rtol=1e-3, atol=1e-4 * b.abs().max().item()
        )


@pytest.mark.parametrize("op", [gaussian_kernel, mmd2])
def test_derivatives_under_autocast_are_those_without(op):
    leaves = [torch.randn(n, 3).requires_grad_() for n in (20, 15)]
    sigma = torch.tensor([0.8, 1.7], requires_grad=True)

    def derivatives():
        return torch.autograd.grad(op(*leaves, sigma).square().sum(), [*leaves, sigma])

    expected = derivatives()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(derivatives(), expected)


@pytest.mark.parametrize("sigma", [1e-20, 1e22])
def test_extreme_bandwidths(device, sigma):
    x, y = to(device, torch.randn(20, 9), torch.randn(15, 9))
    assert_close(gaussian_kernel(x, y, sigma), broadcast(x.double(), y.double(), sigma).float())
    assert (gaussian_kernel(x, x.clone(), sigma).diagonal() == 1).all()
    leaf = x.clone().requires_grad_()
    value = mmd2(leaf, y, sigma)
    assert value.abs() < 1e-6
    assert torch.autograd.grad(value, leaf)[0].isfinite().all()


def test_gradient_within_tight_clusters(device):
    """In few dimensions it is summed up from differences: nothing is lost to their distance."""
    inputs = [t.float() for t in to(device, *(DATA["two tight clusters"](n, 2) for n in (64, 48)))]
    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(broadcast_mmd2(*exact, 0.1), exact)
    for a, b in zip(torch.autograd.grad(mmd2(*leaves, 0.1), leaves), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * b.abs().max().item())


def test_equal_points_have_kernel_one(device):
    for d in (1, 3, 6, 40, 300):
        x = (100 * torch.randn(50, d)).to(device)
        assert (gaussian_kernel(x, x.clone(), 0.1).diagonal() == 1).all()


def test_mmd_of_equal_samples_is_zero(device):
    x = torch.randn(50, 20).to(device)
    assert mmd2(x, x.clone(), 3.0, "biased").abs() < 1e-7


def test_small_bandwidth_leaves_nothing_to_rounding(device):
    """A point's kernel with itself is 1, with others 1e-9: it must not drown their gradient."""
    x, y = to(device, torch.randn(30, 20), torch.randn(20, 20))
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    ours = torch.autograd.grad(mmd2(*leaves, 0.9), leaves)
    exact = [t.double().clone().requires_grad_() for t in (x, y)]
    expected = torch.autograd.grad(broadcast_mmd2(*exact, 0.9), exact)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6 * b.abs().max())


@pytest.mark.parametrize("d", [2, 20])
def test_points_that_are_not_finite(device, d):
    x, y = to(device, points(9, d).float(), points(8, d).float())
    x[2] = torch.inf
    x[4, 0] = torch.nan
    x[5] = 1e25  # its square overflows
    y[3] = 1e25
    torch.testing.assert_close(
        gaussian_kernel(x, y, 2.0), broadcast(x, y, 2.0), equal_nan=True, rtol=1e-5, atol=1e-6
    )


def test_results_do_not_depend_on_threads():
    x, y = torch.randn(700, 20), torch.randn(500, 20)
    v = torch.randn(500, 3)

    def run():
        leaf = x.clone().requires_grad_()
        value = mmd2(leaf, y, 3.0)
        return value, *torch.autograd.grad(value, leaf), gaussian_kernel_matvec(x, y, v, 3.0)

    one = run()
    torch.set_num_threads(2)
    try:
        two = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---- what must be true -------------------------------------------------------------------------


def test_agrees_with_scikit_learn(device):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = to(device, points(30, 5), points(20, 5))
    expected = pairwise.rbf_kernel(x.cpu().numpy(), y.cpu().numpy(), gamma=1 / (2 * 1.3**2))
    np.testing.assert_allclose(gaussian_kernel(x, y, 1.3).cpu().numpy(), expected, rtol=1e-12)


def test_symmetric_positive_definite_and_at_most_one(device):
    k = gaussian_kernel(points(40, 3).to(device), sigma=[0.5, 2.0])
    assert_close(k, k.mT)
    assert torch.linalg.eigvalsh(k).min() > 0
    assert (k.diagonal() == 1).all()
    assert 0 < k.min() <= k.max() <= 1


def closed_form_mmd2(d: int, sigma: float, shift: float, scale: float) -> float:
    """MMD^2 of N(0, 1) and N(shift, scale^2) in d dimensions, by integrating the kernel."""

    def mean_kernel(distance2: float, a: float, b: float) -> float:
        total = sigma**2 + a + b
        return (sigma**2 / total) ** (d / 2) * np.exp(-distance2 / (2 * total))

    same = mean_kernel(0, 1, 1) + mean_kernel(0, scale**2, scale**2)
    return same - 2 * mean_kernel(d * shift**2, 1, scale**2)


def test_unbiased_estimators_meet_the_closed_form(device):
    d, sigma, shift, scale = 3, 1.5, 0.3, 1.3
    x, y = points(400, 50, d), shift + scale * points(400, 30, d)
    x, y = to(device, x, y)
    expected = closed_form_mmd2(d, sigma, shift, scale)
    for estimator in ("unbiased", "linear"):
        estimates = mmd2(x[:, :, :], y, sigma, estimator)
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - expected) < 4 * error
        assert error < 0.2 * expected  # the test can tell
    biased = mmd2(x, y, sigma, "biased")
    assert biased.min() > 0
    assert biased.mean() - expected > 10 * biased.std() / len(biased) ** 0.5


def test_descending_mmd_joins_the_samples(device):
    x, y = to(device, points(40, 2), 1 + points(40, 2))
    for _ in range(60):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(mmd2(x, y, [0.5, 1.0, 2.0]), x)
        x = x - 10 * gradient
    assert mmd2(x, y, 1.0) < 0.1 * mmd2(points(40, 2).to(device), y, 1.0)


def test_vmap_of_nothing(device):
    x, y = to(device, points(0, 5, 2), points(0, 4, 2))
    assert vmap(lambda x, y: gaussian_kernel(x, y, 1.0))(x, y).shape == (0, 5, 4)
    assert vmap(lambda x, y: mmd2(x, y, 1.0))(x, y).shape == (0,)
    assert vmap(vmap(lambda x, y: mmd2(x, y, 1.0)))(x[None], y[None]).shape == (1, 0)


def test_vmap_of_vectors_shares_the_points(device):
    x, y, v = to(device, points(5, 2), points(4, 2), points(3, 4))
    ours = vmap(lambda u: gaussian_kernel_matvec(x, y, u[:, None], 1.0))(v)
    assert_close(ours, (broadcast(x, y, 1.0) @ v.mT).mT[..., None])


def test_third_order_memory_is_linear():
    """No derivative up to the third holds a matrix of all pairs."""
    n = 3000
    x = torch.randn(n, 3, requires_grad=True)
    y = torch.randn(n, 3)
    v = torch.randn(n, 3)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with Watch():
        (first,) = torch.autograd.grad(mmd2(x, y, 1.0), x, create_graph=True)
        (second,) = torch.autograd.grad(first, x, v, create_graph=True)
        torch.autograd.grad(second, x, v)
    assert 3 * n <= largest < n * n / 20


# ---- bad input ---------------------------------------------------------------------------------

GOOD = torch.zeros(3, 2)
BAD_CALLS = {
    "x must be a tensor": lambda: gaussian_kernel([[1.0]]),
    "x must be a dense tensor of float16": lambda: gaussian_kernel(torch.zeros(3, 2, dtype=int)),
    "x must be points": lambda: gaussian_kernel(torch.zeros(3)),
    "y must have the dtype and device of x": lambda: gaussian_kernel(GOOD, GOOD.double()),
    "y must have points of 2 dimensions": lambda: gaussian_kernel(GOOD, torch.zeros(3, 4)),
    "leading dimensions must broadcast": lambda: mmd2(GOOD.expand(2, 3, 2), GOOD.expand(5, 3, 2)),
    "sigma must be positive and finite.*got 0": lambda: gaussian_kernel(GOOD, sigma=0),
    "sigma must be positive and finite.*got nan": lambda: mmd2(GOOD, GOOD, float("nan")),
    "sigma must be positive and finite.*got -1": lambda: mmd2(GOOD, GOOD, [1.0, -1.0]),
    "sigma must hold at least one": lambda: mmd2(GOOD, GOOD, []),
    "sigma must be a number": lambda: mmd2(GOOD, GOOD, "median"),
    "sigma must be a number or numbers": lambda: mmd2(GOOD, GOOD, torch.ones(2, 2)),
    "sigma must be floating-point": lambda: mmd2(GOOD, GOOD, torch.ones(2, dtype=int)),
    "sigma must be positive.*got 1000": lambda: mmd2(GOOD, GOOD, 10**400),
    "v must be vectors": lambda: gaussian_kernel_matvec(GOOD, GOOD, GOOD[:, 0]),
    "v must have a row for each of the 3": lambda: gaussian_kernel_matvec(GOOD, GOOD, GOOD[:2]),
    "v must be points|v must be a tensor": lambda: gaussian_kernel_matvec(GOOD, GOOD, None),
    "estimator must be one of unbiased": lambda: mmd2(GOOD, GOOD, 1.0, "best"),
    "x must hold at least 2 points": lambda: mmd2(GOOD[:1], GOOD),
    "y must hold at least 1 points": lambda: mmd2(GOOD, GOOD[:0], 1.0, "biased"),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_CALLS[message]()


def test_kernels_refuse_what_does_not_fit():
    x, gamma = torch.zeros(1, 3, 2), torch.ones(1, 1, dtype=DOUBLE)
    for arguments in (
        (x[0], x, gamma, gamma, False),
        (x, x.double(), gamma, gamma, False),
        (x, x, gamma.float(), gamma, False),
        (x, x, gamma, gamma.expand(1, 2), False),
    ):
        with pytest.raises(RuntimeError, match="gaussian"):
            gaussian_matrix._run_kernel(arguments)
