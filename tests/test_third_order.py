"""third_order_safe: the composite layers are the native ones, with a right third derivative."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessreg.curvature import HessianOperator, native_norms, third_order_safe
from hessreg.curvature.third_order import require_third_order_safe

FLAT, LINE, IMAGE, VOLUME = (6, 4), (5, 4, 3), (3, 4, 5, 2), (3, 4, 2, 3, 2)
LAYERS = {
    "batch1d": (lambda: nn.BatchNorm1d(4), FLAT),
    "batch1d_line": (lambda: nn.BatchNorm1d(4), LINE),
    "batch2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "batch3d": (lambda: nn.BatchNorm3d(4), VOLUME),
    "batch_cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), IMAGE),
    "batch_untracked": (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    "batch_plain": (lambda: nn.BatchNorm2d(4, affine=False, eps=0.1), IMAGE),
    "batch_sync": (lambda: nn.SyncBatchNorm(4), IMAGE),
    "layer": (lambda: nn.LayerNorm(2), IMAGE),
    "layer_many": (lambda: nn.LayerNorm((4, 5, 2)), IMAGE),
    "layer_plain": (lambda: nn.LayerNorm(4, elementwise_affine=False), FLAT),
    "layer_unbiased": (lambda: nn.LayerNorm(4, bias=False), FLAT),
    "instance1d": (lambda: nn.InstanceNorm1d(4), LINE),
    "instance1d_single": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 3)),
    "instance2d": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "instance2d_tracked": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        IMAGE,
    ),
    "instance3d": (lambda: nn.InstanceNorm3d(4, track_running_stats=True), VOLUME),
}
WRONG = ["batch1d", "batch2d", "layer", "instance1d", "instance2d_tracked"]
RIGHT = {
    "group": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "rms": (lambda: nn.RMSNorm(4), FLAT),
    "batch_eval": (lambda: nn.BatchNorm1d(4).eval(), FLAT),
}


def make(make_layer, shape, dtype=torch.float64):
    torch.manual_seed(0)
    layer = make_layer().to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    return layer, 2 * torch.randn(shape, dtype=dtype) + 1


def run(layer, x, safe):
    if not safe:
        return layer(x)
    with third_order_safe(layer):
        return layer(x)


def derivatives(layer, x, safe):
    """Output, gradient and Hessian-vector product by everything the layer depends on."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    inputs = [x, *layer.parameters()]
    y = run(layer, x, safe)
    first = torch.autograd.grad(y.tanh().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(first, inputs, [torch.randn_like(g) for g in first])
    return [y, *first, *second]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_native_layer(name, training):
    results, buffers = [], []
    for safe in (False, True):
        layer, x = make(*LAYERS[name])
        layer(x)
        layer.train(training)
        results.append(derivatives(layer, x, safe))
        buffers.append({k: b.clone() for k, b in layer.named_buffers()})
    for native, safe in zip(*results, strict=True):
        torch.testing.assert_close(safe, native, rtol=1e-10, atol=1e-11)
        assert safe.stride() == native.stride()
    torch.testing.assert_close(buffers[1], buffers[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_is_as_accurate_as_the_native_layer(name, dtype):
    layer, x = make(*LAYERS[name], dtype=dtype)
    native, safe = run(layer, x, False), run(layer, x, True)
    truth = run(layer.double(), x.double(), False)
    assert safe.dtype == native.dtype
    error, native_error = (y.double().sub(truth).abs().max().item() for y in (safe, native))
    assert error <= 2 * native_error + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["batch2d", "layer", "layer_many", "instance2d"])
def test_keeps_the_native_memory_format(name):
    layer, x = make(*LAYERS[name])
    for layout in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        native, safe = run(layer, layout, False), run(layer, layout, True)
        torch.testing.assert_close(safe, native)
        assert safe.stride() == native.stride()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["batch2d", "layer", "instance2d"])
def test_keeps_the_native_dtype_under_autocast(name, x_dtype):
    layer, x = make(*LAYERS[name], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native, safe = run(layer, x.to(x_dtype), False), run(layer, x.to(x_dtype), True)
    assert safe.dtype == native.dtype
    torch.testing.assert_close(safe, native, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        lambda x: F.instance_norm(x),
        lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        lambda x: F.layer_norm(x, [2]),
        lambda x: torch.layer_norm(x, [2]),
    ],
)
def test_covers_functional_calls(call):
    x = torch.randn(IMAGE, dtype=torch.float64, requires_grad=True)
    with third_order_safe():
        safe = call(x)
    assert native_norms(call(x))
    assert not native_norms(safe)
    torch.testing.assert_close(safe, call(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.BatchNorm1d(3)(torch.ones(1, 3)),
        lambda: nn.BatchNorm1d(3)(torch.ones(4, 5)),
        lambda: nn.BatchNorm2d(3)(torch.ones(4, 3)),
        lambda: F.batch_norm(torch.ones(4, 3), None, None, training=True, eps=0.0),
        lambda: F.batch_norm(torch.ones(4, 3), None, None, torch.ones(2), training=True),
        lambda: F.batch_norm(torch.ones(4), None, None, training=True),
        lambda: nn.InstanceNorm1d(3)(torch.ones(4, 3, 1)),
        lambda: nn.InstanceNorm2d(3, affine=True)(torch.ones(2, 4, 3, 3)),
        lambda: nn.LayerNorm(3)(torch.ones(4, 2)),
        lambda: F.layer_norm(torch.ones(4, 3), [3], torch.ones(2)),
        lambda: F.layer_norm(torch.ones(4, 3, dtype=torch.long), [3]),
    ],
)
def test_raises_what_the_native_layer_raises(call):
    with pytest.raises((IndexError, RuntimeError, ValueError)) as native:
        call()
    with third_order_safe(), pytest.raises((IndexError, RuntimeError, ValueError)) as safe:
        call()
    assert safe.type is native.type
    assert str(safe.value) == str(native.value)


def test_passes_an_empty_batch_through():
    with third_order_safe():
        assert nn.LayerNorm(3)(torch.empty(0, 3)).shape == (0, 3)


class Curved(nn.Module):
    """v' H v of a loss through a layer, as a function of the point on a line in parameters."""

    def __init__(self, layer, x):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(x.shape[-1], x.shape[-1]), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(1)
        ).double()
        self.model(x)
        torch.manual_seed(1)
        self.x = x
        self.params = list(self.model.parameters())
        for p in self.params:
            p.data += 0.3 * torch.randn_like(p)
        n = sum(p.numel() for p in self.params)
        self.v, self.u = torch.randn(2, n, dtype=torch.float64)

    def curvature(self, safe):
        y = run(self.model, self.x, safe)
        grads = torch.autograd.grad(F.softplus(y).sum(), self.params, create_graph=True)
        gradient = torch.cat([g.flatten() for g in grads])
        hv = torch.autograd.grad(gradient @ self.v, self.params, create_graph=True)
        return torch.cat([h.flatten() for h in hv]) @ self.v

    def slope(self, safe):
        parts = torch.autograd.grad(self.curvature(safe), self.params)
        return (torch.cat([p.flatten() for p in parts]) @ self.u).item()

    def finite_difference(self, step=1e-5):
        origin = nn.utils.parameters_to_vector(self.params).detach()
        values = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(origin + sign * step * self.u, self.params)
            values.append(self.curvature(safe=False).item())
        nn.utils.vector_to_parameters(origin, self.params)
        return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("name", LAYERS)
