"""The training module: data, metrics, one step against a hand-written one, state, run folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from hessreg.curvature import HessianOperator
from hessreg.curvature import NonFiniteError as NonFiniteCurvatureError
from hessreg.gan import (
    DEFAULTS,
    REGULARIZERS,
    Discriminator,
    GaussianConfig,
    Generator,
    HessianCorrectedGradients,
    HSCConfig,
    ImageJudge,
    MixtureJudge,
    NonFiniteError,
    NonSaturating,
    Orthogonal,
    PlayerConfig,
    ProjectionConfig,
    R1Config,
    Run,
    ShuffledSampler,
    TrainConfig,
    Trainer,
    load_dataset,
)
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import (
    CheckpointError,
    _digest,
    load_state,
    save_state,
    write_atomically,
)
from hessreg.gan.compare import _Children, _prepare
from hessreg.gan.config import FROM_FILES
from hessreg.gan.metrics import (
    classes_covered,
    copied_share,
    coverage,
    frechet_distance,
    precision_recall,
)
from hessreg.gan.mixtures import RING, grid_mixture, load_mixture, ring_mixture
from hessreg.gan.options import GridConfig, RingConfig
from hessreg.gan.pictures import save_curves, save_kernel, tile
from hessreg.gan.players import Procedure
from hessreg.gan.run_folder import RunFolder, RunFolderError
from hessreg.optim import MODES, OrthogonalGradients
from hessreg.regularizers import (
    DRAGAN,
    HSN1R,
    R1,
    R2,
    WGANGP,
    BaseRegularizer,
    GaussianKernel,
    StepContext,
)
from tests.states import equal

for package in ("matplotlib", "PIL", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def judge(digits):
    return ImageJudge(digits)


@pytest.fixture(scope="module")
def ring():
    return load_dataset("ring")


def small_trainer(regularizers=(), seed=0, architecture="mlp", orthogonal=None):
    with torch.random.fork_rng():
        images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        torch.manual_seed(seed)
        networks = Generator(architecture, 4, 8), Discriminator(architecture, 8)
    options = {"batch_size": 8, "seed": seed, "orthogonal": orthogonal}
    return Trainer(*networks, images, regularizers, **options)


# Data


def test_digits_are_split_once_and_scaled(digits):
    assert digits.train_samples.shape == (1437, 1, 8, 8)
    assert digits.test_samples.shape == (360, 1, 8, 8)
    assert digits.train_samples.min() == -1
    assert digits.train_samples.max() == 1
    assert torch.equal(digits.train_samples, load_dataset("digits").train_samples)
    train = {image.numpy().tobytes() for image in digits.train_samples}
    assert not any(image.numpy().tobytes() in train for image in digits.test_samples)


def test_ring_is_eight_narrow_gaussians(ring):
    assert ring.train_samples.shape == (40_000, 2)
    assert ring.test_samples.shape == (10_000, 2)
    assert torch.equal(ring.train_samples, load_dataset("ring").train_samples)
    torch.testing.assert_close(RING.centres.norm(dim=1), torch.full((8,), 2.0))
    for mode in range(8):
        points = ring.train_samples[ring.train_labels == mode]
        assert len(points) == pytest.approx(5000, rel=0.05)
        torch.testing.assert_close(points.mean(0), RING.centres[mode], atol=2e-3, rtol=0)
        torch.testing.assert_close(points.std(0), torch.full((2,), RING.std), rtol=0.05, atol=0)


def test_unknown_data_set_is_refused():
    known = "choose from digits, ring, grid"
    with pytest.raises(ValueError, match=f"unknown data set 'cifar'; {known}"):
        load_dataset("cifar")


MIXTURES = {
    "ring": ring_mixture(modes=5, radius=30.0, std=0.6, rotation=20.0),
    "grid": grid_mixture(side=3, spacing=7.0, std=0.1),
    "one": ring_mixture(modes=1),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_what_they_are_called(name):
    mixture = MIXTURES[name]
    data = load_mixture(mixture)
    modes = len(mixture.centres)
    for mode in range(modes):
        points = data.train_samples[data.train_labels == mode]
        assert len(points) == pytest.approx(40_000 / modes, rel=0.05)
        close = {"atol": 4 * mixture.std / len(points) ** 0.5, "rtol": 0}
        torch.testing.assert_close(points.mean(0), mixture.centres[mode], **close)
        wanted = torch.full((2,), mixture.std)
        torch.testing.assert_close(points.std(0), wanted, rtol=0.05, atol=0)
    rows = MixtureJudge(data, mixture).reference_rows()
    assert rows["training points"]["modes"] == modes
    assert rows["training points"]["quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.004)
    kept = [row["modes"] for row in list(rows.values())[2:]]
    assert kept == ([modes - 1, 1] if modes > 1 else [])


def test_mixtures_have_their_own_unit_and_networks_do_not_see_it():
    ring, grid, _ = MIXTURES.values()
    assert ring.std * ring.unit == pytest.approx(0.6)
    angle = math.radians(20)
    first = ring.unit * ring.centres[0]
    assert first.tolist() == pytest.approx([30 * math.cos(angle), 30 * math.sin(angle)])
    distances = torch.pdist(grid.unit * grid.centres)
    assert distances.min() == pytest.approx(7)
    assert distances.max() == pytest.approx(14 * 2**0.5)
    assert grid_mixture().centres.square().sum(1).mean() == pytest.approx(4)
    for modes in range(2, 8):  # few neighbours would be too far apart
        assert torch.pdist(ring_mixture(modes).centres).min() == pytest.approx(1.6)
    assert ring_mixture(8).centres.norm(dim=1).tolist() == pytest.approx([2.0] * 8)
    small = load_mixture(ring_mixture(modes=5, radius=0.03, std=0.0006, rotation=20.0))
    torch.testing.assert_close(small.train_samples, load_mixture(ring).train_samples)


def test_sampler_visits_every_sample_once_in_each_pass():
    sampler = ShuffledSampler(size=10, batch_size=4, seed=0)
    stream = torch.cat([next(sampler) for _ in range(5)])
    assert sorted(stream[:10].tolist()) == sorted(stream[10:].tolist()) == list(range(10))


def test_sampler_continues_from_its_state():
    sampler = ShuffledSampler(size=10, batch_size=4, seed=0)
    next(sampler)
    other = ShuffledSampler(size=10, batch_size=4, seed=1)
    other.load_state_dict(sampler.state_dict())
    assert all(torch.equal(next(sampler), next(other)) for _ in range(7))


@pytest.mark.parametrize("architecture", ["mlp", "dcgan"])
@pytest.mark.parametrize("activation", ["silu", "softplus", "tanh", "relu", "leaky_relu"])
def test_networks_have_the_promised_shapes(architecture, activation):
    generator = Generator(architecture, 4, 8, activation)
    images = generator.sample(3, torch.Generator())
    assert generator.training
    assert images.shape == (3, 1, 8, 8)
    assert images.abs().max() < 1
    assert Discriminator(architecture, 8, activation)(images).shape == (3,)


def test_networks_for_points():
    generator, discriminator = Generator(latent_dim=4, shape=(2,)), Discriminator(shape=(2,))
    with torch.no_grad():
        generator.layers[-2].bias.fill_(5.0)
    points = generator.sample(3, torch.Generator())
    assert points.shape == (3, 2)
    assert (points > 2).all()
    assert discriminator(points).shape == (3,)


@pytest.mark.parametrize("dataset", sorted(DEFAULTS.keys() - FROM_FILES))
def test_networks_fit_their_data_set(dataset):
    config = replace(DEFAULTS[dataset], regularizer="none", batch_size=4, width=8)
    trainer = build_trainer(config, load_dataset(dataset))
    trainer.step(done=0.0)
    assert trainer.ema.sample(2, torch.Generator()).shape[1:] == trainer.data.shape[1:]


@pytest.mark.parametrize("architecture", ["mlp", "dcgan"])
def test_features_are_what_the_last_layer_sees(architecture):
    discriminator = Discriminator(architecture, 8).eval()
    images = torch.rand(3, 1, 8, 8)
    logits = discriminator.layers[-1](discriminator.features(images))
    torch.testing.assert_close(logits.squeeze(1), discriminator(images))


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="unknown activation 'relu6'"):
        Generator(activation="relu6")
    with pytest.raises(ValueError, match="unknown architecture 'vit'"):
        Discriminator("vit")
    with pytest.raises(ValueError, match="dcgan is for images whose sides halve"):
        Generator("dcgan", shape=(2,))


# Metrics


def test_frechet_distance_of_known_gaussians():
    # Whitened samples have exactly mean 0 and covariance 1.
    x = torch.randn(400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    scale, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])
    wanted = float(shift.square().sum() + (scale - 1).square().sum())
    assert frechet_distance(x, x * scale + shift) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_manifold_metrics_of_equal_and_of_distant_sets():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x) == (1, 1)
    assert coverage(x, x) == 1
    assert precision_recall(x, x + 100) == (0, 0)
    assert coverage(x, x + 100) == 0


def test_a_collapsed_set_has_precision_but_no_recall():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x[:1].expand(50, 4)) == (1, pytest.approx(1 / 50))


def test_classes_need_a_fifth_of_their_share():
    assert classes_covered(torch.arange(100) % 10, 10) == 10
    assert classes_covered(torch.zeros(100, dtype=torch.int64), 10) == 1
    assert classes_covered(torch.tensor([0] * 97 + [1] * 2 + [2]), 10) == 2


def test_training_images_are_copies_and_test_images_are_not(digits):
    assert copied_share(digits.train_samples, digits.train_samples) == 1
    assert copied_share(digits.test_samples, digits.train_samples) < 0.01
    doubled = torch.cat([digits.train_samples, digits.train_samples])
    assert copied_share(digits.train_samples, doubled) == 1


def test_judge_is_deterministic_accurate_and_leaves_the_random_state_alone(digits, judge):
    before = torch.get_rng_state()
    again = ImageJudge(digits)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(again.features(digits.test_samples), judge.features(digits.test_samples))
    assert judge.accuracy() > 0.96


def test_reference_rows_span_the_scale(judge):
    rows = judge.reference_rows()
    fdd = [row["fdd"] for row in rows.values()]
    assert fdd == sorted(fdd)
    assert fdd[0] < 5 < 10 < fdd[1]
    assert fdd[-1] > 40
    assert rows["training images"]["copies"] == 1
    assert rows["one image per class"]["recall"] < 0.05


def test_ring_judge_of_known_sets(ring):
    judge = MixtureJudge(ring)
    rows = judge.reference_rows()
    assert [row["modes"] for row in rows.values()] == [8, 8, 7, 1]
    assert rows["training points"]["quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.004)
    assert rows["training points"]["tv"] < 0.02
    assert rows["all modes but one"]["tv"] == pytest.approx(1 / 8, abs=0.02)
    assert rows["one mode"]["tv"] == pytest.approx(7 / 8)
    mmd = [row["mmd"] for row in rows.values()]
    assert mmd == sorted(mmd)
    assert mmd[0] < 0.01 < mmd[1]
    assert torch.equal(judge.classify(ring.test_samples), ring.test_labels)


def test_a_mode_counts_with_a_fifth_of_its_share_of_good_samples(ring):
    counts = torch.tensor([25, 25, 25, 25, 25, 25, 5, 4])
    points = RING.centres.repeat_interleave(counts, 0)
    # Near enough to be of mode 7, but not good.
    far = RING.centres[7].expand(41, 2) + 3.1 * RING.std
    values = MixtureJudge(ring).evaluate(torch.cat([points, far]))
    assert values["modes"] == 7
    assert values["quality"] == pytest.approx(159 / 200)


def test_every_judged_sample_counts_for_mmd(ring):
    judge, samples = MixtureJudge(ring), ring.train_samples[:10_000].clone()
    before = judge.evaluate(samples)["mmd"]
    samples[-1000:] = RING.centres[0]
    assert judge.evaluate(samples)["mmd"] > before + 0.02


# Losses and regularisers


def test_r1_equals_finite_differences():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    context = StepContext(0, network, network, None, torch.zeros(()), real=x)
    regularizer = R1(gamma=3.0)
    nothing, penalty = regularizer.loss_terms(context)

    h = 1e-5
    steps = h * torch.eye(3, dtype=torch.float64)
    slopes = torch.cat([(network(x + e) - network(x - e)) / (2 * h) for e in steps], dim=1)
    assert nothing is None
    torch.testing.assert_close(penalty, 1.5 * slopes.square().sum(1).mean())
    assert regularizer.metrics() == {"r1": penalty.item()}


def test_r1_acts_on_the_discriminator_only_and_needs_data():
    network = nn.Linear(3, 1)
    loss = torch.zeros(())
    assert R1().loss_terms(StepContext(0, network, network, loss, None)) == (None, None)
    with pytest.raises(ValueError, match="needs a batch of real data"):
        R1().loss_terms(StepContext(0, network, network, None, loss))
    with pytest.raises(ValueError, match=r"gamma must be .*not negative, got -1"):
        R1(gamma=-1)


# Trainer


@pytest.mark.parametrize("architecture", ["mlp", "dcgan"])
def test_step_equals_a_hand_written_one(architecture):
    # Second derivatives of convolutions come with other strides than the weights, which
    # backward() puts right and fused Adam does not.
    trainer = small_trainer([R1(gamma=0.5)], architecture=architecture)
    by_hand = small_trainer(architecture=architecture)
    g, d, images = by_hand.generator, by_hand.discriminator, by_hand.data
    noise = torch.Generator().manual_seed(0)
    g_opt = torch.optim.Adam(g.parameters(), lr=5e-4, betas=(0.5, 0.999), fused=True)
    d_opt = torch.optim.Adam(d.parameters(), lr=5e-4, betas=(0.5, 0.999), fused=True)
    loss = NonSaturating()
    for _ in range(3):
        real = images[next(by_hand.batches.sampler)].requires_grad_(True)
        fake = g(torch.randn(8, 4, generator=noise)).detach()
        logits = d(real)
        (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        penalty = 0.5 * 0.5 * slope.flatten(1).square().sum(1).mean()
        d_opt.zero_grad()
        (sum(loss.discriminator(logits, d(fake))) + penalty).backward()
        d_opt.step()
        g_opt.zero_grad()
        loss.generator(d(g(torch.randn(8, 4, generator=noise))), logits).backward()
        g_opt.step()
        trainer.step()
    for ours, wanted in zip(trainer.generator.parameters(), g.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7)
    for ours, wanted in zip(trainer.discriminator.parameters(), d.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7)


def cut_off(network, how):
    if how == "frozen":
        network.requires_grad_(False)
    else:
        network.register_forward_hook(lambda module, inputs, output: output.detach())


@pytest.mark.parametrize(
    ("side", "how", "mode"),
    [
        ("generator", "frozen", None),
        ("generator", "detached", None),
        ("discriminator", "frozen", None),
        ("discriminator", "detached", None),
        ("generator", "frozen", "game"),
        ("generator", "detached", "game"),
        ("discriminator", "frozen", "terms"),
    ],
)
def test_a_loss_must_reach_its_network(side, how, mode):
    regularizers = [R1()] if mode == "terms" else []
    trainer = small_trainer(regularizers, orthogonal=Orthogonal(mode) if mode else None)
    cut_off(getattr(trainer, side), how)
    with pytest.raises(ValueError, match=f"the loss of the {side} must depend on a parameter"):
        trainer.step()


def test_a_part_of_a_batch_may_leave_a_network_alone():
    trainer = Trainer(
        Generator("mlp", 4, 8),
        Discriminator("mlp", 8),
        torch.rand(8, 1, 8, 8),
        batch_size=8,
        procedure=Procedure(accumulate=2),
    )
    calls = iter(range(100))

    def detached_at_first(module, inputs, output):  # calls 0 and 1 are the discriminator's step
        return output.detach() if next(calls) == 2 else output

    trainer.generator.register_forward_hook(detached_at_first)
    before = [p.clone() for p in trainer.generator.parameters()]
    trainer.step()
    assert not equal(before, [p.detach() for p in trainer.generator.parameters()])


def test_each_network_has_its_own_rate():
    torch.manual_seed(0)
    trainer = Trainer(
        Generator("mlp", 4, 8),
        Discriminator("mlp", 8),
        torch.rand(8, 1, 8, 8),
        batch_size=8,
        g=PlayerConfig(lr=1e-3),
        d=PlayerConfig(lr=0.0),
    )
    before = [p.clone() for p in trainer.discriminator.parameters()]
    weight = trainer.generator.layers[0].weight.clone()
    trainer.step()
    assert equal(before, [p.detach() for p in trainer.discriminator.parameters()])
    # Adam's first step is the rate times the sign of the gradient.
    step = (trainer.generator.layers[0].weight - weight).abs().max()
    assert step.item() == pytest.approx(1e-3, rel=1e-3)


class Doubled(BaseRegularizer):
    """Gradients times two before, and a sign after: Adam's input tells the order of the hooks."""

    def transform_grads(self, g_grads, d_grads, ctx):
        assert (g_grads is None) == (ctx.generator_loss is None)
        return tuple(g and [2 * x for x in g] for g in (g_grads, d_grads))

    def precondition(self, network, grads, ctx):
        return [x + 1 for x in grads]


