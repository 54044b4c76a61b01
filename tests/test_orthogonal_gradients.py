"""The optimiser wrapper: each mode against its formula, and all a training loop does to it."""

from __future__ import annotations

import copy
import io
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessreg.optim import MODES, OppositeGradientsError, OrthogonalGradients
from tests.processes import in_two_processes
from tests.states import equal

EXAMPLE = Path(__file__).parents[1] / "examples" / "orthogonal_gradients.py"
SGD = torch.optim.SGD
DOUBLE = torch.float64


def network(device="cpu", dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(device, dtype)


def batch(device="cpu", dtype=torch.float32, n=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).to(device, dtype)


def terms_of(net, x, count=2):
    """Losses that conflict: of one output, of the other, and of both."""
    y = net(x)
    return [(y[:, 0] - 1).square().mean(), (y.sum(1) + 2).square().mean(), y.exp().mean()][:count]


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors])


def gradients_of(losses, net) -> list[Tensor]:
    """Flat gradient of each loss."""
    parameters = list(net.parameters())
    return [flat(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses]


def grad_of(net) -> Tensor:
    return flat(p.grad for p in net.parameters())


def degrees(a, b) -> float:
    return math.degrees(math.acos(min(1.0, max(-1.0, float(a @ b / (a.norm() * b.norm()))))))


def pcgrad_by_hand(gradients):
    """Algorithm 1 of the paper, without the shuffling."""
    total = torch.zeros_like(gradients[0])
    for i, g in enumerate(gradients):
        y = g.clone()
        for j, other in enumerate(gradients):
            if j != i and y @ other < 0:
                y = y - (y @ other) / (other @ other) * other
        total += y
    return total


def segments(net, scope):
    """Slices of the flat gradient that belong together."""
    sizes, start = [], 0
    for p in net.parameters():
        rows = len(p) if scope == "row" and p.dim() > 1 else 1
        for _ in range(rows):
            sizes.append(slice(start, start + p.numel() // rows))
            start += p.numel() // rows
    return [slice(0, start)] if scope == "global" else sizes


# --- modes, by their formulas


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_terms_are_projected_where_they_conflict(device, count, scope):
    net, x = network(device), batch(device)
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1), scope=scope)
    losses = terms_of(net, x, count)
    gradients = gradients_of(losses, net)
    expected = torch.cat([pcgrad_by_hand([g[s] for g in gradients]) for s in segments(net, scope)])
    before = flat(net.parameters())
    optimizer.backward(losses)
    torch.testing.assert_close(grad_of(net), expected, rtol=1e-5, atol=1e-6)
    optimizer.step()
    torch.testing.assert_close(flat(net.parameters()), before - 0.1 * expected, rtol=0, atol=1e-6)


def test_terms_that_agree_are_just_added():
    net, plain = network(), network()
    x = batch()
    optimizer = OrthogonalGradients(torch.optim.Adam(net.parameters()))
    adam = torch.optim.Adam(plain.parameters())
    for _ in range(3):
        first, second = net(x).square().mean(), net(x).pow(4).mean()
        optimizer.zero_grad()
        optimizer.backward([first, second])
        optimizer.step()
        adam.zero_grad()
        (plain(x).square().mean() + plain(x).pow(4).mean()).backward()
        adam.step()
    torch.testing.assert_close(flat(net.parameters()), flat(plain.parameters()))
    assert optimizer.cosines[0, 1] > 0


def test_conflicting_terms_both_fall():
    net, x = network(dtype=DOUBLE), batch(dtype=DOUBLE)
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=1e-4))
    losses = terms_of(net, x)
    before = [loss.item() for loss in losses]
    optimizer.backward(losses)
    assert optimizer.cosines[0, 1] < 0
    optimizer.step()
    after = [loss.item() for loss in terms_of(net, x)]
    assert all(a < b for a, b in zip(after, before, strict=True))


