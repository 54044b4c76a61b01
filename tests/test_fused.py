"""Losses of perceptrons: recognised in the graph, and multiplied by the fused operators."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import hessreg
from hessreg.curvature import GaussNewtonOperator, HessianOperator
from hessreg.curvature.fused import FusedHessian
from hessreg.curvature.mlp_graph import find_chains
from hessreg.curvature.norms import nuclear_norm, spectral_norm
from hessreg.curvature.parameters import FlatParameters

DOUBLE = torch.float64
ACTIVATIONS = {
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(beta=2.0),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.2),
    "elu": nn.ELU(0.7),
}


def perceptron(activation=None, bias=True):
    torch.manual_seed(0)
    activation = activation or nn.Tanh()
    layers = [nn.Linear(3, 5), activation, nn.Linear(5, 4, bias=bias), activation, nn.Linear(4, 2)]
    return nn.Sequential(*layers).double()


def batch(rows=6, width=3):
    return torch.randn(rows, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def truth(loss, params):
    """Products with the identity, by plain double backward."""
    flat = FlatParameters(params)
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    rows = []
    for entry in flat.flatten(grads):
        row = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        rows.append(flat.flatten(row))
    return torch.stack(rows)


def check(loss, params):
    """The loss is recognised, and all products are right."""
    flat = FlatParameters(params)
    fused = FusedHessian.find(loss, flat)
    assert fused is not None
    expected = truth(loss, params)
    torch.testing.assert_close(fused.products(torch.eye(flat.size, dtype=DOUBLE)), expected)
    op = HessianOperator(loss, params)
    v = torch.linspace(-1, 1, flat.size, dtype=DOUBLE)
    torch.testing.assert_close(op.matvec(v), expected @ v)
    torch.testing.assert_close(op.matmat(torch.stack([v, v * v], 1))[:, 1], expected @ (v * v))
    torch.testing.assert_close(op.matvec(v, create_graph=True).detach(), expected @ v)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_products_of_every_activation(name, bias):
    model = perceptron(ACTIVATIONS[name], bias)
    check(model(batch()).square().sum(), list(model.parameters()))


def gan_losses():
    """Both players' losses: two passes in one, a constant network behind the other."""
    torch.manual_seed(0)
    generator, discriminator = perceptron(), nn.Sequential(nn.Linear(2, 4), nn.SiLU())
    discriminator = discriminator.append(nn.Linear(4, 1)).double()
    fake, real = generator(batch()), batch(7, 2)
    d_loss = F.softplus(-discriminator(real)).mean()
    d_loss = d_loss + F.softplus(discriminator(fake.detach())).mean()
    return {
        "generator": (F.softplus(-discriminator(fake)).mean(), generator),
        "discriminator": (d_loss, discriminator),
    }


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_both_players_of_a_gan(player):
    loss, network = gan_losses()[player]
    check(loss, list(network.parameters()))


def test_heads_that_couple_the_rows_and_the_passes():
    model = perceptron()
    first, second = model(batch()).tanh(), model(batch(4) + 1)
    loss = (first.mean(0) * second.exp().mean(0)).sum() + torch.logsumexp(first, 0).sum()
    check(loss, list(model.parameters()))


def test_a_pass_without_curvature_beside_another():
    model = perceptron()
    check(model(batch()).sum() + model(batch(4)).square().sum(), list(model.parameters()))
    check(model(batch()).sum(), list(model.parameters()))


def test_one_layer_and_parameters_in_any_order_or_unused():
    model = nn.Linear(3, 2).double()
    spare = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    check(model(batch()).exp().sum(), [spare, model.bias, model.weight])


@pytest.mark.parametrize("left_out", ["0.bias", "0.weight", "2.weight", "2", "4", "0"])
def test_parameters_that_are_left_out_are_constants(left_out):
    model = perceptron()
    some = [p for name, p in model.named_parameters() if not name.startswith(left_out)]
    check(model(batch()).square().sum(), some)


