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
    assert FusedHessian.find(loss, FlatParameters(params)) is None
    op = HessianOperator(loss, params)
    v = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(op.matvec(v), truth(loss, params) @ v)


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