def test_exactly_opposite_terms_leave_nothing():
    net, x = network(), batch()
    loss = net(x).square().mean()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=1.0))
    before = flat(net.parameters())
    optimizer.backward([loss, -2 * loss])
    optimizer.step()
    torch.testing.assert_close(flat(net.parameters()), before, rtol=0, atol=1e-7)
    assert optimizer.metrics()["angle"] == pytest.approx(180)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_previous_projects_the_joint_gradient_on_the_last_raw_one(device, strength, scope):
    first, second = network(device), network(device, seed=2)
    both = nn.ModuleList([first, second])
    options = {"mode": "previous", "strength": strength, "scope": scope}
    rates = SGD(first.parameters(), lr=0.1), SGD(second.parameters(), lr=0.02)
    optimizer = OrthogonalGradients(*rates, **options)
    rate = torch.cat([torch.full((flat(first.parameters()).numel(),), r) for r in (0.1, 0.02)])
    weights, last = flat(both.parameters()), None
    for step in range(4):
        x = batch(device, seed=step)
        loss = (first(x) * second(x)).sum(1).mean()
        expected = g = gradients_of([loss], both)[0]
        if last is not None:
            parts = []
            for s in segments(both, scope):
                a, b = g[s], last[s]
                parts.append(a - strength * (a @ b) / (b @ b) * b)
            expected = torch.cat(parts)
        last = g
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weights = weights - rate * expected
        torch.testing.assert_close(flat(both.parameters()), weights, rtol=1e-5, atol=1e-6)
        weights = flat(both.parameters())


def norm_ratio(strength, rate=0.2, steps=300):
    """Mean factor per step of the norm in the game min_x max_y x y."""
    x, y = (nn.Parameter(torch.tensor([v], dtype=DOUBLE)) for v in (1.0, 0.0))
    optimizer = OrthogonalGradients(
        SGD([x], lr=rate), SGD([y], lr=rate), mode="previous", strength=strength
    )
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward([(x * y).sum(), -(x * y).sum()])
        optimizer.step()
    return math.hypot(x.item(), y.item()) ** (1 / steps)


def test_previous_turns_a_bilinear_game_inwards_where_theory_says():
    # Of the squared norm, 1 + rate^2 (1 - s)(1 - 3 s) to leading order in the rate.
    assert norm_ratio(0.0) == pytest.approx(math.sqrt(1 + 0.2**2), rel=1e-12)
    for strength in (0.2, 0.5, 0.8):
        predicted = math.sqrt(1 + 0.2**2 * (1 - strength) * (1 - 3 * strength))
        assert norm_ratio(strength) == pytest.approx(predicted, abs=2e-3)
    assert norm_ratio(0.5) < 0.998 < 1.002 < norm_ratio(0.2)


def test_game_removes_what_helps_or_harms_the_other_player(device):
    net, x = network(device), batch(device)
    own, other = terms_of(net, x)
    a, b = gradients_of([own, other], net)
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1), mode="game")
    optimizer.backward([own, other])
    torch.testing.assert_close(grad_of(net), a - (a @ b) / (b @ b) * b, rtol=1e-5, atol=1e-6)
    assert abs(float(grad_of(net) @ b)) < 1e-6 * float(grad_of(net).norm() * b.norm())


@pytest.mark.parametrize("loss", ["minimax", "wasserstein"])
def test_game_is_refused_where_the_losses_are_opposite(loss):
    net, x = network(), batch()
    logits = net(x).sum(1)
    fake = nn.functional.softplus(logits).mean() if loss == "minimax" else logits.mean()
    generator_loss = -nn.functional.softplus(net(x).sum(1)).mean()
    if loss == "wasserstein":
        generator_loss = -net(x).sum(1).mean()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1), mode="game")
    with pytest.raises(OppositeGradientsError, match="minimax and Wasserstein losses"):
        optimizer.backward([generator_loss, 3 * fake])


def test_game_warns_of_nearly_opposite_losses_once():
    net, x = network(), batch()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1), mode="game")

    def losses():
        logits = net(x).sum(1)
        return [nn.functional.softplus(-logits).mean(), nn.functional.softplus(logits).mean()]

    with pytest.warns(UserWarning, match=r"nearly opposite \(cosine -0\.\d+\)") as caught:
        optimizer.backward(losses())
    assert caught[0].filename == __file__
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(losses())
    assert -1 < optimizer.cosines < -0.8