def test_gradient_hooks_are_applied_in_order():
    plain, hooked = small_trainer(), small_trainer([Doubled()])
    plain.step()
    hooked.step()
    # Noise and batches are the same, so the discriminator's gradient is related exactly.
    for a, b in zip(
        plain.discriminator.parameters(), hooked.discriminator.parameters(), strict=True
    ):
        torch.testing.assert_close(2 * a.grad + 1, b.grad)


def test_averaged_generator_has_the_newest_buffers():
    trainer = small_trainer(architecture="dcgan")
    before = [buffer.clone() for buffer in trainer.ema.buffers()]
    trainer.step()
    newest = list(trainer.generator.buffers())
    assert equal(list(trainer.ema.buffers()), newest)
    assert not any(map(torch.equal, before, newest))


def test_averaged_generator_follows_with_a_short_memory_at_first():
    trainer = small_trainer()
    before = [p.clone() for p in trainer.ema.parameters()]
    trainer.step()
    for average, old, new in zip(
        trainer.ema.parameters(), before, trainer.generator.parameters(), strict=True
    ):
        torch.testing.assert_close(average, 0.1 * old + 0.9 * new)


@pytest.mark.parametrize("architecture", ["mlp", "dcgan"])
def test_hessian_norms_are_measured_and_act(architecture):
    regularizers = [HSN1R(norm="spectral", weight=0.1, num_steps=2), R1()]
    plain, regularized = (
        small_trainer(architecture=architecture),
        small_trainer(regularizers, architecture=architecture),
    )
    plain.step()
    regularized.step()
    metrics = regularized.metrics()
    assert metrics["hessian_norm_g"] > 0
    assert metrics["hessian_norm_d"] > 0
    assert metrics["penalty_d"] == pytest.approx(0.1 * metrics["hessian_norm_d"] + metrics["r1"])
    assert not equal(plain.discriminator.state_dict(), regularized.discriminator.state_dict())


