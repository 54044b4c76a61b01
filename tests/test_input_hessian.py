"""Hessians in the inputs, one for each sample: products, norms, what is refused, what stays."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, vmap

import hessreg
from hessreg.curvature import (
    ConvergenceWarning,
    HessianOperator,
    InputHessianOperator,
    NonFiniteError,
    eigenvalues,
    trace,
)
from hessreg.curvature.mlp_graph import find_input_chain

DOUBLE = torch.float64
ORDERS = ["spectral", "nuclear", "one", "fro"]


def perceptron(activation=nn.Tanh, n=3):
    torch.manual_seed(0)
    layers = [nn.Linear(n, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 1)]
    return nn.Sequential(*layers).double()


def conv_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 1)).double().eval()


def samples(b=4, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(b, *(shape or (3,)), dtype=DOUBLE, generator=generator)


def cases():
    """Functions with the inputs they take."""
    mlp = perceptron()
    return {
        "mlp": (mlp, samples()),
        "mlp with a head": (lambda x: F.softplus(mlp(x)).squeeze(1), samples()),
        "gelu": (perceptron(nn.GELU), samples()),
        "mlp of images": (nn.Sequential(nn.Flatten(), perceptron(n=8)), samples(3, 2, 2, 2)),
        "conv": (conv_net(), samples(3, 2, 4, 4)),
        "no network": (lambda x: x.prod(1).exp(), samples()),
        "skip": (lambda x: mlp(x).squeeze(1) * x.square().sum(1), samples()),
        "one number": (lambda x: x**3, samples(5)[:, 0]),
        "one sample": (mlp, samples(1)),
    }


CASES = list(cases())


def truth(fn, x):
    """[b, n, n] by torch.func."""
    n = x[0].numel()
    single = hessian(lambda row: fn(row[None]).sum())
    return vmap(single)(x.detach()).reshape(len(x), n, n).detach()


# --- products


@pytest.mark.parametrize("name", CASES)
def test_products_equal_those_of_torch(name):
    fn, x = cases()[name]
    H, op = truth(fn, x), InputHessianOperator(fn, x)
    assert op.shape == H.shape
    torch.testing.assert_close(op.dense(), H)
    torch.testing.assert_close(op.dense(create_graph=True).detach(), H)
    torch.testing.assert_close(op.eigvalsh(), torch.linalg.eigvalsh(H))
    V = torch.randn(*H.shape[:2], 4, dtype=DOUBLE)
    torch.testing.assert_close(op.matmat(V), H @ V)
    assert op.matmat(V[..., :0]).shape == V[..., :0].shape
    expected = (H @ V)[..., 0]
    torch.testing.assert_close(op.matvec(V[..., 0]), expected)
    in_shape = op.matvec(V[..., 0].reshape(x.shape))
    torch.testing.assert_close(in_shape, expected.reshape(x.shape))
    torch.testing.assert_close(op.outputs, fn(x))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ord", ORDERS)
def test_norms_equal_those_of_the_dense_matrices(name, ord):
    fn, x = cases()[name]
    H = truth(fn, x)
    kinds = {"spectral": 2, "nuclear": "nuc", "one": 1, "fro": "fro"}
    expected = torch.linalg.matrix_norm(H, kinds[ord])
    op = InputHessianOperator(fn, x)
    torch.testing.assert_close(op.norm(ord).detach(), expected)
    with torch.no_grad():
        torch.testing.assert_close(InputHessianOperator(fn, x).norm(ord), expected)


def test_the_whole_batch_is_a_hessian_operator():
    fn, x = perceptron(), samples().requires_grad_()
    H = truth(fn, x)
    whole = HessianOperator(lambda: fn(x).sum(), x)
    torch.testing.assert_close(
        eigenvalues(whole, 2).values, torch.linalg.eigvalsh(H).flatten().sort().values[-2:].flip(0)
    )
    traces = H.diagonal(dim1=1, dim2=2).sum().item()
    assert trace(whole).value == pytest.approx(traces)


@pytest.mark.parametrize("max_bytes", [1, 1 << 12])
def test_products_do_not_depend_on_the_memory_limit(max_bytes):
    fn, x = cases()["conv"]
    torch.testing.assert_close(
        InputHessianOperator(fn, x, max_bytes=max_bytes).dense(), truth(fn, x)
    )


def test_calls_agree_bit_for_bit():
    fn, x = perceptron(), samples()
    first, second = (InputHessianOperator(fn, x) for _ in range(2))
    for ord in ORDERS:
        assert torch.equal(first.norm(ord), second.norm(ord))
    pairs = zip(first.leading_eigenpair(), second.leading_eigenpair(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --- the fused way


@pytest.mark.parametrize(
    ("name", "is_fused"),
    [
        ("mlp", True),
        ("mlp with a head", True),
        ("gelu", True),
        ("mlp of images", True),
        ("one sample", True),
        ("conv", False),
        ("skip", False),
        ("no network", False),
    ],
)
def test_perceptrons_are_recognised(name, is_fused):
    fn, x = cases()[name]
    op = InputHessianOperator(fn, x)
    assert (op._graph._fused is not None) == is_fused
    with hessreg.backend("reference"):
        plain = InputHessianOperator(fn, x)
        assert plain._graph._fused is None
        expected = plain.dense()
    torch.testing.assert_close(op.dense(), expected, rtol=1e-12, atol=1e-13)


def test_only_inputs_in_their_order_and_once_are_recognised():
    net = perceptron()
    x = samples(3, 3).requires_grad_()
    assert find_input_chain(net(x.mT).sum(), x) is None
    assert find_input_chain(net(x.reshape(-1).reshape(3, 3)).sum(), x) is not None
    assert find_input_chain((net(x) * net(x)).sum(), x) is None
    assert find_input_chain(net(x[:1].expand(3, 3)).sum(), x) is None


def test_two_rows_of_a_sample_may_go_through_one_network():
    net, x = perceptron(), samples(2, 6)

    def fn(x):
        return net(x.reshape(-1, 3)).tanh().reshape(-1, 2).prod(1)

    op = InputHessianOperator(fn, x)
    assert op._graph._fused is not None
    torch.testing.assert_close(op.dense(), truth(fn, x))


def test_inputs_of_any_shape_are_multiplied_by_the_fused_operators():
    net = perceptron(n=1)
    z = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    op = HessianOperator(net(z.view(1, 1)).exp().sum(), z)
    assert op._graph._fused is not None
    expected = hessian(lambda z: net(z.view(1, 1)).exp().sum())(z).detach()
    torch.testing.assert_close(op.matvec(torch.ones(1, dtype=DOUBLE))[0], expected)


def test_frozen_parameters_are_left_to_autograd():
    net, x = perceptron(), samples()
    expected = truth(net, x)
    net[2].requires_grad_(False)
    torch.testing.assert_close(InputHessianOperator(net, x).dense(), expected)
    net.requires_grad_(False)
    torch.testing.assert_close(InputHessianOperator(net, x).dense(), expected)


@pytest.mark.parametrize("changed", ["weight", "x"])
def test_changes_in_place_are_noticed(changed):
    net, x = perceptron(), samples()
    op = InputHessianOperator(net, x)
    with torch.no_grad():
        (net[0].weight if changed == "weight" else op._x).add_(1)
    with pytest.raises(ValueError, match="changed in place since the operator was made"):
        op.matvec(x)


# --- gradients of norms


def differentiate(value, net, x):
    return torch.autograd.grad(value, [x, *net.parameters()], allow_unused=True)


def dense_norm(net, x, ord):
    """By autograd through the plain dense Hessian."""
    single = hessian(lambda row: net(row[None]).sum())
    H = vmap(single)(x).reshape(len(x), x[0].numel(), -1)
    if ord in ("spectral", "nuclear"):
        sizes = torch.linalg.eigvalsh(H).abs()
        return sizes.amax(1) if ord == "spectral" else sizes.sum(1)
    return H.abs().sum(1).amax(1) if ord == "one" else H.square().sum((1, 2)).sqrt()


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("name", ["mlp", "mlp of images", "conv"])
def test_gradients_equal_those_through_the_dense_hessian(name, ord):
    net, x = cases()[name]
    x.requires_grad_()
    weights = torch.arange(1.0, len(x) + 1, dtype=DOUBLE)
    ours = differentiate(InputHessianOperator(net, x).norm(ord) @ weights, net, x)
    theirs = differentiate(dense_norm(net, x, ord) @ weights, net, x)
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:  # the last bias
            assert not any(g.any() for g in (a, b) if g is not None)
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ord", ORDERS)
def test_gradcheck(ord):
    net, x = perceptron(), samples(2).requires_grad_()
    names = [name for name, _ in net.named_parameters()]

    def norm(x, *values):
        params = dict(zip(names, values, strict=True))
        return InputHessianOperator(lambda x: functional_call(net, params, (x,)), x).norm(ord)

    values = [p.detach().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradcheck(norm, (x, *values))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.BatchNorm1d(6).eval(), nn.GroupNorm(2, 6)])
@pytest.mark.parametrize("ord", ["spectral", "nuclear"])
def test_gradients_through_normalisation(norm, ord):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), copy.deepcopy(norm), nn.Tanh(), nn.Linear(6, 1)).double()
    x = samples().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: InputHessianOperator(net, x).norm(ord), x)


def test_gradients_reach_what_made_the_input():
    """Through a generator in training mode, of which only the first derivative is taken."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    net, z = perceptron(), samples(5, 2)
    leaf = generator(z).detach().requires_grad_()
    (slope,) = torch.autograd.grad(InputHessianOperator(net, leaf).norm("fro").sum(), leaf)
    x = generator(z)
    op = InputHessianOperator(net, x)
    assert op._graph._fused is not None
    ours = torch.autograd.grad(op.norm("fro").sum(), generator.parameters(), retain_graph=True)
    theirs = torch.autograd.grad(x, generator.parameters(), slope)
    torch.testing.assert_close(ours, theirs)