def test_weights_is_orthograd(device):
    net, x = network(device), batch(device)
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1), mode="weights")
    net(x).square().mean().backward()
    expected = []
    for p in net.parameters():
        w, g = flat([p]), flat([p.grad])
        y = g - (w @ g) / (w @ w) * w
        expected.append(p.detach().cpu().double() - 0.1 * (y * g.norm() / y.norm()).view(p.shape))
    optimizer.step()
    torch.testing.assert_close(flat(net.parameters()), flat(expected), rtol=1e-5, atol=1e-6)


def test_weights_keeps_lengths_and_freezes_single_numbers():
    net = nn.Linear(3, 1)
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.0), mode="weights")
    net(torch.randn(5, 3)).square().mean().backward()
    length = net.weight.grad.norm()
    optimizer.step()
    torch.testing.assert_close(net.weight.grad.norm(), length)
    assert (net.weight.grad * net.weight).sum().abs() < 1e-6 * length * net.weight.norm()
    assert net.bias.grad == 0


# --- angles


def test_angles_of_terms():
    net, x = network(dtype=DOUBLE), batch(dtype=DOUBLE)
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1))
    losses = terms_of(net, x, 3)
    gradients = gradients_of(losses, net)
    optimizer.backward(losses)
    found, y = optimizer.metrics(), grad_of(net)
    pairs = [degrees(a, b) for a in gradients for b in gradients if a is not b]
    assert found["angle"] == pytest.approx(max(pairs), abs=1e-5)
    assert found["angle_after"] == pytest.approx(max(degrees(y, g) for g in gradients), abs=1e-5)
    assert found["turn"] == pytest.approx(degrees(y, sum(gradients)), abs=1e-5)
    cosines = torch.stack(gradients) / torch.stack(gradients).norm(dim=1, keepdim=True)
    torch.testing.assert_close(optimizer.cosines, cosines @ cosines.T)


@pytest.mark.parametrize(("mode", "strength"), [("game", 0.7), ("weights", 1.0), ("previous", 0.5)])
def test_angles_of_pairs(mode, strength):
    net, x = network(dtype=DOUBLE), batch(dtype=DOUBLE)
    optimizer = OrthogonalGradients(
        SGD(net.parameters(), lr=0.0), mode=mode, strength=strength, scope="tensor"
    )
    losses = terms_of(net, x)
    before, against = (
        g.split([p.numel() for p in net.parameters()]) for g in gradients_of(losses, net)
    )
    if mode == "weights":
        against = [flat([p]) for p in net.parameters()]
    if mode == "previous":
        losses[1].backward(retain_graph=True)
        optimizer.step()
        assert optimizer.metrics() == {"angle": 90.0, "angle_after": 90.0, "turn": 0.0}
        optimizer.zero_grad()
        losses = terms_of(net, x)  # the step made the old graph stale
    optimizer.backward(losses if mode == "game" else losses[:1])
    optimizer.step()
    after = [flat([p.grad]) for p in net.parameters()]
    for name, (a, b) in {
        "angle": (before, against),
        "angle_after": (after, against),
        "turn": (before, after),
    }.items():
        wanted = sum(map(degrees, a, b)) / 4
        assert optimizer.metrics()[name] == pytest.approx(wanted, abs=1e-4), name
    assert optimizer.cosines.shape == (4,)


@pytest.mark.parametrize("mode", ["terms", "previous", "weights"])
def test_nothing_waits_for_the_device_until_asked(mode, monkeypatch):
    net, x = network(), batch()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1), mode=mode)

    def fail(*args):
        raise AssertionError("waited for the device")

    for _ in range(2):
        losses = terms_of(net, x)[: 2 if mode == "terms" else 1]
        optimizer.zero_grad()
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
                patch.setattr(Tensor, name, fail)
            optimizer.backward(losses)
            optimizer.step()
    assert set(optimizer.metrics()) == {"angle", "angle_after", "turn"}


