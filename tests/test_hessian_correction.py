"""Corrected steps around optimisers: by their formula, and all a training loop does to them."""

from __future__ import annotations

import io
import json
import math
import runpy
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessreg.curvature import DenseOperator, HessianOperator, NonFiniteError
from hessreg.optim import CorrectionWarning, HessianCorrection, HessianPreconditioner
from tests.processes import in_two_processes
from tests.states import equal

EXAMPLE = Path(__file__).parents[1] / "examples" / "hessian_correction.py"
DOUBLE = torch.float64
SGD = torch.optim.SGD
RATES = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
}


def network(device="cpu", dtype=DOUBLE, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(device, dtype)


def batch(device="cpu", dtype=DOUBLE, n=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=DOUBLE).to(device, dtype)


def loss_of(net, x):
    return nn.functional.softplus(net(x)).mean() + (net(x) - 1).square().mean()


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors])


def grad_of(net) -> Tensor:
    return flat(p.grad for p in net.parameters())


def matrix_of(net, x) -> Tensor:
    op = HessianOperator(lambda: loss_of(net, x), list(net.parameters()))
    return op.matmat(torch.eye(op.shape[0], dtype=op.dtype, device=op.device)).cpu().double()


def by_eigenvalues(H, g, eps=1.0, mu=1.0, saddle_free=False):
    values, vectors = torch.linalg.eigh((H + H.mT) / 2)
    values = values.abs() if saddle_free else values
    weights = (values + mu * eps**2) / (values**2 + eps**2)
    return vectors @ (weights * (vectors.mT @ g))


def symmetric(values, seed=0):
    """A dense matrix with these eigenvalues, float64."""
    values = torch.as_tensor(values, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=DOUBLE))
    return (Q * values) @ Q.mT


class Quadratic:
    """1/2 (x - c)' A (x - c) in one parameter, from 0."""

    def __init__(self, values, **options):
        self.A = symmetric(values)
        self.minimum = torch.arange(1.0, len(values) + 1, dtype=DOUBLE)
        self.x = nn.Parameter(torch.zeros_like(self.minimum))
        self.calls = 0
        self.options = options

    def loss(self):
        offset = self.x - self.minimum
        return 0.5 * offset @ self.A @ offset

    def operator(self):
        self.calls += 1
        return HessianOperator(self.loss, self.x)

    def closure(self):
        self.x.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def wrapped(self, optimizer=None):
        return HessianCorrection(optimizer or SGD([self.x], lr=1.0), self.operator, **self.options)

    def step(self, optimizer):
        self.closure()
        optimizer.step()


# --- the step


@pytest.mark.parametrize("saddle_free", [False, True])
@pytest.mark.parametrize(("eps", "mu"), [(1.0, 1.0), (0.1, 0.0), (0.3, 2.0)])
def test_gradients_become_corrected_steps(device, eps, mu, saddle_free):
    net, x = network(device), batch(device)
    parameters = list(net.parameters())
    optimizer = HessianCorrection(
        SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=1.0),
        lambda: HessianOperator(lambda: loss_of(net, x), parameters),
        eps=eps,
        mu=mu,
        saddle_free=saddle_free,
        num_steps=31,
    )
    loss_of(net, x).backward()
    before = flat(parameters)
    expected = by_eigenvalues(matrix_of(net, x), grad_of(net), eps, mu, saddle_free)
    optimizer.step()
    torch.testing.assert_close(grad_of(net), expected, rtol=1e-8, atol=1e-9)
    rates = torch.cat([torch.ones(20), torch.full((11,), 0.5)]).double()
    torch.testing.assert_close(flat(parameters), before - rates * expected, rtol=1e-8, atol=1e-9)


