"""HSN1R: the penalty is weight * max(norm - target, 0), its gradient right, its state complete."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessreg.curvature import native_norms, third_order_safe
from hessreg.gan import Discriminator, Generator, Trainer
from hessreg.regularizers import (
    HSN1R,
    R1,
    BaseRegularizer,
    Regularizer,
    StepContext,
    hsn1r_loss,
    original_loss,
)

NORMS = ["nuclear", "one", "spectral", "fro"]


def networks(seed=0):
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    discriminator = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Softplus(), nn.Linear(6, 1))
    return generator.double(), discriminator.double()


def phases(generator, discriminator, step):
    """The generator's and the discriminator's phase of one step, as a trainer runs them."""
    noise = torch.Generator().manual_seed(step)
    z, x = torch.randn(8, 5, generator=noise, dtype=torch.float64).split([2, 3], 1)
    with third_order_safe(generator, discriminator):
        fake = generator(z)
        g_loss = F.softplus(-discriminator(fake)).mean()
        d_fake = discriminator(fake.detach())
        d_loss = F.softplus(-discriminator(x)).mean() + F.softplus(d_fake).mean()
    yield StepContext(step, generator, discriminator, g_loss, None)
    yield StepContext(step, generator, discriminator, None, d_loss)


def train(regularizer, generator, discriminator, steps):
    """Plain descent with the regulariser's terms; returns the terms."""
    terms = []
    for step in steps:
        g_ctx, d_ctx = phases(generator, discriminator, step)
        for network, loss, term in (
            (generator, g_ctx.generator_loss, regularizer.loss_terms(g_ctx)[0]),
            (discriminator, d_ctx.discriminator_loss, regularizer.loss_terms(d_ctx)[1]),
        ):
            params = list(network.parameters())
            total = loss if term is None else loss + term
            grads = torch.autograd.grad(total, params, retain_graph=True)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p -= 0.1 * g
            terms.append(term)
    return terms


def quadratic(spectrum=(3.0, -2.0, 0.5)):
    """A loss 1/2 x' A x whose matrix depends on a second parameter."""
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64)).Q
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.randn(len(spectrum), dtype=torch.float64, requires_grad=True)
    H = U @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ U.mT
    return x, scale, scale**2 * H


@pytest.mark.parametrize(
    ("norm", "ord"), [("nuclear", "nuc"), ("one", 1), ("spectral", 2), ("fro", "fro")]
)
@pytest.mark.parametrize("as_callable", [True, False])
@pytest.mark.parametrize("method", ["krylov", "exact"])
def test_penalty_of_a_quadratic(norm, ord, as_callable, method):
    x, scale, A = quadratic()
    reg = HSN1R(norm=norm, weight=0.3, num_deflated=3, num_probes=400, method=method)
    assert reg.metrics() == {}
    if as_callable:
        penalty = reg.penalty(lambda: 0.5 * x @ A @ x, [x])
    else:
        penalty = reg.penalty(0.5 * x @ A @ x, x)
    truth = 0.3 * np.linalg.norm(A.detach().numpy(), ord)
    tolerance = 0.05 if norm == "fro" and method == "krylov" else 1e-9
    assert penalty.item() == pytest.approx(truth, rel=tolerance)
    assert 0.3 * reg.metrics()["hessian_norm"] == pytest.approx(penalty.item())
    to_x, to_scale = torch.autograd.grad(penalty, [x, scale], materialize_grads=True)
    assert to_scale.item() == pytest.approx(2 * truth / 2.0, rel=tolerance)  # |s^2 H| = s^2 |H|
    assert not to_x.any()