def check_resume(tmp_path, trainer):
    """Seven steps, and three and four of another trainer: the same. Returns the metrics."""
    straight, first, second = trainer(0), trainer(0), trainer(1)
    for _ in range(7):
        straight.step()
    for _ in range(3):
        first.step()
    save_state(tmp_path / "state", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "state"))
    for _ in range(4):
        second.step()
    save_state(tmp_path / "straight", straight.state_dict())
    save_state(tmp_path / "second", second.state_dict())
    assert equal(load_state(tmp_path / "straight"), load_state(tmp_path / "second"))
    metrics = straight.metrics()
    assert metrics == second.metrics()
    return metrics


@pytest.mark.parametrize("architecture", ["mlp", "dcgan"])
def test_training_from_a_saved_state_is_the_same_training(tmp_path, architecture):
    def trainer(seed):
        regularizers = [HSN1R(norm="nuclear", weight=1e-3, every=2, num_steps=2), R1()]
        return small_trainer(regularizers, seed, architecture)

    check_resume(tmp_path, trainer)


def test_random_points_of_gradient_penalties_are_resumed(tmp_path):
    def trainer(seed):
        return small_trainer([R2(), WGANGP(seed=seed), DRAGAN(seed=seed)], seed)

    assert {"r2", "wgan_gp", "dragan"} <= check_resume(tmp_path, trainer).keys()


