from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import hessian, jacrev, vmap

import hessreg
from hessreg import MLPHessian, mlp_hvp, mlp_parameter_hvp, symmetric_matmul
from hessreg.ops.hvp import (
    adjoint_reference,
    backward_reference,
    forward_reference,
    loss_terms,
    mlp_adjoint,
    mlp_backward,
    mlp_forward,
    mlp_second_adjoint,
    mlp_second_tangent,
    mlp_tangent,
    second_adjoint_reference,
    second_tangent_reference,
    symmetric_matmul_reference,
    symmetric_product,
    tangent_reference,
)
from hessreg.ops.spectral import lanczos_step
from tests.check_op import check_accuracy, check_op

# The activations of torch itself.
ACTIVATIONS = {
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    ("softplus", 2.0): lambda z: F.softplus(z, beta=2.0),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    ("leaky_relu", 0.2): lambda z: F.leaky_relu(z, 0.2),
    "leaky_relu": F.leaky_relu,
    ("elu", 0.7): lambda z: F.elu(z, 0.7),
}
SMOOTH = ("tanh", "sigmoid", ("softplus", 2.0), "silu", "gelu", "gelu_tanh")
# Ragged in every direction: of rows of tiles (12, 6, 4, 1) and of panels (4, 8, 16, 32).
WIDTHS = [(3, 1), (5, 7, 1), (2, 13, 33, 1), (50, 66, 3, 21, 2), (4, 1, 1, 5)]


def network(widths, dtype=torch.float64, device="cpu", scale=1.0):
    """Weights and biases."""
    pairs = list(zip(widths[1:], widths, strict=False))
    weights = [scale * torch.randn(out, n, dtype=torch.float64) / n**0.5 for out, n in pairs]
    biases = [scale * torch.randn(out, dtype=torch.float64) for out, _ in pairs]
    return tuple([t.to(device=device, dtype=dtype) for t in part] for part in (weights, biases))


def apply(weights, biases, activation, x):
    *hidden, last = zip(weights, biases, strict=True)
    each = activation if isinstance(activation, list) else [activation] * len(hidden)
    for (weight, bias), one in zip(hidden, each, strict=True):
        x = ACTIVATIONS[one](F.linear(x, weight, bias))
    return F.linear(x, *last)


def flatten(weights, biases):
    return torch.cat([t.flatten() for pair in zip(weights, biases, strict=True) for t in pair])


def unflatten(flat, weights, biases):
    model = [t for pair in zip(weights, biases, strict=True) for t in pair]
    parts = flat.split([t.numel() for t in model])
    tensors = [part.view_as(t) for part, t in zip(parts, model, strict=True)]
    return tensors[::2], tensors[1::2]


def bent(y):
    """A loss with all second derivatives."""
    return (y.sin() * y).sum() + y.sum().square()


def parameter_hessian(weights, biases, activation, x, loss=bent):
    def value(flat):
        return loss(apply(*unflatten(flat, weights, biases), activation, x))

    return hessian(value)(flatten(weights, biases))


def gauss_newton(weights, biases, activation, x, loss=bent):
    flat = flatten(weights, biases)
    jacobian = jacrev(lambda p: apply(*unflatten(p, weights, biases), activation, x).flatten())
    y = apply(weights, biases, activation, x)
    curvature = hessian(loss)(y).reshape(y.numel(), -1)
    return jacobian(flat).T @ curvature @ jacobian(flat)


# ---- the operators under everything torch may do ---------------------------------------------


def symmetric(a: Tensor) -> Tensor:
    return a + a.mT


@pytest.mark.parametrize("shape", [(3, 2), (2, 4, 1)])
def test_symmetric_matmul_passes_every_check(device, shape):
    *batch, n, k = shape
    a = torch.randn(*batch, n, n, dtype=torch.float64, device=device)
    v = torch.randn(n, k, dtype=torch.float64, device=device)  # broadcasts
    check_op(lambda a, v: symmetric_matmul(symmetric(a), v), lambda a, v: symmetric(a) @ v, [a, v])


def parts(count, tensors):
    weights, biases = tensors[: 2 * count : 2], tensors[1 : 2 * count : 2]
    return (weights, biases, *tensors[2 * count :])


def input_product(weights, biases, activation, x, v):
    dense = vmap(hessian(lambda row: apply(weights, biases, activation, row)[0]))(x)
    return (dense @ v[..., None])[..., 0]


def small(widths, device, batch=2):
    weights, biases = network(widths, device=device)
    x = torch.randn(batch, widths[0], dtype=torch.float64, device=device)
    return [t for pair in zip(weights, biases, strict=True) for t in pair], x


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_mlp_hvp_passes_every_check(device, activation):
    tensors, x = small((2, 3, 1), device)

    *tensors, last_bias = tensors  # it has no part in a derivative

    def op(x, v, *tensors):
        return mlp_hvp(*parts(2, [*tensors, None]), activation, x, v)

    def reference(x, v, *tensors):
        return input_product(*parts(2, [*tensors, last_bias]), activation, x, v)

    check_op(op, reference, [x, torch.randn_like(x), *tensors])


@pytest.mark.slow
@pytest.mark.parametrize("gauss", [False, True])
def test_mlp_parameter_hvp_passes_every_check(device, gauss):
    tensors, x = small((1, 2, 1), device)
    v = torch.randn(sum(t.numel() for t in tensors), dtype=torch.float64, device=device)
    dense = gauss_newton if gauss else parameter_hessian

    def loss(y):
        return (y.sin() * y).sum()

    def op(v, x, *tensors):
        return mlp_parameter_hvp(*parts(2, tensors), "tanh", x, loss, v, gauss_newton=gauss)

    def reference(v, x, *tensors):
        return dense(*parts(2, tensors), "tanh", x, loss) @ v

    check_op(op, reference, [v, x, *tensors])


def raw_arguments(widths=(2, 4, 3, 2), batch=3, directions=2, dtype=torch.float64, device="cpu"):
    """The arguments of the operators, consistent with each other."""
    weights, biases = network(widths, dtype, device)
    x = torch.randn(batch, widths[0], dtype=torch.float64).to(device, dtype)
    hidden = len(weights) - 1
    activations = [1 + i % 3 for i in range(hidden)], [2.0] * hidden
    _, *jets = forward_reference(x, weights, biases, *activations, True)
    a, d1, d2, d3 = (jets[i * hidden : (i + 1) * hidden] for i in range(4))
    delta = torch.randn(batch, widths[-1], dtype=torch.float64).to(device, dtype)
    found = backward_reference(delta, weights, d1, d2, d3)
    length = sum(t.numel() for t in weights + biases) + 5
    u = torch.randn(directions, batch, widths[0], dtype=torch.float64).to(device, dtype)
    v = torch.randn(directions, length, dtype=torch.float64).to(device, dtype)
    offsets = scattered_offsets(weights, biases)
    _, *rz = tangent_reference(x, weights, a, d1, u, v, *offsets)
    r_delta = torch.randn(directions, batch, widths[-1], dtype=torch.float64).to(device, dtype)
    kept = found[: hidden + 1], found[hidden + 1 : 2 * hidden + 1]
    deltas = *kept, rz
    pair = torch.randn(2, length, dtype=torch.float64).to(device, dtype)
    ry, *both = second_tangent_reference(x, weights, a, d1, d2, pair, *offsets)
    second = *kept, found[2 * hidden + 1 :], both[:hidden], both[hidden:]
    return {
        "mlp_forward": (x, weights, biases, *activations, False),
        "mlp_forward with third": (x, weights, biases, *activations, True),
        "mlp_backward": (delta, weights, d1, d2, []),
        "mlp_backward with third": (delta, weights, d1, d2, d3),
        "mlp_second_tangent": (x, weights, a, d1, d2, pair, *offsets),
        "mlp_second_adjoint": (x, weights, a, d1, d2, *second, pair, ry.cos(), *offsets),
        "mlp_tangent": (x, weights, a, d1, u, v, *offsets),
        "mlp_adjoint": (x, weights, a, d1, *deltas, u, v, r_delta, *offsets, False, True),
    }