PASSES = {
    "three dimensions": lambda m: m(batch().reshape(2, 3, 3)),
    "an activation for each layer": lambda m: m[4](F.elu(m[2](m[0](batch()).sigmoid()), 0.3)),
    "no activation": lambda m: m[4](m[2](m[0](batch()))),
    "views between the layers": lambda m: m[2:](m[:2](batch()).reshape(3, 2, 5, 1).flatten(2)),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_that_are_recognised(name):
    model = perceptron()
    check(PASSES[name](model).square().sum(), list(model.parameters()))


def test_a_chain_goes_on_through_the_network_of_another_player():
    loss, generator = gan_losses()["generator"]
    (chain,) = find_chains(loss, list(generator.parameters()))
    assert [tuple(w.shape) for w in chain.weights] == [(5, 3), (4, 5), (2, 4), (4, 2), (1, 4)]
    assert chain.activations == ["tanh", "tanh", "identity", "silu"]


def test_changes_of_the_other_network_are_noticed():
    loss, generator = gan_losses()["generator"]
    op = HessianOperator(loss, generator.parameters())
    (chain,) = find_chains(loss, list(generator.parameters()))
    with torch.no_grad():
        chain.weights[-1].add_(1)
    with pytest.raises(ValueError, match="changed in place"):
        op.matvec(torch.ones(op.shape[0], dtype=DOUBLE))


def test_tensors_that_are_no_leaves_are_not_overlooked():
    model = perceptron()
    x = 2 * batch().requires_grad_()
    params = [x, *model.parameters()]
    loss = model(x).square().sum()
    op = HessianOperator(loss, params)
    v = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(op.matvec(v), truth(loss, params) @ v)


def test_a_frozen_bias_is_a_constant():
    model = perceptron()
    model[0].bias.requires_grad_(False).fill_(3.0)
    params = [p for p in model.parameters() if p.requires_grad]
    loss = model(batch()).square().sum()
    op = HessianOperator(loss, params)
    v = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(op.matvec(v), truth(loss, params) @ v)


def test_inputs_that_need_gradients():
    model = perceptron()
    x = batch().requires_grad_()
    check(model(x * 2).square().sum(), list(model.parameters()))


class NoBatching(torch.autograd.Function):
    """The square, with a derivative that vmap cannot go through."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return NoBatchingBackward.apply(grad, x)


class NoBatchingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return 2 * grad * x

    @staticmethod
    def backward(ctx, grad):
        g, x = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            raise RuntimeError("no batching rule")
        return 2 * grad * x, 2 * grad * g


def test_a_loss_without_a_batching_rule():
    model = perceptron()
    check(NoBatching.apply(model(batch())).sum(), list(model.parameters()))


# --- what is left to autograd


def weight_decay(model):
    return model(batch()).sum() + sum(p.square().sum() for p in model.parameters())


UNKNOWN = {
    "weight decay": lambda m: weight_decay(m),
    "a layer used twice in a row": lambda m: m[4](
        m[2](m[2](batch(6, 5)[:, :4].repeat(1, 2)[:, :5]).repeat(1, 2)[:, :5])
    ).sum(),
    "dropout": lambda m: m[2:](F.dropout(m[:2](batch()))).square().sum(),
    "skip": lambda m: m[4](m[2](m[:2](batch())) + m[2](m[:2](batch()))).sum(),
    "another activation": lambda m: m[4](F.selu(m[2](F.selu(m[0](batch()))))).sum(),
    "two activations in a row": lambda m: m[4](m[2](m[0](batch()).tanh().sigmoid())).sum(),
    "rows of another length": lambda m: (m[:2](batch(4)).reshape(5, 4) @ m[2].weight).sum(),
    "scaled weights": lambda m: F.linear(batch(), 2 * m[0].weight).square().sum(),
}


UNKNOWN |= {
    "softplus that ends early": lambda m: m[4](F.softplus(m[2](batch(6, 5)), 1, 0.3)).sum(),
    "a bias for each row": lambda m: (
        torch.addmm(torch.ones(6, 5, dtype=DOUBLE, requires_grad=True), batch(), m[0].weight.t())
        .square()
        .sum()
    ),
    "sparse input": lambda m: torch.mm(batch().to_sparse(), m[0].weight.t()).square().sum(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_losses_are_left_to_autograd(name):
    model = perceptron()
    params = list(model.parameters())
    loss = UNKNOWN[name](model)
    assert find_chains(loss, params) is None
    op = HessianOperator(loss, params)
    v = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(op.matvec(v), truth(loss, params) @ v)


def test_two_networks_in_one_loss_are_left_to_autograd():
    a, b = perceptron(), perceptron(nn.SiLU())
    params = [*a.parameters(), *b.parameters()]
    loss = (a(batch()) * b(batch())).sum()
    check_left_to_autograd(loss, params)


def check_left_to_autograd(loss, params):
    assert FusedHessian.find(loss, FlatParameters(params)) is None
    op = HessianOperator(loss, params)
    v = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(op.matvec(v), truth(loss, params) @ v)


def test_views_that_make_other_rows_are_left_to_autograd():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4).double(), nn.Linear(2, 1).double()
    loss = second(first(batch()).tanh().reshape(-1, 2)).square().sum()
    check_left_to_autograd(loss, [*first.parameters(), *second.parameters()])


def test_passes_with_different_activations_are_left_to_autograd():
    model = perceptron()
    loss = model(batch()).square().sum()
    loss = loss + model[4](model[2](model[0](batch(4)).sigmoid()).sigmoid()).square().sum()
    check_left_to_autograd(loss, list(model.parameters()))


@pytest.mark.parametrize("of_outputs", [torch.sigmoid, torch.square], ids=["sum", "general"])
def test_losses_whose_slopes_are_not_finite_are_left_to_autograd(of_outputs):
    model, x = perceptron(), batch()
    x[0, 0] = torch.nan
    loss, params = of_outputs(model(x)).mean(), list(model.parameters())
    assert FusedHessian.find(loss, FlatParameters(params)) is None


def test_detached_weights_are_constants():
    model = perceptron()
    frozen = {name: p.detach() for name, p in model.named_parameters() if name.startswith("4")}
    loss = functional_call(model, frozen, (batch(),)).square().sum()
    check(loss, [p for name, p in model.named_parameters() if not name.startswith("4")])


def test_the_reference_backend_has_no_kernels_to_use():
    model = perceptron()
    params = FlatParameters(model.parameters())
    with hessreg.backend("reference"):
        assert FusedHessian.find(model(batch()).square().sum(), params) is None


# --- changes, precision, Gauss-Newton


def test_parameters_changed_in_place_are_noticed():
    model = perceptron()
    op = HessianOperator(model(batch()).square().sum(), model.parameters())
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(ValueError, match="params were changed in place"):
        op.matvec(torch.ones(op.shape[0], dtype=DOUBLE))


def test_infinite_slopes_are_reported_with_their_parameter():
    model = perceptron()
    loss = (0 * model(batch())).sum().sqrt()
    with pytest.raises(hessreg.curvature.NonFiniteError, match=r"gradient of params\[0\]"):
        HessianOperator(loss, model.parameters())


def test_float32_is_as_good_as_autograd():
    model = perceptron()
    params = list(model.parameters())
    loss = F.softplus(model(batch())).sum()
    expected = truth(loss, params)
    single = perceptron().float()
    loss = F.softplus(single(batch().float())).sum()
    eye = torch.eye(len(expected))
    ours = HessianOperator(loss, single.parameters()).matmat(eye).double()
    with hessreg.backend("reference"):
        theirs = HessianOperator(loss, single.parameters()).matmat(eye).double()
    assert (ours - expected).norm() <= 2 * (theirs - expected).norm()


@pytest.mark.parametrize("tail", [nn.Identity(), nn.Tanh()])
def test_gauss_newton_matrix(tail):
    model = perceptron()
    params = list(model.parameters())

    def build():
        return GaussNewtonOperator(tail(model(batch())), lambda y: y.exp().sum(), params)

    eye = torch.eye(sum(p.numel() for p in params), dtype=DOUBLE)
    op = build()
    assert (op._graph._fused is not None) == isinstance(tail, nn.Identity)
    with hessreg.backend("reference"):
        expected = build()
    torch.testing.assert_close(op.matmat(eye), expected.matmat(eye))
    torch.testing.assert_close(op.matvec(eye[3]), expected.matvec(eye[3]))
    torch.testing.assert_close(op.gradient, expected.gradient)


# --- third derivatives


def third(loss, params, w, z):
    """The gradient of w' H z by plain autograd."""
    flat = FlatParameters(params)
    grads = flat.flatten(
        torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    )
    product = torch.autograd.grad(grads @ z, params, create_graph=True, materialize_grads=True)
    value = flat.flatten(product) @ w
    found = torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)
    return value.detach(), flat.flatten(found)


