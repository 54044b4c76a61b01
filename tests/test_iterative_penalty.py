"""The penalty that follows a distance: against WGAN-GP, SciPy, its formulas and its limits."""

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from torch import nn

from hessreg.gan import DEFAULTS, Discriminator, Generator, Run, TrainConfig, Trainer, make_loss
from hessreg.gan.options import IterativeConfig
from hessreg.gan.pictures import save_curves
from hessreg.regularizers import WGANGP, IterativeGradientPenalty, Regularizer, StepContext


class Quadratic(nn.Module):
    """D(x) = x' A x / 2, with slope A x."""

    def __init__(self, d):
        super().__init__()
        matrix = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
        self.weight = nn.Parameter(matrix + matrix.mT)

    def forward(self, x):
        flat = x.flatten(1)
        return 0.5 * ((flat @ self.weight) * flat).sum(1)


def normal(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def context(real, fake, discriminator=None):
    discriminator = discriminator or Quadratic(real[0].numel())
    loss = discriminator(real).mean()
    return StepContext(0, discriminator, discriminator, None, loss, real=real, fake=fake)


def after(regularizer, *contexts):
    for ctx in contexts:
        regularizer.loss_terms(ctx)
    return regularizer.metrics()


def small_trainer(regularizer):
    torch.manual_seed(0)
    data = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    networks = Generator(width=16), Discriminator(width=16)
    return Trainer(*networks, data, [regularizer], batch_size=8, loss=make_loss("wasserstein"))


@pytest.mark.parametrize(
    "constant", [{"lam_min": 3.7}, {"power": 0.0}], ids=["smallest", "without power"]
)
@pytest.mark.parametrize("distance", ["mmd", "energy", "critic"])
def test_uniform_points_and_a_constant_weight_are_wgan_gp_to_the_last_bit(constant, distance):
    follower = IterativeGradientPenalty(
        3.7, distance=distance, schedule="uniform", seed=5, **constant
    )
    mine, theirs = small_trainer(follower), small_trainer(WGANGP(3.7, seed=5))
    for _ in range(6):
        mine.step()
        theirs.step()
    assert mine.metrics()["iterative"] == theirs.metrics()["wgan_gp"]
    ours, known = mine.state_dict(), theirs.state_dict()
    for name in ("generator", "discriminator", "ema"):
        for key, value in known[name].items():
            assert torch.equal(ours[name][key], value), (name, key)
    assert torch.equal(ours["regularizers"][0]["random"], known["regularizers"][0]["random"])


@pytest.mark.parametrize("distance", ["mmd", "energy", "critic"])
def test_equal_distributions_leave_the_smallest_weight_at_the_data(distance):
    real, far = normal(6, 4), normal(6, 4, seed=1) + 5
    regularizer = IterativeGradientPenalty(10.0, distance=distance, decay=0.0, lam_min=0.5)
    start = after(regularizer, context(real, far))
    assert (start["rho"], start["lambda"]) == (1.0, 10.0)
    torch.testing.assert_close(regularizer.points(context(real, far)), far, rtol=0, atol=1e-14)
    same = context(real, real.clone())
    end = after(regularizer, same)
    assert (end["rho"], end["lambda"], end["distance"]) == (0.0, 0.5, 0.0)
    assert torch.equal(regularizer.points(context(real, far)), real)


def test_distributions_that_were_never_apart():
    real = normal(6, 4)
    assert after(IterativeGradientPenalty(), context(real, real.clone()))["rho"] == 0.0


def test_the_default_smallest_weight_is_a_tenth():
    real = normal(6, 4)
    assert after(IterativeGradientPenalty(7.0), context(real, real))["lambda"] == pytest.approx(0.7)


@pytest.mark.parametrize("shape", [(6, 4), (5, 1, 2, 2)])
@pytest.mark.parametrize(("power", "point_power"), [(1.0, 1.0), (2.0, 0.5)])
def test_points_and_weight_follow_the_formulas(shape, power, point_power):
    real, far = normal(*shape), normal(*shape, seed=1) + 8
    regularizer = IterativeGradientPenalty(
        10.0, distance="energy", power=power, point_power=point_power, lam_min=0.0, decay=0.0
    )
    near = real + 0.3 * (far - real)
    ctx = context(real, near)
    regularizer.loss_terms(context(real, far))
    _, term = regularizer.loss_terms(ctx)
    rho = regularizer.metrics()["rho"]
    assert 0.1 < rho < 0.9
    points = ((1 - rho**point_power) * real + rho**point_power * near).flatten(1)
    slopes = points @ ctx.discriminator.weight
    expected = 10 * rho**power * (slopes.norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=0)


def test_several_points_lie_evenly_on_the_way():
    real, fake = normal(6, 4), normal(6, 4, seed=1)
    regularizer = IterativeGradientPenalty(num_points=3)
    ctx = context(real, fake)
    _, term = regularizer.loss_terms(ctx)  # the first step: rho is 1
    wanted = torch.cat([real + share * (fake - real) for share in (1 / 3, 2 / 3, 1)])
    torch.testing.assert_close(regularizer.points(ctx), wanted)
    slopes = wanted @ ctx.discriminator.weight
    torch.testing.assert_close(term, 10 * (slopes.norm(dim=1) - 1).square().mean())


def test_jitter_blends_towards_random_points():
    real = torch.zeros(4000, 1, dtype=torch.float64)
    ctx = context(real, torch.ones_like(real))
    regularizer = IterativeGradientPenalty(jitter=0.25, distance="critic")
    regularizer.loss_terms(ctx)
    shares = regularizer.points(ctx)  # 0.75 rho + 0.25 u with rho = 1
    assert shares.min() >= 0.75
    assert shares.max() <= 1
    assert scipy.stats.kstest(shares.detach()[:, 0].numpy(), "uniform", (0.75, 0.25)).pvalue > 1e-3


def test_energy_distance_is_scipys_without_bias():
    x, y = normal(7, 3), normal(7, 3, seed=1) + 1
    across = scipy.spatial.distance.cdist(x, y).mean()
    within = sum(scipy.spatial.distance.pdist(points).mean() for points in (x, y))
    found = after(IterativeGradientPenalty(distance="energy"), context(x, y))["distance"]
    assert found == pytest.approx((2 * across - within) ** 0.5, rel=1e-12)


def test_energy_distance_tends_to_scipys_on_a_line():
    x, y = normal(3000, 1), normal(3000, 1, seed=1) + 2
    known = scipy.stats.energy_distance(x[:, 0], y[:, 0])
    found = after(IterativeGradientPenalty(distance="energy"), context(x, y))["distance"]
    assert found == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize("sigma", ["median", 1.5, (0.5, 2.0)])
def test_mmd_has_the_median_bandwidth_of_the_first_data(sigma):
    real, fake = normal(9, 3), normal(9, 3, seed=1) + 1
    widths = [np.median(scipy.spatial.distance.pdist(real))] if sigma == "median" else sigma
    distances = [scipy.spatial.distance.cdist(a, b) for a, b in ((real, real), (fake, fake))]
    across = scipy.spatial.distance.cdist(real, fake)
    squared = np.mean(
        [
            sum((np.exp(-(d**2) / (2 * w**2)).sum() - 9) / 72 for d in distances)
            - 2 * np.exp(-(across**2) / (2 * w**2)).mean()
            for w in np.atleast_1d(widths)
        ]
    )
    regularizer = IterativeGradientPenalty(sigma=sigma, decay=0.0)
    found = after(regularizer, context(real, fake))["distance"]
    assert found == pytest.approx(squared**0.5, rel=1e-10)
    # Later data do not move it: distances of different steps are comparable.
    after(regularizer, context(10 * real, fake))
    assert after(regularizer, context(real, fake))["distance"] == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("distance", ["mmd", "energy"])
def test_the_distance_of_a_shift_of_normals_is_the_closed_one(distance):
    shift, n = 3.0, 4000
    x, y = normal(n, 1), normal(n, 1, seed=1) + shift
    # E k(x, y) of two normals is a normal density of variance 2 + sigma^2, here with sigma 1;
    # E|x - y| the mean of a folded normal of variance 2.
    if distance == "mmd":
        squared = 2 / 3**0.5 * (1 - np.exp(-(shift**2) / 6))
    else:
        folded = [scipy.stats.foldnorm.mean(m / 2**0.5, scale=2**0.5) for m in (shift, 0.0)]
        squared = 2 * (folded[0] - folded[1])
    regularizer = IterativeGradientPenalty(distance=distance, sigma=1.0)
    assert after(regularizer, context(x, y))["distance"] == pytest.approx(squared**0.5, rel=0.03)


def test_critics_gap():
    ctx = context(normal(6, 4), normal(6, 4, seed=1))
    with torch.no_grad():
        gap = ctx.discriminator(ctx.real).mean() - ctx.discriminator(ctx.fake).mean()
    regularizer = IterativeGradientPenalty(distance="critic")
    assert after(regularizer, ctx)["distance"] == pytest.approx(abs(gap.item()), rel=1e-14)


def test_estimates_are_smoothed_and_the_largest_kept():
    real = normal(6, 4)
    contexts = [context(real, real + shift) for shift in (2.0, 6.0, 1.0)]
    single = [
        after(IterativeGradientPenalty(distance="energy"), ctx)["distance"] for ctx in contexts
    ]
    regularizer = IterativeGradientPenalty(distance="energy", decay=0.75)
    mean, largest = single[0] ** 2, single[0]
    for ctx, now in zip(contexts, single, strict=True):
        mean = 0.75 * mean + 0.25 * now**2
        largest = max(largest, mean**0.5)
        found = after(regularizer, ctx)
        assert found["distance"] == pytest.approx(mean**0.5, rel=1e-12)
        assert found["rho"] == pytest.approx(mean**0.5 / largest, rel=1e-12)
    assert found["rho"] < 1


def test_gradient_in_the_weights_is_differentiable_itself():
    network = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1), nn.Flatten(0)).double()
    weights = {name: p.detach() for name, p in network.named_parameters()}
    real, fake = normal(5, 3), normal(5, 3, seed=1) + 2

    def penalty(*values):
        changed = dict(zip(weights, values, strict=True))

        def discriminator(x):
            return torch.func.functional_call(network, changed, (x,))

        regularizer = IterativeGradientPenalty(num_points=2, jitter=0.5)
        ctx = StepContext(0, network, discriminator, None, real.sum(), real=real, fake=fake)
        return regularizer.loss_terms(ctx)[1]

    inputs = [value.clone().requires_grad_() for value in weights.values()]
    assert torch.autograd.gradcheck(penalty, inputs)
    assert torch.autograd.gradgradcheck(penalty, inputs)