NUMPY = {"nuclear": "nuc", "one": 1, "spectral": 2, "fro": "fro"}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "spectrum",
    [
        (3.0, 2.0, -1.0, 0.5),
        (2.0, 2.0, -1.0, -1.0),  # repeated
        (2.0, -2.0, 1.0, 0.0),  # a saddle with a kernel
        (1e-6, -1e-6, 0.0, 0.0),
        (2e6, -1e6, 1e6, 0.0),
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_exact_norm_of_any_spectrum(norm, spectrum):
    """The value, and a finite subgradient: for |s^2 H| in s it is 2 |s^2 H| / s."""
    x, scale, A = quadratic(spectrum)
    penalty = HSN1R(norm=norm, weight=1.0, method="exact").penalty(0.5 * x @ A @ x, x)
    truth = np.linalg.norm(A.detach().numpy(), NUMPY[norm])
    assert penalty.item() == pytest.approx(truth, rel=1e-9, abs=0)
    assert torch.autograd.grad(penalty, scale)[0].item() == pytest.approx(truth, rel=1e-9, abs=0)


@pytest.mark.parametrize("norm", NORMS)
def test_exact_norm_of_a_network(norm):
    """Against the whole Hessian and, for the gradient, finite differences of its norm."""
    torch.manual_seed(0)
    x = torch.randn(6, 2, dtype=torch.float64)
    params = [torch.randn(3, 2), torch.randn(3), torch.randn(3)]
    params = [p.double().requires_grad_(True) for p in params]

    def loss(w, b, u):
        return F.softplus(torch.tanh(x @ w.mT + b) @ u).mean()

    def truth():
        blocks = torch.autograd.functional.hessian(loss, tuple(params))
        shape = [p.numel() for p in params]
        rows = [
            torch.cat([b.reshape(n, -1) for b in row], 1)
            for n, row in zip(shape, blocks, strict=True)
        ]
        return np.linalg.norm(torch.cat(rows).numpy(), NUMPY[norm])

    reg = HSN1R(norm=norm, weight=1.0, method="exact")
    penalty = reg.penalty(lambda: loss(*params), params)
    assert penalty.item() == pytest.approx(truth(), rel=1e-9)
    grads = torch.autograd.grad(penalty, params)
    direction = [torch.randn_like(p) for p in params]
    analytic = sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True))
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            torch._foreach_add_(params, direction, alpha=step)
        values.append(truth())
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    with torch.no_grad():
        assert reg.penalty(lambda: loss(*params), params).item() == pytest.approx(values[1])


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({"norm": "spectral", "num_steps": 5}, 5),
        ({"norm": "one", "num_steps": 5}, 5),
        ({"norm": "fro", "num_probes": 4}, 4),
        ({"norm": "nuclear", "num_steps": 8, "num_probes": 2}, 6),
    ],
)
def test_auto_is_exact_where_that_costs_no_more(options, largest):
    def value(n, method):
        random = torch.Generator().manual_seed(n)
        A = torch.randn(n, n, dtype=torch.float64, generator=random)
        x = torch.ones(n, dtype=torch.float64, requires_grad=True)
        loss = 0.25 * x @ (A + A.mT) @ x
        return HSN1R(**options, method=method).penalty(loss, x).item()

    assert value(largest, "auto") == value(largest, "exact")
    assert value(largest + 1, "auto") == value(largest + 1, "krylov")
    assert value(largest + 1, "krylov") != value(largest + 1, "exact")


@pytest.mark.parametrize("target", [10.0, 30.0])
def test_target_is_subtracted_and_floors_at_zero(target):
    x, scale, A = quadratic()
    reg = HSN1R(norm="nuclear", weight=0.5, target=target, num_deflated=3)
    penalty = reg.penalty(0.5 * x @ A @ x, x)
    assert penalty.item() == pytest.approx(0.5 * max(22.0 - target, 0.0))
    slope = torch.autograd.grad(penalty, scale, materialize_grads=True)[0].item()
    assert slope == pytest.approx(0.5 * 22.0 if target < 22 else 0.0)


def test_smoothing_of_the_nuclear_norm():
    spectrum = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    reg = HSN1R(weight=1.0, smoothing=0.1, method="krylov")
    penalty = reg.penalty(0.5 * (spectrum * x * x).sum(), x)
    truth = (spectrum**2 / (spectrum**2 + 0.3**2).sqrt()).sum()
    torch.testing.assert_close(penalty, truth)


def test_terms_come_in_the_phase_of_their_network():
    generator, discriminator = networks()
    reg = HSN1R(norm="spectral", weight=0.1, discriminator_weight=0.2, num_steps=30)
    g_ctx, d_ctx = phases(generator, discriminator, 0)
    g_term, nothing = reg.loss_terms(g_ctx)
    assert nothing is None
    nothing, d_term = reg.loss_terms(d_ctx)
    assert nothing is None
    metrics = reg.metrics()
    assert g_term.item() == pytest.approx(0.1 * metrics["hessian_norm_g"])
    assert d_term.item() == pytest.approx(0.2 * metrics["hessian_norm_d"])


