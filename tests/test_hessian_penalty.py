"""HessianPenalty: the variance of v' H v by its definition, its gradient, its state, its errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hessreg import gaussian_kernel
from hessreg.gan import Discriminator, Generator, HessianPenaltyConfig, TrainConfig, Trainer
from hessreg.gan.building import build_trainer
from hessreg.gan.checkpoint import load_state, save_state
from hessreg.gan.tasks import load_dataset
from hessreg.regularizers import HSN1R, HessianPenalty, Regularizer, StepContext
from tests.test_gan import equal


def generator(activation=nn.Tanh, norm=None):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 6), *([norm] if norm else []), activation(), nn.Linear(6, 4)]
    return nn.Sequential(*layers).double()


def compiled():
    module = nn.Tanh()
    module.compile()
    return module


def noise(n=5, d=3):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def signs(seed, count, z):
    """The directions of a penalty with this seed."""
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 2, z.shape, generator=random) for _ in range(count)]
    return [bits.to(z) * 2 - 1 for bits in drawn]


def hessians(function, row):
    """[outputs, d, d] at one row."""
    outputs = function(row[None])[0].numel()
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda z: function(z[None])[0].flatten()[i], row)  # noqa: B023
            for i in range(outputs)
        ]
    )


# The value


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_value_is_the_variance_over_the_directions(reduction):
    function, z = generator(), noise()
    reg = HessianPenalty(weight=0.5, num_probes=4, reduction=reduction, seed=7)
    value = reg.penalty(function, z)
    curvatures = []
    for v in signs(7, 4, z):
        H = torch.stack([hessians(function, row) for row in z])
        curvatures.append(torch.einsum("ni,noij,nj->no", v, H, v))
    variances = torch.stack(curvatures).var(0)
    reduced = variances.amax(1) if reduction == "max" else variances.mean(1)
    torch.testing.assert_close(value, 0.5 * reduced.mean())
    assert reg.metrics() == {"hessian_penalty": pytest.approx(2 * value.item())}


def test_mean_is_twice_the_sum_of_squares_off_the_diagonal():
    function, z = generator(), noise(1)
    rows = 20_000
    value = HessianPenalty(1.0, reduction="mean").penalty(function, z.expand(rows, 3))
    H = hessians(function, z[0])
    off = H - torch.diag_embed(H.diagonal(dim1=1, dim2=2))
    truth = 2 * off.square().sum((1, 2)).mean()
    # With d = 3 a variance of two directions is at most 4 times its mean or so.
    assert value.item() == pytest.approx(truth.item(), rel=4 * 4 / rows**0.5)


def authors_penalty(function, z, directions, epsilon):
    """hessian_penalty_pytorch.py of the authors, with the maximum over the outputs only."""
    second_orders = [
        (function(z + epsilon * v) - 2 * function(z) + function(z - epsilon * v)) / epsilon**2
        for v in directions
    ]
    return torch.var(torch.stack(second_orders), dim=0, unbiased=True).flatten(1).amax(1).mean()


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d(6), nn.LayerNorm(6)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU, nn.Softplus])
def test_value_equals_the_authors_finite_differences(norm, activation):
    function, z = generator(activation, copy.deepcopy(norm)), noise(8)
    value = HessianPenalty(1.0, num_probes=3, seed=3).penalty(function, z)
    found = [authors_penalty(function, z, signs(3, 3, z), h).item() for h in (2e-2, 1e-2)]
    # The error of the differences is of second order in their step: take it out.
    assert value.item() == pytest.approx((4 * found[1] - found[0]) / 3, rel=1e-5)


def test_value_of_a_convolutional_generator():
    torch.manual_seed(0)
    images = Generator("dcgan", 4, 8).double()
    z = noise(6, 4)
    value = HessianPenalty(1.0, seed=3).penalty(images, z)
    found = [authors_penalty(images, z, signs(3, 2, z), h).item() for h in (2e-2, 1e-2)]
    assert value.item() == pytest.approx((4 * found[1] - found[0]) / 3, rel=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.tanh(),
        lambda z: z.square() + 3,
        lambda z: (z.exp() @ torch.ones(3, 2, dtype=z.dtype))[:, :, None, None],
        lambda z: z @ torch.ones(3, 2, dtype=z.dtype),
        lambda z: torch.ones_like(z),
        generator(nn.ReLU),
        Generator(latent_dim=3, width=4, activation="leaky_relu", shape=(2,)).double(),
    ],
)
def test_zero_where_components_do_not_interact(function):
    value = HessianPenalty(1.0, num_probes=5).penalty(function, noise())
    assert 0 <= value.item() < 1e-25


def test_values_through_our_operators():
    """A mixture of Gaussians: nested forward mode would lose terms of its Function."""
    z, centres = noise(), noise(4)

    def ours(z):
        return gaussian_kernel(z, centres, 1.5)

    def plain(z):
        return torch.exp(-(z[:, None] - centres).square().sum(-1) / 4.5)

    for function in (ours, plain):
        z.requires_grad_(True)
        value = HessianPenalty(1.0).penalty(function, z)
        (slope,) = torch.autograd.grad(value, z)
        if function is ours:
            first = value, slope
    torch.testing.assert_close((value, slope), first)


# The gradient


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d(6), nn.LayerNorm(6)])
def test_gradient_equals_differences(norm):
    function, z = generator(nn.Softplus, copy.deepcopy(norm)), noise().requires_grad_(True)
    names = [name for name, _ in function.named_parameters()]
    params = [p.detach().clone().requires_grad_(True) for p in function.parameters()]

    def value(z, *params):
        given = dict(zip(names, params, strict=True))
        reg = HessianPenalty(1.0, reduction="mean")
        return reg.penalty(lambda x: torch.func.functional_call(function, given, (x,)), z)

    assert torch.autograd.gradcheck(value, (z, *params), atol=1e-6)


def test_descent_makes_components_independent():
    function, z = generator(), noise(64)
    optimizer = torch.optim.Adam(function.parameters(), 0.01)
    reg = HessianPenalty(1.0, num_probes=4)
    values = []
    for _ in range(100):
        value = reg.penalty(function, z)
        keep = (function(z).var(0) - 1).square().sum()  # or the weights only shrink
        optimizer.zero_grad()
        (value + 0.1 * keep).backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-10:]) < 0.3 * sum(values[:10])


# What it leaves alone


def test_changes_nothing_but_its_own_state():
    function = generator(norm=nn.BatchNorm1d(6)).append(nn.Dropout(0.5))
    z, state = noise(), torch.get_rng_state()
    before = copy.deepcopy(function.state_dict())
    first = HessianPenalty(1.0).penalty(function, z)
    assert torch.equal(HessianPenalty(1.0).penalty(function, z), first)
    torch.testing.assert_close(function.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in function.parameters())
    assert function.training
    assert not z.requires_grad
    with torch.no_grad():
        value = HessianPenalty(1.0).penalty(function, z)
    assert not value.requires_grad
    assert torch.equal(value, first)


# Training


def contexts(reg, steps):
    function, critic, loss = generator(), nn.Linear(4, 1), torch.zeros(())
    found = []
    for step in steps:
        ctx = StepContext(step, function, critic, loss, None, noise=noise())
        found.append(reg.loss_terms(ctx)[0])
        assert reg.loss_terms(StepContext(step, function, critic, None, loss)) == (None, None)
    return found


def test_every_applies_seldom_with_a_scaled_weight():
    terms = contexts(HessianPenalty(0.2, every=3), range(7))
    assert [t is not None for t in terms] == [True, False, False, True, False, False, True]
    torch.testing.assert_close(terms[0], 3 * contexts(HessianPenalty(0.2), [0])[0])
    assert contexts(HessianPenalty(0.0), [0]) == [None]
    assert not HessianPenalty().needs_third_order(0)
    assert isinstance(HessianPenalty(), Regularizer)


def test_training_resumes_bit_for_bit(tmp_path):
    def trainer(seed):
        torch.manual_seed(0)
        networks = Generator("dcgan", 4, 8), Discriminator("dcgan", 8)
        data = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        regularizers = [HessianPenalty(0.1, every=2, seed=seed), HSN1R(every=3)]
        return Trainer(*networks, data, regularizers, batch_size=8)

    whole = trainer(0)
    for _ in range(3):
        whole.step()
    save_state(tmp_path / "state", whole.state_dict())
    for _ in range(4):
        whole.step()
    resumed = trainer(9)
    resumed.load_state_dict(load_state(tmp_path / "state"))
    for _ in range(4):
        resumed.step()
    assert equal(whole.state_dict(), resumed.state_dict())
    metrics = whole.metrics()
    assert metrics == resumed.metrics()
    assert metrics["hessian_penalty"] > 0


def test_a_run_is_configured_by_name():
    options = HessianPenaltyConfig(weight=0.3, num_probes=3, reduction="mean", every=2)
    config = TrainConfig(
        regularizer="r1+hessian_penalty", width=8, latent_dim=2, hessian_penalty=options
    )
    assert TrainConfig.from_dict(config.to_dict()) == config
    trainer = build_trainer(config, load_dataset("digits"))
    trainer.step()
    reg = trainer.regularizers[1]
    assert isinstance(reg, HessianPenalty)
    assert (reg.weight, reg.num_probes, reg.reduction, reg.every) == (0.3, 3, "mean", 2)
    metrics = trainer.metrics()
    assert metrics["penalty_g"] == pytest.approx(2 * 0.3 * metrics["hessian_penalty"])


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": -1.0}, ValueError, "weight must be finite and not negative, got -1"),
        ({"weight": "x"}, TypeError, "weight must be a number, got 'x'"),
        ({"num_probes": 1}, ValueError, "num_probes must be at least 2, got 1"),
        ({"num_probes": 2.5}, TypeError, "num_probes must be an int, got 2.5"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"reduction": "sum"}, ValueError, r"reduction must be one of .*, got 'sum'"),
    ],
)
def test_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        HessianPenalty(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be at least 0, got -1.0"),
        ({"num_probes": 1}, "num_probes must be at least 2, got 1"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"reduction": "sum"}, "reduction must be one of max, mean, got 'sum'"),
    ],
)
def test_configuration_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        HessianPenaltyConfig(**options)


@pytest.mark.parametrize(
    ("function", "z", "error", "message"),
    [
        (torch.tanh, [1.0], TypeError, "z must be a floating-point tensor, got list"),
        (torch.tanh, torch.ones(2, 2).int(), TypeError, "z must be .*, got torch.int32"),
        (torch.tanh, torch.ones(0, 2), ValueError, r"z must be \[n, ...\], not empty, got shape"),
        (lambda z: [z], torch.ones(2, 2), TypeError, "function's output must be .*, got list"),
        (torch.sum, torch.ones(2, 2), ValueError, r"output must be \[2, ...\].*shape \(\)"),
        (lambda z: z[:1], torch.ones(2, 2), ValueError, r"\[2, ...\].*shape \(1, 2\)"),
        (compiled(), torch.ones(2, 2), ValueError, "before it is compiled"),
    ],
)
def test_refuses_functions_and_points(function, z, error, message):
    with pytest.raises(error, match=message):
        HessianPenalty().penalty(function, z)


def test_a_linear_function_has_a_gradient_of_zero():
    network, z = nn.Linear(2, 3), torch.randn(4, 2, requires_grad=True)
    penalty = HessianPenalty().penalty(network, z)
    gradients = torch.autograd.grad(penalty, [z, *network.parameters()])
    assert penalty == 0
    assert not any(gradient.any() for gradient in gradients)


def test_refuses_inference_mode():
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        HessianPenalty().penalty(torch.tanh, torch.ones(2, 2))


def test_refuses_a_context_without_noise_and_other_states():
    network, reg = nn.Linear(2, 1), HessianPenalty()
    with pytest.raises(ValueError, match=r"input in ctx\.noise, got None"):
        reg.loss_terms(StepContext(0, network, network, torch.zeros(()), None))
    before = reg.state_dict()
    for state in ({}, {**before, "junk": 1}):
        with pytest.raises(ValueError, match="state must have random and perhaps value"):
            reg.load_state_dict(state)
    assert torch.equal(reg.state_dict()["random"], before["random"])