def test_adam_bends_what_was_orthogonal():
    def turned(kind, seed):
        net, x = network(dtype=DOUBLE, seed=seed), batch(dtype=DOUBLE)
        optimizer = OrthogonalGradients(kind(net.parameters(), lr=1e-3), mode="game")
        losses = terms_of(net, x)
        direction = gradients_of(losses, net)[1]
        before = flat(net.parameters())
        optimizer.backward(losses)
        optimizer.step()
        step = flat(net.parameters()) - before
        return float(step @ direction / (step.norm() * direction.norm()))

    seeds = range(10)
    assert max(abs(turned(SGD, seed)) for seed in seeds) < 1e-10
    assert max(abs(turned(torch.optim.Adam, seed)) for seed in seeds) > 0.1


# --- a training loop


def one_step(optimizer, losses, scaler=None):
    optimizer.zero_grad()
    optimizer.backward(losses if scaler is None else [scaler.scale(loss) for loss in losses])
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def losses_for(mode, net, x):
    return terms_of(net, x)[: 2 if mode in ("terms", "game") else 1]


@pytest.mark.parametrize("mode", MODES)
def test_loss_scaling_changes_nothing(mode):
    nets, scaler = [network(), network()], torch.amp.GradScaler("cpu", growth_interval=2)
    optimizers = [OrthogonalGradients(torch.optim.Adam(n.parameters()), mode=mode) for n in nets]
    for step in range(5):
        x = batch(seed=step)
        one_step(optimizers[0], losses_for(mode, nets[0], x))
        one_step(optimizers[1], losses_for(mode, nets[1], x), scaler)
    assert scaler.get_scale() > 65536
    assert torch.equal(flat(nets[0].parameters()), flat(nets[1].parameters()))


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("mode", MODES)
def test_steps_with_infinite_gradients_are_skipped(mode, bad, value):
    net, scaler = network(), torch.amp.GradScaler("cpu")
    plain, healthy = network(), 3
    optimizer = OrthogonalGradients(torch.optim.Adam(net.parameters()), mode=mode)
    reference = OrthogonalGradients(torch.optim.Adam(plain.parameters()), mode=mode)
    for step in range(healthy):
        losses = losses_for(mode, net, batch(seed=step))
        if bad < len(losses) and step == 1:
            before, state = flat(net.parameters()), copy.deepcopy(optimizer.state_dict())
            spoiled = [loss * value if i == bad else loss for i, loss in enumerate(losses)]
            one_step(optimizer, spoiled, scaler)
            assert torch.equal(flat(net.parameters()), before)
            assert equal(optimizer.state_dict(), state)
            losses = losses_for(mode, net, batch(seed=step))
        one_step(optimizer, losses, scaler)
        one_step(reference, losses_for(mode, plain, batch(seed=step)))
    assert torch.equal(flat(net.parameters()), flat(plain.parameters()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_accumulated_batches_are_one_batch(mode, accumulate):
    whole, parts = network(dtype=DOUBLE), network(dtype=DOUBLE)
    first = OrthogonalGradients(torch.optim.Adam(whole.parameters()), mode=mode)
    second = OrthogonalGradients(torch.optim.Adam(parts.parameters()), mode=mode)
    for step in range(3):
        x = batch(dtype=DOUBLE, n=12, seed=step)
        one_step(first, losses_for(mode, whole, x))
        second.zero_grad()
        for i, rows in enumerate(x.split(4)):
            losses = [loss / 3 for loss in losses_for(mode, parts, rows)]
            second.backward(losses, accumulate=accumulate and i < 2)
        second.step()
    torch.testing.assert_close(flat(parts.parameters()), flat(whole.parameters()))


def test_clipping_acts_on_the_projected_gradient():
    net, x = network(), batch()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=1.0))
    optimizer.backward(terms_of(net, x))
    wanted, before = grad_of(net), flat(net.parameters())
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    optimizer.step()
    step = before - flat(net.parameters())
    assert step.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(step / step.norm(), wanted / wanted.norm(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_and_unused_parameters_are_left_alone(mode):
    net = network()
    layers = nn.Sequential(*net)
    net[0].weight.requires_grad_(False)
    net.unused = nn.Parameter(torch.ones(2))
    before = flat([net[0].weight, net.unused])
    adam = torch.optim.AdamW(net.parameters(), weight_decay=0.5)
    optimizer = OrthogonalGradients(adam, mode=mode)
    for step in range(3):
        one_step(optimizer, losses_for(mode, layers, batch(seed=step)))
    assert net.unused.grad is None
    assert torch.equal(flat([net[0].weight, net.unused]), before)
    assert not torch.equal(net[2].weight, network()[2].weight)


def test_a_term_reaches_only_some_parameters():
    net = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(2, 1, bias=False)})
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1))
    x = torch.ones(1, 2)
    optimizer.backward([net["a"](x).sum() + net["b"](x).sum(), -0.5 * net["a"](x).sum()])
    # <g1, g2> = -1, |g1|^2 = 4, |g2|^2 = 0.5
    torch.testing.assert_close(net["a"].weight.grad, torch.full((1, 2), 0.0 - 0.25))
    torch.testing.assert_close(net["b"].weight.grad, torch.full((1, 2), 1.0 + 0.25))