def test_third_derivative_is_right(name):
    layer, x = make(*LAYERS[name])
    curved = Curved(layer, x)
    assert curved.slope(safe=True) == pytest.approx(curved.finite_difference(), rel=1e-5)


@pytest.mark.parametrize("name", RIGHT)
def test_third_derivative_of_layers_left_alone_is_right(name):
    layer, x = make(*RIGHT[name])
    curved = Curved(layer, x)
    assert curved.slope(safe=False) == pytest.approx(curved.finite_difference(), rel=1e-5)
    assert native_norms(run(layer, x.requires_grad_(), False)) == []


@pytest.mark.parametrize("name", WRONG)
def test_native_third_derivative_is_wrong(name):
    layer, x = make(*LAYERS[name])
    curved = Curved(layer, x)
    truth = curved.finite_difference()
    if curved.slope(safe=False) == pytest.approx(truth, rel=1e-4):
        pytest.skip(
            f"torch {torch.__version__} differentiates {type(layer).__name__} rightly:"
            " third_order_safe need not replace it any more"
        )
    assert native_norms(run(layer, x.requires_grad_(), False))


@pytest.mark.parametrize("training", [True, False])
def test_statistics_may_move_under_an_older_graph(training):
    """A native graph holds the running statistics: updating them must not invalidate it."""
    layer, x = make(*LAYERS["batch1d"])
    older = layer.train(training)(x).square().sum()
    before = layer.running_mean.clone()
    run(layer.train(), x, safe=True)
    assert not torch.equal(layer.running_mean, before)
    older.backward()


@pytest.mark.parametrize("running", [True, False])
def test_batch_normalisation_of_an_ensemble(running):
    """Under vmap, as ``torch.func.stack_module_state`` prepares it."""
    layers = [nn.BatchNorm2d(3, track_running_stats=running).double() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)

    def run(parameters, buffers):
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(layers[0], (parameters, buffers), x), buffers

    native = torch.func.vmap(run)(parameters, buffers)
    with third_order_safe():
        safe = torch.func.vmap(run)(parameters, buffers)
    torch.testing.assert_close(safe, native)