def test_samples_get_no_gradient():
    real, fake = normal(5, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    _, term = IterativeGradientPenalty(distance="critic").loss_terms(context(real, fake))
    term.backward()
    assert real.grad is None
    assert fake.grad is None


@pytest.mark.parametrize("options", [{}, {"distance": "critic", "jitter": 0.5, "num_points": 2}])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, options):
    config = TrainConfig(
        regularizer="iterative", loss="wasserstein", steps=12, width=16, save_every=6, log_every=1,
        tensorboard=False, iterative=IterativeConfig(**options),
    )  # fmt: skip
    whole = Run.create(tmp_path / "whole", config)
    whole.train()
    Run.create(tmp_path / "parts", config).close()
    first = Run.resume(tmp_path / "parts", steps=6)
    first.train()
    second = Run.resume(tmp_path / "parts", steps=12)
    second.train()
    for a, b in zip(whole.trainer.ema.parameters(), second.trainer.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [run.folder.read_metrics() for run in (whole, second)]
    logged = "step", "loss_d", "iterative", "rho", "lambda", "distance"
    taken, resumed = ([[row[name] for name in logged] for row in each] for each in rows)
    assert taken == resumed
    assert len(taken) == 12
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 0


def test_curves_show_path_and_weight(tmp_path):
    rows = [
        {"cpu_seconds": t, "fdd": 1.0, "rho": 1 / t, "lambda": 2 / t, "distance": 3 / t}
        for t in (1.0, 2.0)
    ]
    save_curves(tmp_path / "with.png", {"run": rows}, ("fdd", "FDD"))
    save_curves(
        tmp_path / "without.png", {"run": [{**r, "rho": 1.0} for r in rows]}, ("fdd", "FDD")
    )
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_hooks_and_state():
    regularizer = IterativeGradientPenalty(jitter=0.5)
    assert isinstance(regularizer, Regularizer)
    assert regularizer.metrics() == {}
    untouched = IterativeGradientPenalty()
    untouched.load_state_dict(regularizer.state_dict())
    assert untouched.metrics() == {}
    ctx = context(normal(6, 4), normal(6, 4, seed=1))
    for_generator = StepContext(0, ctx.generator, ctx.discriminator, ctx.real.sum(), None)
    assert regularizer.loss_terms(for_generator) == (None, None)
    regularizer.loss_terms(ctx)
    again = IterativeGradientPenalty(jitter=0.5)
    again.load_state_dict(regularizer.state_dict())
    nearer = context(ctx.real, ctx.real + 0.5 * (ctx.fake - ctx.real))
    assert again.loss_terms(nearer)[1] == regularizer.loss_terms(nearer)[1]
    assert again.metrics() == regularizer.metrics()


@pytest.mark.parametrize(
    "change", [{"unknown": torch.ones(())}, {"mean": 1.0}, {"mean": None}, {"largest": "x"}]
)
def test_other_states_are_refused(change):
    regularizer = IterativeGradientPenalty()
    regularizer.loss_terms(context(normal(6, 4), normal(6, 4, seed=1)))
    state = {k: v for k, v in (regularizer.state_dict() | change).items() if v is not None}
    with pytest.raises(ValueError, match="state"):
        regularizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be finite and not negative"),
        ({"power": float("nan")}, "power must be finite and not negative"),
        ({"point_power": -1.0}, "point_power must be finite"),
        ({"lam_min": 11.0}, r"lam_min must be at most weight, 10.0, got 11.0"),
        ({"jitter": 1.5}, r"jitter must be in \[0, 1\], got 1.5"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"num_points": 0}, "num_points must be at least 1, got 0"),
        ({"distance": "sinkhorn"}, "distance must be one of mmd, energy, critic, got 'sinkhorn'"),
        ({"schedule": "random"}, "schedule must be one of distance, uniform, got 'random'"),
        ({"sigma": "mean"}, "sigma must be one of median, got 'mean'"),
        ({"sigma": 0.0}, "sigma"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        IterativeGradientPenalty(**options)


@pytest.mark.parametrize(
    "options",
    [{"lam_min": 11.0}, {"jitter": 1.5}, {"decay": 1.0}, {"num_points": 0}, {"sigma": "ema"},
     {"power": -1.0}, {"distance": "sinkhorn"}],
)  # fmt: skip
def test_options_of_a_run_are_checked(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        IterativeConfig(**options)


def test_batches_of_one_are_for_the_critic():
    ctx = context(normal(1, 4), normal(1, 4, seed=1))
    for distance in ("mmd", "energy"):
        with pytest.raises(ValueError, match=f"distance {distance} needs at least 2 samples, got"):
            IterativeGradientPenalty(distance=distance).loss_terms(ctx)
    assert after(IterativeGradientPenalty(distance="critic"), ctx)["rho"] == 1.0
    with pytest.raises(ValueError, match="batch_size must be at least 2 with iterative"):
        TrainConfig(regularizer="iterative", batch_size=1)
    critic = IterativeConfig(distance="critic")
    assert TrainConfig(regularizer="iterative", batch_size=1, iterative=critic).batch_size == 1


def test_pairs_are_wanted():
    ctx = context(normal(6, 4), normal(5, 4))
    with pytest.raises(ValueError, match=r"IterativeGradientPenalty needs as many real as"):
        IterativeGradientPenalty().loss_terms(ctx)


def test_every_data_set_has_the_options():
    assert {type(config.iterative) for config in DEFAULTS.values()} == {IterativeConfig}