def test_single_precision_is_right_to_its_rounding(device):
    net, x = network(device, torch.float32), batch(device, torch.float32)
    exact, x64 = network(), batch()
    parameters = list(net.parameters())
    optimizer = HessianCorrection(
        SGD(parameters, lr=1.0),
        lambda: HessianOperator(lambda: loss_of(net, x), parameters),
        num_steps=31,
    )
    loss_of(net, x).backward()
    loss_of(exact, x64).backward()
    optimizer.step()
    expected = by_eigenvalues(matrix_of(exact, x64), grad_of(exact))
    torch.testing.assert_close(grad_of(net), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", [[1e4, 30.0, 1.0, 0.01], [5.0, 1.0, -2.0, -0.5]])
def test_one_step_lands_where_the_gradient_vanishes(values):
    problem = Quadratic(values, eps=1e-6, mu=0.0)
    problem.step(problem.wrapped())
    torch.testing.assert_close(problem.x.detach(), problem.minimum, rtol=1e-6, atol=1e-6)


def test_only_saddle_free_steps_leave_a_saddle():
    for saddle_free, grows in ((False, False), (True, True)):
        problem = Quadratic([3.0, -2.0], eps=0.1, saddle_free=saddle_free)
        optimizer = problem.wrapped()
        before = problem.loss().item()
        for _ in range(5):
            problem.step(optimizer)
        assert (problem.loss().item() < before - 1) == grows
        distance = (problem.x.detach() - problem.minimum).norm()
        assert (distance > 10) == grows


def test_where_there_is_no_curvature_mu_is_the_rate():
    for mu in (0.0, 0.25):
        problem = Quadratic([0.0, 0.0, 0.0], mu=mu)
        problem.x.grad = torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE)
        problem.wrapped().step()
        torch.testing.assert_close(problem.x.grad, mu * torch.tensor([1.0, -2, 3], dtype=DOUBLE))


def test_damping_is_added_to_the_diagonal():
    values = [9.0, 0.5, -1.0]
    damped, shifted = Quadratic(values, damping=2.0, eps=0.3), Quadratic(values, eps=0.3)
    g = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
    damped.x.grad = g.clone()
    damped.wrapped().step()
    expected = by_eigenvalues(shifted.A + 2 * torch.eye(3, dtype=DOUBLE), g, eps=0.3)
    torch.testing.assert_close(damped.x.grad, expected)


def test_a_longer_step_is_shortened_to_the_radius_and_a_shorter_one_is_not():
    g = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
    steps = {}
    for radius in (None, 100.0, 0.25):
        problem = Quadratic([0.1, 0.5, 2.0], eps=0.01, trust_radius=radius)
        problem.x.grad = g.clone()
        problem.wrapped().step()
        steps[radius] = problem.x.grad
    assert torch.equal(steps[None], steps[100.0])
    torch.testing.assert_close(steps[0.25], steps[None] * 0.25 / steps[None].norm())


def test_curvature_is_renewed_at_every_kth_gradient():
    problem = Quadratic([4.0, 2.0, 1.0, -1.0, 0.5], every=3, num_steps=2, eps=0.5, mu=0.7)
    optimizer = problem.wrapped()
    gradients = torch.randn(7, 5, dtype=DOUBLE)
    for i, g in enumerate(gradients):
        problem.x.grad = g.clone()
        optimizer.step()
        assert problem.calls == 1 + i // 3
        first = gradients[3 * (i // 3)]
        Q, _ = torch.linalg.qr(torch.stack([first, problem.A @ first], 1))
        inside = Q.mT @ g
        expected = Q @ by_eigenvalues(Q.mT @ problem.A @ Q, inside, 0.5, 0.7)
        torch.testing.assert_close(problem.x.grad, expected + 0.7 * (g - Q @ inside))


def test_a_zero_gradient_steps_nowhere_and_leaves_the_renewal_to_the_next():
    problem = Quadratic([4.0, 2.0], every=10)
    optimizer = problem.wrapped()
    for i, g in enumerate(torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, -1.0]], dtype=DOUBLE)):
        problem.x.grad = g.clone()
        optimizer.step()
        assert problem.calls == min(i + 1, 2)
        torch.testing.assert_close(problem.x.grad, by_eigenvalues(problem.A, g))