def test_second_derivatives_of_the_smooth_norms():
    net, x = perceptron(), samples(2).requires_grad_()
    for ord in ("nuclear", "fro"):
        assert torch.autograd.gradgradcheck(
            lambda x, o=ord: InputHessianOperator(net, x).norm(o), x
        )


# --- kinks and zeros


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("name", ["linear", "relu", "head without curvature", "repeated"])
def test_gradients_at_degenerate_spectra_are_finite(name, ord):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    fns = {
        "linear": lambda x: F.linear(x, net[0].weight).sum(1),
        "relu": net,
        "head without curvature": lambda x: net(x) * 2,
        "repeated": lambda x: net[0].weight.sum() * x.square().sum(1),
    }
    x = samples().requires_grad_()
    value = InputHessianOperator(fns[name], x).norm(ord)
    assert value.any() == (name == "repeated")
    if value.requires_grad:
        for grad in differentiate(value.sum(), net, x):
            assert grad is None or grad.isfinite().all()
            assert name == "repeated" or grad is None or not grad.any()


def test_relu_with_a_smooth_head_is_the_outer_product():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    x = samples().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x)
    H = InputHessianOperator(lambda x: net(x).square(), x).dense()
    torch.testing.assert_close(H, 2 * g[:, :, None] * g[:, None, :])


