"""Operators: sums, the Gauss-Newton matrix, data in batches, several processes, memory."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.data import DataLoader, TensorDataset

from hessreg.curvature import (
    DenseOperator,
    GaussNewtonOperator,
    HessianOperator,
    LinearOperator,
    NonFiniteError,
    SumOperator,
    eigenvalues,
)
from tests.processes import in_two_processes

DOUBLE = torch.float64


def classifier(*extra):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), *extra, nn.Linear(5, 4)).double()
    x, t = torch.randn(16, 3, dtype=DOUBLE), torch.randint(0, 4, (16,))
    return model, x, t


def dense(op):
    return op.matmat(torch.eye(op.shape[0], dtype=op.dtype))


# --- sums


def test_sums_and_shifts_are_those_of_the_matrices():
    A, B = (torch.randn(5, 5, dtype=DOUBLE) for _ in range(2))
    A, B = A + A.mT, B + B.mT
    a, b = DenseOperator(A), DenseOperator(B)
    expected = 2 * A - 0.5 * B + 3 * torch.eye(5, dtype=DOUBLE)
    total = (2.0 * a - b * 0.5).shifted(3.0)
    torch.testing.assert_close(dense(total), expected)
    v = torch.randn(5, dtype=DOUBLE)
    torch.testing.assert_close(total.matvec(v), expected @ v)
    torch.testing.assert_close((-(a + b)).matvec(v), -(A + B) @ v)
    assert isinstance(total, LinearOperator)


def test_a_sum_is_differentiable():
    A = torch.diag(torch.tensor([1.0, 2.0])).requires_grad_()
    v = torch.tensor([1.0, 3.0])
    (DenseOperator(A) * 2.0).matvec(v, create_graph=True)[1].backward()
    torch.testing.assert_close(A.grad, 2 * torch.tensor([[0.0, 0.0], [1.0, 3.0]]))


@pytest.mark.parametrize(
    ("operators", "factors", "error", "message"),
    [
        ([], [], ValueError, "at least one"),
        ([torch.eye(2)], [1.0], TypeError, "operators must be linear operators, got Tensor"),
        ([DenseOperator(torch.eye(2))], [1.0, 2.0], ValueError, "got 1 and 2"),
        ([DenseOperator(torch.eye(2))], ["1"], TypeError, "numbers, got '1'"),
        (
            [DenseOperator(torch.eye(2)), DenseOperator(torch.eye(3))],
            [1.0, 1.0],
            ValueError,
            "must agree in shape",
        ),
    ],
)
def test_sum_refuses(operators, factors, error, message):
    with pytest.raises(error, match=message):
        SumOperator(operators, factors)


# --- the Gauss-Newton matrix


def gauss_newton_truth(model, x, t):
    names = [name for name, _ in model.named_parameters()]

    def outputs(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    params = tuple(model.parameters())
    y = outputs(*params)
    J = jacrev(outputs, argnums=tuple(range(len(params))))(*params)
    J = torch.cat([part.reshape(y.numel(), -1) for part in J], 1)
    H = hessian(lambda z: F.cross_entropy(z, t))(y).reshape(y.numel(), y.numel())
    return (J.mT @ H @ J).detach()


def test_gauss_newton_equals_its_definition():
    model, x, t = classifier()
    op = GaussNewtonOperator(lambda: model(x), lambda y: F.cross_entropy(y, t), model.parameters())
    truth = gauss_newton_truth(model, x, t)
    torch.testing.assert_close(dense(op), truth)
    v = torch.randn(op.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(op.matvec(v), truth @ v)
    gradient = HessianOperator(F.cross_entropy(model(x), t), model.parameters()).gradient
    torch.testing.assert_close(op.gradient, gradient)
    assert torch.linalg.eigvalsh(dense(op)).min() > -1e-12


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    model = nn.Linear(3, 4).double()
    _, x, t = classifier()
    params = list(model.parameters())
    op = GaussNewtonOperator(model(x), lambda y: F.cross_entropy(y, t), params)
    torch.testing.assert_close(
        dense(op), dense(HessianOperator(F.cross_entropy(model(x), t), params))
    )


def test_gauss_newton_of_a_linear_loss_is_zero():
    model, x, _ = classifier()
    op = GaussNewtonOperator(model(x), lambda y: y.sum(), model.parameters())
    assert not dense(op).any()


def test_gradient_of_a_gauss_newton_form():
    model, x, t = classifier(nn.BatchNorm1d(5, track_running_stats=False))
    params = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in params), dtype=DOUBLE)
    direction = [torch.randn_like(p) for p in params]

    def form(create_graph=False):
        op = GaussNewtonOperator(lambda: model(x), lambda y: F.cross_entropy(y, t), params)
        return v @ op.matvec(v, create_graph=create_graph)

    def moved(step):
        with torch.no_grad():
            torch._foreach_add_(params, direction, alpha=step)
            value = form()
            torch._foreach_sub_(params, direction, alpha=step)
        return value

    grads = torch.autograd.grad(form(create_graph=True), params)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    torch.testing.assert_close(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("outputs", "loss", "error", "message"),
    [
        (3.0, torch.sum, TypeError, "outputs must be a Tensor or a callable, got float"),
        (torch.ones(2), 3.0, TypeError, "loss must be a callable of the outputs, got float"),
        (torch.ones(2), torch.sum, ValueError, "outputs must be a Tensor with its graph"),
    ],
)
def test_gauss_newton_refuses(outputs, loss, error, message):
    with pytest.raises(error, match=message):
        GaussNewtonOperator(outputs, loss, torch.ones(2, requires_grad=True))


# --- data in batches


def loader(x, t, batch_size, **options):
    return DataLoader(TensorDataset(x, t), batch_size=batch_size, **options)


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ragged_batches_make_the_hessian_of_all_rows(shuffle, progress):
    model, x, t = classifier()
    params = list(model.parameters())
    whole = HessianOperator(F.cross_entropy(model(x), t), params)
    batches = loader(x, t, 7, shuffle=shuffle)
    op = HessianOperator(
        lambda b: F.cross_entropy(model(b[0]), b[1]), params, batches, progress=progress
    )
    V = torch.randn(op.shape[0], 3, dtype=DOUBLE)
    torch.testing.assert_close(op.matmat(V), whole.matmat(V))
    torch.testing.assert_close(op.matvec(V[:, 0]), whole.matvec(V[:, 0]))
    torch.testing.assert_close(op.gradient, whole.gradient)


def test_gauss_newton_over_data():
    model, x, t = classifier()
    op = GaussNewtonOperator(
        lambda b: model(b["x"]),
        lambda y, b: F.cross_entropy(y, b["t"]),
        model.parameters(),
        [{"x": x[:9], "t": t[:9]}, {"x": x[9:], "t": t[9:]}],
    )
    torch.testing.assert_close(dense(op), gauss_newton_truth(model, x, t))


def test_products_over_data_can_be_differentiated():
    model, x, t = classifier()
    params = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in params), dtype=DOUBLE)
    batches = [(x[:9], t[:9]), (x[9:], t[9:])]
    over = HessianOperator(lambda b: F.cross_entropy(model(b[0]), b[1]), params, batches)
    whole = HessianOperator(F.cross_entropy(model(x), t), params)
    grads, expected = (
        torch.autograd.grad(v @ op.matvec(v, create_graph=True), params) for op in (over, whole)
    )
    torch.testing.assert_close(grads, expected)


def test_dropout_and_shuffling_are_the_same_in_every_product():
    model, x, t = classifier(nn.Dropout(0.5))
    batches = loader(x, t, 5, shuffle=True)
    op = HessianOperator(lambda b: F.cross_entropy(model(b[0]), b[1]), model.parameters(), batches)
    v = torch.randn(op.shape[0], dtype=DOUBLE)
    before = torch.get_rng_state()
    first = op.matvec(v)
    torch.rand(3)
    assert torch.equal(op.matvec(v), first)
    torch.set_rng_state(before)
    op.matvec(v)
    assert torch.equal(torch.get_rng_state(), before)
    H = dense(op)
    torch.testing.assert_close(H, H.mT)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, "data must be an iterable of batches, got int"),
        (iter([torch.ones(2)]), TypeError, "got an iterator"),
        ([], ValueError, "data has no rows"),
        ([torch.ones(0, 2)], ValueError, "data has no rows"),
        ([3.0], TypeError, "a batch must hold a tensor"),
    ],
)
def test_data_that_is_refused(data, error, message):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        HessianOperator(lambda b: (w * 1.0).square().sum(), w, data)


def test_data_needs_a_callable():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="loss must be a callable of a batch, got Tensor"):
        HessianOperator(w.square().sum(), w, [torch.ones(1)])


def test_a_bad_batch_is_reported():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(NonFiniteError, match="loss must be finite, got inf"):
        HessianOperator(lambda b: (b * w).square().sum(), w, [torch.ones(2), torch.ones(2) / 0])


# --- memory


@pytest.mark.parametrize("max_bytes", [1, 1 << 14, 1 << 30])
def test_products_do_not_depend_on_the_memory_limit(max_bytes):
    model, x, t = classifier()
    params = list(model.parameters())
    op = HessianOperator(F.cross_entropy(model(x), t), params, max_bytes=max_bytes)
    V = torch.randn(op.shape[0], 9, dtype=DOUBLE)
    one_by_one = torch.stack([op.matvec(v) for v in V.unbind(1)], 1)
    torch.testing.assert_close(op.matmat(V), one_by_one)


# --- several processes


def _share_of_a_process(rank, size, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=size)
    model, x, t = classifier()
    rows = slice(0, 5) if rank == 0 else slice(5, 16)
    params = list(model.parameters())
    op = HessianOperator(
        lambda b: F.cross_entropy(model(b[0]), b[1]),
        params,
        loader(x[rows], t[rows], 4),
        process_group=dist.group.WORLD,
    )
    v = torch.linspace(-1, 1, op.shape[0], dtype=DOUBLE)
    product = op.matvec(v, create_graph=True)
    grads = torch.cat([g.flatten() for g in torch.autograd.grad(v @ product, params)])
    dist.all_reduce(grads)  # as a trainer does
    found = [dense(op), op.gradient, product.detach(), grads / size, *eigenvalues(op, 3, "LM")[:2]]
    results.put((rank, [t.numpy() for t in found]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found_by_two(tmp_path_factory):
    """What each of two processes found, by rank."""
    found = in_two_processes(_share_of_a_process, tmp_path_factory.mktemp("processes") / "store")
    return {rank: [torch.from_numpy(array) for array in arrays] for rank, arrays in found.items()}


def test_two_processes_have_the_hessian_of_all_rows(found_by_two):
    model, x, t = classifier()
    params = list(model.parameters())
    whole = HessianOperator(F.cross_entropy(model(x), t), params)
    v = torch.linspace(-1, 1, whole.shape[0], dtype=DOUBLE)
    product = whole.matvec(v, create_graph=True)
    expected = [dense(whole), whole.gradient, product.detach()]
    grads = torch.autograd.grad(v @ product, params)
    expected.append(torch.cat([g.flatten() for g in grads]))
    for found in found_by_two.values():
        for result, truth in zip(found[:4], expected, strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-14)


def test_two_processes_find_the_eigenvalues_of_one(found_by_two):
    model, x, t = classifier()
    whole = HessianOperator(F.cross_entropy(model(x), t), model.parameters())
    (*_, values, vectors), (*_, others_values, others_vectors) = found_by_two.values()
    assert torch.equal(values, others_values)
    assert torch.equal(vectors, others_vectors)
    torch.testing.assert_close(values, eigenvalues(whole, 3, "LM").values, rtol=1e-12, atol=0)
    truth = torch.linalg.eigvalsh(dense(whole))
    truth = truth[truth.abs().argsort(descending=True)][:3]
    torch.testing.assert_close(values, truth, rtol=1e-12, atol=0)