def test_gradients_may_be_off_around_a_step():
    problem = Quadratic([4.0, 1.0])
    problem.closure()
    expected = by_eigenvalues(problem.A, problem.x.grad)
    sgd = SGD([problem.x], lr=1.0)
    optimizer = HessianCorrection(sgd, lambda: HessianOperator(problem.loss(), problem.x))
    with torch.no_grad():
        optimizer.step()
    torch.testing.assert_close(problem.x.grad, expected)


def test_a_loss_evaluated_on_some_rows_gives_the_curvature_of_these():
    net, x = network(), batch(n=16)
    optimizer = HessianCorrection(
        SGD(net.parameters(), lr=0.1),
        lambda: HessianOperator(lambda: loss_of(net, x[:4]), net.parameters()),
        num_steps=31,
    )
    loss_of(net, x).backward()
    expected = by_eigenvalues(matrix_of(net, x[:4]), grad_of(net))
    optimizer.step()
    torch.testing.assert_close(grad_of(net), expected, rtol=1e-8, atol=1e-9)


# --- optimisers and closures


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_any_optimizer_steps_along_the_corrected_gradient(rate):
    net, by_hand, x = network(), network(), batch()
    parameters = list(net.parameters())
    optimizer = HessianCorrection(
        rate(parameters),
        lambda: HessianOperator(lambda: loss_of(net, x), parameters),
        num_steps=31,
    )
    plain = rate(by_hand.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
        plain.zero_grad()
        loss_of(by_hand, x).backward()
        step = by_eigenvalues(matrix_of(by_hand, x), grad_of(by_hand))
        sizes = [p.numel() for p in by_hand.parameters()]
        for p, part in zip(by_hand.parameters(), step.split(sizes), strict=True):
            p.grad = part.view_as(p)
        plain.step()
    torch.testing.assert_close(flat(parameters), flat(by_hand.parameters()), rtol=1e-6, atol=1e-8)


def test_every_gradient_of_a_closure_is_corrected():
    values = torch.logspace(-1, 3, 12, dtype=DOUBLE)
    problem = Quadratic(values, eps=1e-3, mu=0.0, num_steps=12)
    lbfgs = torch.optim.LBFGS([problem.x], lr=1.0, max_iter=4, tolerance_grad=0.0)
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        return problem.closure()

    first = problem.loss().item()
    # The first of L-BFGS' steps is a short one along the gradient, whose length it does not trust.
    assert problem.wrapped(lbfgs).step(closure).item() == first
    assert problem.calls == evaluations > 2
    torch.testing.assert_close(problem.x.detach(), problem.minimum, rtol=1e-6, atol=1e-6)


def test_a_closure_and_a_step_without_are_the_same_for_adam():
    problems = Quadratic([4.0, 1.0, -1.0]), Quadratic([4.0, 1.0, -1.0])
    first, second = (p.wrapped(torch.optim.Adam([p.x], lr=0.1)) for p in problems)
    for _ in range(3):
        loss = first.step(problems[0].closure)
        assert loss.item() == problems[1].loss().item()
        problems[1].step(second)
    assert torch.equal(problems[0].x, problems[1].x)


def test_a_grad_scaler_unscales_before_and_skips_what_overflowed():
    problem, plain = Quadratic([4.0, 1.0, -1.0]), Quadratic([4.0, 1.0, -1.0])
    scaled, optimizer = problem.wrapped(), plain.wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(problem.loss()).backward()
    scaler.step(scaled)
    scaler.update()
    plain.step(optimizer)
    torch.testing.assert_close(problem.x, plain.x)
    problem.x.grad.fill_(math.inf)
    before = problem.x.detach().clone()
    scaler.scale(problem.x.sum())
    scaler.step(scaled)
    assert torch.equal(problem.x, before)


def test_missing_gradients_count_as_zeros_and_stay_missing():
    a, b = nn.Parameter(torch.ones(2, dtype=DOUBLE)), nn.Parameter(torch.ones(3, dtype=DOUBLE))
    frozen = nn.Parameter(torch.ones(4, dtype=DOUBLE), requires_grad=False)
    A = symmetric([3.0, 2.0, 1.0, -1.0, 0.0])
    optimizer = HessianCorrection(SGD([a, frozen, b], lr=0.1), lambda: DenseOperator(A))
    optimizer.step()  # none at all
    assert optimizer.metrics() == {}
    a.grad = torch.tensor([1.0, -1.0], dtype=DOUBLE)
    optimizer.step()
    g = torch.tensor([1.0, -1.0, 0, 0, 0], dtype=DOUBLE)
    torch.testing.assert_close(a.grad, by_eigenvalues(A, g)[:2])
    assert b.grad is None
    assert frozen.grad is None
    assert torch.equal(b, torch.ones(3, dtype=DOUBLE))


# --- what goes wrong


class Failing(DenseOperator):
    """NaN in products at the calls named."""

    def __init__(self, H, fails):
        super().__init__(H)
        self.fails = fails

    def matvec(self, v, *, create_graph=False):
        return super().matvec(v) * (math.nan if self.fails else 1)


def preconditioned(g, operators, **options):
    """Steps of one preconditioner for one gradient, with the warnings of each."""
    preconditioner = HessianPreconditioner(**options)
    results = []
    for op in operators:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append((preconditioner.correct(g, lambda op=op: op), [*map(str, caught)]))
    return preconditioner, results


def test_failed_products_fall_back_on_the_gradient_and_say_so_once_in_a_row():
    A, g = symmetric([4.0, 1.0, -1.0]), torch.tensor([3.0, 0.0, 4.0], dtype=DOUBLE)
    fails = [True, True, False, True, False]
    preconditioner, results = preconditioned(
        g, [Failing(A, each) for each in fails], trust_radius=2.0, every=4
    )
    for i, (each, (step, said)) in enumerate(zip(fails, results, strict=True)):
        if i in (0, 1):
            assert torch.equal(step, g * 0.4)
        elif i != 3:  # the third serves the fourth too, which is not renewed
            expected = by_eigenvalues(A, g)
            torch.testing.assert_close(step, expected * min(1, 2 / expected.norm()))
        assert bool(said) == (i == 0), (each, said)
    assert "step 1: the gradient is used as it is, uncorrected: a product of" in results[0][1][0]
    assert preconditioner.metrics()["fallbacks"] == 2
    assert preconditioner.metrics()["turn"] > 0


def test_a_second_run_of_failures_is_said_again():
    A, g = symmetric([4.0, 1.0]), torch.ones(2, dtype=DOUBLE)
    operators = [Failing(A, each) for each in (True, False, True, True)]
    _, results = preconditioned(g, operators)
    assert [len(said) for _, said in results] == [1, 0, 1, 0]
    assert "step 3: " in results[2][1][0]


def test_a_run_of_failures_ends_where_a_state_is_restored():
    A, g = symmetric([4.0, 1.0]), torch.ones(2, dtype=DOUBLE)
    preconditioner, _ = preconditioned(g, [Failing(A, True)])
    preconditioner.load_state_dict(preconditioner.state_dict())
    with pytest.warns(CorrectionWarning, match="step 2: the gradient is used as it is"):
        preconditioner.correct(g, lambda: Failing(A, True))


def test_a_loss_that_is_not_finite_falls_back_and_names_it():
    problem = Quadratic([4.0, 1.0], eps=0.1)
    problem.closure()
    gradient = problem.x.grad.clone()
    problem.A.fill_(math.nan)
    optimizer = problem.wrapped()
    with pytest.warns(CorrectionWarning, match="uncorrected: loss must be finite, got nan") as said:
        optimizer.step()
    assert said[0].filename == __file__
    assert torch.equal(problem.x.grad, gradient)
    assert optimizer.metrics() == {"turn": 0.0, "fallbacks": 1}


def test_a_step_that_does_not_solve_its_equation_is_not_made():
    # One product with this gradient shows a curvature of 0, and eps is small.
    H, g = DenseOperator(torch.diag(torch.tensor([1.0, -1.0]))), torch.ones(2)
    options = {"eps": 1e-3, "num_steps": 1, "mu": 0.5, "every": 5}
    careful = HessianPreconditioner(**options)
    with pytest.warns(CorrectionWarning, match=r"its residual 1e\+03 is above 1$"):
        assert torch.equal(careful.correct(g, lambda: H), g)
    assert torch.equal(careful.correct(g, lambda: H), g)  # nor from what was kept
    assert careful.metrics()["residual"] == pytest.approx(1000)
    lenient = HessianPreconditioner(**options, max_residual=math.inf)
    torch.testing.assert_close(lenient.correct(g, lambda: H), 0.5 * g)


def test_a_step_that_overflows_is_not_made():
    H, g = DenseOperator(0.4 * torch.eye(2)), torch.full((2,), 3e38)
    preconditioner = HessianPreconditioner()
    with pytest.warns(CorrectionWarning, match="the corrected step has NaN or infinity"):
        assert torch.equal(preconditioner.correct(g, lambda: H), g)


def test_the_tiniest_eps_leaves_metrics_finite():
    H = DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE))
    preconditioner = HessianPreconditioner(eps=1e-310, num_steps=1, max_residual=math.inf)
    with pytest.warns(CorrectionWarning, match="the corrected step has NaN or infinity"):
        preconditioner.correct(torch.tensor([1.0, 0.0], dtype=DOUBLE), lambda: H)
    assert preconditioner.metrics()["residual"] > 1e300
    assert all(map(math.isfinite, preconditioner.metrics().values()))