def scattered_offsets(weights, biases):
    """Parameters in backward order with a gap in front and after each other."""
    weight_offsets, bias_offsets, end = [], [], 1
    for weight, bias in zip(weights[::-1], biases[::-1], strict=True):
        bias_offsets.append(end)
        weight_offsets.append(end + bias.numel())
        end += bias.numel() + weight.numel() + (len(weight_offsets) == 1)
    return weight_offsets[::-1], bias_offsets[::-1]


OPERATORS = {
    "mlp_forward": (mlp_forward, forward_reference),
    "mlp_forward with third": (mlp_forward, forward_reference),
    "mlp_backward": (mlp_backward, backward_reference),
    "mlp_backward with third": (mlp_backward, backward_reference),
    "mlp_second_tangent": (mlp_second_tangent, second_tangent_reference),
    "mlp_second_adjoint": (mlp_second_adjoint, second_adjoint_reference),
    "mlp_tangent": (mlp_tangent, tangent_reference),
    "mlp_adjoint": (mlp_adjoint, adjoint_reference),
}


def require_grad(argument):
    if isinstance(argument, Tensor):
        return argument.detach().clone().requires_grad_()
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        return [require_grad(t) for t in argument]
    return argument


@pytest.mark.parametrize("name", OPERATORS)
def test_registration(name):
    arguments = tuple(require_grad(argument) for argument in raw_arguments()[name])
    operator = getattr(torch.ops.hessreg, name.split()[0]).default
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_registration_of_the_symmetric_product():
    a = symmetric(torch.randn(2, 3, 3, dtype=torch.float64)).requires_grad_()
    v = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    operator = torch.ops.hessreg.symmetric_matmul.default
    assert set(torch.library.opcheck(operator, (a, v)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("batch", [1, 5, 33, 70])
def test_operators_equal_their_definitions(device, name, widths, batch):
    operator, reference = OPERATORS[name]
    arguments = raw_arguments(widths, batch, 3, device=device)[name]
    torch.testing.assert_close(operator(*arguments), reference(*arguments))


# ---- values, against torch.func ----------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", WIDTHS[:3])
def test_parameter_products_equal_the_dense_hessian(device, activation, widths):
    weights, biases = network(widths, device=device)
    x = torch.randn(6, widths[0], dtype=torch.float64, device=device)
    dense = parameter_hessian(weights, biases, activation, x)
    v = torch.randn(len(dense), 3, dtype=torch.float64, device=device)
    actual = mlp_parameter_hvp(weights, biases, activation, x, bent, v)
    torch.testing.assert_close(actual, dense @ v)
    one = mlp_parameter_hvp(weights, biases, activation, x, bent, v[:, 0])
    torch.testing.assert_close(one, dense @ v[:, 0])


BY_LAYER = [
    ["tanh", "silu"],
    [("leaky_relu", 0.2), ("softplus", 2.0)],
    ["gelu", "identity"],
]


@pytest.mark.parametrize("activation", BY_LAYER, ids=str)
def test_each_layer_may_have_an_activation_of_its_own(device, activation):
    weights, biases = network((4, 6, 5, 1), device=device)
    x, u = torch.randn(2, 6, 4, dtype=torch.float64, device=device)
    dense = parameter_hessian(weights, biases, activation, x)
    v = torch.randn(len(dense), 2, dtype=torch.float64, device=device)
    actual = mlp_parameter_hvp(weights, biases, activation, x, bent, v)
    torch.testing.assert_close(actual, dense @ v)
    expected = input_product(weights, biases, activation, x, u)
    torch.testing.assert_close(mlp_hvp(weights, biases, activation, x, u), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gauss_newton_products_equal_the_dense_matrix(device, activation):
    weights, biases = network((5, 7, 6, 2), device=device)
    x = torch.randn(4, 5, dtype=torch.float64, device=device)
    dense = gauss_newton(weights, biases, activation, x)
    v = torch.randn(len(dense), 3, dtype=torch.float64, device=device)
    actual = mlp_parameter_hvp(weights, biases, activation, x, bent, v, gauss_newton=True)
    torch.testing.assert_close(actual, dense @ v)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", WIDTHS[:3])
def test_input_products_equal_the_dense_hessian(device, activation, widths):
    weights, biases = network(widths, device=device)
    x = torch.randn(2, 5, widths[0], dtype=torch.float64, device=device)
    dense = vmap(vmap(hessian(lambda row: apply(weights, biases, activation, row)[0])))(x)
    v = torch.randn(*x.shape, 4, dtype=torch.float64, device=device)
    torch.testing.assert_close(mlp_hvp(weights, biases, activation, x, v), dense @ v)
    one = mlp_hvp(weights, biases, activation, x, v[..., 0])
    torch.testing.assert_close(one, (dense @ v)[..., 0])


def test_the_identity_gives_all_of_the_hessian(device):
    weights, biases = network((4, 9, 1), device=device)
    x = torch.randn(4, dtype=torch.float64, device=device)
    eye = torch.eye(4, dtype=torch.float64, device=device)
    dense = hessian(lambda row: apply(weights, biases, "gelu", row)[0])(x)
    torch.testing.assert_close(mlp_hvp(weights, biases, "gelu", x, eye), dense)


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.2)])
def test_piecewise_linear_networks_have_no_curvature_of_their_own(device, activation):
    weights, biases = network((3, 8, 8, 1), device=device)
    x, v = torch.randn(2, 5, 3, dtype=torch.float64, device=device)
    assert not mlp_hvp(weights, biases, activation, x, v).any()


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.2), ("elu", 0.7)])
def test_kinks_are_as_in_torch(device, activation):
    """At z = 0 exactly, the derivatives are those that torch takes."""
    weights = [torch.eye(2, dtype=torch.float64, device=device)] * 2
    biases = [torch.zeros(2, dtype=torch.float64, device=device)] * 2
    x = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64, device=device)
    v = torch.randn(12, dtype=torch.float64, device=device)
    flat = flatten(weights, biases).requires_grad_()
    outputs = apply(*unflatten(flat, weights, biases), activation, x)
    (moved,) = torch.autograd.grad(bent(outputs), flat, create_graph=True)
    (expected,) = torch.autograd.grad(moved, flat, v)
    actual = mlp_parameter_hvp(weights, biases, activation, x, bent, v)
    torch.testing.assert_close(actual, expected)
    w = torch.randn(12, dtype=torch.float64, device=device)
    third = fused_third(weights, biases, activation, x, w, v)
    expected = third_derivative(weights, biases, activation, x, w, v)
    torch.testing.assert_close(third, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_are_as_exact_as_those_of_torch(device, dtype, activation):
    """Values and three derivatives from the tiniest numbers to where they saturate."""
    size = torch.logspace(-30, 2, 400, dtype=torch.float64)
    z = torch.cat([-size, size, torch.linspace(-12, 12, 401, dtype=torch.float64)])
    z = z.to(device, dtype)[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=device)
    activations = hessreg.ops.hvp._checked_activations(activation, 1)
    nothing = [torch.zeros(0, dtype=dtype, device=device)] * 2
    _, *jet = mlp_forward(z, [one, one], nothing, *activations, True)
    exact = forward_reference(
        z.double(), [one.double()] * 2, [n.double() for n in nothing], *activations, True
    )[1:]
    rounding = torch.finfo(dtype).eps
    # A third derivative magnifies the rounding of f': by 4 - 12 f' for tanh, more with beta.
    for ours, truth, slack in zip(jet, exact, (4, 4, 4, 16), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=16 * rounding, atol=slack * rounding)
    small = z[:, 0].abs() < 1e-3
    value, truth = jet[0][0, small].double(), exact[0][0, small]
    torch.testing.assert_close(value, truth, rtol=16 * rounding, atol=0)


@pytest.mark.parametrize("gauss", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "silu", ("leaky_relu", 0.2)])
@pytest.mark.parametrize("widths", [(40, 50, 30, 1), (300, 130, 1)])
def test_error_of_parameter_products_is_at_most_twice_that_of_torch(
    device, activation, widths, gauss
):
    weights, biases = network(widths)
    x = torch.randn(64, widths[0], dtype=torch.float64)
    v = torch.randn(sum(t.numel() for t in weights + biases), dtype=torch.float64)

    def loss(y):
        return F.softplus(y).mean()

    def op(x, v, *tensors):
        return mlp_parameter_hvp(
            *parts(len(weights), tensors), activation, x, loss, v, gauss_newton=gauss
        )

    def plain(x, v, *tensors):
        ours = parts(len(weights), tensors)
        flat = flatten(*ours)

        def outputs(p):
            return apply(*unflatten(p, *ours), activation, x)

        if gauss:
            y, moved = torch.func.jvp(outputs, (flat,), (v,))
            bend = torch.func.jvp(torch.func.grad(loss), (y,), (moved,))[1]
            return torch.func.vjp(outputs, flat)[1](bend)[0]
        gradient = torch.func.grad(lambda p: loss(outputs(p)))
        return torch.func.vjp(gradient, flat)[1](v)[0]

    tensors = [t for pair in zip(weights, biases, strict=True) for t in pair]
    inputs = [t.to(device) for t in [x, v, *tensors]]
    check_accuracy(op, inputs, plain, torch.float32)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_error_of_input_products_is_at_most_twice_that_of_torch(device, activation):
    weights, biases = network((20, 70, 50, 1))
    x, v = torch.randn(2, 40, 20, dtype=torch.float64)

    def op(x, v, *tensors):
        return mlp_hvp(*parts(3, tensors), activation, x, v)

    def plain(x, v, *tensors):
        weights, biases = parts(3, tensors)
        gradient = torch.func.grad(lambda x: apply(weights, biases, activation, x).sum())
        return torch.func.vjp(gradient, x)[1](v)[0]

    tensors = [t for pair in zip(weights, biases, strict=True) for t in pair]
    check_accuracy(op, [t.to(device) for t in [x, v, *tensors]], plain, torch.float32)


