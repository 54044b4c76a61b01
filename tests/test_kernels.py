"""Kernels, bandwidths, features and tests against scikit-learn, SciPy, closed forms and sampling.

Every bound on what is random is at least four standard errors wide, and the seeds are fixed.
"""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.gaussian_process.kernels import RationalQuadratic
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.metrics import pairwise
from torch.autograd import gradcheck, gradgradcheck

from hessreg import kernels
from hessreg.kernels import (
    AdaptiveBandwidth,
    RandomFourierFeatures,
    gaussian_kernel,
    laplacian_kernel,
    linear_kernel,
    mean_squared_distance_bandwidth,
    median_bandwidth,
    mmd2,
    mmd2_block,
    mmd2_test,
    mmd2_variance,
    nystrom_features,
    polynomial_kernel,
    random_fourier_features,
    rational_quadratic_kernel,
    two_sample,
)

DOUBLE = torch.float64
KERNELS = [
    gaussian_kernel,
    laplacian_kernel,
    linear_kernel,
    polynomial_kernel,
    rational_quadratic_kernel,
]
STATIONARY = [gaussian_kernel, laplacian_kernel, rational_quadratic_kernel]


def points(*shape, dtype=DOUBLE):
    return torch.randn(shape, dtype=dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def differentiable(fn, *inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert gradcheck(fn, leaves, check_forward_ad=True)
    assert gradgradcheck(fn, leaves)


# --- kernels


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda x, y: gaussian_kernel(x, y, 1.7),
            lambda x, y: pairwise.rbf_kernel(x, y, gamma=0.5 / 1.7**2),
        ),
        (
            lambda x, y: laplacian_kernel(x, y, 1.7),
            lambda x, y: pairwise.laplacian_kernel(x, y, gamma=1 / 1.7),
        ),
        (linear_kernel, pairwise.linear_kernel),
        (
            lambda x, y: polynomial_kernel(x, y, 4, 0.3),
            lambda x, y: pairwise.polynomial_kernel(x, y, degree=4, gamma=1, coef0=0.3),
        ),
        (
            lambda x, y: rational_quadratic_kernel(x, y, 1.7, 0.6),
            lambda x, y: RationalQuadratic(1.7, 0.6)(x, y),
        ),
    ],
    ids=["gaussian", "laplacian", "linear", "polynomial", "rational quadratic"],
)
def test_kernels_are_those_of_scikit_learn(ours, theirs):
    x, y = points(9, 4), points(6, 4)
    for second in (y, x[:5], None):
        expected = theirs(x.numpy(), x.numpy() if second is None else second.numpy())
        np.testing.assert_allclose(ours(x, second).numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_symmetric_and_positive_definite(kernel):
    x, y = points(12, 3), points(7, 3)
    torch.testing.assert_close(kernel(x, y), kernel(y, x).mT)
    eigenvalues = torch.linalg.eigvalsh(kernel(x))
    assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]
    if kernel in STATIONARY:
        assert eigenvalues[0] > 1e-6  # strictly: the points are distinct


@pytest.mark.parametrize("kernel", STATIONARY)
def test_stationary_kernels_are_one_at_equal_points_and_less_elsewhere(kernel):
    x = 1e3 + points(20, 3)
    matrix = kernel(x)
    assert torch.equal(matrix.diagonal(), torch.ones(20, dtype=DOUBLE))
    elsewhere = matrix[~torch.eye(20, dtype=torch.bool)]
    assert (elsewhere > 0).all()
    assert (elsewhere < 1).all()