def test_gradient_of_the_terms():
    """Through the normalisation layers of both networks, against finite differences."""
    generator, discriminator = networks()
    torch.manual_seed(1)
    for which, network in enumerate((generator, discriminator)):
        params = list(network.parameters())

        def term():
            ctx = tuple(phases(generator, discriminator, 0))[which]  # noqa: B023
            reg = HSN1R(norm="spectral", weight=1.0, num_steps=60)
            return reg.loss_terms(ctx)[which]  # noqa: B023

        grads = torch.autograd.grad(term(), params)
        direction = [torch.randn_like(p) for p in params]
        analytic = sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True))
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                torch._foreach_add_(params, direction, alpha=sign * 1e-5)
            values.append(term().item())
        with torch.no_grad():
            torch._foreach_add_(params, direction, alpha=1e-5)
        assert analytic == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_every_applies_seldom_with_a_scaled_weight():
    generator, discriminator = networks()
    reg = HSN1R(norm="one", weight=0.1, every=3)
    steps = [reg.loss_terms(next(phases(generator, discriminator, i)))[0] for i in range(7)]
    assert [t is not None for t in steps] == [True, False, False, True, False, False, True]
    once = HSN1R(norm="one", weight=0.1).loss_terms(next(phases(*networks(), 0)))[0]
    torch.testing.assert_close(steps[0], 3 * once)
    assert [reg.needs_third_order(i) for i in range(7)] == [t is not None for t in steps]


def test_only_steps_that_are_differentiated_thrice_leave_the_native_layers():
    torch.manual_seed(0)
    data, native = torch.randn(16, 1, 8, 8), []

    class Watching(BaseRegularizer):
        def loss_terms(self, ctx):
            loss = ctx.discriminator_loss if ctx.generator_loss is None else ctx.generator_loss
            native.append(bool(native_norms(loss)))
            return None, None

    networks = Generator("dcgan", 4, 8), Discriminator("dcgan", 8)
    trainer = Trainer(*networks, data, [HSN1R(every=2), Watching()], batch_size=8)
    for _ in range(3):
        trainer.step()
    assert native == [False, False, True, True, False, False]


def test_weight_zero_and_frozen_parameters():
    generator, discriminator = networks()
    reg = HSN1R(weight=0.0, discriminator_weight=1.0)
    assert [t is None for t in train(reg, generator, discriminator, [0])] == [True, False]
    discriminator[0].requires_grad_(False)
    _, ctx = phases(generator, discriminator, 0)
    assert HSN1R().loss_terms(ctx)[1] is not None