def third_order_losses():
    heads = {
        "softplus": lambda y: F.softplus(y).mean(),
        "coupled": lambda y: torch.logsumexp(y, 0).sum() + (y.tanh().mean(0).exp()).prod(),
        "square": lambda y: y.square().sum(),
        "linear": lambda y: y.sum(),
    }
    for name, activation in ACTIVATIONS.items():
        model = perceptron(activation)
        yield name, heads["softplus"](model(batch())), model
    for name, head in heads.items():
        model = perceptron()
        yield f"{name} head", head(torch.cat([model(batch()), model(batch(4) + 1)])), model
    model = perceptron()
    yield "one pass without curvature", model(batch()).sum() + model(batch(4)).exp().sum(), model
    for player, (loss, network) in gan_losses().items():
        yield player, loss, network


@pytest.mark.parametrize(
    ("loss", "model"), [pytest.param(*rest, id=name) for name, *rest in third_order_losses()]
)
def test_third_derivatives(loss, model):
    params = list(model.parameters())
    op = HessianOperator(loss, params, only_params=True)
    w = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    z = torch.randn(op.shape[0], dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    value, expected = third(loss, params, w, z)
    number = op.bilinear(w, z)
    assert isinstance(op._graph._fused, FusedHessian)
    torch.testing.assert_close(number.detach(), value)
    found = torch.autograd.grad(3 * number, params, retain_graph=True)
    torch.testing.assert_close(FlatParameters(params).flatten(found), 3 * expected)
    assert op.bilinear(w, z, value).item() == value.item()
    with torch.no_grad():
        torch.testing.assert_close(op.bilinear(w, z), value)


def test_gradients_of_third_derivatives():
    """A second differentiation goes through autograd."""
    model = perceptron(nn.Softplus())
    params = list(model.parameters())
    op = HessianOperator(model(batch()).tanh().sum(), params)
    w = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)

    def slope(number):
        first = torch.autograd.grad(number, params, create_graph=True, materialize_grads=True)
        total = sum(g.square().sum() for g in first)
        return torch.autograd.grad(total, params, materialize_grads=True, retain_graph=True)

    assert op._graph._depends_on_params_only
    expected = slope(w @ op.matvec(w, create_graph=True))
    torch.testing.assert_close(slope(op.bilinear(w, w)), expected)