def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_parameter():
    net, x = network(), batch()
    parameters = list(net.parameters())
    optimizer = HessianCorrection(
        SGD(parameters, lr=0.1), lambda: HessianOperator(lambda: loss_of(net, x), parameters)
    )
    loss_of(net, x).backward()
    before = flat(parameters)
    parameters[2].grad[0, 3] = math.inf
    message = r"gradient of params\[2\], shape \(1, 5\), is inf at \(0, 3\)"
    with pytest.raises(NonFiniteError, match=message):
        optimizer.step()
    assert torch.equal(flat(parameters), before)
    with pytest.raises(NonFiniteError, match="g has NaN or infinity"):
        HessianPreconditioner().correct(torch.tensor([math.nan]), lambda: None)


def asymmetric(v):
    return torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=DOUBLE) @ v


class Asymmetric(DenseOperator):
    def matvec(self, v, *, create_graph=False):
        return asymmetric(v)


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        (torch.eye(2), TypeError, "operator_factory must return a LinearOperator, got Tensor"),
        (None, TypeError, "operator_factory must return a LinearOperator, got NoneType"),
        (
            DenseOperator(torch.eye(3, dtype=DOUBLE)),
            ValueError,
            r"operator like the gradient, \(2, 2\), torch.float64 on cpu, got \(3, 3\), torch",
        ),
        (
            DenseOperator(torch.eye(2)),
            ValueError,
            r"\(2, 2\), torch.float64 on cpu, got \(2, 2\), torch.float32 on cpu",
        ),
        (
            Asymmetric(torch.eye(2, dtype=DOUBLE)),
            ValueError,
            "the operator of operator_factory: op must be symmetric",
        ),
    ],
)
def test_operators_that_cannot_be_used_are_refused(operator, error, message):
    problem = Quadratic([4.0, 1.0])
    optimizer = HessianCorrection(SGD([problem.x], lr=0.1), lambda: operator)
    problem.closure()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert optimizer.metrics() == {}