class Poison(BaseRegularizer):
    def __init__(self, what):
        self.what = what

    def loss_terms(self, ctx):
        if self.what == "penalty" and ctx.discriminator_loss is not None:
            return None, torch.tensor(math.nan)
        if self.what == "product":
            raise NonFiniteCurvatureError("Hessian-vector product of params[0] is nan at (0,)")
        if self.what == "value":
            raise ValueError("nan is not an option")
        return None, None

    def precondition(self, network, grads, ctx):
        return [
            g * math.inf if self.what == "gradient" and i == 2 else g for i, g in enumerate(grads)
        ]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("penalty", "step 1: discriminator penalty is not finite"),
        ("gradient", r"step 1: discriminator gradient of layers\.3\.weight is not finite"),
        ("product", r"step 1: discriminator penalty: .* is nan"),
    ],
)
def test_nothing_is_trained_on_what_is_not_finite(what, message):
    trainer = small_trainer([Poison(what)])
    before = [p.clone() for p in trainer.discriminator.parameters()]
    with pytest.raises(NonFiniteError, match=message):
        trainer.step()
    assert equal(before, [p.detach() for p in trainer.discriminator.parameters()])


class Halves(BaseRegularizer):
    """Terms whose gradients conflict with the losses': half of these, taken back."""

    def loss_terms(self, ctx):
        return tuple(
            loss and -0.5 * loss.square() for loss in (ctx.generator_loss, ctx.discriminator_loss)
        )


class ByHand:
    """The steps of a trainer as a user of `OrthogonalGradients` would write them."""

    def __init__(self, mode, pair):
        self.mode, self.pair = mode, pair
        self.trainer = small_trainer()
        self.g, self.d = self.trainer.generator, self.trainer.discriminator
        self.noise = torch.Generator().manual_seed(0)
        self.g_opt, self.d_opt = self.trainer.optimizers.values()

    def losses(self, parts, rival=None):
        whole = sum(parts[1:], parts[0])
        if self.mode == "terms":
            return [*(parts if self.pair == "real_fake" else [whole]), -0.5 * whole.square()]
        loss = whole - 0.5 * whole.square()
        return [loss, rival] if self.mode == "game" else [loss]

    def generate(self):
        return self.g(torch.randn(8, 4, generator=self.noise))

    def discriminator_terms(self):
        real = self.trainer.data[next(self.trainer.batches.sampler)]
        logits = self.d(real), self.d(self.generate().detach())
        return self.losses(NonSaturating().discriminator(*logits))

    def generator_terms(self):
        logits = self.d(self.generate())
        loss = NonSaturating()
        rival = loss.discriminator(logits, logits)[1]
        return self.losses([loss.generator(logits, logits)], rival)

    def run(self, count):
        steps = {"previous": self.joint_steps, "game": self.game_steps}
        steps.get(self.mode, self.separate_steps)(count)
        return [p.detach() for network in (self.g, self.d) for p in network.parameters()]

    def joint_steps(self, count):
        both = OrthogonalGradients(self.g_opt, self.d_opt, mode="previous")
        for _ in range(count):
            d_terms = self.discriminator_terms()
            both.zero_grad()
            both.backward([*self.generator_terms(), *d_terms])
            both.step()

    def separate_steps(self, count):
        d_opt = OrthogonalGradients(self.d_opt, mode=self.mode)
        g_opt = OrthogonalGradients(self.g_opt, mode=self.mode)
        for _ in range(count):
            for optimizer, terms in (
                (d_opt, self.discriminator_terms),
                (g_opt, self.generator_terms),
            ):
                optimizer.zero_grad()
                optimizer.backward(terms())
                optimizer.step()

    def game_steps(self, count):
        g_opt = OrthogonalGradients(self.g_opt, mode="game")
        for _ in range(count):
            self.d_opt.zero_grad()
            self.discriminator_terms()[0].backward()
            self.d_opt.step()
            g_opt.zero_grad()
            g_opt.backward(self.generator_terms())
            g_opt.step()


@pytest.mark.parametrize(
    ("mode", "pair"),
    [(mode, "adversarial_regularizer") for mode in MODES] + [("terms", "real_fake")],
)
@pytest.mark.filterwarnings("ignore:mode 'game'")
def test_orthogonal_steps_equal_hand_written_ones(mode, pair):
    trainer = small_trainer([Halves()], orthogonal=Orthogonal(mode, pair))
    for _ in range(3):
        trainer.step()
    found = [p for n in (trainer.generator, trainer.discriminator) for p in n.parameters()]
    for ours, wanted in zip(found, ByHand(mode, pair).run(3), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:mode 'game'")
def test_orthogonal_training_from_a_saved_state_is_the_same_training(tmp_path, mode):
    def trainer(seed):
        regularizers = [HSN1R(norm="spectral", weight=1.0, every=2, num_steps=2), R1()]
        return small_trainer(regularizers, seed, orthogonal=Orthogonal(mode))

    metrics = check_resume(tmp_path, trainer)
    sides = {"terms": ["_g", "_d"], "previous": [""], "game": ["_g"], "weights": ["_g", "_d"]}
    angles = {f"{name}{side}" for name in ("angle", "angle_after", "turn") for side in sides[mode]}
    assert {name for name in metrics if name.startswith(("angle", "turn"))} == angles
    assert all(0 < metrics[name] <= 180 for name in angles)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ("previous", "weights", "state is of mode 'previous', this object's is 'weights'"),
        ("previous", "terms", "state is of mode 'previous'"),
        ("terms", "game", "state is of mode 'terms'"),
    ],
)
def test_a_state_of_another_projection_is_refused(saved, loaded, message):
    state = small_trainer(orthogonal=Orthogonal(saved)).state_dict()
    with pytest.raises(ValueError, match=message):
        small_trainer(orthogonal=Orthogonal(loaded)).load_state_dict(state)


def test_terms_without_a_second_one_are_plain_training():
    plain, projected = small_trainer(), small_trainer(orthogonal=Orthogonal("terms"))
    for trainer in (plain, projected):
        trainer.step()
    assert equal(plain.discriminator.state_dict(), projected.discriminator.state_dict())
    assert equal(plain.generator.state_dict(), projected.generator.state_dict())
    assert "angle_d" not in projected.metrics()


class Noted(BaseRegularizer):
    """Keeps what gradients are when they come here, and both losses' Hessians on the first rows."""

    def __init__(self, rows):
        self.rows = rows
        self.gradients, self.hessians = {}, {}

    def precondition(self, network, grads, ctx):
        self.gradients[network] = torch.cat([grad.flatten() for grad in grads])

        def loss():
            logits = ctx.discriminator(ctx.fake[: self.rows].detach())
            if network is ctx.generator:
                logits = ctx.discriminator(ctx.generator(ctx.noise[: self.rows]))
                return NonSaturating().generator(logits, logits)
            return sum(
                NonSaturating().discriminator(ctx.discriminator(ctx.real[: self.rows]), logits)
            )

        op = HessianOperator(loss, list(network.parameters()))
        self.hessians[network] = op.matmat(torch.eye(op.shape[0])).double()
        return grads