@pytest.mark.parametrize("shape", [(1, 1), (4, 33), (3, 64), (2, 100)])
def test_error_of_symmetric_products_is_at_most_twice_that_of_torch(device, shape):
    batch, n = shape
    a = symmetric(torch.randn(batch, n, n, dtype=torch.float64, device=device))
    v = torch.randn(batch, n, 3, dtype=torch.float64, device=device)
    check_accuracy(symmetric_matmul, [a, v], torch.matmul, torch.float32)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("activation", ["tanh", "silu", "gelu", ("softplus", 2.0)])
def test_products_keep_their_digits_at_any_scale(device, activation, scale):
    """Tiny and saturating preactivations, in float32 against float64."""
    weights, biases = network((6, 20, 1), scale=1.0)
    x = scale * torch.randn(8, 6, dtype=torch.float64)
    biases[0] *= scale
    v = torch.randn(6, 3, dtype=torch.float64).expand(8, 6, 3)
    rounded = [t.float().to(device) for t in [*weights, *biases, x, v.contiguous()]]
    exact = [t.double() for t in rounded]
    dense = vmap(hessian(lambda row: apply(exact[:2], exact[2:4], activation, row)[0]))(exact[4])
    actual = mlp_hvp(rounded[:2], rounded[2:4], activation, *rounded[4:])
    assert (actual - dense @ exact[5]).abs().max() <= 1e-5 * (dense @ exact[5]).abs().max() + 1e-30


def test_scaled_directions_give_scaled_products(device):
    weights, biases = network((6, 9, 1), torch.float32, device)
    x = torch.randn(4, 6).to(device)
    v = torch.randn(sum(t.numel() for t in weights + biases)).to(device)
    product = mlp_parameter_hvp(weights, biases, "tanh", x, bent, v)
    for scale in (2.0**-20, 2.0**20):
        scaled = mlp_parameter_hvp(weights, biases, "tanh", x, bent, scale * v)
        torch.testing.assert_close(scaled / scale, product)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(device, dtype):
    weights, biases = network((5, 7, 1), dtype, device)
    x, u = torch.randn(2, 4, 5).to(device, dtype)
    v = torch.randn(sum(t.numel() for t in weights + biases)).to(device, dtype)
    wide = [[t.float() for t in part] for part in (weights, biases)]
    actual = mlp_parameter_hvp(weights, biases, "tanh", x, bent, v)
    expected = mlp_parameter_hvp(*wide, "tanh", x.float(), bent, v.float())
    torch.testing.assert_close(actual, expected.to(dtype))
    actual = mlp_hvp(weights, biases, "tanh", x, u)
    torch.testing.assert_close(actual, mlp_hvp(*wide, "tanh", x.float(), u.float()).to(dtype))
    a, w = symmetric(torch.randn(5, 5)).to(device, dtype), torch.randn(5, 2).to(device, dtype)
    torch.testing.assert_close(symmetric_matmul(a, w), (a.float() @ w.float()).to(dtype))


# ---- theorems ------------------------------------------------------------------------------------