# --- large samples


def wide(n=150, b=3):
    """A quadratic with known eigenvalues for each sample."""
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(b, n, n, dtype=DOUBLE))
    values = torch.linspace(-1, 1, n, dtype=DOUBLE).repeat(b, 1)
    values[:, 0] = torch.tensor([-5.0, -2.0, -3.0])
    values[:, -1] = torch.tensor([2.0, 2.0, 6.0])  # the second sample is a saddle
    return Q @ torch.diag_embed(values) @ Q.mT, torch.tensor([5.0, 2.0, 6.0], dtype=DOUBLE)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_spectral_norm_of_large_samples(scale):
    A, sizes = wide()
    A.mul_(scale).requires_grad_()
    op = InputHessianOperator(lambda x: torch.einsum("bi,bij,bj->b", x, A, x) / 2, samples(3, 150))
    value = op.norm()
    torch.testing.assert_close(value.detach(), scale * sizes)
    (grad,) = torch.autograd.grad(value.sum(), A)
    values, vectors = torch.linalg.eigh(A.detach())
    for i in (0, 2):  # with a simple eigenvalue
        j = values[i].abs().argmax()
        v = vectors[i, :, j]
        torch.testing.assert_close(grad[i], values[i, j].sign() * v[:, None] * v, atol=1e-6, rtol=0)
    found = op.leading_eigenpair()
    assert found.converged.all()
    residuals = (op.matvec(found.vectors) - found.values[:, None] * found.vectors).norm(dim=1)
    assert (residuals <= 1.1 * found.residuals + 1e-14 * scale).all()


def test_few_steps_are_a_lower_bound_and_not_converged():
    A, sizes = wide()
    op = InputHessianOperator(lambda x: torch.einsum("bi,bij,bj->b", x, A, x) / 2, samples(3, 150))
    found = op.leading_eigenpair(4)
    assert not found.converged.any()
    assert (found.values.abs() < sizes).all()
    off = (found.values[:, None] - torch.linalg.eigvalsh(A)).abs().amin(1)
    assert (off <= found.residuals).all()
    with torch.no_grad():
        assert not op.leading_eigenpair(4).values.requires_grad