def test_what_else_a_loss_depends_on_gets_its_gradient():
    model, x = perceptron(), batch().requires_grad_()
    params = list(model.parameters())
    loss = model(x).tanh().sum()
    w = torch.linspace(-1, 1, sum(p.numel() for p in params), dtype=DOUBLE)
    op = HessianOperator(loss, params)
    assert op._graph._fused is not None
    expected = torch.autograd.grad(w @ op.matvec(w, create_graph=True), x, retain_graph=True)
    found = torch.autograd.grad(op.bilinear(w, w), x, retain_graph=True)
    torch.testing.assert_close(found, expected)
    only = HessianOperator(loss, params, only_params=True).bilinear(w, w)
    assert torch.autograd.grad(only, x, allow_unused=True) == (None,)


def test_every_operator_has_the_number():
    model = perceptron()
    params = list(model.parameters())
    loss = model(batch()).tanh().sum()
    w = torch.linspace(-1, 1, sum(p.numel() for p in params), dtype=DOUBLE)
    z = w.flip(0)
    H = HessianOperator(loss, params)
    G = GaussNewtonOperator(model(batch()), lambda y: y.exp().sum(), params)
    for op in (G, 2.0 * H + G, hessreg.curvature.DenseOperator(truth(loss, params))):
        number = op.bilinear(w, z)
        torch.testing.assert_close(number.detach(), w @ op.matvec(z))
        if number.requires_grad:
            expected = w @ op.matvec(z, create_graph=True)
            torch.testing.assert_close(
                torch.autograd.grad(number, params, materialize_grads=True, retain_graph=True),
                torch.autograd.grad(expected, params, materialize_grads=True, retain_graph=True),
            )
    with pytest.raises(ValueError, match="z must have shape"):
        H.bilinear(w, z[1:])


