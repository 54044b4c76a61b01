"""What holds for any gradients and directions, and PCGrad against TorchJD's."""

from __future__ import annotations

import pytest
import torch

from hessreg import pcgrad, project_orthogonal
from hessreg.ops.projection import pcgrad_operator

hypothesis = pytest.importorskip("hypothesis")
torchjd = pytest.importorskip("torchjd.aggregation")
st = hypothesis.strategies

EPS = torch.finfo(torch.float32).eps
by_hypothesis = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw):
    """A gradient and directions in float32, some nearly dependent, collinear, zero, or extreme."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size, count = draw(st.integers(1, 300)), draw(st.integers(1, 6))
    vectors = torch.randn(1 + count, size, dtype=torch.float64, generator=generator)
    for j in range(1, 1 + count):
        nearness = draw(st.sampled_from([None, None, 1e-2, 1e-4, 1e-9, 0.0]))
        if nearness is not None:
            other = draw(st.integers(0, j - 1))
            vectors[j] = vectors[other] + nearness * vectors[j]
    scales = [draw(st.sampled_from([1.0, 1e-20, 1e18, -3.0, 0.0])) for _ in range(1 + count)]
    vectors = (vectors * torch.tensor(scales, dtype=torch.float64)[:, None]).float()
    return vectors[0], list(vectors[1:])


def products_of(y, directions):
    """Cosines, with |g| to come: <y, v> / |v|, zero for zero directions."""
    y, v = y.double(), torch.stack(directions).double()
    norms = v.norm(dim=1)
    return torch.where(norms > 0, v @ y / norms, 0)


@by_hypothesis
@hypothesis.given(problem=problems())
def test_result_is_orthogonal_to_every_direction(device, problem):
    g, directions = problem[0].to(device), [v.to(device) for v in problem[1]]
    y = project_orthogonal(g, directions)
    # Directions within 16 epsilons of the span of others are left out.
    assert (products_of(y, directions).abs() <= 20 * EPS * g.double().norm()).all()
    assert y.double().norm() <= (1 + 4 * EPS) * g.double().norm()
    again = project_orthogonal(y, directions)
    assert (again - y).double().norm() <= 40 * EPS * g.double().norm()
    assert torch.equal(project_orthogonal(g, directions), y)


@by_hypothesis
@hypothesis.given(problem=problems())
def test_nothing_conflicts_any_more(device, problem):
    g, directions = problem[0].to(device), [v.to(device) for v in problem[1]]
    y = project_orthogonal(g, directions, mode="conflict")
    assert (products_of(y, directions) >= -20 * EPS * g.double().norm()).all()
    if (products_of(g, directions) >= 0).all():
        assert torch.equal(y, g)


@by_hypothesis
@hypothesis.given(problem=problems(), power=st.integers(-40, 40))
def test_lengths_of_directions_do_not_matter(device, problem, power):
    g, directions = problem[0].to(device), [v.double().to(device) for v in problem[1]]
    scaled = [2.0**power * v for v in directions]
    expected = project_orthogonal(g.double(), directions)
    assert torch.equal(project_orthogonal(g.double(), scaled), expected)


@pytest.mark.parametrize("num_tasks", [2, 5])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_pcgrad_agrees_with_torchjd(device, num_tasks, scale):
    torch.manual_seed(num_tasks)
    J = torch.randn(num_tasks, 30, dtype=torch.float64)
    J = (J - 0.9 * J.mean(0)) * scale
    torch.manual_seed(1)
    expected = torchjd.PCGrad()(J)
    torch.manual_seed(1)
    orders = torch.stack([torch.randperm(num_tasks) for _ in range(num_tasks)]).to(device)
    tensors = [*J.to(device)]
    (found,) = pcgrad_operator(tensors, num_tasks, orders, 1, 0, False)
    torch.testing.assert_close(found / scale, expected.to(device) / scale)
    if num_tasks == 2:
        torch.testing.assert_close(pcgrad(tensors) / scale, found / scale)
        torch.testing.assert_close(pcgrad(tensors, reduction="mean") * 2 / scale, found / scale)