@pytest.mark.parametrize(
    ("network", "rows", "saddle_free"), [("generator", 0, False), ("discriminator", 3, True)]
)
def test_gradients_of_the_chosen_network_are_corrected_by_its_own_hessian(
    network, rows, saddle_free
):
    before, after = Noted(rows or 8), Noted(rows or 8)
    options = {"network": network, "rows": rows, "saddle_free": saddle_free, "eps": 0.3, "mu": 0.5}
    correction = HessianCorrectedGradients(**options, num_steps=60)
    trainer = small_trainer([R1(), before, correction, after])
    for _ in range(2):
        trainer.step()
    for each in (trainer.generator, trainer.discriminator):
        g, step = before.gradients[each].double(), after.gradients[each].double()
        if each is not getattr(trainer, network):
            assert torch.equal(step, g)
            continue
        values, vectors = torch.linalg.eigh(before.hessians[each])
        values = values.abs() if saddle_free else values
        weights = (values + 0.5 * 0.09) / (values**2 + 0.09)
        wanted = vectors @ (weights * (vectors.mT @ g))
        assert (step - wanted).norm() <= 1e-3 * wanted.norm()
        assert (step - 0.5 * g).norm() > 0.01 * step.norm()  # there is curvature
    names = {"condition", "condition_corrected", "smallest", "smallest_corrected"}
    side = network[0]
    wanted = {f"hsc_{name}_{side}" for name in names | {"residual", "turn", "fallbacks"}}
    assert {name for name in trainer.metrics() if name.startswith("hsc")} == wanted


@pytest.mark.parametrize("mode", ["none", *MODES])
@pytest.mark.filterwarnings("ignore:mode 'game'")
def test_corrected_training_from_a_saved_state_is_the_same_training(tmp_path, mode):
    def trainer(seed):
        correction = HessianCorrectedGradients(every=2, num_steps=3, rows=4)
        orthogonal = None if mode == "none" else Orthogonal(mode)
        return small_trainer([R1(), correction], seed, orthogonal=orthogonal)

    metrics = check_resume(tmp_path, trainer)
    assert metrics["hsc_fallbacks_g"] == metrics["hsc_fallbacks_d"] == 0
    assert metrics["hsc_turn_d"] > 0


def test_corrected_training_of_normalised_networks_leaves_no_trace_of_the_curvature():
    plain = small_trainer(architecture="dcgan")
    corrected = small_trainer([HessianCorrectedGradients("generator")], architecture="dcgan")
    for trainer in (plain, corrected):
        trainer.step()
    buffers = [dict(t.discriminator.named_buffers()) for t in (plain, corrected)]
    assert equal(*buffers)
    assert equal(plain.batches.noise.get_state(), corrected.batches.noise.get_state())


def test_a_correction_of_few_products_is_made_whatever_its_residual():
    trainer = small_trainer([HessianCorrectedGradients(num_steps=1, eps=1e-3)])
    trainer.step()
    for side in "gd":
        assert trainer.metrics()[f"hsc_residual_{side}"] > 1
        assert trainer.metrics()[f"hsc_fallbacks_{side}"] == 0


def test_projected_gradients_are_what_is_corrected():
    before, after = Noted(8), Noted(8)
    correction = HessianCorrectedGradients(num_steps=1, eps=1e9)  # f(H) is the identity
    plain = small_trainer([Halves()], orthogonal=Orthogonal("terms"))
    trainer = small_trainer([Halves(), before, correction, after], orthogonal=Orthogonal("terms"))
    for each in (plain, trainer):
        each.step()
    for a, b in zip(
        plain.discriminator.parameters(), trainer.discriminator.parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad)
    gradient = before.gradients[trainer.discriminator]
    torch.testing.assert_close(after.gradients[trainer.discriminator], gradient)


def test_a_gradient_that_is_not_finite_is_named_before_it_is_corrected():
    message = r"step 1: discriminator gradient of layers\.3\.weight is not finite"
    with pytest.raises(NonFiniteError, match=message):
        small_trainer([Poison("gradient"), HessianCorrectedGradients()]).step()


def test_a_correction_needs_the_batch_and_the_state_of_its_networks():
    network = nn.Linear(3, 1)
    correction = HessianCorrectedGradients("generator")
    context = StepContext(0, network, nn.Linear(1, 1), torch.zeros(()), None)
    with pytest.raises(ValueError, match=r"needs a batch in ctx\.noise, got None"):
        correction.precondition(network, [torch.ones(1, 3), torch.ones(1)], context)
    with pytest.raises(ValueError, match="state must be of generator, got discriminator"):
        correction.load_state_dict(HessianCorrectedGradients("discriminator").state_dict())
    other = nn.Linear(4, 1)
    state = {"count": 1, "fallbacks": 0, "metrics": {}, "curvature": None}
    with pytest.raises(ValueError, match="count must be an integer"):
        correction.load_state_dict({"generator": {**state, "count": "1"}})
    assert correction.precondition(other.requires_grad_(False), [], context) == []


def test_other_errors_of_a_regularizer_stay_what_they_are():
    with pytest.raises(ValueError, match="nan is not an option"):
        small_trainer([Poison("value")]).step()


def test_a_loss_that_is_not_finite_is_named():
    trainer = small_trainer([HSN1R(norm="spectral", weight=0.1)])
    trainer.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="step 1: discriminator loss is not finite"):
        trainer.step()


def test_frozen_and_unused_parameters_are_left_alone(tmp_path):
    trainer, other = small_trainer(), small_trainer(seed=1)
    for each in (trainer, other):
        each.discriminator.layers[1].weight.requires_grad_(False)
        each.discriminator.unused = nn.Parameter(torch.ones(2))
    frozen = trainer.discriminator.layers[1].weight.clone()
    trainer.step()
    assert torch.equal(trainer.discriminator.layers[1].weight, frozen)
    assert trainer.discriminator.layers[1].weight.grad is None
    assert trainer.discriminator.unused.grad is None
    save_state(tmp_path / "state", trainer.state_dict())
    other.load_state_dict(load_state(tmp_path / "state"))
    trainer.step()
    other.step()
    assert equal(trainer.discriminator.state_dict(), other.discriminator.state_dict())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = Run.create(tmp_path / "run", run_config(regularizer="none"))
    with torch.no_grad():
        run.trainer.discriminator.layers[1].weight[0, 0] = math.inf
    message = r"step 0: discriminator layers\.1\.weight is not finite; the last good checkpoint is"
    with pytest.raises(NonFiniteError, match=message):
        run._save()
    saved = Run.resume(tmp_path / "run").trainer.discriminator.layers[1].weight
    assert saved.isfinite().all()


