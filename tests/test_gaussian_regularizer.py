"""GaussianKernel: its terms by their definitions, its bandwidths, state and errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hessreg import mmd2
from hessreg.curvature import NonFiniteError
from hessreg.gan import Discriminator, Generator, Trainer
from hessreg.gan.checkpoint import load_state, save_state
from hessreg.kernels import median_bandwidth
from hessreg.regularizers import HSN1R, R1, GaussianKernel, Regularizer, StepContext
from tests.test_gan import equal

POLICIES = ["median", "ema", "learned"]


def batches(n=6, m=6, d=3, shift=1.0):
    random = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(k, d, generator=random, dtype=torch.float64) for k in (n, m))
    return (fake + shift).requires_grad_(True), real


def kernel(x, y, sigma):
    return torch.exp(-(x - y).square().sum(-1) / (2 * sigma**2))


def trainer(regularizers, seed=0):
    torch.manual_seed(seed)
    data = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    networks = Generator(latent_dim=2, width=8, shape=(2,)), Discriminator(width=8, shape=(2,))
    return Trainer(*networks, data, regularizers, batch_size=8, seed=seed)


def phases(fake, real, discriminator=None):
    network = discriminator or nn.Linear(fake.shape[1], 1, dtype=fake.dtype)
    zero = torch.zeros(())
    return (
        StepContext(0, network, network, zero, None, real, fake),
        StepContext(0, network, network, None, zero, real, fake.detach()),
    )


# The terms


def test_interaction_term_is_mmd2():
    fake, real = batches(6, 5)
    term = GaussianKernel(interaction_weight=3.0, sigma=0.7).penalty(fake, real)
    torch.testing.assert_close(term, 3 * mmd2(fake, real, 0.7))
    several = GaussianKernel(sigma=(0.5, 2.0)).penalty(fake, real)
    torch.testing.assert_close(several, (mmd2(fake, real, 0.5) + mmd2(fake, real, 2.0)) / 2)


def test_interaction_term_makes_the_distributions_alike():
    fake, real = batches(32, 32, 2)
    regularizer = GaussianKernel()
    first = regularizer.penalty(fake, real).item()
    for _ in range(50):
        (slope,) = torch.autograd.grad(regularizer.penalty(fake, real), [fake])
        fake = (fake - 20 * slope).detach().requires_grad_(True)
    assert first > 0.1
    assert regularizer.penalty(fake, real).item() < 0.01 * first
    torch.testing.assert_close(fake.mean(0), real.mean(0), atol=0.1, rtol=0)


@pytest.mark.parametrize(("weight", "moves_away"), [(0.01, True), (-0.01, False)])
def test_generator_term_repels_pairs_for_a_positive_weight(weight, moves_away):
    fake, real = batches()
    regularizer = GaussianKernel(interaction_weight=0, generator_weight=weight, sigma=0.5**0.5)
    term = regularizer.penalty(fake, real)
    # As in the article: exp(-sum (G - x)^2).
    torch.testing.assert_close(term, weight * torch.exp(-(fake - real).square().sum(1)).mean())
    term.backward()
    before = (fake - real).norm(dim=1)
    after = (fake - 0.1 * fake.grad - real).norm(dim=1)
    assert ((after > before) == moves_away).all()
    assert regularizer.metrics()["kernel_g"] == pytest.approx(term.item() / weight)


@pytest.mark.parametrize(("weight", "moves_away"), [(0.01, True), (-0.01, False)])
def test_discriminator_term_is_of_probabilities_and_one_half(weight, moves_away):
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([[-1.0], [-0.2]])
    logits = [t.double().requires_grad_(True) for t in (real, fake)]
    regularizer = GaussianKernel(discriminator_weight=weight)
    term = regularizer.discriminator_penalty(*logits)
    wanted = sum(torch.exp(-(t.sigmoid() - 0.5).square()).mean() for t in logits)
    torch.testing.assert_close(term, weight * wanted)
    term.backward()
    for each in logits:
        after = each - each.grad
        assert ((after.abs() > each.abs()) == moves_away).all()
    assert regularizer.metrics() == {"kernel_d": pytest.approx(wanted.item() / 2)}


@pytest.mark.parametrize("policy", [0.8, [0.5, 1.0], "median", "ema"])
def test_gradients_equal_differences(policy):
    fake, real = batches()
    regularizer = GaussianKernel(generator_weight=0.3, sigma=policy)
    regularizer.penalty(fake, real)  # an average that does not move any more
    with torch.no_grad():
        sigma = regularizer.bandwidth(fake, real)
    fixed = GaussianKernel(generator_weight=0.3, sigma=sigma.reshape(-1).tolist())
    assert torch.autograd.gradcheck(fixed.penalty, (fake, real.requires_grad_(True)))
    assert torch.autograd.gradgradcheck(fixed.penalty, (fake, real))
    (wanted,) = torch.autograd.grad(fixed.penalty(fake, real), [fake])
    (ours,) = torch.autograd.grad(regularizer.penalty(fake, real), [fake])
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-9)


def test_samples_of_any_shape_are_points():
    fake, real = batches(5, 5, 12)
    regularizer = GaussianKernel(sigma=2.0)
    images = (t.reshape(5, 3, 2, 2) for t in (fake, real))
    assert regularizer.penalty(*images).item() == regularizer.penalty(fake, real).item()


def test_terms_go_to_the_network_whose_phase_it_is():
    fake, real = batches()
    g_phase, d_phase = phases(fake, real)
    regularizer = GaussianKernel(discriminator_weight=0.1, sigma=1.0)
    assert isinstance(regularizer, Regularizer)
    g_term, nothing = regularizer.loss_terms(g_phase)
    assert nothing is None
    torch.testing.assert_close(g_term, mmd2(fake, real, 1.0))
    nothing, d_term = regularizer.loss_terms(d_phase)
    assert nothing is None
    logits = d_phase.discriminator(real), d_phase.discriminator(fake.detach())
    torch.testing.assert_close(d_term, regularizer.discriminator_penalty(*logits))
    off = GaussianKernel(interaction_weight=0)
    assert off.loss_terms(g_phase) == off.loss_terms(d_phase) == (None, None)
    assert off.metrics() == {}


def test_features_are_the_last_hidden_layer_or_what_a_callable_says():
    discriminator = Discriminator(width=8, shape=(3,)).double()
    fake, real = batches()
    context, _ = phases(fake, real, discriminator)
    features = discriminator.features(fake), discriminator.features(real)
    assert features[0].shape == (6, 8)
    torch.testing.assert_close(discriminator.layers[-1](features[0])[:, 0], discriminator(fake))
    by_name, by_callable = (
        GaussianKernel(sigma=1.0, space=space).loss_terms(context)[0]
        for space in ("features", discriminator.features)
    )
    torch.testing.assert_close(by_name, mmd2(*features, 1.0))
    assert by_name.item() == by_callable.item()


@pytest.mark.parametrize("space", ["samples", "features"])
def test_it_trains_together_with_the_others(space):
    kernels = GaussianKernel(discriminator_weight=-0.1, generator_weight=-0.1, space=space)
    both = trainer([HSN1R(weight=1e-3, num_steps=2), R1(0.5), kernels])
    for _ in range(3):
        both.step()
    metrics = both.metrics()
    assert {"r1", "hessian_norm_g", "mmd2", "sigma", "kernel_g", "kernel_d"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


# Bandwidths


def test_median_is_that_of_both_batches():
    fake, real = batches(20, 30)
    regularizer = GaussianKernel()
    regularizer.penalty(fake, real)
    assert regularizer.metrics()["sigma"] == median_bandwidth(fake, real).item()


def test_average_follows_the_median_slowly():
    fake, real = batches(20, 20)
    regularizer = GaussianKernel(sigma="ema")
    regularizer.penalty(fake, real)
    first = regularizer.metrics()["sigma"]
    assert first == pytest.approx(median_bandwidth(fake, real).item())
    regularizer.penalty(3 * fake, 3 * real)
    assert first < regularizer.metrics()["sigma"] < 1.5 * first


def test_learned_bandwidth_climbs_to_the_largest_mmd2():
    random = torch.Generator().manual_seed(0)
    real = torch.randn(50, 1, generator=random)
    fake = torch.randn(50, 1, generator=random) + 4 * torch.randint(2, (50, 1), generator=random)
    regularizer = GaussianKernel(sigma="learned")
    for _ in range(400):
        regularizer.penalty(fake, real)
    grid = torch.linspace(0.2, 5.0, 200)
    best = grid[torch.stack([mmd2(fake, real, s) for s in grid.tolist()]).argmax()].item()
    assert regularizer.metrics()["sigma"] == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_bandwidth_is_a_constant_and_rests_without_gradients(policy):
    fake, real = batches()
    regularizer = GaussianKernel(sigma=policy)
    regularizer.penalty(fake, real).backward()
    assert not regularizer.bandwidth(fake, real).requires_grad
    with torch.no_grad():
        first = regularizer.penalty(fake, real)
        assert regularizer.penalty(fake, real).item() == first.item()


def test_equal_points_have_a_bandwidth():
    points = torch.ones(4, 2)
    for policy in POLICIES:
        assert GaussianKernel(sigma=policy).penalty(points, points).item() == pytest.approx(
            0, abs=1e-6
        )


# State


@pytest.mark.parametrize("policy", POLICIES)
def test_training_from_a_saved_state_is_the_same_training(tmp_path, policy):
    def make(seed):
        return trainer([GaussianKernel(sigma=policy, discriminator_weight=0.1)], seed)

    straight, first, second = make(0), make(0), make(1)
    for _ in range(6):
        straight.step()
    for _ in range(3):
        first.step()
    save_state(tmp_path / "state", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "state"))
    for _ in range(3):
        second.step()
    assert straight.metrics() == second.metrics()
    for name in ("straight", "second"):
        save_state(tmp_path / name, locals()[name].state_dict())
    assert equal(load_state(tmp_path / "straight"), load_state(tmp_path / "second"))


def test_a_new_state_can_be_loaded():
    for policy in [1.0, *POLICIES]:
        state = GaussianKernel(sigma=policy).state_dict()
        GaussianKernel(sigma=policy).load_state_dict(state)


@pytest.mark.parametrize(
    ("policy", "change", "message"),
    [
        ("median", {"policy": "ema"}, "state is of bandwidth 'ema', this regulariser's 'median'"),
        ("median", {"sigma.average": torch.ones(())}, "bandwidth median has no state"),
        ("median", {"random": 1}, "unknown entries"),
        ("ema", {"sigma.average": torch.ones(2)}, "must be a tensor of shape"),
        ("ema", {"sigma.log_sigma": torch.ones(())}, "bandwidth's state must be"),
        ("learned", {"sigma.adam_step": torch.ones(())}, "Adam's state of the bandwidth is not"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(policy, change, message):
    regularizer = GaussianKernel(sigma=policy)
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match=message):
        regularizer.load_state_dict(before | change)
    assert str(regularizer.state_dict()) == str(before)


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"interaction_weight": math.nan}, ValueError, "interaction_weight must be finite, got"),
        ({"generator_weight": "1"}, TypeError, "generator_weight must be a number, got '1'"),
        ({"discriminator_weight": True}, TypeError, "discriminator_weight must be a number"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive and finite, and so its square, got 0"),
        ({"sigma": 1e-160}, ValueError, "and so its square, got 1e-160"),
        ({"sigma": [1.0, math.inf]}, ValueError, "and so its square, got inf"),
        ({"sigma": []}, ValueError, "sigma must hold at least one bandwidth, got none"),
        ({"sigma": "mean"}, ValueError, "median, ema, learned, got 'mean'"),
        ({"sigma": None}, TypeError, "sigma must be a number, numbers or a tensor, got .*None"),
        ({"space": "pixels"}, ValueError, "space must be samples, features or a callable, got"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        GaussianKernel(**options)


@pytest.mark.parametrize(
    ("fake", "real", "error", "message"),
    [
        ([1.0], torch.ones(2, 2), TypeError, "fake must be a floating-point tensor, got"),
        (torch.ones(2, 2), torch.ones(2, 2).int(), TypeError, "real must be .* torch.int32"),
        (torch.ones(2), torch.ones(2), ValueError, r"fake must be at least 2 points .*\(2,\)"),
        (torch.ones(1, 2), torch.ones(4, 2), ValueError, r"fake must be .* got shape \(1, 2\)"),
        (torch.ones(4, 3), torch.ones(4, 2), ValueError, r"fake .* \(2,\) like real, got \(3,\)"),
        (torch.ones(4, 2), torch.ones(5, 2), ValueError, "as many points as real .* 5, got 4"),
    ],
)
def test_bad_batches_are_refused(fake, real, error, message):
    with pytest.raises(error, match=message):
        GaussianKernel(generator_weight=0.1).penalty(fake, real)


def test_missing_batches_and_features_are_named():
    fake, real = batches()
    with pytest.raises(ValueError, match=r"needs a batch of data in ctx\.real, got None"):
        GaussianKernel().loss_terms(phases(fake, None)[0])
    with pytest.raises(ValueError, match=r"features needs a discriminator with features\(\)"):
        GaussianKernel(space="features").loss_terms(phases(fake, real)[0])


def test_points_that_are_not_finite_are_named_with_their_place():
    fake, real = batches()
    with torch.no_grad():
        fake[2, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"fake is nan at \(2, 1\)"):
        GaussianKernel().penalty(fake, real)