@pytest.mark.parametrize("options", [{"norm": n} for n in NORMS] + [{"num_deflated": 2}])
@pytest.mark.parametrize("warm_start", [True, False])
def test_resumed_run_is_the_same_bit_for_bit(options, warm_start):
    reg = HSN1R(warm_start=warm_start, every=2, seed=3, **options)
    pair = networks()
    train(reg, *pair, range(3))
    kept = copy.deepcopy(pair)
    file = io.BytesIO()
    torch.save(reg.state_dict(), file)
    expected = train(reg, *pair, range(3, 7))
    file.seek(0)
    resumed = HSN1R(warm_start=warm_start, every=2, seed=99, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    found = train(resumed, *kept, range(3, 7))
    for a, b in zip(expected, found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert resumed.metrics() == reg.metrics()
    for a, b in zip(pair, kept, strict=True):
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_state_is_a_copy_and_plain():
    reg = HSN1R(norm="spectral")
    train(reg, *networks(), [0])
    state = reg.state_dict()
    assert all(isinstance(v, (torch.Tensor, float, int, str)) for v in state.values())
    before = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    train(reg, *networks(), [1])
    assert all(torch.equal(v, before[k]) for k, v in state.items() if k in before)
    with pytest.raises(ValueError, match="state is of norm 'spectral', this regulariser's 'one'"):
        HSN1R(norm="one").load_state_dict(state)
    with pytest.raises(ValueError, match=r"unknown entries \['junk'\]"):
        HSN1R(norm="spectral").load_state_dict({**state, "junk": 1})


def test_warm_start_follows_the_eigenvector():
    """With few steps for a slow spectrum, a search that goes on comes closer."""
    spectrum = torch.linspace(0.9, 1.0, 200, dtype=torch.float64)
    x = torch.ones(200, dtype=torch.float64, requires_grad=True)
    values = {}
    for warm in (True, False):
        reg = HSN1R(norm="spectral", weight=1.0, num_steps=4, warm_start=warm)
        for _ in range(15):
            values[warm] = reg.penalty(0.5 * (spectrum * x * x).sum(), x).item()
    assert values[False] < values[True] <= 1.0 + 1e-12


def test_warm_start_does_not_miss_an_eigenvalue_that_overtakes():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    reg = HSN1R(norm="spectral", weight=1.0, num_steps=3, method="krylov")
    for spectrum in ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, -5.0, 1.0]):
        diagonal = torch.tensor(spectrum, dtype=torch.float64)
        value = reg.penalty(0.5 * (diagonal * x * x).sum(), x).item()
        assert value == pytest.approx(max(map(abs, spectrum)))


@pytest.mark.parametrize("norm", NORMS)
def test_changes_nothing_but_its_own_state(norm):
    generator, discriminator = networks()
    contexts = list(phases(generator, discriminator, 0))
    before = copy.deepcopy([generator.state_dict(), discriminator.state_dict()])
    state = torch.get_rng_state()
    for ctx in contexts * 2:
        HSN1R(norm=norm, num_deflated=1).loss_terms(ctx)
    after = [generator.state_dict(), discriminator.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in [*generator.parameters(), *discriminator.parameters()])


def test_native_normalisation_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(5, 2)
    loss = model(x).square().mean()
    with pytest.raises(ValueError, match=r"batch or instance normalisation.*third_order_safe"):
        HSN1R().penalty(loss, model.parameters())
    HSN1R().penalty(lambda: model(x).square().mean(), model.parameters()).backward()


def test_any_module():
    """A recurrent classifier: the regulariser is not only for GANs."""
    torch.manual_seed(0)
    embed, cell, head = nn.Embedding(7, 4), nn.RNNCell(4, 5), nn.Linear(5, 3)
    params = [p for m in (embed, cell, head) for p in m.parameters()]
    words, labels = torch.randint(7, (4, 6)), torch.randint(3, (4,))

    def loss():
        h = torch.zeros(4, 5)
        for t in range(6):
            h = cell(embed(words[:, t]), h)
        return F.cross_entropy(head(h), labels)

    value = loss()
    (value + HSN1R(weight=1e-2).penalty(value, params)).backward()
    assert all(p.grad.isfinite().all() for p in params)