# Files


def test_images_are_tiled_row_by_row_with_gaps():
    images = torch.linspace(-1, 1, 16).view(16, 1, 1, 1).expand(16, 1, 8, 8)
    grid = tile(images)
    assert grid.shape == (2 * 52, 8 * 52)
    centres = torch.from_numpy(grid[26::52, 26::52].astype("float32")).flatten()
    torch.testing.assert_close(centres, torch.linspace(0, 255, 16), atol=0.51, rtol=0)
    assert (grid[0] == grid[0, 0]).all()


def test_kernel_is_drawn_of_any_bandwidths(tmp_path):
    real, fake = torch.rand(6, 2), torch.rand(4, 2)
    for name, sigma in (("one", torch.tensor(0.5)), ("many", torch.tensor([0.1, 1.0]))):
        points = (real, torch.arange(6) % 2), (fake, torch.arange(4) % 2)
        save_kernel(tmp_path / name, *points, sigma)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_state_survives_a_file(tmp_path):
    state = {
        "tensors": [torch.arange(3), torch.tensor(2.5), torch.ones(0), torch.eye(2).T],
        "plain": {"a": 1, "b": [0.1, None, "x", math.inf]},
    }
    save_state(tmp_path / "state", state)
    assert equal(load_state(tmp_path / "state"), state)


def test_missing_and_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_state(path)
    save_state(path, {"x": torch.ones(100)})
    whole = path.read_bytes()
    for damaged in (b"", whole[:-10], whole[:20], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_state(path)


def test_a_flipped_byte_is_noticed_and_the_older_checkpoint_named(tmp_path):
    Run.create(tmp_path / "run", run_config(regularizer="none", steps=5)).train()
    older, last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    damaged = bytearray(last.read_bytes())
    damaged[-50] ^= 0x40
    last.write_bytes(damaged)
    with pytest.raises(CheckpointError) as error:
        Run.resume(tmp_path / "run")
    message = f"checkpoint {last} is damaged (wrong checksum); delete it to continue from {older}"
    assert str(error.value) == message
    last.unlink()
    assert Run.resume(tmp_path / "run").trainer.steps_done == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "run"
    run = Run.create(path, run_config(regularizer="none"))
    for _ in range(3):
        run.trainer.step()
    run._save()
    run.close()
    return run


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["trainer", "optimizers"], [{}, {}]),
        (["trainer", "optimizers"], 5),
        (["trainer", "optimizers", 0, "0"], "x"),
        (["trainer", "optimizers", 0, "0", "exp_avg"], torch.zeros(3)),
        (["trainer", "optimizers", 1, "0", "exp_avg_sq"], torch.zeros(8, 64).double()),
        (["trainer", "optimizers", 1, "0", "step"], torch.zeros(2)),
        (["trainer", "sampler", "queue"], "abc"),
        (["trainer", "sampler", "queue"], torch.full((50,), 99999)),
        (["trainer", "sampler", "queue"], torch.rand(50)),
        (["trainer", "steps_done"], "abc"),
        (["trainer", "steps_done"], -5),
        (["trainer", "steps_done"], 10**400),
        (["trainer", "counts"], None),
        (["trainer", "counts"], {}),
        (["trainer", "counts", "loss_g"], 0),
        (["trainer", "counts", "loss_g"], "x"),
        (["trainer", "sums", "loss_g"], 3),
        (["trainer", "sums"], 3),
        (["trainer", "orthogonal"], [{}]),
        (["trainer", "noise"], 5),
        (["trainer", "generator"], [1]),
        (["trainer"], [1]),
        (["cpu_seconds"], math.nan),
        (["cpu_seconds"], 10**400),
    ],
)
def test_a_state_that_no_run_writes_is_refused(trained, monkeypatch, keys, value):
    state = load_state(trained.folder.last_checkpoint())
    inner = state
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    monkeypatch.setattr(trained.folder, "load_checkpoint", lambda: state)
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        trained._load()