def test_gradients_in_other_networks_are_not_touched():
    first, second = network(), network(seed=2)
    x = batch()
    optimizers = SGD(first.parameters(), lr=0.1), SGD(second.parameters(), lr=0.1)
    loss = (first(x) * second(x)).mean()
    OrthogonalGradients(optimizers[0]).backward([loss, loss.square()], retain_graph=True)
    assert all(p.grad is None for p in second.parameters())
    both = OrthogonalGradients(*optimizers, mode="previous")
    both.zero_grad()
    both.backward([loss, -2 * loss])
    expected = gradients_of([(first(x) * second(x)).mean()], nn.ModuleList([first, second]))[0]
    half = flat(first.parameters()).numel()
    torch.testing.assert_close(grad_of(first), expected[:half])
    torch.testing.assert_close(grad_of(second), -2 * expected[half:])


def test_expanded_gradients_are_written_as_ordinary_ones():
    p = nn.Parameter(torch.ones(3))
    optimizer = OrthogonalGradients(SGD([p], lr=0.1), mode="weights")
    optimizer.backward([p.sum()])
    p.grad.mul_(2)  # fails where elements share memory
    assert p.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters(dtype):
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    q = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = OrthogonalGradients(SGD([p], lr=1.0), SGD([q], lr=1.0), mode="terms")
    optimizer.backward([(p * p).sum().float() + q.sum(), -p.sum().float() - 3 * q.sum()])
    gradients = [torch.tensor([2.0, 4, 6, 1, 1]), torch.tensor([-1.0, -1, -1, -3, -3])]
    found = torch.cat([p.grad.float(), q.grad])
    torch.testing.assert_close(found, pcgrad_by_hand(gradients), rtol=1e-2, atol=1e-2)
    assert p.grad.dtype == dtype


def test_rates_and_groups_are_those_of_the_wrapped_optimisers():
    net, other = network(), network(seed=2)
    optimizers = SGD(net.parameters(), lr=0.1), SGD(other.parameters(), lr=0.2)
    optimizer = OrthogonalGradients(*optimizers, mode="weights")
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    optimizer.param_groups[1]["lr"] = 0.0
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)
    before = flat(other.parameters()), flat(net.parameters())
    one_step(optimizer, [net(batch()).square().mean(), other(batch()).square().mean()])
    schedule.step()
    assert torch.equal(flat(other.parameters()), before[0])
    assert not torch.equal(flat(net.parameters()), before[1])
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_forgotten(mode, set_to_none):
    net, x = network(), batch()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1), mode=mode)
    optimizer.backward(losses_for(mode, net, x))
    first = grad_of(net)
    optimizer.zero_grad(set_to_none)
    assert all((p.grad is None) == set_to_none for p in net.parameters())
    optimizer.backward(losses_for(mode, net, x))
    assert torch.equal(grad_of(net), first)
    net.zero_grad()  # who uses the module's means the same
    optimizer.backward(losses_for(mode, net, x))
    assert torch.equal(grad_of(net), first)