def test_what_does_not_converge_is_said():
    n = 400
    d = torch.linspace(-1, 1, n, dtype=DOUBLE).pow(3)  # leading eigenvalues too close to tell apart
    d = torch.where(d.abs() > 0.5, d.sign() * (1 + 1e-9 * torch.arange(n)), d)
    d = d * (1 + 1e-3 * torch.linspace(-1, 1, n, dtype=DOUBLE))
    op = InputHessianOperator(lambda x: (d * x.square()).sum(1) / 2, samples(2, n))
    with pytest.warns(ConvergenceWarning, match="not converged for 2 of 2 samples"):
        value = op.norm()
    assert (value <= d.abs().max()).all()
    torch.testing.assert_close(value.detach(), d.abs().max().expand(2), rtol=1e-3, atol=0)


def test_large_samples_with_few_or_no_eigenvalues():
    """Lanczos breaks down at once; float32 as float64."""
    x = samples(2, 200).requires_grad_()
    u = samples(1, 200)[0]
    for dtype in (torch.float32, DOUBLE):
        y, w = x.detach().to(dtype).requires_grad_(), u.to(dtype)
        rank_one = InputHessianOperator(lambda x, w=w: (x @ w).square() / 2, y)
        torch.testing.assert_close(rank_one.norm().detach(), w.square().sum().expand(2))
        multiple = InputHessianOperator(lambda x: x.square().sum(1) * x[:, 0].detach(), y)
        torch.testing.assert_close(multiple.norm().detach(), 2 * y[:, 0].abs().detach())
        zero = InputHessianOperator(lambda x, w=w: x @ w, y)
        found = zero.leading_eigenpair()
        assert found.converged.all()
        assert not found.values.any()
        torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(2, dtype=dtype))


# --- empty and wrong input


def test_an_empty_batch():
    op = InputHessianOperator(perceptron(), samples(0))
    assert op.shape == (0, 3, 3)
    assert op.dense().shape == op.dense(create_graph=True).shape == (0, 3, 3)
    assert op.matvec(torch.zeros(0, 3, dtype=DOUBLE)).shape == (0, 3)
    assert all(op.norm(ord).shape == (0,) for ord in ORDERS)
    assert op.eigvalsh().shape == (0, 3)
    assert op.leading_eigenpair().vectors.shape == (0, 3)


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("b", [0, 4])
def test_no_curvature_has_a_gradient_of_zero(ord, b):
    x = samples(b).requires_grad_()
    value = InputHessianOperator(nn.Linear(3, 1).double(), x).norm(ord)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.shape == x.shape
    assert not gradient.any()


@pytest.mark.parametrize(
    ("fn", "x", "error", "message"),
    [
        (3, samples(), TypeError, "fn must be a callable, got int"),
        (torch.sum, [1.0], TypeError, "x must be a Tensor, got list"),
        (torch.sum, torch.ones(2, 3).half(), TypeError, "x must be float32 or float64, got torch"),
        (torch.sum, torch.tensor(1.0), ValueError, r"x must be \[b, ...\] with entries"),
        (torch.sum, torch.ones(2, 0), ValueError, r"got \(2, 0\)"),
        (lambda x: 3.0, samples(), TypeError, "fn must return a Tensor, got float"),
        (torch.sum, samples(), ValueError, r"shape \(4,\) or \(4, 1\), got \(\)"),
        (torch.exp, samples(), ValueError, r"shape \(4,\) or \(4, 1\), got \(4, 3\)"),
        (lambda x: x.sum(1).detach(), samples(), ValueError, "a tensor with a graph"),
        (
            lambda x: x.sum(1) / 0,
            samples(),
            NonFiniteError,
            r"finite numbers, got -?inf for x\[0\]",
        ),
        (
            lambda x: x.sqrt().sum(1),
            torch.zeros(4, 3),
            NonFiniteError,
            r"gradient of x, shape \(4, 3\), is inf at \(0, 0\)",
        ),
    ],
)
def test_what_is_refused(fn, x, error, message):
    with pytest.raises(error, match=message):
        InputHessianOperator(fn, x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda op: op.matvec(3), TypeError, "v must be a Tensor, got int"),
        (lambda op: op.matvec(torch.ones(12)), ValueError, r"\(4, 3\), got \(12,\)"),
        (lambda op: op.matvec(torch.ones(4, 3)), TypeError, "v must have dtype torch.float64"),
        (lambda op: op.matvec(samples().to("meta")), ValueError, "v must be on cpu, got meta"),
        (lambda op: op.matmat(samples()), ValueError, r"V must have shape \(4, 3, k\)"),
        (lambda op: op.norm("two"), ValueError, "ord must be one of .* got 'two'"),
        (lambda op: op.leading_eigenpair(0), ValueError, "num_steps must be at least 1, got 0"),
        (lambda op: op.leading_eigenpair(2.0), TypeError, "num_steps must be an int, got 2.0"),
    ],
)
def test_calls_that_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(InputHessianOperator(perceptron(), samples()))