def test_deeply_nested_metadata_is_refused(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    for state in ("[" * 100_000, "3", '{"__tensor__": ["x"]}'):
        digest = _digest(state, {"x": torch.ones(2)})
        save({"x": torch.ones(2)}, tmp_path / "state", {"state": state, "sha256": digest})
        with pytest.raises(CheckpointError, match="is damaged"):
            load_state(tmp_path / "state")


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"a": 1}', '{"step": "x", "cpu_seconds": 1}'])
def test_damaged_metrics_are_refused_with_file_and_line(tmp_path, line):
    folder = RunFolder(tmp_path)
    folder.metrics_file.write_text(f'{{"step": 1, "cpu_seconds": 0.5}}\n{line}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl is damaged: line 2 is not"):
        folder.read_metrics()


def test_a_folder_belongs_to_one_process(tmp_path):
    run = Run.create(tmp_path / "run", run_config(regularizer="none"))
    script = (
        "import sys, pathlib; from hessreg.gan.run_folder import RunFolder\n"
        "RunFolder(pathlib.Path(sys.argv[1])).lock()"
    )
    command = [sys.executable, "-c", script, str(run.folder.path)]
    other = subprocess.run(command, capture_output=True, text=True)
    assert f"{run.folder.path} is in use by another process" in other.stderr
    run.close()
    assert subprocess.run(command).returncode == 0


def test_who_does_not_get_the_lock_of_a_new_folder_removes_nothing(tmp_path):
    path = tmp_path / "run"
    owner = RunFolder(path)
    path.mkdir()
    owner.lock()  # as between the lock of `create` and its configuration
    script = (
        "import sys, pathlib; from hessreg.gan import DEFAULTS, Run\n"
        "Run.create(pathlib.Path(sys.argv[1]), DEFAULTS['ring'])"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True
    )
    assert f"{path} is in use by another process" in other.stderr
    assert (path / ".lock").exists()


def test_a_folder_that_filled_up_before_the_lock_keeps_what_it_has(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def lock_late():
        RunFolder(folder.path).write_config(run_config(seed=5))

    monkeypatch.setattr(folder, "lock", lock_late)
    with pytest.raises(RunFolderError, match="is not empty"):
        folder.create(run_config())
    assert folder.read_config().seed == 5


def test_a_lock_that_was_removed_with_its_folder_is_none(tmp_path, monkeypatch):
    folder, opened = RunFolder(tmp_path), os.open

    def open_late(*args):
        handle = opened(*args)
        (tmp_path / ".lock").unlink()
        return handle

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(RunFolderError, match="is in use by another process"):
        folder.lock()


def test_checkpoints_without_a_configuration_are_not_overwritten(tmp_path):
    foreign = tmp_path / "checkpoints" / "step-000000007.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"another run's")
    with pytest.raises(RunFolderError, match="is not empty"):
        RunFolder(tmp_path).create(run_config())
    assert foreign.read_bytes() == b"another run's"


@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_create_leaves_nothing(tmp_path, monkeypatch, existed):
    path = tmp_path / "run"
    if existed:
        path.mkdir()

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*config\.yaml'"):
        Run.create(path, run_config(regularizer="none"))
    assert [*tmp_path.rglob("*")] == [path] * existed


def test_missing_packages_are_noticed_before_anything_is_made(tmp_path, monkeypatch):
    for package in ("matplotlib", "PIL", "sklearn", "tensorboard"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ModuleNotFoundError, match=package):
                Run.create(tmp_path / "run", run_config(regularizer="none", tensorboard=True))
    assert list(tmp_path.iterdir()) == []


def test_no_child_outlives_or_follows_a_stop():
    children = _Children()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    codes = []
    thread = threading.Thread(target=lambda: codes.append(children.run(sleep)))
    thread.start()
    while not children._processes:
        pass
    children.stop()
    thread.join(10)
    assert codes == [-15]
    assert children.run(sleep) == 130
    assert len(children._processes) == 1


def test_a_comparison_reuses_runs_of_equal_configuration(tmp_path):
    config = run_config(regularizer="none")
    _prepare(tmp_path / "none", config)
    first = (tmp_path / "none" / "config.yaml").stat().st_mtime_ns
    _prepare(tmp_path / "none", config)
    assert (tmp_path / "none" / "config.yaml").stat().st_mtime_ns == first
    with pytest.raises(RunFolderError, match="is not empty"):
        _prepare(tmp_path / "none", run_config(regularizer="none", seed=1))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def run_config(**options) -> TrainConfig:
    defaults = {"steps": 20, "width": 8, "latent_dim": 4, "batch_size": 8, "tensorboard": False}
    return TrainConfig(**{**defaults, "log_every": 5, "save_every": 5, **options})


def test_run_folder_holds_what_it_promises(tmp_path):
    pytest.importorskip("tensorboard")
    path = tmp_path / "run"
    last_line = Run.create(path, run_config(regularizer="hsn1r+r1", tensorboard=True)).train()
    assert str(path / "samples.png") in last_line
    names = {".lock", "config.yaml", "metrics.jsonl", "result.json", "samples.png", "curves.png"}
    names |= {"best.png", "interpolation.png", "tensorboard", "checkpoints"}
    assert {p.name for p in path.iterdir()} == names
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == [
        "best.safetensors",
        "step-000000015.safetensors",
        "step-000000020.safetensors",
    ]
    rows = RunFolder(path).read_metrics()
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert {"loss_g", "loss_d", "hessian_norm_g", "hessian_norm_d", "r1"} <= rows[0].keys()
    assert "fdd" in rows[-1]
    assert json.loads((path / "result.json").read_text())["fdd"] == rows[-1]["fdd"]


def test_angles_are_logged_plotted_and_kept(tmp_path, monkeypatch):
    import matplotlib.axes

    titles, labels = set(), set()
    set_title, plot = matplotlib.axes.Axes.set_title, matplotlib.axes.Axes.plot

    def noted_title(axes, title, *args, **kwargs):
        titles.add(title)
        return set_title(axes, title, *args, **kwargs)

    def noted_plot(axes, *args, **kwargs):
        labels.add(kwargs.get("label"))
        return plot(axes, *args, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", noted_title)
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", noted_plot)
    config = run_config(regularizer="r1", orthogonal="terms")
    last_line = Run.create(tmp_path / "run", config).train()
    assert "by r1, orthogonal terms after 20 steps" in last_line
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert {"angle_d", "angle_after_d", "turn_d"} <= rows[0].keys()
    assert "angle_g" not in rows[0]  # R1 adds nothing to the generator's loss
    assert "angles of gradients, degrees" in titles
    named = {f"r1, orthogonal terms {name}" for name in ("angle_d", "angle_after_d")}
    assert named == {label for label in labels if "angle" in label}
    assert RunFolder(tmp_path / "run").read_result()["orthogonal"] == "terms"


@pytest.mark.parametrize("network", ["both", "generator"])
def test_conditioning_is_logged_plotted_and_named(tmp_path, monkeypatch, network):
    import matplotlib.axes

    panels, set_title = {}, matplotlib.axes.Axes.set_title

    def noted_title(axes, title, *args, **kwargs):
        panels[title] = axes
        return set_title(axes, title, *args, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", noted_title)
    correction = {"correction": "hsc", "hsc": HSCConfig(network=network, every=2)}
    last_line = Run.create(tmp_path / "run", run_config(regularizer="r1", **correction)).train()
    named = "hsc" if network == "both" else "hsc generator"
    assert f"by r1, {named} after 20 steps" in last_line
    rows = RunFolder(tmp_path / "run").read_metrics()
    sides = ["g", "d"] if network == "both" else ["g"]
    for title, name in (("condition number of H", "condition"), ("smallest |eig", "smallest")):
        drawn = [axes for found, axes in panels.items() if found.startswith(title)]
        assert len(drawn) == 1
        keys = [f"hsc_{name}{kind}_{side}" for side in sides for kind in ("", "_corrected")]
        assert [line.get_label() for line in drawn[0].lines] == [f"r1, {named} {k}" for k in keys]
        assert [*drawn[0].lines[0].get_ydata()] == [row[keys[0]] for row in rows]
        assert drawn[0].get_yscale() in ("log", "symlog")
    assert RunFolder(tmp_path / "run").read_result()["correction"] == "hsc"


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({"dataset": "digits", "ring": RingConfig(modes=1000)}, 40),
        ({"dataset": "ring"}, 40),
        ({"dataset": "ring", "ring": RingConfig(modes=12)}, 60),
        ({"dataset": "ring", "ring": RingConfig(modes=1000)}, 90),
        ({"dataset": "grid", "grid": GridConfig(side=3)}, 45),
        ({"dataset": "grid"}, 90),
        ({"dataset": "grid", "steps": 5}, 0),
        ({"dataset": "grid", "seconds": 7.0}, 7),
    ],
)
def test_many_modes_are_trained_for_longer(options, seconds):
    assert TrainConfig(**options).seconds == seconds


@pytest.mark.parametrize("space", ["samples", "features"])
def test_a_run_on_the_ring_counts_modes_and_draws_the_kernel(tmp_path, space):
    options = {
        "dataset": "ring",
        "regularizer": "gaussian",
        "gaussian": GaussianConfig(space=space),
    }
    last_line = Run.create(tmp_path / "run", run_config(**options)).train()
    assert "0 of 8 modes" in last_line
    assert "curves.png and kernel.png beside it" in last_line
    for picture in ("samples.png", "curves.png", "kernel.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    row = RunFolder(tmp_path / "run").read_metrics()[-1]
    assert {"modes", "quality", "tv", "mmd", "mmd2", "sigma"} <= row.keys()


def test_any_set_of_regularizers_can_be_named(digits):
    config = run_config(regularizer="gaussian+r1+hsn1r", gaussian=GaussianConfig(sigma="0.5,1"))
    kinds = [type(each) for each in build_trainer(config, digits).regularizers]
    assert kinds == [HSN1R, R1, GaussianKernel]
    assert build_trainer(run_config(regularizer="none"), digits).regularizers == ()


def test_resuming_a_finished_run_changes_no_metrics(tmp_path):
    Run.create(tmp_path / "run", run_config(regularizer="none")).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    Run.resume(tmp_path / "run").train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_rows_after_the_checkpoint_and_half_written_files_are_removed(tmp_path):
    Run.create(tmp_path / "run", run_config(regularizer="none")).train()
    folder = RunFolder(tmp_path / "run")
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 25, "cpu_seconds": 1}\n{"step": 30, "cp')
    (folder.checkpoints / ".step-000000025.safetensors.x.tmp").touch()
    Run.resume(tmp_path / "run", steps=30).train()
    assert [row["step"] for row in folder.read_metrics()] == [5, 10, 15, 20, 25, 30]
    assert not list(folder.checkpoints.glob(".*"))
    assert folder.read_config().steps == 30
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        Run.resume(tmp_path / "run", steps=-1)


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    Run.create(tmp_path / "run", run_config(regularizer="none"))
    folder = RunFolder(tmp_path / "run")
    folder.write_config(run_config(regularizer="none", width=16))
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        Run.resume(tmp_path / "run")


def test_configuration_survives_yaml_and_is_checked(tmp_path):
    config = run_config(regularizer="r1", r1=R1Config(gamma=0.25))
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    assert folder.read_config() == config
    for text in (
        "[" * 5000,
        "width: 8.5",
        "hsn1r: {norm: foo}",
        "hsc: {eps: 0}",
        "seed: 1" + "0" * 400,
        "steps: -1",
        "stepz: 1",
        "[1",
        "r1: 3",
        "steps: x",
        "",
    ):
        (folder.path / "config.yaml").write_text(text)
        with pytest.raises(RunFolderError, match="is damaged"):
            folder.read_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": "0.5,x"}, "sigma must be median, ema, learned or positive numbers"),
        ({"sigma": "0"}, "sigma must be .* positive numbers with commas, got '0'"),
        ({"sigma": True}, "sigma must be a number or text, got True"),
        ({"sigma": -1.0}, "sigma must be .* positive numbers with commas, got -1.0"),
        ({"interaction_weight": math.inf}, "interaction_weight must be finite, got inf"),
        ({"space": "pixels"}, "space must be one of samples, features, got 'pixels'"),
    ],
)
def test_bad_kernel_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": "x"}, "strength must be a number or null, got 'x'"),
        ({"strength": math.inf}, "strength must be finite, got inf"),
        ({"pair": "x"}, "pair must be one of adversarial_regularizer, real_fake, got 'x'"),
        ({"scope": "x"}, "scope must be one of auto, global, tensor, row, got 'x'"),
    ],
)
def test_bad_projection_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProjectionConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "x"}, "network must be one of generator, discriminator, both, got 'x'"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": math.inf}, "eps must be finite, got inf"),
        ({"mu": -1.0}, "mu must be at least 0, got -1.0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"rows": -1}, "rows must be at least 0, got -1"),
        ({"damping": math.nan}, "damping must be finite, got nan"),
        ({"trust_radius": 0.0}, "trust_radius must be positive or null, got 0.0"),
        ({"saddle_free": 1}, "saddle_free must be true or false, got 1"),
    ],
)
def test_bad_correction_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HSCConfig(**options)