def everything(curvature, length, like):
    """The matrix of a product."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device)
    return curvature(eye)


@pytest.mark.parametrize("gauss", [False, True])
def test_the_matrix_of_products_is_symmetric(device, gauss):
    weights, biases = network((3, 4, 4, 2), device=device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    length = sum(t.numel() for t in weights + biases)
    eye = torch.eye(length, dtype=torch.float64, device=device)
    matrix = mlp_parameter_hvp(weights, biases, "silu", x, bent, eye, gauss_newton=gauss)
    torch.testing.assert_close(matrix, matrix.T)


def test_gauss_newton_of_a_convex_loss_is_positive_semidefinite(device):
    weights, biases = network((3, 4, 4, 2), device=device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    length = sum(t.numel() for t in weights + biases)
    eye = torch.eye(length, dtype=torch.float64, device=device)

    def loss(y):
        return F.softplus(y).sum()

    matrix = mlp_parameter_hvp(weights, biases, "tanh", x, loss, eye, gauss_newton=True)
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] >= -1e-12 * values[-1]
    assert (values > 1e-12 * values[-1]).sum() <= 5 * 2  # of the rank of the outputs at most


def test_a_minimum_without_residuals_has_the_gauss_newton_matrix_for_hessian(device):
    weights, biases = network((3, 5, 2), device=device)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    target = apply(weights, biases, "tanh", x)
    v = torch.randn(sum(t.numel() for t in weights + biases), 2, dtype=torch.float64).to(device)

    def loss(y):
        return (y - target).square().sum()

    whole, part = (
        mlp_parameter_hvp(weights, biases, "tanh", x, loss, v, gauss_newton=gauss)
        for gauss in (False, True)
    )
    torch.testing.assert_close(whole, part)


def test_a_linear_loss_leaves_only_the_curvature_of_the_network(device):
    weights, biases = network((3, 5, 1), device=device)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    v = torch.randn(sum(t.numel() for t in weights + biases), dtype=torch.float64).to(device)
    dense = parameter_hessian(weights, biases, "tanh", x, torch.sum)
    torch.testing.assert_close(
        mlp_parameter_hvp(weights, biases, "tanh", x, torch.sum, v), dense @ v
    )
    assert not mlp_parameter_hvp(weights, biases, "tanh", x, torch.sum, v, gauss_newton=True).any()


def test_a_deep_network(device):
    widths = (3, *([4] * 20), 1)
    weights, biases = network(widths, device=device)
    x = torch.randn(3, 3, dtype=torch.float64, device=device)
    dense = parameter_hessian(weights, biases, "tanh", x)
    v = torch.randn(len(dense), 2, dtype=torch.float64, device=device)
    actual = mlp_parameter_hvp(weights, biases, "tanh", x, bent, v)
    torch.testing.assert_close(actual, dense @ v)


# ---- the caches --------------------------------------------------------------------------------


def curvature_of(weights, biases, activation, x, loss=bent, **options):
    curvature = MLPHessian(weights, biases, activation, x, **options)
    gradient = torch.func.grad(loss)
    y = curvature.outputs
    curvature.linearize(gradient(y))
    return curvature, vmap(lambda moved: torch.func.jvp(gradient, (y,), (moved,))[1])


def test_products_share_their_caches(device):
    weights, biases = network((5, 6, 4, 2), device=device)
    x = torch.randn(7, 5, dtype=torch.float64, device=device)
    curvature, head = curvature_of(weights, biases, "tanh", x)
    torch.testing.assert_close(curvature.outputs, apply(weights, biases, "tanh", x))
    dense = parameter_hessian(weights, biases, "tanh", x)
    for k in (1, 3):
        v = torch.randn(k, len(dense), dtype=torch.float64, device=device)
        torch.testing.assert_close(curvature.product(v, head), v @ dense)
    curvature.linearize(torch.zeros_like(curvature.outputs))
    v = torch.randn(2, len(dense), dtype=torch.float64, device=device)
    expected = v @ gauss_newton(weights, biases, "tanh", x)
    torch.testing.assert_close(curvature.product(v, head), expected)


def test_input_products_know_the_loss(device):
    weights, biases = network((4, 6, 3), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)

    def loss(y):
        return (y.sin() * y).sum()

    curvature, head = curvature_of(weights, biases, "sigmoid", x, loss)
    dense = vmap(hessian(lambda row: loss(apply(weights, biases, "sigmoid", row))))(x)
    u = torch.randn(3, 5, 4, dtype=torch.float64, device=device)
    expected = torch.einsum("bij,kbj->kbi", dense, u)
    torch.testing.assert_close(curvature.input_product(u, head), expected)


def test_offsets_choose_the_parameters(device):
    weights, biases = network((4, 6, 5, 2), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    flat = flatten(weights, biases)
    dense = parameter_hessian(weights, biases, "tanh", x)
    places = unflatten(torch.arange(len(flat), device=device), weights, biases)
    # W_3, then a gap, then b_2, W_1; the others stay fixed.
    weight_offsets, bias_offsets = [10 + 3 + 5, -1, 0], [-1, 10 + 3, -1]
    chosen = torch.cat([places[0][2].flatten(), places[1][1], places[0][0].flatten()])
    where = torch.cat([torch.arange(10), torch.arange(13, 13 + 5 + 24)]).to(device)
    curvature, head = curvature_of(
        weights, biases, "tanh", x, weight_offsets=weight_offsets, bias_offsets=bias_offsets
    )
    v = torch.randn(3, 45, dtype=torch.float64, device=device)
    expected = torch.zeros_like(v)
    expected[:, where] = v[:, where] @ dense[chosen][:, chosen]
    torch.testing.assert_close(curvature.product(v, head), expected)
    part = gauss_newton(weights, biases, "tanh", x)[chosen][:, chosen]
    expected[:, where] = v[:, where] @ part
    torch.testing.assert_close(curvature.product(v, head, gauss_newton=True), expected)


# Which of four layers move: their weights, their biases.
MOVING = {
    "the last two": ("  WW", "  bb"),
    "the first two": ("WW  ", "bb  "),
    "those in between": (" WW ", " bb "),
    "every other": ("W W ", "b b "),
    "one bias": ("    ", " b  "),
    "the last bias": ("    ", "   b"),
    "one weight": ("  W ", "    "),
    "the last weight": ("   W", "    "),
    "no bias": ("WWWW", "    "),
    "none": ("    ", "    "),
}


def moving_part(weights, biases, moving):
    """The offsets of the parameters that move, one after another, and where they lie in all."""
    offsets, places, start, end = ([], []), [], 0, 0
    for weight, bias, *moves in zip(weights, biases, *moving, strict=True):
        for kind, (tensor, letter) in enumerate(zip((weight, bias), moves, strict=True)):
            offsets[kind].append(-1 if letter == " " else end)
            if letter != " ":
                places.append(torch.arange(start, start + tensor.numel(), device=weight.device))
                end += tensor.numel()
            start += tensor.numel()
    return offsets, torch.cat([*places, torch.arange(0, device=weights[0].device)])


@pytest.mark.parametrize("moving", MOVING.values(), ids=MOVING)
def test_products_where_layers_are_fixed(device, moving):
    weights, biases = network((4, 6, 5, 3, 2), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    offsets, chosen = moving_part(weights, biases, moving)
    curvature, head = curvature_of(
        weights, biases, "tanh", x, weight_offsets=offsets[0], bias_offsets=offsets[1]
    )
    v = torch.randn(3, len(chosen), dtype=torch.float64, device=device)
    for gauss, matrix in ((False, parameter_hessian), (True, gauss_newton)):
        dense = matrix(weights, biases, "tanh", x)[chosen][:, chosen]
        actual = curvature.product(v, head, gauss_newton=gauss)
        torch.testing.assert_close(actual, v @ dense)


def test_nothing_is_read_of_the_layers_before_the_first_that_moves(device):
    weights, biases = network((4, 6, 5, 3, 2), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    offsets, chosen = moving_part(weights, biases, MOVING["the last two"])
    options = {"weight_offsets": offsets[0], "bias_offsets": offsets[1]}
    curvature, head = curvature_of(weights, biases, "tanh", x, with_third=True, **options)
    v = torch.randn(2, len(chosen), dtype=torch.float64, device=device)
    outputs_head = third_head(bent, curvature.outputs)
    expected = curvature.product(v, head), curvature.third(*v, outputs_head)
    for weight in weights[:3]:  # W_3 would take on only what does not move
        weight.fill_(math.nan)
    for tensor in (*curvature._a[:1], *curvature._d1[:1], *curvature._s[:2]):
        tensor.fill_(math.nan)
    for tensor in curvature._delta[:2]:
        tensor.fill_(math.nan)
    actual = curvature.product(v, head), curvature.third(*v, outputs_head)
    torch.testing.assert_close(actual, expected)


def test_layers_without_bias(device):
    weights, biases = network((4, 6, 2), device=device)
    biases[0] = torch.zeros_like(biases[0])
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    dense = parameter_hessian(weights, biases, "tanh", x)
    kept = [i for i in range(len(dense)) if not 24 <= i < 30]
    v = torch.randn(len(kept), 2, dtype=torch.float64, device=device)
    actual = mlp_parameter_hvp(weights, [None, biases[1]], "tanh", x, bent, v)
    torch.testing.assert_close(actual, dense[kept][:, kept] @ v)


@pytest.mark.parametrize("widths", [(3, 1), (5, 7, 1)])
def test_empty_batches(device, widths):
    weights, biases = network(widths, device=device)
    x = torch.zeros(0, widths[0], dtype=torch.float64, device=device)
    v = torch.randn(sum(t.numel() for t in weights + biases), 2, dtype=torch.float64).to(device)
    assert not mlp_parameter_hvp(weights, biases, "tanh", x, torch.sum, v).any()
    assert mlp_hvp(weights, biases, "tanh", x, x).shape == x.shape
    empty = torch.zeros(len(v), 0, dtype=torch.float64, device=device)
    product = mlp_parameter_hvp(weights, biases, "tanh", x, torch.sum, empty)
    assert product.shape == empty.shape


def test_large_shapes(device):
    """Sums over several blocks of depth, and many chunks of rows."""
    weights, biases = network((300, 260, 1), torch.float32, device)
    x = torch.randn(300, 300).to(device)
    v = torch.randn(sum(t.numel() for t in weights + biases)).to(device)
    actual = mlp_parameter_hvp(weights, biases, "tanh", x, lambda y: y.square().mean(), v)
    wide = [[t.double() for t in part] for part in (weights, biases)]
    with hessreg.backend("reference"):
        expected = mlp_parameter_hvp(
            *wide, "tanh", x.double(), lambda y: y.square().mean(), v.double()
        )
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


# ---- third derivatives ---------------------------------------------------------------------------


def third_derivative(weights, biases, activation, x, w, z, loss=bent):
    """The gradient of w' H z, by autograd."""
    flat = flatten(weights, biases).requires_grad_()
    value = loss(apply(*unflatten(flat, weights, biases), activation, x))
    (gradient,) = torch.autograd.grad(value, flat, create_graph=True)
    (product,) = torch.autograd.grad(gradient, flat, z, create_graph=True)
    (third,) = torch.autograd.grad(product, flat, w)
    return third