def test_gradients_from_elsewhere_are_not_written_over():
    net, x = network(), batch()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1))
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match="written or changed by something else"):
        optimizer.backward(terms_of(net, x))
    optimizer.zero_grad()
    optimizer.backward(terms_of(net, x))
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="clip or unscale gradients only after"):
        optimizer.backward(terms_of(net, x))


# --- state


@pytest.mark.parametrize("mode", MODES)
def test_training_from_a_saved_state_is_the_same_training(mode):
    def start(seed):
        net = network(seed=seed)
        return net, OrthogonalGradients(torch.optim.Adam(net.parameters()), mode=mode)

    (straight, optimizer), (other, resumed) = start(0), start(1)
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save([straight.state_dict(), optimizer.state_dict()], file)
            file.seek(0)
            weights, state = torch.load(file)
            other.load_state_dict(weights)
            resumed.load_state_dict(state)
        one_step(optimizer, losses_for(mode, straight, batch(seed=step)))
        if step >= 3:
            one_step(resumed, losses_for(mode, other, batch(seed=step)))
    assert torch.equal(flat(straight.parameters()), flat(other.parameters()))
    assert equal(optimizer.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "terms"}, "state is of mode 'terms', this object's is 'previous'"),
        ({"optimizers": []}, r"optimizers must be a list of 1 states, got \[\]"),
        ({"optimizers": 3}, "optimizers must be a list of 1 states, got 3"),
        ({"checked": 1}, "checked must be True or False, got 1"),
        ({"previous": 3}, "previous must be a list of 4 gradients or None"),
        ({"previous": [None] * 3}, "previous must be a list of 4 gradients or None"),
        (
            {"previous": [torch.ones(2), None, None, None]},
            r"previous\[0\] must be None or a tensor",
        ),
        (
            {"previous": [None, torch.ones(5).double(), None, None]},
            r"previous\[1\] must be None or a tensor of shape \(5,\) and torch.float32",
        ),
        ({"extra": 1}, r"state must have entries \['checked', 'mode', 'optimizers', 'previous'\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    net = network()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1), mode="previous")
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**state, **change})
    assert equal(optimizer.state_dict(), state)


# --- errors


def sgd():
    return SGD([nn.Parameter(torch.ones(2))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: OrthogonalGradients(), ValueError, "optimizers must be at least one, got none"),
        (lambda: OrthogonalGradients(3), TypeError, r"optimizers\[0\] must be a torch.optim.Opt"),
        (lambda: OrthogonalGradients(sgd(), mode="x"), ValueError, "mode must be one of terms, "),
        (lambda: OrthogonalGradients(sgd(), scope="x"), ValueError, "scope must be one of global"),
        (
            lambda: OrthogonalGradients(sgd(), strength=0.5),
            ValueError,
            "strength is not for mode 'terms', got 0.5",
        ),
        (
            lambda: OrthogonalGradients(sgd(), mode="game", strength="1"),
            TypeError,
            "strength must be a number, got <class 'str'>",
        ),
        (
            lambda: OrthogonalGradients(sgd(), mode="game", strength=math.nan),
            ValueError,
            "strength must be finite, got nan",
        ),
    ],
)
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("mode", MODES)
def test_fused_optimisers_step_along_gradients_of_other_strides(mode):
    weights = []
    for fused in (False, True):
        w = nn.Parameter(torch.arange(6.0).view(2, 3))
        adam = torch.optim.Adam([w], lr=0.1, fused=fused)
        optimizer = OrthogonalGradients(adam, mode=mode)
        target = torch.tensor([[1.0, -20.0], [30.0, -1.0], [2.0, 50.0]])
        losses = [(w.T * target).sum(), (w.T * target.flip(0)).sum()]
        assert torch.autograd.grad(losses[0], w, retain_graph=True)[0].stride() != w.stride()
        optimizer.backward(losses[: 2 if mode in ("terms", "game") else 1])
        optimizer.step()
        weights.append(w.detach())
    torch.testing.assert_close(*weights)


def test_shared_parameters_are_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="optimizers must not share parameters"):
        OrthogonalGradients(SGD([p], lr=0.1), SGD([p], lr=0.1))