def test_bilinear_is_summed_over_data():
    model = perceptron()
    params = list(model.parameters())
    data = [batch(6), batch(3) + 1]
    op = HessianOperator(lambda x: model(x).tanh().square().mean(), params, data)
    w = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    expected = w @ op.matvec(w, create_graph=True)
    number = op.bilinear(w, w)
    torch.testing.assert_close(number, expected)
    torch.testing.assert_close(
        torch.autograd.grad(number, params), torch.autograd.grad(expected, params)
    )


class Undefined(torch.autograd.Function):
    """Zero, with no gradient at all."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_pass_whose_gradient_is_undefined_is_left_to_autograd():
    model = perceptron()
    params = list(model.parameters())
    loss = Undefined.apply(model(batch())).sum() + model(batch(4)).square().sum()
    check_left_to_autograd(loss, params)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Mish()], ids=["fused", "autograd"])
@pytest.mark.parametrize("head", [F.l1_loss, lambda y, t: (y - t).abs().pow(3).sum()])
def test_gradients_of_norms_of_losses_with_a_kink(activation, head):
    model = perceptron(activation)
    params = list(model.parameters())
    loss = head(model(batch()), torch.zeros(6, 2, dtype=DOUBLE))
    op = HessianOperator(loss, params)
    w = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    found = torch.autograd.grad(op.bilinear(w, w), params, retain_graph=True)
    _, expected = third(loss, params, w, w)
    torch.testing.assert_close(FlatParameters(params).flatten(found), expected)


def test_memory_of_several_vectors_is_limited():
    model = perceptron()
    loss = model(batch(500)).square().sum()
    op = HessianOperator(loss, model.parameters(), max_bytes=1 << 18)
    assert op._graph._bytes_per_vector >= 2 * 8 * 500 * (3 + 5 + 4 + 2)
    seen = []
    products = op._graph._fused.products
    op._graph._fused.products = lambda vectors: seen.append(len(vectors)) or products(vectors)
    V = torch.randn(op.shape[0], 9, dtype=DOUBLE)
    op.matmat(V)
    assert sum(seen) == 9
    assert max(seen) == max(1, (1 << 18) // op._graph._bytes_per_vector) < 9
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        HessianOperator(loss, model.parameters(), max_bytes=0)


# --- losses that are sums over the outputs


SUMS = {
    "softplus": lambda y: F.softplus(-y).mean(),
    "negated": lambda y: -(-(F.softplus(y))).sum(),
    "of a squeezed view": lambda y: F.softplus(y.reshape(-1, 1).squeeze(1), beta=2.0).mean(),
    "linear": lambda y: -y.mean(),
    "beside others": lambda y: torch.ones(()) + F.silu(y).sum() + y.detach().sum(),
}
NO_SUMS = {
    "square": lambda y: y.square().sum(),
    "scaled": lambda y: 2 * F.softplus(y).mean(),
    "shifted": lambda y: F.softplus(y + 1).mean(),
    "twice": lambda y: F.softplus(y).mean() + y.mean(),
    "coupled": lambda y: torch.logsumexp(y, 0).sum(),
    "two activations": lambda y: F.softplus(y).tanh().sum(),
    "an activation of the sum": lambda y: y.sum().tanh(),
    "sum of an addition": lambda y: (F.softplus(y).mean() + torch.ones(3)).sum(),
    "addition with a factor": lambda y: torch.add(torch.ones(()), F.softplus(y).mean(), alpha=3),
    "some outputs": lambda y: F.softplus(y[:, 0]).mean(),
}


@pytest.mark.parametrize("name", [*SUMS, *NO_SUMS])
def test_losses_that_are_sums_over_outputs(name):
    model = perceptron()
    params = list(model.parameters())
    loss = (SUMS | NO_SUMS)[name](model(batch()))
    (chain,) = find_chains(loss, params)
    assert (chain.term is not None) == (name in SUMS)
    check(loss, params)


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_norms_of_both_players_are_those_of_autograd(player):
    loss, network = gan_losses()[player]
    params = list(network.parameters())
    assert all(chain.term is not None for chain in find_chains(loss, params))

    def found(**options):
        op = HessianOperator(loss, params, only_params=True)
        value = nuclear_norm(op, num_steps=5, smoothing=1e-2, **options).value
        gradient = torch.autograd.grad(value, params, create_graph=True)
        again = torch.autograd.grad(
            FlatParameters(params).flatten(gradient).norm(), params, retain_graph=True
        )
        return (
            value,
            FlatParameters(params).flatten(gradient),
            FlatParameters(params).flatten(again),
        )

    for options in ({}, {"num_probes": 2}, {"num_deflated": 1}):
        ours = found(**options)
        with hessreg.backend("reference"):
            expected = found(**options)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 100])
@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_spectral_norms_of_both_players_are_those_of_autograd(player, num_steps):
    loss, network = gan_losses()[player]
    params = list(network.parameters())

    def found():
        op = HessianOperator(loss, params, only_params=True)
        norm = spectral_norm(op, num_steps=num_steps)
        first = torch.autograd.grad(norm.value, params, retain_graph=True)
        gradient = torch.autograd.grad(norm.value, params, create_graph=True)
        flat = FlatParameters(params).flatten(gradient)
        again = torch.autograd.grad(flat.norm(), params, retain_graph=True)
        with torch.no_grad():
            number = spectral_norm(op, num_steps=num_steps)
        assert norm.converged is number.converged
        return *norm[:3], *number[:3], *first, *gradient, *again

    start = FlatParameters(params).flatten(params).detach()
    op = HessianOperator(loss, params, only_params=True)
    assert op.spectral_form(start / start.norm(), num_steps) is not None
    ours = found()
    with hessreg.backend("reference"):
        expected = found()
    torch.testing.assert_close(ours, expected)


def test_products_that_are_not_finite_are_reported_by_norms():
    model = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 1))
    with torch.no_grad():
        model[0].weight.mul_(1e-9), model[2].weight.mul_(1e30)
    loss = model(1e9 * batch().float()).mean()
    op = HessianOperator(loss, model.parameters(), only_params=True)
    with pytest.raises(ValueError, match=r"product of params\[\d\], shape .* is (nan|-?inf) at"):
        nuclear_norm(op, num_steps=3)
    with pytest.raises(ValueError, match=r"product of params\[\d\], shape .* is (nan|-?inf) at"):
        spectral_norm(op, num_steps=3)