def third_head(loss, y):
    """What `third` must know of a loss."""

    def head(y_w, y_z, y_wz):
        def form(y, y_w, y_z):
            slope, pullback = torch.func.vjp(torch.func.grad(loss), y)
            return (pullback(y_z)[0] * y_w).sum() + (slope * y_wz).sum()

        return torch.func.grad(form, argnums=(0, 1, 2))(y, y_w, y_z)

    return head


def fused_third(weights, biases, activation, x, w, z, loss=bent, **offsets):
    curvature = MLPHessian(weights, biases, activation, x, with_third=True, **offsets)
    curvature.linearize(torch.func.grad(loss)(curvature.outputs))
    return curvature.third(w, z, third_head(loss, curvature.outputs))


def mean_of_softplus(y):
    return F.softplus(y).mean()


def pair_of(weights, biases):
    length = sum(t.numel() for t in weights + biases)
    return torch.randn(2, length, dtype=torch.float64).to(weights[0])


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *BY_LAYER], ids=str)
@pytest.mark.parametrize("widths", [(3, 8, 1), (5, 7, 19, 2), (3, 2)])
def test_third_derivatives_equal_those_of_autograd(device, activation, widths):
    if isinstance(activation, list):
        activation = activation[: len(widths) - 2]
    weights, biases = network(widths, device=device)
    x = torch.randn(6, widths[0], dtype=torch.float64, device=device)
    w, z = pair_of(weights, biases)
    expected = third_derivative(weights, biases, activation, x, w, z)
    actual = fused_third(weights, biases, activation, x, w, z)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("widths", [(16, 128, 33, 1), (64, 300, 1), (8, *[6] * 5, 1)])
def test_third_derivatives_of_larger_networks(device, widths):
    weights, biases = network(widths, device=device)
    x = torch.randn(70, widths[0], dtype=torch.float64, device=device)
    w, z = pair_of(weights, biases)
    expected = third_derivative(weights, biases, "silu", x, w, z, mean_of_softplus)
    actual = fused_third(weights, biases, "silu", x, w, z, mean_of_softplus)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("activation", ["tanh", "silu", "gelu_tanh", ("elu", 0.7)])
