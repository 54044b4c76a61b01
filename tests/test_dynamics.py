"""The game dynamics lab: published factors, linear maps, what never converges, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hessreg.cli import main
from hessreg.dynamics import (
    AlternatingGradientDescent,
    ClippedCritic,
    CompetitiveGradientDescent,
    ConsensusOptimization,
    DiracGAN,
    Extragradient,
    Game,
    GradientPenalty,
    HessianCorrected,
    HessianNormPenalty,
    NegativeMomentum,
    OptimisticGradientDescent,
    PreviousGradientProjection,
    QuadraticGame,
    SimultaneousGradientDescent,
    SymplecticGradientAdjustment,
    bilinear_game,
    jacobian,
    vector_field,
)
from hessreg.dynamics.calculus import (
    HessianProducts,
    InteractionProducts,
    JacobianProducts,
    conjugate_gradients,
)
from hessreg.dynamics.catalogue import GAMES, METHODS, chosen_games, chosen_methods
from hessreg.dynamics.config import DynamicsConfig
from hessreg.dynamics.lab import play
from hessreg.dynamics.ring import RingGame, play_ring
from hessreg.regularizers import HSN1R
from tests.test_cli import refused

ROTATION = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)  # J of f = xy
ETAS = (0.05, 0.3, 0.8)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orbit(game, method, steps, z=None):
    """The points of a game, from its start on: [steps + 1, n]."""
    z, memory = game.start() if z is None else z, None
    points = [z]
    for _ in range(steps):
        z, memory = method.step(game, z, memory)
        z = game.constrain(z)
        points.append(z)
    return torch.stack(points)


def distances(game, method, steps, z=None):
    return orbit(game, method, steps, z).norm(dim=1)


# f = xy


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(
    ("method", "factor"),
    [
        (SimultaneousGradientDescent, lambda eta: math.sqrt(1 + eta**2)),
        (Extragradient, lambda eta: math.sqrt((1 - eta**2) ** 2 + eta**2)),
        (CompetitiveGradientDescent, lambda eta: 1 / math.sqrt(1 + eta**2)),
    ],
)
def test_every_step_changes_the_distance_by_the_published_factor(method, factor, eta):
    found = distances(bilinear_game(), method(eta), 20)
    np.testing.assert_allclose(found[1:] / found[:-1], factor(eta), rtol=1e-12)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, -0.3])
@pytest.mark.parametrize("method", [ConsensusOptimization, SymplecticGradientAdjustment])
def test_consensus_and_symplectic_adjustment_damp_the_rotation(method, weight, eta):
    found = distances(bilinear_game(), method(eta, weight), 20)
    factor = math.sqrt((1 - eta * weight) ** 2 + eta**2)
    np.testing.assert_allclose(found[1:] / found[:-1], factor, rtol=1e-12)


@pytest.mark.parametrize("eta", [*ETAS, 1.9])
def test_alternating_descent_conserves_an_ellipse(eta):
    x, y = orbit(bilinear_game(), AlternatingGradientDescent(eta), 300).T
    conserved = x**2 + y**2 - eta * x * y
    np.testing.assert_allclose(conserved, conserved[0], rtol=1e-10)
    assert (x - x[0]).abs().max() > 0.1  # it does move


@pytest.mark.parametrize("eta", [0.05, 0.3, 0.4])
def test_optimistic_descent_has_the_factor_of_its_characteristic_polynomial(eta):
    # Of z' = z - 2 eta v(z) + eta v(z_prev) with v an imaginary number.
    factor = np.abs(np.roots([1, -(1 - 2j * eta), -1j * eta])).max()
    found = play("optimistic", bilinear_game(), OptimisticGradientDescent(eta), 500)
    assert found.theory == pytest.approx(factor, rel=1e-10)
    assert found.factor == pytest.approx(factor, abs=2e-4)
    assert found.outcome == "converges"


@pytest.mark.parametrize(("eta", "beta"), [(0.1, -0.5), (0.3, -0.5), (0.8, -0.3), (0.1, 0.2)])
def test_negative_momentum_has_the_factor_of_its_characteristic_polynomial(eta, beta):
    # ((m - 1)(m - beta))^2 + eta^2 m^3, from eliminating y.
    square = np.polymul(np.poly([1, beta]), np.poly([1, beta]))
    factor = np.abs(np.roots(np.polyadd(square, [eta**2, 0, 0, 0]))).max()
    found = play("negative_momentum", bilinear_game(), NegativeMomentum(eta, beta), 500)
    assert found.theory == pytest.approx(factor, rel=1e-9)
    assert found.factor == pytest.approx(factor, abs=1e-3)
    assert found.outcome == ("converges" if beta < 0 else "diverges")


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        (Extragradient(1.0), 1.0),
        (OptimisticGradientDescent(1.0), 1 / math.sqrt(3)),
        (NegativeMomentum(1.0), 1.0),
        (ConsensusOptimization(1.0), 1.0),
    ],
)
def test_learning_rates_have_the_published_limits(method, limit):
    below, above = (replace(method, eta=limit * c).factor(ROTATION, 1) for c in (0.999, 1.001))
    assert below < 1 - 1e-4 < 1 + 1e-4 < above


@pytest.mark.parametrize("strength", [0.0, 0.2, 1 / 3, 0.5, 0.7, 0.9])
def test_projection_against_the_last_gradient_changes_the_distance_as_derived(strength):
    excess = []
    for eta in (0.05, 0.1, 0.2):
        method = PreviousGradientProjection(eta, strength)
        found = distances(bilinear_game(), method, 200)[100:]
        factor = found[1:] / found[:-1]
        np.testing.assert_allclose(factor, method.factor(ROTATION, 1), rtol=1e-10)
        leading = 1 + eta**2 * (1 - strength) * (1 - 3 * strength)
        excess.append(abs(factor[-1].item() ** 2 - leading) / eta**4)
    assert max(excess) < 1  # so the formula is right to the third order
    assert max(excess) < 1.2 * min(excess) + 1e-9


def test_projection_has_no_known_factor_where_several_motions_are_possible():
    assert PreviousGradientProjection(0.99, 1.0).factor(ROTATION, 1) == pytest.approx(1.0)
    assert PreviousGradientProjection(1.2, 1.0).factor(ROTATION, 1) is None
    assert PreviousGradientProjection(0.3, 0.5, "update").factor(ROTATION, 1) is None
    assert PreviousGradientProjection(0.3, 0.5).factor(ROTATION + torch.eye(2), 1) is None


def test_projection_converges_between_a_third_and_one_only():
    outcomes = {}
    for s in (0.0, 0.3, 0.37, 0.5, 0.97, 1.0, 1.1):
        method = PreviousGradientProjection(0.3, s)
        outcomes[s] = play("orthogonal", bilinear_game(), method, 500).outcome
    assert [s for s, outcome in outcomes.items() if outcome == "converges"] == [0.37, 0.5, 0.97]
    assert outcomes[0.0] == outcomes[0.3] == outcomes[1.1] == "diverges"
    assert outcomes[1.0] == "stalls"


def test_full_projection_stalls_or_circles_depending_on_what_is_remembered():
    gradient = orbit(bilinear_game(), PreviousGradientProjection(0.3, 1.0), 200)
    assert torch.equal(gradient[-1], gradient[50])
    assert gradient[-1].norm() > 0.9
    update = orbit(bilinear_game(), PreviousGradientProjection(0.3, 1.0, "update"), 200)
    moves = update.diff(dim=0)
    cosines = torch.cosine_similarity(moves[1:], moves[:-1])
    assert cosines.abs().max() < 1e-10
    # In the frame of the two directions, it is alternating descent.
    x, y = (update @ (moves[i] / moves[i].norm()) for i in (0, 1))
    sign = torch.sign(torch.linalg.det(torch.stack([moves[0], moves[1]])))
    np.testing.assert_allclose((x**2 + y**2 - sign * 0.3 * x * y)[::2].std(), 0, atol=1e-10)
    assert update.norm(dim=1).min() > 0.8


# Linear games


class LinearGame(Game):
    """Two quadratic losses that need not add up to zero: v = J z."""

    def __init__(self, J, num_x):
        self.J, self.num_x = J, num_x

    def start(self):
        return random(len(self.J), seed=5)

    def loss(self, player, x, y):
        rows = slice(0, self.num_x) if player == 0 else slice(self.num_x, None)
        own, other = (x, y) if player == 0 else (y, x)
        rest = slice(self.num_x, None) if player == 0 else slice(0, self.num_x)
        return own @ self.J[rows, rows] @ own / 2 + own @ self.J[rows, rest] @ other


def general_sum(num_x=3, num_y=2):
    J = random(num_x + num_y, num_x + num_y, seed=3)
    J[:num_x, :num_x] += J[:num_x, :num_x].mT.clone()
    J[num_x:, num_x:] += J[num_x:, num_x:].mT.clone()
    return LinearGame(J, num_x)


def zero_sum():
    P, B, Q = random(3, 3, seed=1), random(3, 2, seed=2), random(2, 2, seed=3)
    return QuadraticGame(P @ P.mT / 4, B, Q @ Q.mT / 4)


LINEAR_METHODS = [
    SimultaneousGradientDescent(0.1),
    AlternatingGradientDescent(0.1),
    NegativeMomentum(0.1, -0.4),
    Extragradient(0.1),
    OptimisticGradientDescent(0.1),
    ConsensusOptimization(0.1, 0.4),
    SymplecticGradientAdjustment(0.1, 0.4),
    CompetitiveGradientDescent(0.1),
    HessianCorrected(0.1, eps=0.7),
    HessianCorrected(0.1, eps=0.7, mu=0.3),
]


def name(value):
    return type(value).__name__ if not callable(value) else value.__name__


@pytest.mark.parametrize("game", [zero_sum, general_sum])
@pytest.mark.parametrize("method", LINEAR_METHODS, ids=name)
def test_steps_in_a_linear_game_are_the_linear_map(method, game):
    game = game()
    J = jacobian(game, game.start())
    points = orbit(game, method, 6)
    step = method.linear_map(J, game.num_x)
    memory = len(step) // len(J) == 2
    for before, z, after in zip(points, points[1:], points[2:], strict=False):
        state = torch.cat([z, before]) if memory else z
        np.testing.assert_allclose((step @ state)[: len(z)], after, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", LINEAR_METHODS, ids=name)
def test_measured_factor_is_the_spectral_radius(method):
    game = QuadraticGame(*(torch.tensor([[v]]).double() for v in (0.5, 1.0, 0.1)), seed=2)
    found = play("", game, replace(method, eta=0.3), 400)
    step = method.linear_map(jacobian(game, game.start()), 1)
    assert found.theory != pytest.approx(np.abs(np.linalg.eigvals(step)).max(), abs=1e-3)  # eta 0.1
    assert found.theory < 0.98
    assert found.factor == pytest.approx(found.theory, abs=3e-3)
    assert found.outcome == "converges"


def test_bilinear_games_of_several_numbers_go_by_their_smallest_singular_value():
    game = bilinear_game(4, seed=1)
    np.testing.assert_allclose(torch.linalg.svdvals(game.B), np.linspace(1, 0.5, 4), rtol=1e-12)
    found = play("", game, Extragradient(0.3), 1000)
    assert found.theory == pytest.approx(math.sqrt((1 - 0.15**2) ** 2 + 0.15**2), rel=1e-12)
    assert found.factor == pytest.approx(found.theory, abs=1e-4)


def test_competitive_descent_solves_the_systems_of_its_article():
    game = zero_sum()
    z, eta = game.start(), 0.4
    x, y = z[:3], z[3:]
    f_x, f_y = game.P @ x + game.B @ y, game.B.mT @ x - game.Q @ y
    B = game.B
    move_x = torch.linalg.solve(torch.eye(3) + eta**2 * B @ B.mT, f_x + eta * B @ f_y)
    move_y = torch.linalg.solve(torch.eye(2) + eta**2 * B.mT @ B, -f_y + eta * B.mT @ f_x)
    moved = CompetitiveGradientDescent(eta).step(game, z, None)[0]
    np.testing.assert_allclose((z - moved) / eta, torch.cat([move_x, move_y]), rtol=1e-10)


def test_symplectic_adjustment_leaves_a_game_without_rotation_alone():
    J = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    game = LinearGame(J, 1)
    adjusted = orbit(game, SymplecticGradientAdjustment(0.1, 5.0), 10)
    plain = orbit(game, SimultaneousGradientDescent(0.1), 10)
    np.testing.assert_allclose(adjusted, plain, rtol=1e-12)
    assert (orbit(game, ConsensusOptimization(0.1, 5.0), 1)[1] - plain[1]).norm() > 0.1


def test_consensus_goes_to_a_maximum_too_and_symplectic_adjustment_does_not():
    a, none, c = (torch.tensor([[v]]).double() for v in (-0.5, 0.0, 0.1))
    game = QuadraticGame(a, none, c)  # 0 is where x's loss is largest
    assert play("", game, ConsensusOptimization(0.3, 3.0), 300).outcome == "converges"
    assert play("", game, SymplecticGradientAdjustment(0.3, 3.0), 300).outcome == "diverges"


# What does not help


@pytest.mark.parametrize("norm", ["nuclear", "spectral", "one", "fro"])
def test_hessian_norms_change_nothing_in_a_quadratic_game(norm):
    for game in (bilinear_game(), zero_sum()):
        plain = orbit(game, SimultaneousGradientDescent(0.1), 5)
        penalised = HessianNormPenalty(game, HSN1R(norm=norm, weight=10.0))
        np.testing.assert_allclose(
            orbit(penalised, SimultaneousGradientDescent(0.1), 5), plain, rtol=1e-12, atol=1e-15
        )


def test_hessian_norms_change_a_dirac_gan_but_not_near_its_equilibrium():
    game = HessianNormPenalty(DiracGAN(), HSN1R(weight=0.5))
    z = torch.tensor([1.0, 0.7], dtype=torch.float64)
    assert (vector_field(game, z) - vector_field(DiracGAN(), z)).norm() > 1e-3
    zero = torch.zeros(2, dtype=torch.float64)
    np.testing.assert_allclose(jacobian(game, zero), -0.5 * ROTATION, atol=1e-12)


def test_hessian_correction_moves_nobody_where_the_hessians_are_zero():
    points = orbit(bilinear_game(), HessianCorrected(0.3), 5)
    assert torch.equal(points[-1], points[0])
    assert play("hsc", bilinear_game(), HessianCorrected(0.3), 20).outcome == "stalls"
    with_mu = orbit(bilinear_game(), HessianCorrected(0.3, mu=0.5), 5)
    plain = orbit(bilinear_game(), SimultaneousGradientDescent(0.15), 5)
    np.testing.assert_allclose(with_mu, plain, rtol=1e-12)


# Dirac-GAN


@pytest.mark.parametrize("gamma", [0.3, 1.0, 1.7, 4.0])
@pytest.mark.parametrize(
    ("loss", "slope"), [("non_saturating", 0.5), ("minimax", 0.5), ("wasserstein", 1.0)]
)
def test_r1_gives_a_dirac_gan_the_published_eigenvalues(loss, slope, gamma):
    game = GradientPenalty(DiracGAN(loss), gamma)
    J = jacobian(game, torch.zeros(2, dtype=torch.float64))
    root = np.emath.sqrt(gamma**2 / 4 - slope**2)
    found = np.linalg.eigvals(-J.numpy())  # of the motion z' = -v(z)
    np.testing.assert_allclose(
        np.sort_complex(found), np.sort_complex([-gamma / 2 - root, -gamma / 2 + root]), atol=1e-7
    )


@pytest.mark.parametrize(("gamma", "eta"), [(0.5, 0.3), (0.5, 0.05), (1.5, 0.2)])
def test_r1_converges_at_the_rate_of_these_eigenvalues(gamma, eta):
    game = GradientPenalty(DiracGAN(), gamma)
    found = play("r1", game, SimultaneousGradientDescent(eta), 600)
    root = np.emath.sqrt(gamma**2 / 4 - 0.25)
    factor = max(abs(1 + eta * (-gamma / 2 + sign * root)) for sign in (-1, 1))
    assert found.theory == pytest.approx(factor, rel=1e-12)
    assert found.factor == pytest.approx(factor, abs=1e-3)
    assert found.outcome == "converges"


UPDATES = [SimultaneousGradientDescent, AlternatingGradientDescent]


@pytest.mark.parametrize("eta", [0.05, 0.3])
@pytest.mark.parametrize("method", UPDATES)
@pytest.mark.parametrize(("loss", "margin"), [("wasserstein", 0.5), ("non_saturating", 1.0)])
def test_wgan_gp_never_reaches_the_equilibrium(loss, margin, method, eta):
    game = GradientPenalty(DiracGAN(loss), 1.0, target=1.0)
    steps = round(60 / eta)
    near = torch.tensor([0.05, 0.05], dtype=torch.float64)
    found = distances(game, method(eta), steps, near)
    assert found[steps // 2 :].min() > 0.3
    last, before = found[-steps // 4 :].max(), found[steps // 2 : -steps // 4].max()
    assert last > margin
    assert last > 0.98 * before  # nor is it on the way there
    assert distances(GradientPenalty(DiracGAN(loss), 1.0), method(eta), steps)[-1] < 1e-3


@pytest.mark.parametrize("eta", [0.05, 0.3])
@pytest.mark.parametrize("method", UPDATES)
def test_weight_clipping_never_reaches_the_equilibrium(method, eta):
    game = ClippedCritic(DiracGAN("wasserstein"), 0.5)
    steps = round(60 / eta)
    points = orbit(game, method(eta), steps)
    assert points[1:, 1].abs().max() <= 0.5
    found = points.norm(dim=1)
    assert found.min() > 0.4
    assert found[-steps // 4 :].max() > 0.99 * found[steps // 2 : -steps // 4].max()


def test_weight_clipping_takes_nothing_from_a_loss_that_converges_inside_the_bound():
    game = ClippedCritic(DiracGAN(), 0.5)
    found = distances(game, AlternatingGradientDescent(0.3), 1600)
    assert found[1600] == pytest.approx(found[400].item() / 2, rel=0.2)  # like 1 / sqrt(steps)
    assert found[1600] < 0.15


def test_wgan_gp_rests_where_its_gradient_jumps():
    game = GradientPenalty(DiracGAN(), 2.0, target=0.5)
    x, y = orbit(game, SimultaneousGradientDescent(0.1), 2000)[-1].abs().tolist()
    assert x == pytest.approx(2.0 * 0.5 / 0.5, rel=1e-3)
    assert y < 1e-3


def test_without_a_penalty_a_dirac_gan_circles_where_theory_near_the_equilibrium_says_it_grows():
    found = play("", DiracGAN(), SimultaneousGradientDescent(0.3), 1000)
    assert found.theory == pytest.approx(math.sqrt(1 + 0.15**2), rel=1e-12)
    assert found.outcome == "cycles"
    inside = distances(DiracGAN(), SimultaneousGradientDescent(0.3), 1000, 0.01 * found.points[0])
    assert (inside[100] / inside[0]).item() == pytest.approx(found.theory**100, rel=0.05)
    assert inside[-100:].max().item() == pytest.approx(found.distances[-100:].max().item(), rel=0.1)


# Products


@pytest.mark.parametrize("make", [zero_sum, general_sum, lambda: GradientPenalty(DiracGAN(), 0.7)])
def test_products_are_those_of_the_jacobian(make):
    game = make()
    z = game.start()
    J, u, n = jacobian(game, z), random(len(z), seed=9), game.num_x
    own = torch.block_diag(J[:n, :n], J[n:, n:])
    products, B, H = (
        JacobianProducts(game, z),
        InteractionProducts(game, z),
        HessianProducts(game, z),
    )
    pairs = [
        (products.forward(u), J @ u),
        (products.transposed(u), J.mT @ u),
        (H(u), own @ u),
        (B(u), (J - own) @ u),
        (B.transposed(u), (J - own).mT @ u),
        *((each.v, vector_field(game, z)) for each in (products, B, H)),
    ]
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    finite = torch.stack(
        [
            (vector_field(game, z + h) - vector_field(game, z - h)) / 2e-6
            for h in 1e-6 * torch.eye(len(z))
        ],
        1,
    )
    np.testing.assert_allclose(J, finite, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_conjugate_gradients_solve(scale):
    A, b = random(6, 6), scale * random(6, seed=1)
    A = scale * (A @ A.mT + torch.eye(6))
    found = conjugate_gradients(lambda u: A @ u, b, 6)
    np.testing.assert_allclose(found, torch.linalg.solve(A, b), rtol=1e-8)
    assert torch.equal(conjugate_gradients(lambda u: A @ u, 0 * b, 6), 0 * b)


# The ring


@pytest.fixture(scope="module")
def ring():
    return lambda: RingGame("non_saturating", width=4, batch_size=8, seed=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
def test_every_method_plays_the_ring(ring, method, adam):
    config, game = DynamicsConfig(), ring()
    entry = METHODS[method]
    played = entry.modify(game, config)
    found = play_ring(method, game, played, entry.method(config, 0.01), seconds=0.02, adam=adam)
    assert found.steps >= 1
    assert 0 <= found.metrics["modes"] <= 8
    assert found.points.shape == (10_000, 2)
    still = game.draw(game.start(), 100)
    assert not torch.equal(found.points[:100], still)


def test_moves_on_the_ring_are_right_without_any_matrix(ring):
    game = ring()
    z = game.start().double()
    game._real, game._noise = game._real.double(), game._noise.double()
    J, n = jacobian(game, z), game.num_x
    own = torch.block_diag(J[:n, :n], J[n:, n:])
    v, identity = vector_field(game, z), torch.eye(len(z), dtype=torch.float64)
    adjusted = v + (J.mT @ v - J @ v) / 2
    competitive = torch.linalg.solve(identity + 0.1 * (J - own), v)
    corrected = own @ torch.linalg.solve(own @ own + identity, v)
    for method, wanted in (
        (ConsensusOptimization(0.1), v + J.mT @ v),
        (SymplecticGradientAdjustment(0.1), adjusted),
        (CompetitiveGradientDescent(0.1), competitive),
        (HessianCorrected(0.1, num_steps=20), corrected),
    ):
        move = (z - method.step(game, z, None)[0]) / 0.1
        np.testing.assert_allclose(move, wanted, rtol=1e-7, atol=1e-9)


def test_a_diverging_network_is_reported(ring):
    game = ring()
    found = play_ring("", game, game, SimultaneousGradientDescent(1e30), seconds=5.0, adam=False)
    assert found.metrics == {}
    assert found.to_dict()["outcome"] == "diverges"


# The command


def test_all_is_everything_that_applies_but_the_ring():
    config = DynamicsConfig()
    assert chosen_games(config) == ["bilinear", "quadratic", "dirac", "dirac_wasserstein"]
    of_critics = {"r1", "wgan_gp", "weight_clipping"}
    for game in (*GAMES, "ring"):
        missing = of_critics if game in ("bilinear", "quadratic") else set()
        assert set(chosen_methods(config, game)) == METHODS.keys() - missing


def test_command_writes_a_table_json_and_pictures(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    games = ["bilinear", "dirac"]
    assert main(["dynamics", f"--games={','.join(games)}", "--steps=60", f"--out={out}"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["dynamics.json", *(f"{game}.png" for game in games)]
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    content = json.loads((out / "dynamics.json").read_text())
    assert content["config"]["steps"] == 60
    rows = {row["method"]: row for row in content["games"]["bilinear"]}
    assert list(rows) == [m for m in METHODS if m not in ("r1", "wgan_gp", "weight_clipping")]
    assert [row["method"] for row in content["games"]["dirac"]] == list(METHODS)
    assert rows["simultaneous"]["theory"] == pytest.approx(math.sqrt(1.09))
    assert rows["simultaneous"]["factor"] == pytest.approx(math.sqrt(1.09))
    line = next(line for line in captured.out.splitlines() if line.startswith("extragradient"))
    assert line.split() == ["extragradient", "0.95818", "0.95818", "0.077", "converges"]


def test_options_of_methods_arrive(tmp_path):
    options = ["--games=bilinear", "--methods=consensus,orthogonal", "--eta=0.2", "--seed=3"]
    special = ["--consensus.weight=0.25", "--orthogonal.strength=0.8", "--steps=200"]
    assert main(["dynamics", *options, *special, f"--out={tmp_path}"]) == 0
    consensus, projected = json.loads((tmp_path / "dynamics.json").read_text())["games"]["bilinear"]
    assert consensus["factor"] == pytest.approx(math.sqrt(0.95**2 + 0.2**2), rel=1e-9)
    wanted = math.sqrt(1 + 0.04 * 0.2 * -1.4)
    assert projected["factor"] == pytest.approx(wanted, abs=2e-3 * 0.2)


def test_ring_is_played_for_a_time(tmp_path, capsys):
    small = ["--ring.seconds=0.05", "--ring.width=4", "--ring.batch_size=8"]
    methods = "--methods=alternating,r1"
    assert main(["dynamics", "--games=ring", methods, *small, f"--out={tmp_path}"]) == 0
    assert "0.05 CPU seconds each" in capsys.readouterr().out
    rows = json.loads((tmp_path / "dynamics.json").read_text())["games"]["ring"]
    assert [row["method"] for row in rows] == ["alternating", "r1"]
    assert all(0.05 <= row["cpu_seconds"] < 5 and row["steps"] >= 1 for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamics.json", "ring.png"]


@pytest.mark.parametrize("eta", ["5", "1e200"])
def test_divergence_and_overflow_are_results(tmp_path, capsys, eta):
    args = ["--games=dirac_wasserstein", f"--eta={eta}", "--steps=100", f"--out={tmp_path}"]
    assert main(["dynamics", *args]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[:-1])) <= 72
    rows = json.loads((tmp_path / "dynamics.json").read_text())["games"]["dirac_wasserstein"]
    outcomes = {row["method"]: row["outcome"] for row in rows}
    assert outcomes.pop("competitive") == ("stalls" if eta == "1e200" else "converges")
    assert outcomes.pop("hsc") == "stalls"
    assert len(outcomes) == len(METHODS) - 2
    bounded = {"wgan_gp", "weight_clipping"} if eta == "5" else set()
    assert {name for name, outcome in outcomes.items() if outcome != "diverges"} <= bounded


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--games=chess", "unknown game 'chess'; choose from all, bilinear, quadratic, dirac"),
        ("--methods=luck", "unknown method 'luck'; choose from all, simultaneous"),
        ("--methods=r1,r1 --games=dirac", "methods must be different names, got 'r1,r1'"),
        ("--games=dirac,bilinear --methods=r1", "r1 does not apply to bilinear: it needs a discr"),
        ("--games=quadratic --methods=weight_clipping", "whose weights are clipped"),
        ("--eta=0", "eta must be positive, got 0.0"),
        ("--eta=much", "--eta: Expected float. Got value: much"),
        ("--steps=9", "steps must be in [10, 100000], got 9"),
        ("--seed=-1", "seed must be at least 0, got -1"),
        ("--bilinear.dim=65", "bilinear.dim must be in [1, 64], got 65"),
        ("--ring.eta=-1", "ring.eta must be positive, got -1.0"),
        ("--ring.seconds=0", "seconds must be positive, got 0.0"),
        ("--hsc.eps=0", "eps must be positive, got 0.0"),
        ("--r1.gamma=-2", "gamma must be at least 0, got -2.0"),
        ("--orthogonal.reference=both", "Expected one of 'gradient', 'update'"),
        ("--luck=1", "unrecognized arguments: --luck=1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(capsys, tmp_path, args, message):
    out = tmp_path / "out"
    assert message in refused(capsys, "dynamics", *args.split(), f"--out={out}")
    assert not out.exists()


def test_an_output_folder_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "dynamics", "--steps=10", f"--out={tmp_path / 'file'}")


@pytest.mark.parametrize("method", [SimultaneousGradientDescent, ConsensusOptimization])
def test_steps_do_not_depend_on_whether_gradients_are_recorded(method):
    z = torch.tensor([1.0, 3.0], dtype=torch.float64)
    moved, _ = method(0.1).step(DiracGAN(), z, None)
    with torch.no_grad():
        torch.testing.assert_close(method(0.1).step(DiracGAN(), z, None)[0], moved)
        torch.testing.assert_close(jacobian(bilinear_game(), z)[0, 1].item(), 1.0)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        method(0.1).step(DiracGAN(), z, None)
