"""Adversarial losses against other formulations of them, and in games whose solution is known."""

import pytest
import torch
from torch.nn import functional as F

from hessreg.gan import (
    LOSSES,
    Discriminator,
    Generator,
    HessianCorrectedGradients,
    HSCConfig,
    MMDLoss,
    ProjectionConfig,
    TrainConfig,
    Trainer,
    make_loss,
)
from hessreg.regularizers import HSN1R, R2, WGANGP

REAL = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
FAKE = torch.tensor([-0.5, 1.5, 0.0, -2.0], dtype=torch.float64)


def total(loss, real=REAL, fake=FAKE):
    return torch.stack(loss.discriminator(real, fake)).sum()


def outputs(loss, count, generator):
    shape = (count, loss.outputs) if loss.outputs > 1 else (count,)
    return torch.rand(shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("real", "fake"), [(1.0, 0.0), (0.9, 0.0), (0.8, 0.2)])
def test_nonsaturating_is_binary_cross_entropy(real, fake):
    loss = make_loss("nonsaturating", 1 - real, both=fake > 0)
    expected = F.binary_cross_entropy_with_logits(REAL, torch.full_like(REAL, real))
    expected += F.binary_cross_entropy_with_logits(FAKE, torch.full_like(FAKE, fake))
    torch.testing.assert_close(total(loss), expected, rtol=1e-14, atol=0)
    wanted = F.binary_cross_entropy_with_logits(FAKE, torch.ones_like(FAKE))
    torch.testing.assert_close(loss.generator(FAKE, REAL), wanted, rtol=1e-14, atol=0)


def test_minimax_is_zero_sum_and_saturates():
    loss, other = make_loss("minimax"), make_loss("nonsaturating")
    assert loss.discriminator(REAL, FAKE) == other.discriminator(REAL, FAKE)
    assert loss.generator(FAKE, REAL) == -loss.discriminator(REAL, FAKE)[1]
    sure = torch.full((3,), -20.0, requires_grad=True)
    slopes = [torch.autograd.grad(each.generator(sure, sure), sure)[0] for each in (loss, other)]
    assert slopes[0].abs().max() < 1e-8 < 0.3 < slopes[1].abs().max()


def test_least_squares_with_labels():
    loss = make_loss("least_squares", label_smoothing=0.1, both=True)
    assert loss.discriminator(REAL, FAKE)[0] == 0.5 * F.mse_loss(REAL, torch.full_like(REAL, 0.9))
    assert loss.discriminator(REAL, FAKE)[1] == 0.5 * F.mse_loss(FAKE, torch.full_like(FAKE, 0.1))
    assert loss.generator(FAKE, REAL) == 0.5 * F.mse_loss(FAKE, torch.full_like(FAKE, 0.9))


def test_hinge_ignores_what_is_beyond_the_margin():
    loss = make_loss("hinge")
    real = REAL.clone().requires_grad_()
    parts = loss.discriminator(real, FAKE)
    assert [part.item() for part in parts] == [(0 + 2 + 0.5 + 0) / 4, (0.5 + 2.5 + 1 + 0) / 4]
    assert torch.autograd.grad(parts[0], real)[0].tolist() == [0, -0.25, -0.25, 0]
    assert loss.generator(FAKE, REAL) == 0.25


def test_wasserstein_is_the_difference_of_means():
    loss = make_loss("wasserstein")
    assert total(loss) == FAKE.mean() - REAL.mean()
    assert loss.generator(FAKE, REAL) == -FAKE.mean()


def test_relativistic_sees_differences_only_and_is_symmetric():
    loss = make_loss("relativistic")
    torch.testing.assert_close(total(loss, REAL + 7, FAKE + 7), total(loss), rtol=1e-14, atol=0)
    assert total(loss, FAKE, REAL) == loss.generator(FAKE, REAL)
    expected = -(REAL - FAKE).sigmoid().log().mean()
    torch.testing.assert_close(total(loss), expected, rtol=1e-14, atol=0)