@pytest.mark.parametrize("widths", [(40, 50, 30, 1), (20, 300, 1)])
def test_error_of_third_derivatives_is_at_most_twice_that_of_torch(device, activation, widths):
    weights, biases = network(widths)
    x = torch.randn(64, widths[0], dtype=torch.float64)
    w, z = pair_of(weights, biases)

    def op(x, w, z, *tensors):
        ours = parts(len(weights), tensors)
        return fused_third(*ours, activation, x, w, z, mean_of_softplus)

    def plain(x, w, z, *tensors):
        ours = parts(len(weights), tensors)
        return third_derivative(*ours, activation, x, w, z, mean_of_softplus)

    tensors = [t for pair in zip(weights, biases, strict=True) for t in pair]
    inputs = [t.to(device) for t in [x, w, z, *tensors]]
    check_accuracy(op, inputs, plain, torch.float32)


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_third_derivatives_of_activations_are_those_of_autograd(activation):
    z = torch.linspace(-15, 15, 1001, dtype=torch.float64).requires_grad_()
    number, parameter = hessreg.ops.hvp._checked_activation(activation)
    *_, second, third = hessreg.ops.hvp._JETS[number](z, parameter)
    (expected,) = torch.autograd.grad(second.sum(), z)
    torch.testing.assert_close(third, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("moving", MOVING.values(), ids=MOVING)
def test_third_derivatives_where_layers_are_fixed(device, moving):
    weights, biases = network((4, 6, 5, 3, 2), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    offsets, chosen = moving_part(weights, biases, moving)
    options = {"weight_offsets": offsets[0], "bias_offsets": offsets[1]}
    w, z = torch.randn(2, len(chosen), dtype=torch.float64, device=device)
    whole = torch.zeros(2, sum(t.numel() for t in weights + biases)).to(w)
    whole[:, chosen] = torch.stack([w, z])
    expected = third_derivative(weights, biases, "tanh", x, *whole)[chosen]
    actual = fused_third(weights, biases, "tanh", x, w, z, **options)
    torch.testing.assert_close(actual, expected)


def test_third_derivatives_leave_gaps_at_zero(device):
    weights, biases = network((4, 6, 2), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    offsets = {"weight_offsets": [3, -1], "bias_offsets": [30, 38]}
    w, z = torch.randn(2, 44, dtype=torch.float64, device=device)
    actual = fused_third(weights, biases, "tanh", x, w, z, **offsets)
    gaps = [0, 1, 2, 27, 28, 29, 36, 37, 40, 41, 42, 43]
    assert not actual[gaps].any()
    rest = [i for i in range(44) if i not in gaps]
    assert actual[rest].all()


def test_the_third_derivative_is_symmetric(device):
    """In all three directions."""
    weights, biases = network((4, 6, 5, 2), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    w, z = pair_of(weights, biases)
    u, _ = pair_of(weights, biases)
    values = [
        fused_third(weights, biases, "gelu", x, *pair) @ rest
        for *pair, rest in ((w, z, u), (z, w, u), (u, z, w), (w, u, z))
    ]
    torch.testing.assert_close(values[1:], values[:1] * 3)


def test_the_third_derivative_is_what_the_hessian_changes_by(device):
    """Against differences of products, of an error of fourth order."""
    weights, biases = network((4, 6, 5, 2), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    w, z = pair_of(weights, biases)
    step, flat = 1e-3, flatten(weights, biases)

    def product(shift):
        moved = unflatten(flat + shift * step * w, weights, biases)
        return mlp_parameter_hvp(*moved, "silu", x, bent, z)

    differences = 8 * (product(1) - product(-1)) - (product(2) - product(-2))
    expected = differences / (12 * step)
    actual = fused_third(weights, biases, "silu", x, w, z)
    assert (actual - expected).norm() <= 1e-7 * expected.norm()


@pytest.mark.slow
def test_third_passes_every_check(device):
    tensors, x = small((1, 2, 1), device)
    w, z = torch.randn(2, sum(t.numel() for t in tensors), dtype=torch.float64, device=device)

    def loss(y):
        return (y.sin() * y).sum()

    def op(w, x, z, *tensors):
        curvature = MLPHessian(*parts(2, tensors), "tanh", x, with_third=True)
        y = curvature.outputs
        curvature.linearize(y.sin() + y * y.cos())
        second, third = 2 * y.cos() - y * y.sin(), -3 * y.sin() - y * y.cos()

        def head(y_w, y_z, y_wz):  # without torch.func, which does not nest in everything
            return third * y_w * y_z + second * y_wz, second * y_z, second * y_w

        return curvature.third(w, z, head)

    def reference(w, x, z, *tensors):
        weights, biases = parts(2, tensors)

        def value(flat):
            return loss(apply(*unflatten(flat, weights, biases), "tanh", x))

        def form(flat):
            return hessian(value)(flat) @ z @ w

        return torch.func.grad(form)(flatten(weights, biases))

    check_op(op, reference, [w, x, z, *tensors])


def test_third_derivatives_do_not_depend_on_the_number_of_threads():
    weights, biases = network((200, 150, 70, 1), torch.float32)
    x = torch.randn(100, 200)
    w, z = pair_of(weights, biases)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fused_third(weights, biases, "tanh", x, w, z, mean_of_softplus))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("widths", [(3, 1), (5, 7, 1)])
def test_third_derivatives_of_empty_batches(device, widths):
    weights, biases = network(widths, device=device)
    x = torch.zeros(0, widths[0], dtype=torch.float64, device=device)
    w, z = pair_of(weights, biases)
    actual = fused_third(weights, biases, "tanh", x, w, z, torch.sum)
    assert torch.equal(actual, torch.zeros_like(w))


def test_third_refuses_what_it_cannot_use():
    def head(*moved):
        return moved

    curvature = MLPHessian([W], [B], "tanh", X)
    curvature.linearize(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match=r"third needs MLPHessian\(\.\.\., with_third=True\)"):
        curvature.third(torch.ones(16), torch.ones(16), head)
    curvature = MLPHessian([W], [B], "tanh", X, with_third=True)
    with pytest.raises(RuntimeError, match="and linearize first"):
        curvature.third(torch.ones(16), torch.ones(16), head)
    curvature.linearize(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"z must have shape \(16,\), got \(1, 16\)"):
        curvature.third(torch.ones(16), torch.ones(1, 16), head)
    with pytest.raises(
        ValueError, match=r"w must be \[p\] with p of at least 16, got shape \(15,\)"
    ):
        curvature.third(torch.ones(15), torch.ones(15), head)


# ---- symmetric matrices ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 4, 7, 15, 16, 17, 33, 64, 77])
@pytest.mark.parametrize("k", [1, 3])
def test_symmetric_products_equal_those_of_torch(device, dtype, n, k):
    a = symmetric(torch.randn(3, n, n, dtype=torch.float64)).to(device, dtype)
    v = torch.randn(3, n, k, dtype=torch.float64).to(device, dtype)
    torch.testing.assert_close(symmetric_matmul(a, v), a @ v)


def test_only_the_lower_triangle_is_read(device):
    a = symmetric(torch.randn(2, 21, 21, dtype=torch.float64)).to(device)
    v = torch.randn(2, 21, 2, dtype=torch.float64).to(device)
    upper = torch.full_like(a, math.nan).triu(1)
    torch.testing.assert_close(symmetric_matmul(a.tril() + upper, v), a @ v)


def test_large_matrices_are_cut_into_parts(device):
    a = symmetric(torch.randn(1, 530, 530, dtype=torch.float64)).to(device)
    v = torch.randn(1, 530, 1, dtype=torch.float64).to(device)
    torch.testing.assert_close(symmetric_matmul(a, v), a @ v)


def test_the_gradient_is_symmetric(device):
    a = symmetric(torch.randn(5, 5, dtype=torch.float64)).to(device).requires_grad_()
    v, g = torch.randn(2, 5, 3, dtype=torch.float64).to(device)
    (gradient,) = torch.autograd.grad(symmetric_matmul(a, v), a, g)
    torch.testing.assert_close(gradient, 0.5 * (g @ v.T + v @ g.T))


@pytest.mark.parametrize("shapes", [((0, 3, 3), (3, 2)), ((2, 0, 0), (0, 2)), ((3, 3), (3, 0))])
def test_empty_symmetric_products(device, shapes):
    a, v = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
    actual, expected = symmetric_matmul(a, v), a @ v
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


def test_symmetric_products_of_an_empty_batch_of_vmap(device):
    a, v = torch.zeros(0, 3, 3, device=device), torch.zeros(0, 3, 2, device=device)
    assert vmap(symmetric_matmul)(a, v).shape == (0, 3, 2)
    assert vmap(vmap(symmetric_matmul))(a[None], v[None]).shape == (1, 0, 3, 2)


def test_compiled_products_of_networks_of_any_width():
    """The second width makes the sizes symbols."""
    torch._dynamo.reset()
    run = torch.compile(mlp_hvp, backend="eager", fullgraph=True)
    for width in (4, 5, 6):
        weights = [torch.randn(width, 3).double(), torch.randn(1, width).double()]
        x, v = torch.randn(2, 2, 3).double()
        arguments = weights, [None, None], "tanh", x, v
        torch.testing.assert_close(run(*arguments), mlp_hvp(*arguments))


def test_symmetric_reference_is_the_operator(device):
    a = torch.randn(2, 6, 6, dtype=torch.float64).to(device)  # its lower triangle counts
    v = torch.randn(2, 6, 2, dtype=torch.float64).to(device)
    torch.testing.assert_close(symmetric_product(a, v), symmetric_matmul_reference(a, v))


# ---- the same results whatever runs beside -----------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads():
    weights, biases = network((200, 150, 70, 1), torch.float32)
    x = torch.randn(100, 200)
    v = torch.randn(sum(t.numel() for t in weights + biases), 3)
    u = torch.randn(100, 200, 2)
    a, w = symmetric(torch.randn(20, 130, 130)), torch.randn(20, 130, 2)
    large = symmetric(torch.randn(1, 1100, 1100)), torch.randn(1, 1100, 1)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    mlp_parameter_hvp(weights, biases, "tanh", x, bent, v),
                    mlp_hvp(weights, biases, "tanh", x, u),
                    symmetric_matmul(a, w),
                    symmetric_matmul(*large),
                ]
            )
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_directions_do_not_see_each_other(device):
    weights, biases = network((20, 30, 1), torch.float32, device)
    x = torch.randn(10, 20).to(device)
    v = torch.randn(sum(t.numel() for t in weights + biases), 5).to(device)
    together = mlp_parameter_hvp(weights, biases, "tanh", x, bent, v)
    alone = [mlp_parameter_hvp(weights, biases, "tanh", x, bent, v[:, j]) for j in range(5)]
    torch.testing.assert_close(together, torch.stack(alone, 1))


# ---- refusals ----------------------------------------------------------------------------------


X, W, B, LAST = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), torch.ones(1, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([W], [B], "cube", X), ValueError, "activation must be one of identity, .*got 'cube'"),
        (([W], [B], ["tanh"], X), ValueError, r"each of 0 hidden layers, got \['tanh'\]"),
        (([W, LAST], [B, None], ["cube"], X), ValueError, "must be one of identity, .*got 'cube'"),
        (([W], [B], None, X), ValueError, "activation must be one, or a list .*, got None"),
        (([W], [B], ("tanh", 1.0), X), ValueError, "activation 'tanh' has no parameter, got 1.0"),
        (([W], [B], ("elu", "1"), X), TypeError, "parameter of an activation must be a number"),
        (([W], [B], ("softplus", 0.0), X), ValueError, "parameter of softplus must be finite"),
        (([W], [B], ("elu", math.inf), X), ValueError, "parameter of elu must be finite"),
        (([], [], "tanh", X), ValueError, "weights must hold at least one matrix, got none"),
        (([LAST], [None], "tanh", X), ValueError, r"weights\[0\] must be \[width, 3\], got shape"),
        (([W, W], [B, B], "tanh", X), ValueError, r"weights\[1\] must be \[width, 4\], got shape"),
        (([W], [B[:3]], "tanh", X), ValueError, r"biases\[0\] must be \[4\], got shape \(3,\)"),
        (([W], [], "tanh", X), ValueError, "biases must hold one for each of 1 weights, got 0"),
        (([W], [B], "tanh", X[0]), ValueError, r"x must be \[batch, n_0\], got shape \(3,\)"),
        (([W], [B], "tanh", X.double()), ValueError, r"weights\[0\] must have the dtype"),
        (([W], [B.double()], "tanh", X), ValueError, r"biases\[0\] must have the dtype"),
        (([W], [B], "tanh", [X]), TypeError, "x must be a tensor, got <class 'list'>"),
        (([W.long()], [B], "tanh", X), TypeError, "must be a dense tensor of float16"),
    ],
)
def test_wrong_networks_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MLPHessian(*arguments)