@pytest.mark.parametrize(
    ("mode", "losses", "error", "message"),
    [
        ("terms", torch.ones(()), TypeError, "losses must be a sequence of scalar tensors"),
        ("terms", [], ValueError, "losses must be one or more terms, got 0"),
        ("terms", [3.0], TypeError, r"losses\[0\] must be a tensor, got <class 'float'>"),
        ("terms", [torch.ones(())], ValueError, r"losses\[0\] must have a graph"),
        (
            "terms",
            [torch.ones(2, requires_grad=True)],
            ValueError,
            r"losses\[0\] must be a scalar, got shape \(2,\)",
        ),
        (
            "game",
            [torch.ones(())],
            ValueError,
            "the player's own loss and the other player's, got 1",
        ),
        ("weights", [1, 2], ValueError, "losses must be one for each wrapped optimiser, got 2"),
    ],
)
def test_bad_losses_are_refused(mode, losses, error, message):
    with pytest.raises(error, match=message):
        OrthogonalGradients(sgd(), mode=mode).backward(losses)


def test_steps_out_of_order_are_refused():
    net, x = network(), batch()
    optimizer = OrthogonalGradients(SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="cannot step with a closure"):
        optimizer.step(lambda: None)
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"call backward\(losses\) of this object"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(terms_of(net, x), accumulate=True)
    with pytest.raises(RuntimeError, match="must be without accumulate=True"):
        optimizer.step()
    with pytest.raises(ValueError, match="losses must be 2, as in the last call, got 3"):
        optimizer.backward(terms_of(net, x, 3))


# --- several processes


def trained(mode, first, last, group=None):
    """Three steps of Adam on rows of batches of 8; only rows 0 to 3 reach one parameter."""
    net = network(dtype=DOUBLE)
    net.register_parameter("sometimes", nn.Parameter(torch.ones(2, dtype=DOUBLE)))
    net.register_parameter("never", nn.Parameter(torch.ones(2, dtype=DOUBLE)))
    adam = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = OrthogonalGradients(adam, mode=mode, process_group=group)
    for step in range(3):
        optimizer.zero_grad()
        for row in range(first, last, 2):
            x = batch(dtype=DOUBLE, n=8, seed=step)[row : row + 2]
            y = net[2](net[1](net[0](x)))
            losses = [(y[:, 0] - 1).square().sum(), (y.sum(1) + 2).square().sum()]
            if row < 4:
                losses[0] = losses[0] + net.sometimes.square().sum()
            chosen = losses[: 2 if mode in ("terms", "game") else 1]
            size = last - first
            accumulate = step == 1 and row < last - 2
            optimizer.backward([loss / size for loss in chosen], accumulate)
        optimizer.step()
    assert net.never.grad is None
    return flat(net.parameters())


def _share_of_a_process(rank, size, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=size)
    group = dist.group.WORLD
    found = [trained(mode, 4 * rank, 4 * rank + 4, group).numpy() for mode in MODES]
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found_by_two(tmp_path_factory):
    """The weights that each of two processes found in each mode, by rank."""
    found = in_two_processes(_share_of_a_process, tmp_path_factory.mktemp("processes") / "store")
    return {rank: dict(zip(MODES, weights, strict=True)) for rank, weights in found.items()}


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one_on_the_joined_batch(found_by_two, mode):
    first, second = (torch.from_numpy(found_by_two[rank][mode]) for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, trained(mode, 0, 8), rtol=1e-12, atol=1e-14)


# --- the example


@pytest.mark.parametrize("mode", ["terms", "previous", "none"])
def test_example_runs(mode, tmp_path):
    for package in ("matplotlib", "PIL", "sklearn"):
        pytest.importorskip(package)
    picture = tmp_path / "digits.png"
    small = ["--images=32", "--batch-size=16", "--epochs=4", "--print-every=2"]
    command = [sys.executable, "-W", "error", str(EXAMPLE), f"--mode={mode}", *small]
    command.append(f"--picture={picture}")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    number = r"\d+\.\d{4}"
    line = rf"Epoch [24]/4, Generator Loss: {number}, Discriminator Loss: {number}\n"
    assert re.fullmatch(2 * line, done.stdout)
    assert picture.read_bytes().startswith(b"\x89PNG")
