"""Gradient penalties on functions whose slope is known."""

import pytest
import torch
from torch import nn

from hessreg.regularizers import DRAGAN, R1, R2, WGANGP, Regularizer, StepContext

ALL = {"R1": R1, "R2": R2, "WGANGP": WGANGP, "DRAGAN": DRAGAN}


class Quadratic(nn.Module):
    """D(x) = x' A x / 2, with slope A x."""

    def __init__(self, d, dtype=torch.float64):
        super().__init__()
        matrix = torch.randn(d, d, dtype=dtype, generator=torch.Generator().manual_seed(d))
        self.weight = nn.Parameter(matrix + matrix.mT)

    def forward(self, x):
        flat = x.flatten(1)
        return 0.5 * ((flat @ self.weight) * flat).sum(1)


def context(discriminator, shape=(6, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    real, fake = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    loss = discriminator(real).mean()
    return StepContext(0, discriminator, discriminator, None, loss, real=real, fake=fake)


def penalty(regularizer, ctx):
    for_generator, for_discriminator = regularizer.loss_terms(ctx)
    assert for_generator is None
    return for_discriminator


@pytest.mark.parametrize(("kind", "samples"), [(R1, "real"), (R2, "fake")])
def test_squared_slopes(kind, samples):
    discriminator = Quadratic(4)
    ctx = context(discriminator)
    slopes = getattr(ctx, samples) @ discriminator.weight
    expected = 1.5 * slopes.square().sum(1).mean()
    torch.testing.assert_close(penalty(kind(gamma=3.0), ctx), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ALL.values())
@pytest.mark.parametrize(
    "outputs", [lambda x: x.detach().sum(1), lambda x: torch.ones(len(x), requires_grad=True)]
)
def test_outputs_must_depend_on_the_samples(kind, outputs):
    ctx = context(Quadratic(4))
    ctx.discriminator = outputs
    with pytest.raises(ValueError, match="must return what depends on the samples"):
        kind().loss_terms(ctx)


@pytest.mark.parametrize("kind", [R1, R2])
def test_outputs_that_are_there_are_not_made_again(kind):
    discriminator = Quadratic(4)
    ctx = context(discriminator)
    expected = penalty(kind(), ctx)
    ctx.real, ctx.fake = ctx.real.requires_grad_(), ctx.fake.requires_grad_()
    ctx.outputs = discriminator(ctx.real), discriminator(ctx.fake)
    ctx.discriminator = None
    found = penalty(kind(), ctx)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(each, discriminator.weight)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(6, 4), (5, 1, 2, 2)])
def test_wgan_gp_between_the_pairs(shape):
    discriminator = Quadratic(4)
    ctx = context(discriminator, shape)
    # As published: the same numbers, drawn by hand.
    u = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=torch.Generator().manual_seed(5))
    points = (ctx.real + u.double() * (ctx.fake - ctx.real)).requires_grad_()
    (slopes,) = torch.autograd.grad(discriminator(points).sum(), points)
    expected = 10 * ((slopes.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    torch.testing.assert_close(penalty(WGANGP(seed=5), ctx), expected, rtol=1e-13, atol=0)


def test_dragan_stays_near_the_data():
    discriminator = Quadratic(4)
    ctx = context(discriminator)
    points = DRAGAN(spread=0.5, seed=1).points(ctx)
    offsets = (points - ctx.real) / ctx.real.std(correction=0)
    assert (offsets >= 0).all()
    assert (offsets <= 0.5).all()
    assert 0.15 < offsets.mean() < 0.35
    slopes = points @ discriminator.weight
    expected = 2 * (slopes.norm(dim=1) - 1).square().mean()
    found = penalty(DRAGAN(weight=2.0, spread=0.5, seed=1), ctx)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_the_weights_and_only_them(name):
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    ctx = context(network)
    weights = list(network.parameters())

    def value(*changed):
        pairs = zip(weights, changed, strict=True)
        with torch.no_grad():
            before = [w.clone() for w in weights]
            for w, new in pairs:
                w.copy_(new)
        found = penalty(ALL[name](), ctx).item()
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)
        return found

    gradient = torch.autograd.grad(penalty(ALL[name](), ctx), weights, allow_unused=True)
    direction = [torch.randn_like(w) for w in weights]
    step = 1e-6
    ahead = value(*[w + step * v for w, v in zip(weights, direction, strict=True)])
    behind = value(*[w - step * v for w, v in zip(weights, direction, strict=True)])
    known = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True) if g is not None)
    assert known.item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)
    assert ctx.real.grad_fn is None
    assert not ctx.real.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_hooks_and_state(name):
    regularizer = ALL[name]()
    assert isinstance(regularizer, Regularizer)
    assert regularizer.metrics() == {}
    ctx = context(Quadratic(4))
    in_generators_phase = StepContext(0, ctx.discriminator, ctx.discriminator, ctx.real.sum(), None)
    assert regularizer.loss_terms(in_generators_phase) == (None, None)
    first = penalty(regularizer, ctx)
    assert regularizer.metrics() == {regularizer.name: first.item()}
    again = ALL[name]()
    again.load_state_dict(regularizer.state_dict())
    assert penalty(again, ctx) == penalty(regularizer, ctx)
    with pytest.raises(ValueError, match="state"):
        again.load_state_dict({"unknown": 1})


def test_random_points_change_from_step_to_step():
    ctx = context(Quadratic(4))
    for kind in (WGANGP, DRAGAN):
        regularizer = kind()
        assert penalty(regularizer, ctx) != penalty(regularizer, ctx)


@pytest.mark.parametrize(("name", "missing"), [("R1", "real"), ("R2", "fake"), ("WGANGP", "fake")])
def test_missing_samples_are_named(name, missing):
    ctx = context(Quadratic(4))
    setattr(ctx, missing, None)
    with pytest.raises(ValueError, match=f"{name} needs a batch of .* in ctx.{missing}, got None"):
        ALL[name]().loss_terms(ctx)


def test_wgan_gp_wants_pairs():
    ctx = context(Quadratic(4))
    ctx.fake = ctx.fake[:3]
    with pytest.raises(ValueError, match=r"as many real as generated samples, got \(6, 4\) and"):
        WGANGP().loss_terms(ctx)


@pytest.mark.parametrize("bad", [-1.0, float("inf"), float("nan")])
def test_weights_are_checked(bad):
    for make in (R1, R2, WGANGP, DRAGAN, lambda spread: DRAGAN(spread=spread)):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            make(bad)