def test_infinite_products_are_reported_with_their_place():
    x = samples().abs()
    x[2, 1] = 0
    with pytest.raises(NonFiniteError, match=r"product of x, shape \(4, 3\), is .* at \(2, 1\)"):
        InputHessianOperator(lambda x: x.pow(1.5).sum(1), x)


def minibatch_deviation(x):
    return x.square().sum(1) * x.std(0).sum()


@pytest.mark.parametrize("b", [2, 3, 64])
@pytest.mark.parametrize("kind", ["batch norm", "deviation", "neighbours"])
def test_samples_that_depend_on_each_other_are_refused(kind, b):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)]
    fns = {
        "batch norm": nn.Sequential(*layers).double(),
        "deviation": minibatch_deviation,
        "neighbours": lambda x: (x * x.roll(1, 0)).sum(1),
    }
    with pytest.raises(ValueError, match="fn must treat every sample by itself"):
        InputHessianOperator(fns[kind], samples(b))
    if kind == "batch norm":
        net = fns[kind].eval()
        torch.testing.assert_close(
            InputHessianOperator(net, samples(b)).dense()[0], truth(net, samples(b))[0]
        )


# --- what stays as it was


def test_state_is_unchanged():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)).double()
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1).double())
    net = nn.Sequential(net, spectral, nn.Softplus()).train()
    x = samples()
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    op = InputHessianOperator(net, x)
    first = op.norm()
    op.leading_eigenpair()
    torch.testing.assert_close(op.norm(), first, rtol=0, atol=0)  # one set of dropout masks
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert not x.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_inside_no_grad_nothing_is_recorded():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        op = InputHessianOperator(conv_net(), samples(3, 2, 4, 4))
        assert not op.norm("nuclear").requires_grad
        assert not op.eigvalsh().requires_grad
    assert op.norm("nuclear").requires_grad


# --- coupled samples, siblings


def groups_of(rows):
    """Minibatch deviation in groups, as StyleGAN has it."""

    def fn(x):
        y = x.view(rows, -1, x.shape[1])
        deviation = (y - y.mean(0, keepdim=True)).square().mean(0).sqrt().mean(1)
        return (x.sum(1) * deviation.repeat(rows)).tanh()

    return fn


@pytest.mark.parametrize(
    "fn",
    [
        groups_of(2),
        groups_of(4),
        *(lambda x, k=k: (x * x.roll(k, 0)).square().sum(1) for k in range(1, 8)),
    ],
)
def test_coupled_samples_are_refused_whichever_they_are(fn):
    with pytest.raises(ValueError, match="fn must treat every sample by itself"):
        InputHessianOperator(fn, samples(8))


def test_siblings_are_not_mistaken_for_the_input():
    net = perceptron()
    both = samples(4).requires_grad_()
    for a, b in (both.chunk(2), both.unbind(0)[:2]):
        rows = b.reshape(-1, 3)
        op = HessianOperator(net(rows).square().sum(), a)
        assert op.matmat(torch.eye(a.numel(), dtype=DOUBLE)).norm() == 0
        same = HessianOperator(net(a.reshape(-1, 3)).square().sum(), a)
        assert same._graph._fused is not None
        assert same.matmat(torch.eye(a.numel(), dtype=DOUBLE)).norm() > 0


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Mish()], ids=["fused", "autograd"])
def test_autocast_is_for_the_function_only(activation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 1))
    op = InputHessianOperator(net, torch.randn(5, 3))
    assert (op._graph._fused is not None) == isinstance(activation, nn.Tanh)

    def everything():
        yield from (op.norm(ord) for ord in ("spectral", "nuclear", "one", "fro"))
        yield op.matmat(torch.ones(5, 3, 4))
        yield op.leading_eigenpair().values

    expected = list(everything())
    with torch.autocast("cpu", torch.bfloat16):
        found = list(everything())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