@pytest.mark.parametrize("name", ["r1+r1", "none+r1", "r1+", ""])
def test_a_set_of_regularizers_has_no_repetition(name):
    with pytest.raises(ValueError, match=f"regularizer must be none, or {', '.join(REGULARIZERS)}"):
        TrainConfig(regularizer=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"seconds": math.nan}, "seconds must be finite, got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        (
            {"regularizer": "wgan"},
            "hsn1r, gaussian, hessian_penalty joined by \\+, got 'wgan'",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8.0}, "batch_size must be an integer, got 8.0"),
        ({"batch_size": True}, "batch_size must be an integer, got True"),
        ({"ema_decay": False}, "ema_decay must be a number, got False"),
        ({"g": 1e-3}, "g must be a mapping of names to values, got 0.001"),
        ({"tensorboard": "no"}, "tensorboard must be true or false, got 'no'"),
        ({"architecture": "vit"}, "or module:factory, got 'vit'"),
        ({"regularizer": ["none"]}, "regularizer must be text, got"),
        ({"r1": None}, "r1 must be a mapping of names to values, got None"),
        ({"seed": 10**400}, r"seed must be in \(-2\*\*63, 2\*\*63\), got 1"),
        (
            {"orthogonal": "x"},
            "orthogonal must be one of none, terms, previous, game, weights, got",
        ),
        (
            {"orthogonal": "terms", "regularizer": "none"},
            "projection.pair must be real_fake with orthogonal terms and no regularizer",
        ),
        (
            {"orthogonal": "terms", "projection": ProjectionConfig(strength=0.5)},
            "projection.strength must be null with orthogonal terms, got 0.5",
        ),
        ({"correction": "x"}, "correction must be one of none, hsc, got 'x'"),
        ({"hsc": 3}, "hsc must be a mapping of names to values, got 3"),
        ({"seconds": 10**400}, r"seconds must be in \(-2\*\*63, 2\*\*63\), got 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_time_budget_counts_training_only(tmp_path):
    run = Run.create(tmp_path / "run", run_config(regularizer="none", steps=0, seconds=0.2))
    run.train()
    result = RunFolder(tmp_path / "run").read_result()
    assert 0.2 <= result["cpu_seconds"] < 0.3
    assert result["steps"] > 1


@pytest.mark.parametrize(
    ("logged", "panels"), [((), 1), (("r1",), 2), (("r2", "hsc_condition_g"), 3)]
)
def test_curves_have_a_panel_for_each_kind_that_was_logged(tmp_path, logged, panels):
    from PIL import Image

    rows = [{"cpu_seconds": 1.0, "loss_g": 0.5, **dict.fromkeys(logged, 2.0)}]
    save_curves(tmp_path / "curves.png", {"run": rows}, ("fdd", "FDD"))
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width == 550 * panels


def test_a_run_judges_each_step_once(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", run_config(regularizer="none", steps=4, eval_every=2))
    judged, evaluate = [], Run._judged

    def counted(self):
        judged.append(self.trainer.steps_done)
        return evaluate(self)

    monkeypatch.setattr(Run, "_judged", counted)
    run.train()
    assert judged == [2, 4]
    rows = [row for row in run.folder.read_metrics() if "fdd" in row]
    assert rows[0]["fdd"] != rows[1]["fdd"] == run.result["fdd"]