def test_penalty_reduces_the_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y = torch.randn(32, 4).double(), torch.randn(32, 1).double()
    params = list(model.parameters())

    def final_norm(weight):
        net = copy.deepcopy(model)
        reg = HSN1R(norm="nuclear", weight=weight)
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(40):
            loss = (net(x) - y).square().mean()
            total = loss + reg.penalty(loss, net.parameters()) if weight else loss
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        judge = HSN1R(norm="nuclear", weight=1.0, num_deflated=len(params) * 50, num_steps=60)
        return judge.penalty(lambda: (net(x) - y).square().mean(), net.parameters()).item()

    assert final_norm(0.05) < 0.9 * final_norm(0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "two"}, r"norm must be one of .*, got 'two'"),
        ({"method": "dense"}, r"method must be one of .*, got 'dense'"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_probes": -1}, "num_probes must be at least 1, got -1"),
        ({"num_deflated": -1}, "num_deflated must be at least 0, got -1"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        HSN1R(**options)


# --- the article's functions


def separate_losses(generator, discriminator, x):
    z = torch.randn(len(x), 2, dtype=x.dtype)
    g_loss = F.softplus(-discriminator(generator(z))).mean()
    d_fake = discriminator(generator(z).detach())
    return g_loss, F.softplus(-discriminator(x)).mean() + F.softplus(d_fake).mean()


def test_original_loss_gives_each_network_its_own_gradient():
    generator, discriminator = networks()
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.manual_seed(5)
    total = original_loss(generator, discriminator, x)
    total.backward()
    torch.manual_seed(5)
    g_loss, d_loss = separate_losses(generator, discriminator, x)
    torch.testing.assert_close(total, g_loss + d_loss)
    for network, loss in ((generator, g_loss), (discriminator, d_loss)):
        params = list(network.parameters())
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        torch.testing.assert_close([p.grad for p in params], list(grads))


def test_hsn1r_loss_adds_both_norms():
    generator, discriminator = networks()
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.manual_seed(5)
    plain = original_loss(generator, discriminator, x)
    reg = HSN1R(generator, discriminator, weight=0.1)
    torch.manual_seed(5)
    total = reg(x)
    norms = reg.metrics()
    added = 0.1 * (norms["hessian_norm_g"] + norms["hessian_norm_d"])
    assert (total - plain).item() == pytest.approx(added)
    torch.manual_seed(5)
    article = hsn1r_loss(generator, discriminator, x, 0.1)
    assert article > plain
    article.backward()
    assert all(p.grad is not None for p in [*generator.parameters(), *discriminator.parameters()])
    torch.manual_seed(5)
    assert hsn1r_loss(generator, discriminator, x, 0.0) == plain


def test_noise_fits_the_generator():
    class Latent(nn.Module):
        latent_dim = 5

        def forward(self, z):
            assert z.shape == (4, 5)
            return z[:, :3]

    critic = nn.Linear(3, 1)
    assert original_loss(Latent(), critic, torch.randn(4, 3)).shape == ()
    image = nn.Sequential(nn.ConvTranspose2d(6, 1, 4), nn.BatchNorm2d(1))
    judge = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    assert original_loss(image, judge, torch.randn(4, 1, 4, 4)).shape == ()
    with pytest.raises(ValueError, match="give the generator an attribute latent_dim"):
        original_loss(nn.Identity(), critic, torch.randn(4, 3))
    with pytest.raises(ValueError, match="needs a generator and a discriminator"):
        HSN1R()(torch.randn(4, 3))


# --- the protocol


def test_base_regularizer_does_nothing():
    base = BaseRegularizer()
    generator, discriminator = networks()
    ctx = next(phases(generator, discriminator, 0))
    grads = [torch.ones(2)]
    assert isinstance(base, Regularizer)
    assert isinstance(HSN1R(), Regularizer)
    assert base.loss_terms(ctx) == (None, None)
    assert base.transform_grads(grads, None, ctx) == (grads, None)
    assert base.precondition(generator, grads, ctx) is grads
    assert not base.needs_third_order(0)
    assert base.metrics() == base.state_dict() == {}
    base.load_state_dict({})
    with pytest.raises(ValueError, match=r"BaseRegularizer has no state, got \['a'\]"):
        base.load_state_dict({"a": 1})


# --- arguments and states


@pytest.mark.parametrize("name", ["weight", "discriminator_weight", "target", "smoothing"])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_refuses_numbers_that_are_no_weights(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be finite and not negative"):
        HSN1R(**{name: bad})
    with pytest.raises(ValueError, match="gamma must be finite and not negative"):
        R1(gamma=bad)


@pytest.mark.parametrize("name", ["every", "num_steps", "num_probes", "num_deflated"])
@pytest.mark.parametrize("bad", [2.5, True, "4"])
def test_refuses_counts_that_are_no_integers(name, bad):
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        HSN1R(**{name: bad})


def test_a_refused_state_changes_nothing():
    reg = HSN1R(norm="spectral")
    before = reg.state_dict()
    other = torch.Generator().manual_seed(9).get_state()
    with pytest.raises(ValueError, match=r"unknown entries \['junk'\]"):
        reg.load_state_dict({"norm": "spectral", "random": other, "junk": 1})
    with pytest.raises(ValueError, match=r"no entries \['norm'\]"):
        reg.load_state_dict({"random": other})
    torch.testing.assert_close(reg.state_dict()["random"], before["random"], rtol=0, atol=0)