def test_wrong_vectors_are_refused():
    with pytest.raises(ValueError, match=r"v must be like x, \(2, 3\), .*got shape \(3,\)"):
        mlp_hvp([W, LAST], [B, None], "tanh", X, X[0])
    with pytest.raises(ValueError, match=r"must end in one of shape \[1, width\], got 4 outputs"):
        mlp_hvp([W], [B], "tanh", X, X)
    with pytest.raises(ValueError, match=r"v must be \[p\] or \[p, k\] with p = 16 parameters"):
        mlp_parameter_hvp([W], [B], "tanh", X, torch.sum, torch.ones(15))
    with pytest.raises(ValueError, match=r"A must be square matrices \[\.\.\., n, n\], got shape"):
        symmetric_matmul(X, X)
    with pytest.raises(ValueError, match=r"V must be vectors \[\.\.\., n, k\] with n = 2"):
        symmetric_matmul(torch.eye(2), torch.ones(3, 1))
    with pytest.raises(
        ValueError, match=r"leading dimensions must broadcast, got \(2,\) and \(3,\)"
    ):
        symmetric_matmul(torch.ones(2, 3, 3), torch.ones(3, 3, 1))
    with pytest.raises(TypeError, match="V must be a tensor"):
        symmetric_matmul(torch.eye(2), 1.0)


def test_products_need_a_gradient_first():
    curvature = MLPHessian([W], [B], "tanh", X)
    with pytest.raises(RuntimeError, match="linearize must be called before a product"):
        curvature.product(torch.ones(1, 16), lambda moved: moved)
    product = curvature.product(torch.ones(1, 16), lambda moved: moved, gauss_newton=True)
    assert product.shape == (1, 16)


@pytest.mark.parametrize(
    ("second", "length", "error", "message"),
    [
        (20, 19, ValueError, r"v must be \[k, p\] with p of at least 24, got shape \(1, 19\)"),
        (10, 30, RuntimeError, "offsets must point to parts of a vector"),
    ],
)
def test_offsets_that_overlap_or_leave_the_vector_are_refused(second, length, error, message):
    curvature = MLPHessian(
        [W, LAST], [B, None], "tanh", X, weight_offsets=[0, second], bias_offsets=[12, -1]
    )
    with pytest.raises(error, match=message):
        curvature.product(torch.ones(1, length), lambda moved: moved, gauss_newton=True)


def test_gradients_and_directions_of_another_shape_or_kind_are_refused():
    curvature = MLPHessian([W], [B], "tanh", X)
    with pytest.raises(ValueError, match=r"delta must have shape \(2, 4\), got \(4,\)"):
        curvature.linearize(torch.ones(4))
    curvature.linearize(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"u must have shape \(1, 2, 3\), got \(1, 3\)"):
        curvature.input_product(torch.ones(1, 3))
    with pytest.raises(ValueError, match="v must have the dtype and device of x"):
        curvature.product(torch.ones(1, 16).double(), lambda moved: moved)


def test_operators_refuse_wrong_caches():
    x, weights, a, d1, *rest = raw_arguments()["mlp_tangent"]
    with pytest.raises(RuntimeError, match=r"hvp: a must be \[4, 3\], got \[3, 4\]"):
        mlp_tangent(x, weights, [a[0].mT, a[1]], d1, *rest)
    with pytest.raises(RuntimeError, match="hvp: d1 must hold 2 tensors, got 1"):
        mlp_tangent(x, weights, a, d1[:1], *rest)


# --- losses that are sums over the outputs


def summed(device, widths=(5, 7, 6, 2), rows=9, dtype=torch.float64, **offsets):
    """A network, linearised at the mean of a softplus of its outputs, and that loss."""
    weights, biases = network(widths, dtype, device)
    x = torch.randn(rows, widths[0], dtype=torch.float64).to(device, dtype)
    curvature = MLPHessian(weights, biases, "silu", x, with_third=True, **offsets)
    scale = 1 / curvature.outputs.numel()
    loss = loss_terms(curvature.outputs, [rows], ["softplus"], [-1.0], [scale])
    curvature.linearize(loss[0])
    return curvature, loss


def third_of(curvature, loss, w, z):
    """The gradient of w' H z in the parameters, by what takes any loss."""

    def head(y_w, y_z, y_wz):
        return loss[1] * y_wz + loss[2] * y_w * y_z, loss[1] * y_z, loss[1] * y_w

    return curvature.third(w, z, head)