def sgd():
    return SGD([nn.Parameter(torch.ones(2))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HessianCorrection(3, dict), TypeError, "optimizer must be a torch.optim.Optim"),
        (
            lambda: HessianCorrection(sgd(), DenseOperator(torch.eye(2))),
            TypeError,
            "operator_factory must be callable and return an operator, got DenseOperator",
        ),
        (lambda: HessianCorrection(sgd(), dict, eps=0.0), ValueError, "eps must be positive"),
        (lambda: HessianCorrection(sgd(), dict, mu=-1.0), ValueError, "mu must be finite and not"),
        (lambda: HessianCorrection(sgd(), dict, every=0), ValueError, "every must be at least 1"),
        (lambda: HessianCorrection(sgd(), dict, num_steps=1.5), TypeError, "num_steps must be an"),
        (lambda: HessianCorrection(sgd(), dict, damping=-1), ValueError, "damping must be finite"),
        (
            lambda: HessianCorrection(sgd(), dict, trust_radius=0),
            ValueError,
            "trust_radius must be positive or None, got 0",
        ),
        (
            lambda: HessianCorrection(sgd(), dict, max_residual=math.nan),
            ValueError,
            "max_residual must be finite and not negative, got nan",
        ),
        (
            lambda: HessianCorrection(SGD([nn.Parameter(torch.ones(2).half())]), dict),
            TypeError,
            r"params\[0\] must be float32 or float64, got torch.float16",
        ),
        (
            lambda: HessianCorrection(
                SGD([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())]), dict
            ),
            ValueError,
            r"params must share one dtype and device: params\[0\] has torch.float32",
        ),
    ],
)
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = HessianCorrection(SGD(embedding.parameters(), lr=0.1), lambda: None)
    embedding(torch.tensor([1])).sum().backward()
    message = r"gradient of params\[0\] must be dense, got torch.sparse_coo"
    with pytest.raises(TypeError, match=message):
        optimizer.step()