@pytest.mark.parametrize("kernel", STATIONARY)
def test_several_bandwidths_are_the_mean_of_their_kernels(kernel):
    x, y, sigmas = points(5, 3), points(4, 3), (0.5, 1.0, 4.0)
    mean = torch.stack([kernel(x, y, s) for s in sigmas]).mean(0)
    torch.testing.assert_close(kernel(x, y, sigmas), mean)
    torch.testing.assert_close(kernel(x, y, torch.tensor(sigmas)), mean)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_broadcast_batches_and_take_no_points(kernel):
    x, y = points(2, 1, 4, 3), points(3, 5, 3)
    matrix = kernel(x, y)
    assert matrix.shape == (2, 3, 4, 5)
    torch.testing.assert_close(matrix[1, 2], kernel(x[1, 0], y[2]))
    assert kernel(x[..., :0, :], y).shape == (2, 3, 0, 5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(kernel, dtype):
    x = points(6, 3, dtype=dtype)
    torch.testing.assert_close(kernel(x), kernel(x.float()).to(dtype), rtol=0, atol=0)


def test_half_precision_does_not_overflow_on_the_way():
    x = torch.tensor([[0.0], [400.0]], dtype=torch.float16)  # its square is above 65504
    assert rational_quadratic_kernel(x, sigma=400.0)[0, 1] == pytest.approx(2 / 3, rel=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_have_derivatives(kernel):
    differentiable(kernel, points(3, 2), points(4, 2))
    if kernel in STATIONARY:
        differentiable(kernel, points(2, 2), points(2, 2), torch.tensor([0.7, 2.0], dtype=DOUBLE))


def test_derivatives_at_coincident_points():
    x = points(2, 2)[[0, 1, 0]]
    differentiable(lambda z: rational_quadratic_kernel(z, None, 1.3, 0.8), x)
    differentiable(lambda a, b: rational_quadratic_kernel(a, b, 1.3, 0.8), x, x)
    curvature = torch.func.hessian(lambda a: rational_quadratic_kernel(a[None], x[:1], 1.3).sum())
    torch.testing.assert_close(curvature(x[0]), -torch.eye(2, dtype=DOUBLE) / 1.3**2)
    differentiable(lambda z: polynomial_kernel(z, None, 3, 0.0), torch.zeros(2, 2, dtype=DOUBLE))


def test_derivative_of_the_polynomial_kernel_ends_at_its_degree():
    def f(t):
        return polynomial_kernel(t.reshape(1, 1), torch.ones(1, 1, dtype=DOUBLE), 2, 0.0).sum()

    t, values = torch.zeros((), dtype=DOUBLE), []
    for _ in range(3):
        f = torch.func.grad(f)
        values.append(f(t).item())
    assert values == [0.0, 2.0, 0.0]


def test_the_kink_of_the_laplacian_kernel_has_the_mean_slope():
    x = points(1, 2).requires_grad_()
    y = x.detach() + torch.tensor([[0.0, 1.0]])
    (slope,) = torch.autograd.grad(laplacian_kernel(x, y).sum(), x)
    torch.testing.assert_close(slope, torch.tensor([[0.0, math.exp(-1)]], dtype=DOUBLE))


# --- bandwidths


@pytest.mark.parametrize("count", [2, 3, 4, 20, 23])  # odd and even numbers of pairs
def test_median_bandwidth_is_the_median_of_pdist(count):
    x, y = points(count, 3), points(5, 3)
    expected = np.median(pdist(x.numpy()))
    assert median_bandwidth(x).item() == pytest.approx(expected, rel=1e-14)
    joined = np.median(pdist(torch.cat([x, y]).numpy()))
    assert median_bandwidth(x, y).item() == pytest.approx(joined, rel=1e-14)


def test_median_bandwidth_of_points_that_coincide():
    half = torch.tensor([[0.0], [0.0], [0.0], [3.0]])
    assert median_bandwidth(half) == np.median(pdist(half)) == 1.5
    mostly = torch.cat([torch.zeros(8, 1), torch.tensor([[2.0], [5.0]])])
    assert np.median(pdist(mostly)) == 0
    positive = pdist(mostly)[pdist(mostly) > 0]
    assert median_bandwidth(mostly) == np.median(positive) == 3.0
    assert median_bandwidth(torch.full((4, 2), 0.1)) == 1.0


def test_median_bandwidth_of_what_is_not_finite_is_nan():
    x = points(12, 2)  # 11 of 66 pairs have NaN: they are not in the middle
    x[4, 1] = math.nan
    assert median_bandwidth(x).isnan()


def test_median_bandwidth_of_a_subsample():
    x = points(900, 2)
    exact = median_bandwidth(x).item()
    assert median_bandwidth(x, max_points=900).item() == exact
    evenly = median_bandwidth(x, max_points=90)
    assert torch.equal(evenly, median_bandwidth(x[::10]))
    first, second = (median_bandwidth(x, None, 90, seeded(s)) for s in (1, 2))
    assert torch.equal(first, median_bandwidth(x, None, 90, seeded(1)))
    assert first != second
    for estimate in (evenly, first, second):
        assert estimate.item() == pytest.approx(exact, rel=0.2)


def test_bandwidths_take_both_samples_into_a_subsample():
    x, y = torch.zeros(500, 1), torch.full((500, 1), 8.0)
    assert median_bandwidth(x, y, max_points=20) == 8.0


def test_bandwidths_are_plain_tensors():
    x = points(6, 2, dtype=torch.float16).requires_grad_()
    for bandwidth in (median_bandwidth, mean_squared_distance_bandwidth):
        assert bandwidth(x).dtype is torch.float32
        assert bandwidth(x.double()).dtype is DOUBLE
        assert bandwidth(x).shape == ()
    assert not median_bandwidth(x).requires_grad


def test_mean_squared_distance_is_that_of_pdist():
    x, y = points(20, 3), points(7, 3)
    for sample, joined in (((x,), x), ((x, y), torch.cat([x, y]))):
        expected = math.sqrt(np.mean(pdist(joined.numpy()) ** 2) / 2)
        found = mean_squared_distance_bandwidth(*sample).item()
        assert found == pytest.approx(expected, rel=1e-13)


def test_mean_squared_distance_keeps_its_digits_far_from_the_origin():
    x = points(50, 3).float()
    moved = mean_squared_distance_bandwidth(x.double().add(1e4).float())
    near = mean_squared_distance_bandwidth(x.double().add(1e4).float().double().sub(1e4))
    assert moved.item() == pytest.approx(near.item(), rel=1e-6)


def test_mean_squared_distance_has_derivatives():
    differentiable(mean_squared_distance_bandwidth, points(4, 2), points(3, 2))
    differentiable(
        lambda x: gaussian_kernel(x, None, mean_squared_distance_bandwidth(x)), points(4, 2)
    )


def test_mean_squared_distance_of_points_that_coincide():
    x = torch.full((11, 1), 0.1, requires_grad=True)
    assert x.var(0) > 0  # by rounding
    sigma = mean_squared_distance_bandwidth(x)
    (gradient,) = torch.autograd.grad(sigma, x)
    assert sigma == 1.0
    assert torch.equal(gradient, torch.zeros(11, 1))


def test_averaged_bandwidth_follows_the_median():
    bandwidth = AdaptiveBandwidth("ema", decay=0.75)
    assert bandwidth() == 1.0
    assert not list(bandwidth.parameters())
    first, second = points(20, 3), 5 * points(20, 3)
    bandwidth.update(first[:10], first[10:])
    assert bandwidth().item() == pytest.approx(median_bandwidth(first).item(), rel=1e-6)
    bandwidth.update(second)
    expected = 0.75 * median_bandwidth(first) + 0.25 * median_bandwidth(second)
    assert bandwidth().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("policy", ["ema", "learned"])
def test_an_initial_bandwidth_counts(policy):
    x = torch.tensor([[0.0], [6.0]])
    bandwidth = AdaptiveBandwidth(policy, initial=2.0, decay=0.5)
    assert bandwidth().item() == pytest.approx(2.0)
    bandwidth.update(x)
    assert bandwidth().item() == pytest.approx(4.0 if policy == "ema" else 2.0)


@pytest.mark.parametrize("policy", ["ema", "learned"])
def test_a_broken_batch_does_not_spoil_the_bandwidth(policy):
    x, broken = points(9, 2), torch.full((5, 2), math.nan)
    bandwidth, expected = AdaptiveBandwidth(policy), AdaptiveBandwidth(policy)
    expected.update(x)
    for batch in (broken, x, broken):  # before the first that counts, and after it
        bandwidth.update(batch)
    assert torch.equal(bandwidth(), expected())
    assert bandwidth() != 1.0


def test_learned_bandwidth_is_learned():
    bandwidth = AdaptiveBandwidth("learned")
    x, y = points(60, 2), points(60, 2) + 1
    bandwidth.update(100 * x)
    start = bandwidth().item()
    assert start == pytest.approx(median_bandwidth(100 * x).item(), rel=1e-5)
    bandwidth.update(x)
    assert bandwidth().item() == start  # only the first counts
    optimizer = torch.optim.Adam(bandwidth.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = -mmd2(x, y, bandwidth())
        loss.backward()
        optimizer.step()
    assert 0.3 < bandwidth().item() < 3
    assert mmd2(x, y, bandwidth()) > 100 * mmd2(x, y, start)


@pytest.mark.parametrize("policy", ["ema", "learned"])
def test_adaptive_bandwidth_goes_on_from_its_state(policy):
    one, other = AdaptiveBandwidth(policy), AdaptiveBandwidth(policy)
    first, second = points(9, 2), points(9, 2)
    one.update(first)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(), other())
    one.update(second)
    other.update(second)
    assert torch.equal(one(), other())


def test_an_update_leaves_graphs_alone():
    bandwidth = AdaptiveBandwidth("ema")
    x = points(6, 2).requires_grad_()
    sigma = bandwidth()
    loss = (x / sigma).sum()
    bandwidth.update(x)
    assert sigma == 1.0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.ones(6, 2, dtype=DOUBLE))


def test_bandwidths_never_wait_for_the_device():
    """Tensors without values raise where a value would be asked for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(30, 2)
        assert median_bandwidth(x, x, 20).shape == ()
        assert mean_squared_distance_bandwidth(x).shape == ()
        for policy in ("ema", "learned"):
            bandwidth = AdaptiveBandwidth(policy)
            bandwidth.update(x)
            assert bandwidth().shape == ()


# --- features


def test_fourier_features_have_the_mean_and_deviation_of_theory():
    x, y, sigma, repeats, count = points(6, 3), points(5, 3), 1.5, 400, 64
    kernel, errors = gaussian_kernel(x, y, sigma), []
    for seed in range(repeats):
        features = RandomFourierFeatures(3, count, sigma, seeded(seed))
        errors.append(features(x) @ features(y).mT - kernel)
    deviation = (1 - kernel**2) / math.sqrt(count)  # count / 2 pairs of cosine and sine
    scores = torch.stack(errors) / deviation
    assert scores.mean(0).abs().max() < 4.5 / math.sqrt(repeats)
    assert (scores.square().mean(0) - 1).abs().max() < 5 * math.sqrt(3 / repeats)


def test_fourier_features_err_less_than_those_of_scikit_learn():
    x, sigma, count = points(20, 3), 2.0, 128
    kernel, ours, theirs = gaussian_kernel(x, None, sigma), [], []
    for seed in range(40):
        phi = random_fourier_features(x, count, sigma, seeded(seed))
        ours.append((phi @ phi.mT - kernel).square().mean().item())
        sampler = RBFSampler(gamma=0.5 / sigma**2, n_components=count, random_state=seed)
        psi = torch.as_tensor(sampler.fit_transform(x.numpy()))
        theirs.append((psi @ psi.mT - kernel).square().mean().item())
    expected = ((1 - kernel**2).square() / count).mean().item()
    of_phases = ((1 - kernel**2 + kernel**4 / 2) / count).mean().item()
    assert np.mean(ours) == pytest.approx(expected, rel=0.2)
    assert np.mean(theirs) == pytest.approx(of_phases, rel=0.2)
    assert np.mean(ours) < 0.85 * np.mean(theirs)


def test_fourier_features_of_several_bandwidths():
    x, sigmas, repeats, total = points(5, 3), (0.5, 2.0, 8.0), 200, 0
    for seed in range(repeats):
        phi = random_fourier_features(x, 60, sigmas, seeded(seed))
        total = total + phi @ phi.mT
    error = total / repeats - gaussian_kernel(x, None, sigmas)
    assert error.abs().max() < 4.5 / math.sqrt(30 * repeats)  # no cosine deviates by more than 1
    torch.testing.assert_close((phi * phi).sum(-1), torch.ones(5, dtype=DOUBLE))


def test_fourier_features_are_shared_and_kept():
    x = points(4, 3).float()
    features = RandomFourierFeatures(3, 10, (1.0, 3.0, 2.0, 4.0, 5.0), seeded(0))
    alike = random_fourier_features(x, 10, (1.0, 3.0, 2.0, 4.0, 5.0), seeded(0))
    torch.testing.assert_close(features(x), alike, rtol=0, atol=0)
    other = RandomFourierFeatures(3, 10, generator=seeded(1))
    assert not torch.equal(other(x), features(x))
    other.load_state_dict(features.state_dict())
    assert torch.equal(other(x), features(x))
    assert features(x.half()).dtype is torch.float16
    assert features(x.expand(2, 1, 4, 3)).shape == (2, 1, 4, 10)


def test_fourier_features_have_derivatives():
    features = RandomFourierFeatures(2, 8).double()
    differentiable(features, points(3, 2))
    sigma = torch.tensor([0.7, 2.0], dtype=DOUBLE)
    differentiable(lambda x, s: random_fourier_features(x, 8, s, seeded(0)), points(3, 2), sigma)


def test_nystrom_features_are_those_of_scikit_learn():
    x, sigma = points(30, 3), 1.7
    theirs = Nystroem(gamma=0.5 / sigma**2, n_components=8, random_state=0).fit(x.numpy())
    ours = nystrom_features(x, torch.as_tensor(theirs.components_), sigma)
    np.testing.assert_allclose(ours.numpy(), theirs.transform(x.numpy()), rtol=1e-7, atol=1e-9)


def test_nystrom_features_are_exact_at_landmarks():
    x, landmarks = points(20, 3), points(9, 3)
    at_x, at_landmarks = (nystrom_features(z, landmarks, (0.5, 2.0)) for z in (x, landmarks))
    kernel = gaussian_kernel(x, landmarks, (0.5, 2.0))
    torch.testing.assert_close(at_x @ at_landmarks.mT, kernel, rtol=0, atol=1e-9)
    left_out = gaussian_kernel(x, None, (0.5, 2.0)) - at_x @ at_x.mT
    assert torch.linalg.eigvalsh(left_out)[0] > -1e-9  # a projection only takes away
    assert left_out.diagonal().max() > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (DOUBLE, 1e-7)])
def test_nystrom_features_with_landmarks_that_coincide(dtype, tolerance):
    landmarks = points(6, 2, dtype=dtype)[[0, 1, 2, 3, 4, 5, 0, 1, 0]]
    phi = nystrom_features(landmarks, landmarks, 3.0)
    torch.testing.assert_close(
        phi @ phi.mT, gaussian_kernel(landmarks, None, 3.0), rtol=0, atol=tolerance
    )


def test_nystrom_features_have_derivatives_in_the_points():
    landmarks = points(5, 2)[[0, 1, 2, 3, 4, 0]]
    differentiable(lambda x: nystrom_features(x, landmarks, 1.5), points(3, 2))
    constant = nystrom_features(points(3, 2), landmarks.clone().requires_grad_(), 1.5)
    assert not constant.requires_grad


# --- two samples


def expected_kernel(sigma, distance2, dim, variance):
    """E k of two points whose difference is normal with this mean square and variance."""
    v = sigma**2 + variance
    return (sigma**2 / v) ** (dim / 2) * math.exp(-distance2 / (2 * v))


def gaussian_mmd2(sigma, shift, scale, dim):
    """MMD^2 of N(0, I) and N(shift, scale^2 I)."""
    own = expected_kernel(sigma, 0, dim, 2) + expected_kernel(sigma, 0, dim, 2 * scale**2)
    return own - 2 * expected_kernel(sigma, dim * shift**2, dim, 1 + scale**2)


def draws(repeats, n, m, shift, scale, dim=2):
    return points(repeats, n, dim), scale * points(repeats, m, dim) + shift


@pytest.mark.parametrize(
    "estimator",
    [mmd2, lambda x, y, s: mmd2_block(x, y, s, 5), lambda x, y, s: mmd2(x, y, s, "linear")],
    ids=["quadratic", "block", "linear"],
)
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 1.2)])
def test_estimates_are_unbiased(estimator, shift, scale):
    sigma, repeats = 1.4, 4000
    estimates = estimator(*draws(repeats, 11, 14, shift, scale), sigma)
    error = estimates.mean() - gaussian_mmd2(sigma, shift, scale, 2)
    standard_error = estimates.std() / math.sqrt(repeats)
    assert error.abs() < 4 * standard_error
    assert standard_error < 0.005


def test_block_estimate_is_the_mean_over_blocks():
    x, y = points(2, 11, 3), points(14, 3)
    blocks = [mmd2(x[:, i : i + 3], y[i : i + 3], (0.7, 2.0)) for i in (0, 3, 6)]
    torch.testing.assert_close(mmd2_block(x, y, (0.7, 2.0), 3), torch.stack(blocks).mean(0))
    torch.testing.assert_close(mmd2_block(x, y), mmd2_block(x, y, 1.0, 3))  # the root of 11
    torch.testing.assert_close(mmd2_block(x[0], y[:11], 1.0, 11), mmd2(x[0], y[:11]))
    differentiable(lambda a, b: mmd2_block(a, b, 1.0, 2), points(4, 2), points(4, 2))


def mean_apart(product, *sizes):
    """The mean of a product of indices, one for each size, over distinct indices of a sample."""
    total, count = 0.0, 0
    for i in permutations(range(sizes[0]), sizes[1]):
        for j in permutations(range(sizes[2]), sizes[3]):
            total, count = total + product(i, j), count + 1
    return total / count


def variance_by_definition(x, y, sigma):
    """Each expectation in the variance of the estimate, by the mean over distinct indices."""
    n, m = len(x), len(y)
    z = torch.cat([x, y])
    k = gaussian_kernel(z, None, sigma).numpy()
    xx, yy, xy = k[:n, :n], k[n:, n:], k[:n, n:]

    def within(a, n):
        square = mean_apart(lambda i, _: a[i[0], i[1]] ** 2, n, 2, 1, 1)
        chain = mean_apart(lambda i, _: a[i[0], i[1]] * a[i[0], i[2]], n, 3, 1, 1)
        apart = mean_apart(lambda i, _: a[i[0], i[1]] * a[i[2], i[3]], n, 4, 1, 1)
        return (4 * (n - 2) * (chain - apart) + 2 * (square - apart)) / (n * (n - 1))

    def covariance(a, c, n, m):
        chain = mean_apart(lambda i, j: a[i[0], i[1]] * c[i[0], j[0]], n, 2, m, 1)
        return chain - mean_apart(lambda i, j: a[i[0], i[1]] * c[i[2], j[0]], n, 3, m, 1)

    apart = mean_apart(lambda i, j: xy[i[0], j[0]] * xy[i[1], j[1]], n, 2, m, 2)
    by_x = mean_apart(lambda i, j: xy[i[0], j[0]] * xy[i[0], j[1]], n, 1, m, 2) - apart
    by_y = mean_apart(lambda i, j: xy[i[0], j[0]] * xy[i[1], j[0]], n, 2, m, 1) - apart
    across = ((m - 1) * by_x + (n - 1) * by_y + (xy**2).mean() - apart) / (n * m)
    shared = covariance(xx, xy, n, m) / n + covariance(yy, xy.T, m, n) / m
    return within(xx, n) + within(yy, m) + 4 * across - 8 * shared


@pytest.mark.parametrize("sigma", [1.3, (0.5, 1.0, 3.0)])
def test_variance_is_its_definition(sigma):
    x, y = points(5, 2), points(6, 2) + 0.5
    expected = variance_by_definition(x, y, sigma)
    assert mmd2_variance(x, y, sigma).item() == pytest.approx(expected, rel=1e-10, abs=1e-15)
    torch.testing.assert_close(mmd2_variance(y, x, sigma), mmd2_variance(x, y, sigma))


@pytest.mark.parametrize(
    ("n", "m", "shift", "scale"),
    [(8, 8, 0.0, 1.0), (8, 8, 1.0, 1.0), (6, 12, 0.0, 1.0), (6, 12, 0.7, 1.5)],
)
def test_variance_is_unbiased(n, m, shift, scale):
    repeats, sigma = 10_000, (0.7, 1.5)
    x, y = draws(repeats, n, m, shift, scale)
    values, estimates = mmd2(x, y, sigma), mmd2_variance(x, y, sigma)
    squares = (values - values.mean()).square()
    truth, truth_error = squares.mean(), squares.std() / math.sqrt(repeats)
    estimate_error = estimates.std() / math.sqrt(repeats)
    bound = 4 * torch.hypot(truth_error, estimate_error)
    assert (estimates.mean() - truth).abs() < bound
    assert bound < 0.12 * truth


def test_variance_in_batches_and_low_precision():
    x, y = points(3, 1, 8, 2), points(2, 7, 2) + 1
    found = mmd2_variance(x, y, 1.5)
    assert found.shape == (3, 2)
    torch.testing.assert_close(found[2, 1], mmd2_variance(x[2, 0], y[1], 1.5))
    rounded = mmd2_variance(x.half(), y.half(), 1.5)  # most are below the range of float16
    assert rounded.dtype is torch.float32
    torch.testing.assert_close(rounded.double(), found, rtol=0.02, atol=1e-5)


def test_variance_has_derivatives():
    sigma = torch.tensor([0.7, 2.0], dtype=DOUBLE)
    differentiable(mmd2_variance, points(4, 2), points(5, 2) + 1, sigma)


def test_the_test_rejects_at_its_level():
    """Under the null the p-value is uniform on its 50 values; samples are small and unequal."""
    tests, alpha = 1200, 0.1
    x, y = draws(tests, 9, 6, 0.0, 1.0)
    p_value = mmd2_test(x, y, 1.0, 49, seeded(0)).p_value
    for level in (alpha, 0.5, 0.8):
        rate = (p_value <= level + 1e-9).double().mean().item()
        assert abs(rate - level) < 4 * math.sqrt(level * (1 - level) / tests)


def test_the_test_has_power():
    for shift, scale in ((1.5, 1.0), (0.0, 5.0)):
        x, y = draws(40, 30, 20, shift, scale)
        found = mmd2_test(x, y, median_bandwidth(x[0], y[0]), 99).p_value <= 0.05
        assert found.double().mean() >= 0.95


def test_the_statistic_is_the_unbiased_estimate():
    x, y = points(3, 1, 8, 2), points(2, 5, 2) + 0.5
    outcome = mmd2_test(x, y, (0.5, 2.0), 10)
    torch.testing.assert_close(outcome.statistic, mmd2(x, y, (0.5, 2.0)))
    assert outcome.p_value.shape == (3, 2)
    assert outcome.p_value.dtype is DOUBLE
    assert mmd2_test(x.float(), y.float(), 1.0, 10).statistic.dtype is torch.float32
    assert not mmd2_test(x.requires_grad_(), y, 1.0, 10).statistic.requires_grad


@pytest.mark.parametrize("entries", [1, 40, 2**22])  # held at a time: several sweeps, and one
def test_permutations_are_those_of_the_joined_sample(monkeypatch, entries):
    monkeypatch.setattr(two_sample, "_ENTRIES", entries)
    x, y = points(4, 2), points(6, 2) + 1
    z, divisions = torch.cat([x, y]), []
    for chunk in two_sample._divisions(z, 4, 30, seeded(3)):
        divisions += [column.bool() for column in chunk.unbind(-1)]
    assert len(divisions) == 31
    assert torch.equal(divisions[0], torch.arange(10) < 4)
    assert all(division.sum() == 4 for division in divisions)
    assert len({tuple(division.tolist()) for division in divisions}) > 15
    values = torch.stack([mmd2(z[d], z[~d], 1.3) for d in divisions])
    expected = (values >= values[0] - 1e-12).double().mean()
    outcome = mmd2_test(x, y, 1.3, 30, seeded(3))
    torch.testing.assert_close(outcome.p_value, expected)
    torch.testing.assert_close(outcome.statistic, values[0])


def test_equal_divisions_count_as_equal():
    """Six divisions of four points are three and their mirror images: p is in thirds."""
    x, y = draws(30, 2, 2, 0.0, 1.0, dim=1)
    p_value = mmd2_test(x, y, 1.0, 3000, seeded(0)).p_value
    thirds = (3 * p_value).round()
    assert set(thirds.tolist()) == {1.0, 2.0, 3.0}
    assert (p_value - thirds / 3).abs().max() < 4.5 * math.sqrt(2 / 9 / 3000)
    same = torch.full((6, 2), 0.1)
    assert mmd2_test(same, same[:3], 1.0, 20).p_value == 1.0


def test_equal_divisions_of_many_points_count_as_equal():
    z = torch.tensor([0.1, 0.8]).repeat(150)[:, None]  # how many of each are in a group decides
    chunks = two_sample._divisions(z.double(), 100, 100, seeded(0))
    ones = torch.cat([(d * (z > 0.5)).sum(0) for d in chunks])
    expected = ((ones - 50).abs() >= (ones[0] - 50).abs()).double().mean()
    for sigma in (0.01, 0.7, 30.0):
        found = mmd2_test(z[:100], z[100:], sigma, 100, seeded(0)).p_value
        torch.testing.assert_close(found, expected)


def test_the_test_can_be_repeated():
    x, y = points(10, 2), points(10, 2) + 0.4
    first, second, other = (mmd2_test(x, y, 1.0, 500, seeded(s)).p_value for s in (1, 1, 2))
    assert first == second
    assert first != other


# --- errors

X = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_kernel([1.0]), TypeError, "x must be a tensor"),
        (lambda: linear_kernel(X.int()), TypeError, "x must be a dense tensor of float16"),
        (lambda: linear_kernel(X[0]), ValueError, r"x must be points .*got shape \(2,\)"),
        (lambda: linear_kernel(X, X.double()), ValueError, "y must have the dtype and device of x"),
        (lambda: linear_kernel(X, X[:, :1]), ValueError, "y must have points of 2 dimensions"),
        (lambda: linear_kernel(X.expand(2, 5, 2), X.expand(3, 5, 2)), ValueError, "broadcast"),
        (lambda: polynomial_kernel(X, degree=2.0), TypeError, "degree must be an int"),
        (lambda: polynomial_kernel(X, degree=0), ValueError, "degree must be at least 1, got 0"),
        (lambda: polynomial_kernel(X, offset=-1.0), ValueError, "offset must be .* got -1.0"),
        (lambda: laplacian_kernel(X, sigma=0.0), ValueError, "sigma must be positive"),
        (lambda: laplacian_kernel(X, sigma="1"), TypeError, "sigma must be a number"),
        (lambda: rational_quadratic_kernel(X, alpha=0), ValueError, "alpha must be .* got 0"),
        (lambda: rational_quadratic_kernel(X, alpha="1"), TypeError, "alpha must be a number"),
        (lambda: median_bandwidth(X[:1]), ValueError, "x and y must hold at least 2 .* got 1"),
        (lambda: median_bandwidth(X[None]), ValueError, r"x must be points \[n, d\]"),
        (lambda: median_bandwidth(X, X[None]), ValueError, r"y must be points \[n, d\]"),
        (lambda: median_bandwidth(X, max_points=1), ValueError, "max_points must be at least 2"),
        (lambda: median_bandwidth(X, generator=3), TypeError, "generator must be a torch.Gen"),
        (lambda: mean_squared_distance_bandwidth(X[:1]), ValueError, "at least 2 points"),
        (lambda: AdaptiveBandwidth("fixed"), ValueError, "policy must be one of learned, ema"),
        (lambda: AdaptiveBandwidth(initial=0.0), ValueError, "initial must be positive"),
        (lambda: AdaptiveBandwidth(initial="1"), TypeError, "initial must be a number"),
        (lambda: AdaptiveBandwidth(decay=1.0), ValueError, r"decay must be in \[0, 1\), got 1.0"),
        (lambda: AdaptiveBandwidth(max_points=1), ValueError, "max_points must be at least 2"),
        (lambda: RandomFourierFeatures(0, 4), ValueError, "dim must be at least 1"),
        (lambda: RandomFourierFeatures(2, 5), ValueError, "num_features must be a multiple of 2"),
        (lambda: RandomFourierFeatures(3, 4)(X), ValueError, "x must have points of 3 dimensions"),
        (lambda: RandomFourierFeatures(2, 4)(X.to("meta")), ValueError, "device of the features"),
        (
            lambda: random_fourier_features(X, 6, (1.0, 2.0)),
            ValueError,
            "num_features must be a multiple of 4, .* got 6",
        ),
        (lambda: random_fourier_features(X, 0), ValueError, "num_features must be at least 1"),
        (lambda: random_fourier_features(X, 4, generator=1), TypeError, "generator must be"),
        (lambda: nystrom_features(X, X[:0]), ValueError, "landmarks must hold at least one"),
        (lambda: nystrom_features(X, X.half()), ValueError, "landmarks must have the dtype"),
        (lambda: mmd2_block(X, X, 1.0, 1), ValueError, "block_size must be at least 2, got 1"),
        (lambda: mmd2_block(X, X[:4], 1.0, 5), ValueError, "block_size must be at most 4"),
        (lambda: mmd2_block(X, X, 1.0, 2.0), TypeError, "block_size must be an int"),
        (lambda: mmd2_block(X[:1], X), ValueError, "x must hold at least 2 points"),
        (lambda: mmd2_variance(X, X[:3]), ValueError, "y must hold at least 4 points"),
        (lambda: mmd2_test(X, X[:1]), ValueError, "y must hold at least 2 points"),
        (lambda: mmd2_test(X, X, num_permutations=0), ValueError, "num_permutations must be at"),
        (lambda: mmd2_test(X, X, generator=0), TypeError, "generator must be a torch.Generator"),
        (lambda: mmd2_test(X, X, sigma=-1.0), ValueError, "sigma must be positive"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_everything_is_exported():
    for name in kernels.__all__:
        assert getattr(kernels, name).__doc__
    assert sorted(kernels.__all__) == kernels.__all__


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_p_value_without_a_statistic(bad):
    x, y = torch.randn(20, 2), torch.randn(20, 2)
    x[3, 1] = bad
    assert kernels.mmd2_test(x, y, num_permutations=20).p_value.isnan() or bad == torch.inf
    assert kernels.mean_squared_distance_bandwidth(x).isnan()