def dense(curvature, loss):
    eye = torch.eye(curvature._length, dtype=loss.dtype, device=loss.device)
    return curvature.product(eye, lambda moved: loss[1] * moved)


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_derivatives_of_loss_terms(device, activation):
    y = torch.linspace(-3, 3, 10, dtype=torch.float64).reshape(5, 2).requires_grad_()
    number, parameter = hessreg.ops.hvp._checked_activation(activation)

    def f(z):
        return hessreg.ops.hvp._JETS[number](z, parameter)[0]

    order, total = [], f(-y[:3]).sum() / 6 - 2 * y[3:].sum()
    for _ in range(3):
        (total,) = torch.autograd.grad(total.sum(), y, create_graph=True)
        order.append(total.detach())
    kinds = [activation, "identity"], [-1.0, 1.0], [1 / 6, -2.0]
    actual = loss_terms(y.detach().to(device), [3, 2], *kinds)
    torch.testing.assert_close(actual.cpu(), torch.stack(order), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_steps_are_single_products(device, dtype, gauss_newton):
    curvature, loss = summed(device, dtype=dtype)
    basis = torch.zeros(7, curvature._length, dtype=dtype, device=device)
    rows = torch.linalg.qr(torch.randn(basis.shape[1], 2, dtype=torch.float64))[0].mT
    basis[:2] = rows.to(basis)
    expected, largest = basis.clone(), torch.zeros(1, dtype=torch.float64, device=device)
    steps = 1, 5, 1e-12, largest, loss[1]
    found = curvature.lanczos_steps(basis, *steps, gauss_newton=gauss_newton)
    assert [len(result) for result in found] == [5, 6, 7, 8, 9]
    for j, result in enumerate(found, 1):
        v = expected[j : j + 1]
        w = curvature.product(v, lambda moved: loss[1] * moved, gauss_newton=gauss_newton)[0]
        largest = lanczos_step(expected, w, j + 1, largest, 1e-12)
        torch.testing.assert_close(result, largest, rtol=1e-4, atol=1e-6)
        largest = largest[-1:]
    torch.testing.assert_close(basis, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_absolute_form_of_a_whole_krylov_space(device, smoothing):
    """With as many steps as there are parameters, w = f(H) z by eigenvalues."""
    curvature, loss = summed(device, (2, 3, 1), rows=4)
    H = dense(curvature, loss).cpu()
    values, V = torch.linalg.eigh((H + H.mT) / 2)
    z = torch.nn.functional.normalize(torch.randn(len(H), dtype=torch.float64), dim=0)
    signs = values / values.hypot(smoothing * values.abs().max())
    expected = 3 * V @ (signs * (V.mT @ z))
    options = {"smoothing": smoothing, "weight": 3.0, "with_gradient": True}
    value, w, gradient = curvature.absolute_form(z.to(device), len(H) + 5, loss, **options)
    assert value.item() == pytest.approx((expected @ H @ z).item(), rel=1e-9)
    if smoothing:  # the sign of eigenvalues that are rounding errors means nothing
        torch.testing.assert_close(w.cpu(), expected, rtol=1e-7, atol=1e-7)

    third = third_of(curvature, loss, w, z.to(device))
    torch.testing.assert_close(gradient, third, rtol=1e-10, atol=1e-12)
    options["with_gradient"] = False
    assert len(curvature.absolute_form(z.to(device), 3, loss, **options)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("form", "options"),
    [("absolute_form", {"smoothing": 0.01, "weight": 2.0}), ("spectral_form", {})],
    ids=["absolute", "spectral"],
)
def test_forms_are_their_references(device, dtype, form, options):
    curvature, loss = summed(device, dtype=dtype)
    z = torch.nn.functional.normalize(torch.randn(curvature._length), dim=0).to(loss)
    run = getattr(curvature, form)
    found = run(z, 4, loss=loss, **options, with_gradient=True)
    with hessreg.backend("reference"):
        expected = run(z, 4, loss=loss, **options, with_gradient=True)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        size = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * size)


def test_absolute_form_ends_at_an_invariant_space(device):
    curvature, loss = summed(device, (3, 1), rows=1)  # a Hessian of rank one
    H = dense(curvature, loss)
    z = H[0] / H[0].norm()
    options = {"smoothing": 0.0, "weight": 1.0, "with_gradient": False}
    value, w = curvature.absolute_form(z, 4, loss, **options)
    assert value.item() == pytest.approx(H.trace().item(), rel=1e-12)
    torch.testing.assert_close(w, z)


def test_absolute_form_of_what_is_not_finite(device):
    curvature, loss = summed(device)
    z = torch.full((curvature._length,), torch.nan, dtype=torch.float64, device=device)
    options = {"smoothing": 0.0, "weight": 1.0, "with_gradient": True}
    assert curvature.absolute_form(z, 3, loss, **options) == []


@pytest.mark.parametrize(
    "offsets",
    [
        {},
        {"weight_offsets": [-1, 0, 42], "bias_offsets": [-1, -1, 54]},
        {"weight_offsets": [3, -1, -1], "bias_offsets": [45, -1, -1]},
        {"weight_offsets": [-1, -1, -1], "bias_offsets": [0, -1, 7]},
    ],
    ids=["all", "last", "first", "biases"],
)
def test_spectral_form_of_a_whole_krylov_space(device, offsets):
    curvature, loss = summed(device, rows=70, **offsets)
    H = dense(curvature, loss)
    values, vectors = torch.linalg.eigh((H + H.mT) / 2)
    k = values.abs().argmax()
    z = torch.nn.functional.normalize(torch.randn(len(H), dtype=torch.float64), dim=0).to(device)
    ends, v, gradient = curvature.spectral_form(z, len(H) + 5, loss, with_gradient=True)
    assert ends.tolist() == pytest.approx([values[k].item(), 0.0], rel=1e-9, abs=1e-9)
    assert abs(v @ vectors[:, k]).item() == pytest.approx(1.0, rel=1e-9)
    assert v @ z > 0

    third = values[k].sign() * third_of(curvature, loss, v, v)
    torch.testing.assert_close(gradient, third, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_spectral_form_after_a_few_steps(device, sign):
    """The residual is that of the pair, and the gradient that of the modulus."""
    curvature, loss = summed(device)
    loss = sign * loss
    curvature.linearize(loss[0])
    H = dense(curvature, loss)
    z = torch.nn.functional.normalize(torch.randn(len(H), dtype=torch.float64), dim=0).to(device)
    (theta, residual), v, gradient = curvature.spectral_form(z, 4, loss, with_gradient=True)
    assert theta.item() == pytest.approx((v @ H @ v).item(), rel=1e-10)
    assert residual.item() == pytest.approx((H @ v - theta.item() * v).norm().item(), rel=1e-8)

    third = math.copysign(1, theta) * third_of(curvature, loss, v, v)
    torch.testing.assert_close(gradient, third, rtol=1e-10, atol=1e-12)
    assert len(curvature.spectral_form(z, 4, loss, with_gradient=False)) == 2


def test_spectral_form_ends_at_an_invariant_space(device):
    curvature, loss = summed(device, (3, 1), rows=1)  # a Hessian of rank one
    H = dense(curvature, loss)
    for num_steps in 1, 2, 4:
        ends, v = curvature.spectral_form(H[0] / H[0].norm(), num_steps, loss, with_gradient=False)
        assert ends.tolist() == pytest.approx([H.trace().item(), 0.0], rel=1e-12, abs=1e-12)
        torch.testing.assert_close(v, H[0] / H[0].norm())


def test_spectral_form_of_what_is_not_finite(device):
    curvature, loss = summed(device)
    z = torch.full((curvature._length,), torch.nan, dtype=torch.float64, device=device)
    assert curvature.spectral_form(z, 3, loss, with_gradient=True) == []


def test_sums_over_outputs_refuse_wrong_arguments():
    curvature, loss = summed("cpu")
    z, options = loss.new_ones(curvature._length), {"smoothing": 0.0, "weight": 1.0}
    with pytest.raises(ValueError, match=r"loss must have shape \(3, 9, 2\), got \(9, 2\)"):
        curvature.absolute_form(z, 3, loss[0], **options, with_gradient=False)
    with pytest.raises(ValueError, match=r"z must be \[p\]"):
        curvature.absolute_form(z[1:], 3, loss, **options, with_gradient=False)
    with pytest.raises(ValueError, match=r"curvature must have shape \(9, 2\)"):
        curvature.lanczos_steps(z.repeat(3, 1), 0, 1, 0.0, loss.new_zeros(1), loss)
    with pytest.raises(ValueError, match="activation must be one of"):
        loss_terms(loss[0], [9], ["cube"], [1.0], [1.0])
    new = MLPHessian(curvature._weights, curvature._biases, "silu", curvature._x)
    with pytest.raises(RuntimeError, match="linearize must be called before"):
        new.absolute_form(z, 3, loss, **options, with_gradient=False)
    with pytest.raises(RuntimeError, match="third needs"):
        new.absolute_form(z, 3, loss, **options, with_gradient=True)
    with pytest.raises(RuntimeError, match="third needs"):
        new.spectral_form(z, 3, loss, with_gradient=True)