# --- metrics


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_metrics_are_those_of_the_eigenvalues(scale):
    values, eps = torch.tensor([8.0, 2.0, -0.5, 0.1], dtype=DOUBLE) * scale, 0.5 * scale
    g = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=DOUBLE)
    preconditioner = HessianPreconditioner(eps=eps, mu=1.0 / scale)
    H = DenseOperator(symmetric(values))
    step = preconditioner.correct(g, lambda: H)
    metrics = preconditioner.metrics()
    corrected = ((values**2 + eps**2) / (values + eps**2 / scale)).abs()
    assert metrics["condition"] == pytest.approx(80)
    assert metrics["smallest"] == pytest.approx(0.1 * scale)
    assert metrics["condition_corrected"] == pytest.approx(corrected.max() / corrected.min())
    assert metrics["smallest_corrected"] == pytest.approx(corrected.min().item())
    cosine = (g @ step / g.norm() / step.norm()).item()
    assert metrics["turn"] == pytest.approx(math.degrees(math.acos(cosine)))
    assert metrics["residual"] < 1e-9
    assert metrics["fallbacks"] == 0


@pytest.mark.parametrize("mu", [0.0, 1.0])
@pytest.mark.parametrize(
    "values", [[0.0, 0.0, 0.0], [1e12, 1.0, 0.0], [1e-12, 0.0, 0.0], [-1.0, 1.0, 0.0], [1.0] * 3]
)
@pytest.mark.parametrize("g", [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1e-30, 0.0, 0.0], [1e30] * 3])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.filterwarnings("ignore::hessreg.optim.CorrectionWarning")  # 1e12 in single precision
def test_steps_and_metrics_are_finite_whatever_the_operator(values, mu, g, dtype):
    preconditioner = HessianPreconditioner(mu=mu)
    H = DenseOperator(torch.diag(torch.tensor(values, dtype=dtype)))
    step = preconditioner.correct(torch.tensor(g, dtype=dtype), lambda: H)
    assert step.isfinite().all()
    metrics = json.loads(json.dumps(preconditioner.metrics(), allow_nan=False))
    assert 1 <= metrics["condition"] <= 1 / torch.finfo(dtype).eps
    assert 0 <= metrics["turn"] <= 180


# --- state