def test_is_local_to_the_context_and_the_thread():
    layer, x = make(*LAYERS["batch1d"])
    elsewhere = []
    with third_order_safe(layer):
        thread = threading.Thread(target=lambda: elsewhere.append(native_norms(layer(x))))
        thread.start()
        thread.join()
        with third_order_safe(layer):
            assert native_norms(layer(x)) == []
        assert native_norms(layer(x)) == []
    with pytest.raises(KeyError), third_order_safe():
        raise KeyError
    assert elsewhere == [["batch or instance normalisation"]] == [native_norms(layer(x))]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_refuses_a_scripted_layer():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="BatchNorm1d '1' is compiled by TorchScript"):
        third_order_safe(model).__enter__()
    with third_order_safe(torch.jit.script(nn.Linear(4, 4))):
        pass


def test_names_the_layers_of_a_graph():
    x = torch.randn(IMAGE, requires_grad=True)
    both = nn.BatchNorm2d(4)(x).sum() + nn.LayerNorm(2)(x).sum()
    assert native_norms(both) == ["batch or instance normalisation", "layer normalisation"]
    assert native_norms(nn.BatchNorm2d(4).eval()(x)) == []
    assert native_norms(x.sum()) == native_norms(torch.ones(())) == []
    with pytest.raises(ValueError, match="batch or instance normalisation and layer norm"):
        require_third_order_safe(both)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_penalty_counts_as_a_derivative(training):
    """A penalty on the gradient has a wrong Hessian, not only a wrong third derivative."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    model.train(training)
    x = torch.randn(6, 4, requires_grad=True)

    def penalty():
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return g.square().sum()

    params = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in params))
    if training:
        with pytest.raises(ValueError, match="batch or instance normalisation"):
            HessianOperator(penalty(), params)
    else:
        HessianOperator(penalty(), params).matvec(v)
    HessianOperator(penalty, params).matvec(v)


WEIGHT_NORMS = {
    "rows": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "columns": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4), dim=1),
}


@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_weight_norm_is_right(name):
    """Its native second derivative is wrong already: only values and gradients are compared."""
    layer, x = make(WEIGHT_NORMS[name], FLAT)
    params = list(layer.parameters())
    results = [run(layer, x, safe) for safe in (False, True)]
    grads = [torch.autograd.grad(y.tanh().sum(), params) for y in results]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(grads[1], grads[0])
    curved = Curved(layer, x)
    origin = nn.utils.parameters_to_vector(curved.params).detach()
    slopes, curvatures = [], []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(origin + sign * 1e-5 * curved.v, curved.params)
        loss = F.softplus(curved.model(x)).sum()
        parts = torch.autograd.grad(loss, curved.params)
        slopes.append(torch.cat([p.flatten() for p in parts]) @ curved.v)
        nn.utils.vector_to_parameters(origin + sign * 1e-5 * curved.u, curved.params)
        curvatures.append(curved.curvature(safe=True).item())
    nn.utils.vector_to_parameters(origin, curved.params)
    second, third = ((a - b) / 2e-5 for a, b in (slopes, curvatures))
    assert curved.curvature(safe=True).item() == pytest.approx(second.item(), rel=1e-5)
    assert curved.slope(safe=True) == pytest.approx(third, rel=1e-5)


def test_native_weight_norm_is_refused_where_it_is_wrong():
    model = WEIGHT_NORMS["rows"]()
    loss = model(torch.randn(FLAT)).square().sum()
    assert native_norms(loss, derivatives=1) == []
    assert native_norms(loss, derivatives=2) == ["weight normalisation"]
    with pytest.raises(ValueError, match=r"weight normalisation.*third_order_safe"):
        HessianOperator(loss, model.parameters())


@pytest.mark.parametrize("name", ["batch_untracked", "layer", "instance2d"])
def test_torchs_hessian_of_inputs_and_weights_is_right_in_safe_layers(name):
    """Forward over reverse, through which the native layers' Hessian is wrong by over a tenth."""
    layer, x = make(*LAYERS[name])
    names, weights = zip(*layer.named_parameters(), strict=True)

    def loss(x, *weights):
        state = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, state, (x,)).tanh().square().sum()

    arguments = (x, *(w.detach() for w in weights))
    every = tuple(range(len(arguments)))
    truth = torch.autograd.functional.hessian(loss, arguments)
    with third_order_safe(layer):
        found = torch.func.hessian(loss, argnums=every)(*arguments)
    for row, wanted in zip(found, truth, strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-9, atol=1e-11)