def test_mmd_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    loss = MMDLoss(sigmas=(0.5, 2.0), outputs=3)
    real, fake = outputs(loss, 6, generator), outputs(loss, 5, generator)

    def kernel(a, b):
        squares = (a[:, None] - b[None]).square().sum(-1)
        return sum((-squares / (2 * s * s)).exp() for s in loss.sigmas) / 2

    within = [(kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (real, fake)]
    expected = sum(within) - 2 * kernel(real, fake).mean()
    torch.testing.assert_close(loss.generator(fake, real), expected, rtol=1e-12, atol=1e-14)
    assert total(loss, real, fake) == -loss.generator(fake, real)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_separates_and_fools(name):
    """Both players, on the outputs themselves, move as they should, and twice differentiably."""
    loss = make_loss(name)
    generator = torch.Generator().manual_seed(1)
    real, fake = outputs(loss, 8, generator), outputs(loss, 8, generator)
    of_d = torch.autograd.grad(total(loss, real, fake), (real, fake), create_graph=True)
    of_g = torch.autograd.grad(loss.generator(fake, real), fake, create_graph=True)[0]
    assert torch.stack(loss.discriminator(real, fake)).shape == ((2,) if loss.has_parts else (1,))
    assert (of_d[1] * of_g).sum() < 0  # what the discriminator wants down, the generator wants up
    by_real = torch.autograd.grad(
        loss.generator(fake, real), real, allow_unused=True, materialize_grads=True
    )[0]
    assert bool(by_real.any()) == loss.compares
    assert torch.autograd.gradcheck(lambda r, f: total(loss, r, f), (real, fake))
    assert torch.autograd.gradgradcheck(lambda r, f: total(loss, r, f) ** 2, (real, fake))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wgan",), "loss must be one of nonsaturating, minimax"),
        (("hinge", 0.1), "label_smoothing is for losses with labels, nonsaturating"),
        (("minimax", 0.5), r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (("minimax", -0.1), "label_smoothing must be in"),
        (("minimax", float("nan")), "label_smoothing must be in"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_loss(*arguments)


def trainer(name, seed=0, regularizers=()):
    loss = make_loss(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = Generator("mlp", 4, 8), Discriminator("mlp", 8, outputs=loss.outputs)
        images = torch.rand(40, 1, 8, 8) * 2 - 1
    return Trainer(*networks, images, regularizers, batch_size=8, seed=seed, loss=loss)


@pytest.mark.parametrize("name", LOSSES)
def test_trainer_steps_along_both_gradients(name):
    """The first step of Adam is the sign of the gradient, which is taken by hand here."""
    each, by_hand = trainer(name), trainer(name)
    loss, d, g = each.loss, by_hand.discriminator, by_hand.generator
    real = by_hand.data[next(by_hand.batches.sampler)]
    noise = [torch.randn(8, 4, generator=by_hand.batches.noise) for _ in range(2)]
    parts = loss.discriminator(d(real), d(g(noise[0]).detach()))
    of_d = torch.autograd.grad(torch.stack(parts).sum(), list(d.parameters()))
    each.step()
    moved_d = [b - a for a, b in zip(d.parameters(), each.discriminator.parameters(), strict=True)]
    of_g = torch.autograd.grad(
        loss.generator(each.discriminator(g(noise[1])), each.discriminator(real)),
        list(g.parameters()),
    )
    moved_g = [b - a for a, b in zip(g.parameters(), each.generator.parameters(), strict=True)]
    for gradient, moved in zip([*of_d, *of_g], [*moved_d, *moved_g], strict=True):
        seen = gradient.abs() > 1e-5
        assert torch.equal(gradient[seen].sign(), -moved[seen].sign())


@pytest.mark.parametrize("name", LOSSES)
def test_regularisers_take_every_loss(name):
    """Hessian norms, corrections and penalties see the loss that is trained with."""
    loss = make_loss(name)
    hsn1r, hsc = (
        HSN1R(norm="spectral", weight=1e-3),
        HessianCorrectedGradients(loss=loss, num_steps=3),
    )
    each = trainer(name, regularizers=[hsn1r, WGANGP(), R2(), hsc])
    for _ in range(2):
        each.step()
    each.check_weights()
    metrics = each.metrics()
    assert {"hessian_norm_g", "hessian_norm_d", "wgan_gp", "r2", "hsc_turn_g"} <= metrics.keys()
    norm = HSN1R(norm="spectral", weight=1.0, num_steps=30)
    real, noise = each.data[:8], torch.randn(8, 4)
    fake = each.generator(noise).detach()
    d = each.discriminator
    value = norm.penalty(lambda: loss.of_discriminator(d, real, fake), d.parameters())
    assert value.isfinite()


def test_outputs_for_real_samples_are_constant_for_the_generator():
    each = trainer("relativistic")
    seen = []
    each.discriminator.register_forward_hook(lambda *given: seen.append(torch.is_grad_enabled()))
    real, fake = each.data[:8], each.generator(torch.randn(8, 4))
    loss = each.loss.of_generator(each.discriminator, real, fake)
    assert seen == [True, False]
    assert loss.requires_grad
    seen.clear()
    make_loss("hinge").of_generator(each.discriminator, real, fake)
    assert seen == [True]


def test_real_and_fake_parts_are_wanted_of_losses_that_have_them():
    options = {"orthogonal": "terms", "regularizer": "none"}
    parts = ProjectionConfig(pair="real_fake")
    TrainConfig(loss="hinge", projection=parts, **options)
    with pytest.raises(ValueError, match="loss relativistic has no part on real samples alone"):
        TrainConfig(loss="relativistic", projection=parts, **options)


def test_configuration_refuses_smoothing_without_labels():
    TrainConfig(loss="least_squares", label_smoothing=0.1, smoothing="both")
    with pytest.raises(ValueError, match="label_smoothing is for losses with labels"):
        TrainConfig(loss="wasserstein", label_smoothing=0.1)


def test_configuration_refuses_batches_too_small_for_mmd():
    options = {"loss": "mmd", "regularizer": "none"}
    TrainConfig(**options, batch_size=2, correction="hsc", hsc=HSCConfig(rows=2))
    TrainConfig(**options, hsc=HSCConfig(rows=1))  # not used
    with pytest.raises(ValueError, match="batch_size must be at least 2 with mmd, got 1"):
        TrainConfig(**options, batch_size=1)
    with pytest.raises(ValueError, match=r"hsc\.rows must be 0 or at least 2 with mmd, got 1"):
        TrainConfig(**options, correction="hsc", hsc=HSCConfig(rows=1))