class Training:
    """A network, its wrapped optimiser and steps on the batches of the seeds given."""

    def __init__(self, rate, seed, **options):
        self.net, self.x = network(seed=seed), batch()
        self.parameters = list(self.net.parameters())
        self.optimizer = HessianCorrection(rate(self.parameters), self.operator, **options)

    def operator(self):
        return HessianOperator(lambda: loss_of(self.net, self.x), self.parameters)

    def run(self, seeds):
        for seed in seeds:
            self.x = batch(seed=seed)
            self.optimizer.zero_grad()
            loss_of(self.net, self.x).backward()
            self.optimizer.step()


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_training_is_the_same_bit_for_bit(rate, stop):
    straight, resumed = (Training(rate, seed, every=3, num_steps=4) for seed in (0, 5))
    straight.run(range(stop))
    file = io.BytesIO()
    torch.save([straight.net.state_dict(), straight.optimizer.state_dict()], file)
    straight.run(range(stop, 9))
    file.seek(0)
    weights, state = torch.load(file)
    resumed.run([50])  # to be forgotten
    resumed.net.load_state_dict(weights)
    resumed.optimizer.load_state_dict(state)
    assert equal(resumed.optimizer.state_dict(), state)
    resumed.run(range(stop, 9))
    assert torch.equal(flat(straight.parameters), flat(resumed.parameters))
    assert equal(straight.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert straight.optimizer.metrics() == resumed.optimizer.metrics()


def test_a_state_may_come_from_any_device(device):
    H, gradients = symmetric([4.0, 1.0, -1.0]).to(device), torch.randn(2, 3, dtype=DOUBLE)
    straight, resumed = (HessianPreconditioner(every=2, num_steps=2) for _ in range(2))
    first, second = gradients.to(device)
    straight.correct(first, lambda: DenseOperator(H))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    expected = straight.correct(second, lambda: DenseOperator(H))
    for place in ("cpu", device):
        file.seek(0)
        resumed.load_state_dict(torch.load(file, map_location=place))
        assert torch.equal(resumed.correct(second, lambda: DenseOperator(H)), expected)


def state_with(keys, value):
    problem = Quadratic([4.0, 1.0, -1.0], every=3)
    optimizer = problem.wrapped()
    problem.step(optimizer)
    state = optimizer.state_dict()
    inner = state
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return optimizer, state


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["extra"], 1, r"state must have entries \['optimizer', 'preconditioner'\], got"),
        (["preconditioner"], 3, r"state must have entries \['count', .*\], got int"),
        (["preconditioner", "count"], -1, "count must be an integer of at least 0, got -1"),
        (["preconditioner", "fallbacks"], 1.0, "fallbacks must be an integer of at least 0, got"),
        (["preconditioner", "metrics"], {"x": 1.0}, "metrics must be numbers named condition, "),
        (["preconditioner", "metrics"], 3, "metrics must be numbers named condition, "),
        (["preconditioner", "metrics", "turn"], math.nan, "turn must be a finite number, got nan"),
        (["preconditioner", "curvature"], 3, "curvature must have entries .* got int"),
        (["preconditioner", "curvature", "basis"], None, "curvature's basis must be a matrix"),
        (
            ["preconditioner", "curvature", "basis"],
            torch.zeros(3, 4, dtype=DOUBLE),
            "curvature kept must be of gradients of 3 numbers of torch.float64, got 4 of torch.f",
        ),
        (
            ["preconditioner", "curvature", "basis"],
            torch.zeros(3, 3),
            "must be of gradients of 3 numbers of torch.float64, got 3 of torch.float32",
        ),
        (
            ["preconditioner", "curvature", "values"],
            torch.zeros(2, dtype=DOUBLE),
            r"curvature's values must be float64 of shape \(3,\)",
        ),
        (
            ["preconditioner", "curvature", "coordinates"],
            torch.zeros(3, 3),
            r"curvature's coordinates must be float64 of shape \(3, 3\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(keys, value, message):
    _, state = state_with(keys, value)
    optimizer, good = state_with(["optimizer"], {})
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert equal(optimizer.preconditioner.state_dict(), good["preconditioner"])


def test_a_state_keeps_no_curvature_that_is_not_used_again():
    problem = Quadratic([4.0, 1.0, -1.0])
    optimizer = problem.wrapped()
    problem.step(optimizer)
    assert optimizer.state_dict()["preconditioner"]["curvature"] is None


# --- several processes


def trained(first, last, group=None, parallel=False):
    """Four steps of Adam on rows of batches of 8."""
    net = network()
    forward = nn.parallel.DistributedDataParallel(net, process_group=group) if parallel else net
    x = batch()
    optimizer = HessianCorrection(
        torch.optim.Adam(net.parameters(), lr=0.01),
        lambda: HessianOperator(
            lambda: loss_of(net, x[first:last]), net.parameters(), process_group=group
        ),
        every=2,
        num_steps=5,
        saddle_free=True,
    )
    for step in range(4):
        x = batch(seed=step)
        optimizer.zero_grad()
        loss_of(forward, x[first:last]).backward()
        if group is not None and not parallel:
            for p in net.parameters():
                dist.all_reduce(p.grad.div_(dist.get_world_size(group)), group=group)
        optimizer.step()
    assert optimizer.metrics()["fallbacks"] == 0
    return flat(net.parameters())


def reasons_to_fall_back(rank, group):
    """Why a process does not correct where the curvature's loss is NaN in the second one only."""
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    share = torch.tensor([1.0, math.nan][rank], dtype=torch.float64)
    reasons = []
    for data in (None, [torch.ones(1)]):
        optimizer = HessianCorrection(
            torch.optim.SGD([x], lr=0.1),
            lambda data=data: HessianOperator(
                lambda *batch: share * x.square().sum(), [x], data, process_group=group
            ),
        )
        x.grad = torch.ones_like(x)
        with pytest.warns(CorrectionWarning) as warned:
            optimizer.step()
        reasons.append(str(warned[0].message))
    return reasons


def _share_of_a_process(rank, size, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=size)
    rows = 4 * rank, 4 * rank + 4
    found = [trained(*rows, dist.group.WORLD, parallel).numpy() for parallel in (False, True)]
    results.put((rank, [*found, reasons_to_fall_back(rank, dist.group.WORLD)]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found_by_two(tmp_path_factory):
    """The weights that each of two processes found, by hand and with DistributedDataParallel."""
    return in_two_processes(_share_of_a_process, tmp_path_factory.mktemp("processes") / "store")


@pytest.mark.parametrize("parallel", [False, True])
def test_two_processes_train_as_one_on_the_joined_batch(found_by_two, parallel):
    first, second = (torch.from_numpy(found_by_two[rank][parallel]) for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, trained(0, 8), rtol=1e-9, atol=1e-12)


def test_what_is_not_finite_in_one_process_is_corrected_in_none(found_by_two):
    for first, second in zip(found_by_two[0][2], found_by_two[1][2], strict=True):
        assert first.endswith("the loss or its gradient has NaN or infinity in another process")
        assert second.endswith("loss must be finite, got nan")


# --- the example


@pytest.mark.slow
def test_example_runs_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    for package in ("jsonargparse", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "yaml"):
        pytest.importorskip(package)
    example = runpy.run_path(str(EXAMPLE))
    small = ["--steps=4", "--width=8", "--latent_dim=4", "--log_every=2", "--tensorboard=false"]
    command = [*small, "--seeds=3", "--jobs=2", f"--out={tmp_path}"]
    example["main"](command)
    lines = capsys.readouterr().out.splitlines()
    named = [line.split(" | ")[:2] for line in lines if line.startswith("|")]
    assert named[2:6] == [["| none", "3"], ["| none", "mean"], ["| hsc", "3"], ["| hsc", "mean"]]
    assert [name for name, _ in named[6:]] == ["| seed", "| ---", "| 3"]
    monkeypatch.setattr(subprocess, "run", None)
    example["main"](command)
    assert capsys.readouterr().out.splitlines() == [line for line in lines if "digits" not in line]
