"""Rules by which both players move, and the linear maps that they are in a linear game.

A method maps a game, a point z ``[n]`` and what it remembers to the next ones. v is the vector
field of the game: each player's gradient in its own parameters. J is the Jacobian of v; in a game
with v = J z, ``linear_map`` says what the method does to z (or to z and its predecessor), so its
spectral radius is the factor by which the distance to the equilibrium changes per step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hessreg.curvature import NonFiniteError, SymmetricOperator
from hessreg.dynamics.calculus import (
    HessianProducts,
    InteractionProducts,
    JacobianProducts,
    conjugate_gradients,
    player_gradient,
    vector_field,
)
from hessreg.dynamics.games import Game
from hessreg.ops import project_orthogonal
from hessreg.optim import correction_step

__all__ = [
    "AlternatingGradientDescent",
    "CompetitiveGradientDescent",
    "ConsensusOptimization",
    "Extragradient",
    "HessianCorrected",
    "Method",
    "NegativeMomentum",
    "OptimisticGradientDescent",
    "PreviousGradientProjection",
    "SimultaneousGradientDescent",
    "SymplecticGradientAdjustment",
]

Memory = Tensor | None


@dataclass(frozen=True)
class Method(ABC):
    """A rule to move.

    Args:
        eta: Learning rate of both players.
    """

    eta: float

    @abstractmethod
    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point, and what to give to the next call; None to the first."""

    def linear_map(self, J: Tensor, num_x: int) -> Tensor | None:
        """What a step does in the game v = J z: a square matrix, or None if it is not linear."""
        return None

    def factor(self, J: Tensor, num_x: int) -> float | None:
        """The change of the distance to 0 per step in the game v = J z, if it is known."""
        step = self.linear_map(J, num_x)
        return None if step is None else torch.linalg.eigvals(step).abs().max().item()


def _identity(J: Tensor) -> Tensor:
    return torch.eye(len(J), dtype=J.dtype, device=J.device)


def _own_rows(J: Tensor, num_x: int) -> tuple[Tensor, Tensor]:
    """The projections [n, n] on the first player's parameters and on the second's."""
    is_x = (torch.arange(len(J), device=J.device) < num_x).to(J.dtype)
    return is_x.diag(), (1 - is_x).diag()


def _own_blocks(J: Tensor, num_x: int) -> Tensor:
    """The Hessian of each player's loss in its own parameters, block diagonal: [n, n]."""
    X, Y = _own_rows(J, num_x)
    return X @ J @ X + Y @ J @ Y


def _with_predecessor(now: Tensor, before: Tensor) -> Tensor:
    """The matrix of (z, z_prev) -> (now z + before z_prev, z): [2n, 2n]."""
    identity = torch.eye(len(now), dtype=now.dtype, device=now.device)
    below = torch.cat([identity, torch.zeros_like(identity)], 1)
    return torch.cat([torch.cat([now, before], 1), below])


class SimultaneousGradientDescent(Method):
    """Both players step at once: z - eta v(z).

    On f = xy the distance grows by sqrt(1 + eta^2).

    Example:
        >>> from hessreg.dynamics import bilinear_game
        >>> z = torch.tensor([1.0, 1.0]).double()
        >>> SimultaneousGradientDescent(eta=0.5).step(bilinear_game(), z, None)[0].tolist()
        [0.5, 1.5]
    """

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point."""
        return z - self.eta * vector_field(game, z), None

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """I - eta J."""
        return _identity(J) - self.eta * J


@dataclass(frozen=True)
class NegativeMomentum(Method):
    """One player after the other, each with momentum (Gidel et al., 2019).

    Args:
        eta: Learning rate of both players.
        beta: Momentum; below 0 it damps the rotation. On f = xy the method converges with -1/2
            and eta < 1; with 0 it is alternating descent, and above it diverges.
    """

    beta: float = -0.5

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point; remembers the velocity."""
        velocity = torch.zeros_like(z) if memory is None else self.beta * memory
        velocity = velocity + player_gradient(game, z, 0)
        half = torch.cat([(z - self.eta * velocity)[: game.num_x], z[game.num_x :]])
        velocity = velocity + player_gradient(game, half, 1)
        return z - self.eta * velocity, velocity

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """The matrix of (z, z_prev)."""
        X, Y = _own_rows(J, num_x)
        first, second = _identity(J) - self.eta * X @ J, _identity(J) - self.eta * Y @ J
        now = second @ (first + self.beta * X) + self.beta * Y
        return _with_predecessor(now, -self.beta * (second @ X + Y))


class AlternatingGradientDescent(Method):
    """The second player steps after the first, at the point where that has moved to.

    On f = xy it conserves x^2 + y^2 - eta x y.

    Example:
        >>> from hessreg.dynamics import bilinear_game
        >>> z = torch.tensor([1.0, 1.0]).double()
        >>> AlternatingGradientDescent(eta=0.5).step(bilinear_game(), z, None)[0].tolist()
        [0.5, 1.25]
    """

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point."""
        z = z - self.eta * player_gradient(game, z, 0)
        return z - self.eta * player_gradient(game, z, 1), None

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """(I - eta Y J)(I - eta X J), X and Y the projections on the players' parameters."""
        X, Y = _own_rows(J, num_x)
        return (_identity(J) - self.eta * Y @ J) @ (_identity(J) - self.eta * X @ J)


class Extragradient(Method):
    """The step is taken with the gradient of where it would lead (Korpelevich, 1976).

    On f = xy the factor is sqrt((1 - eta^2)^2 + eta^2), below 1 for eta < 1.
    """

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point."""
        ahead = z - self.eta * vector_field(game, z)
        return z - self.eta * vector_field(game, ahead), None

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """I - eta J + eta^2 J^2."""
        return _identity(J) - self.eta * J @ (_identity(J) - self.eta * J)


class OptimisticGradientDescent(Method):
    """z - 2 eta v(z) + eta v(z_prev): extragradient at the cost of one gradient.

    From Daskalakis et al., "Training GANs with optimism", 2018. The first step is plain. On f = xy
    it converges for eta < 1 / sqrt(3).
    """

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point; remembers the gradient."""
        v = vector_field(game, z)
        last = v if memory is None else memory
        return z - self.eta * (2 * v - last), v

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """The matrix of (z, z_prev)."""
        return _with_predecessor(_identity(J) - 2 * self.eta * J, self.eta * J)


@dataclass(frozen=True)
class ConsensusOptimization(Method):
    """Both players also want |v|^2 / 2 to be small (Mescheder et al., 2017): v + weight J'v.

    On f = xy the factor is sqrt((1 - eta weight)^2 + eta^2).

    Args:
        eta: Learning rate of both players.
        weight: The article's gamma, also called lambda.
    """

    weight: float = 1.0

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point."""
        products = JacobianProducts(game, z)
        return z - self.eta * (products.v + self.weight * products.transposed(products.v)), None

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """I - eta (J + weight J'J)."""
        return _identity(J) - self.eta * (J + self.weight * J.mT @ J)


@dataclass(frozen=True)
class SymplecticGradientAdjustment(Method):
    """v + weight A'v, A = (J - J') / 2 the part that rotates (Balduzzi et al., 2018).

    On f = xy it is consensus optimisation; where there is no rotation it is gradient descent, which
    consensus is not. Without the article's choice of the weight's sign.

    Args:
        eta: Learning rate of both players.
        weight: The article's lambda.
    """

    weight: float = 1.0

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point."""
        products = JacobianProducts(game, z)
        v = products.v
        adjustment = (products.transposed(v) - products.forward(v)) / 2
        return z - self.eta * (v + self.weight * adjustment), None

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """I - eta (J + weight A'J)."""
        return _identity(J) - self.eta * (J + self.weight * (J.mT - J) / 2 @ J)


@dataclass(frozen=True)
class CompetitiveGradientDescent(Method):
    """The equilibrium of the local bilinear game (Schaefer and Anandkumar, 2019).

    z - eta (I + eta B)^-1 v, B being J without the players' own Hessians. It is solved by conjugate
    gradients on (I + eta B)'(I + eta B), which in a zero-sum game are the article's two systems
    side by side and is right in any other, too. On f = xy the factor is 1 / sqrt(1 + eta^2).

    Args:
        eta: Learning rate of both players.
        num_steps: Of conjugate gradients at most, two products with B each.
    """

    num_steps: int = 10

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point."""
        B = InteractionProducts(game, z)

        def product(u: Tensor) -> Tensor:
            w = u + self.eta * B(u)
            return w + self.eta * B.transposed(w)

        target = B.v + self.eta * B.transposed(B.v)
        return z - self.eta * conjugate_gradients(product, target, self.num_steps), None

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """I - eta (I + eta B)^-1 J."""
        B = J - _own_blocks(J, num_x)
        return _identity(J) - self.eta * torch.linalg.solve(_identity(J) + self.eta * B, J)


class _OwnHessians(SymmetricOperator):
    """The players' own Hessians, block diagonal, and the vector field v."""

    def __init__(self, game: Game, z: Tensor) -> None:
        self._product = HessianProducts(game, z)
        self.v = self._product.v
        self.shape = (len(z), len(z))
        self.dtype, self.device = z.dtype, z.device

    def matvec(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """H v [n], without a graph."""
        return self._product(v)


@dataclass(frozen=True)
class HessianCorrected(Method):
    """Hessian Singularity Correction: z - eta p, p = H (H^2 + eps^2 I)^-1 v.

    H has the players' own Hessians. p = (H + eps^2 H^-1)^-1 v without an inverse, so where H is
    singular, nothing is left of the gradient: on f = xy, where H = 0, nobody moves. See
    :func:`hessreg.optim.correction_step`.

    Args:
        eta: Learning rate of both players.
        eps: How small an eigenvalue is taken for singular.
        mu: Gives what is singular a gradient step of its own: p + mu (v - H p).
        num_steps: Of conjugate gradients at most, two products with H each.
    """

    eps: float = 1.0
    mu: float = 0.0
    num_steps: int = 10

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point."""
        H = _OwnHessians(game, z)
        try:
            found = correction_step(
                H, H.v, self.eps, mu=self.mu, method="cg", num_steps=self.num_steps
            )
        except NonFiniteError:  # an overflow is a way to diverge
            return torch.full_like(z, torch.nan), None
        return z - self.eta * found.step, None

    def linear_map(self, J: Tensor, num_x: int) -> Tensor:
        """I - eta (H + mu eps^2)(H^2 + eps^2)^-1 J."""
        H, identity = _own_blocks(J, num_x), _identity(J)
        squared = self.eps**2 * identity
        solved = torch.linalg.solve(H @ H + squared, J)
        return identity - self.eta * (H + self.mu * squared) @ solved


@dataclass(frozen=True)
class PreviousGradientProjection(Method):
    """The joint gradient of both players, made orthogonal to the last one.

    g - strength <g, r> / <r, r> r with r the last joint gradient as it was before its own
    projection (``reference="gradient"``), or after it ("update"). The two differ:

    - "gradient", on f = xy: the square of the distance changes by 1 + eta^2 (1 - s)(1 - 3s) +
      O(eta^4) per step, so it converges for s between 1/3 and 1 and comes to a stop at s = 1.
    - "update": for s above 1/2 the updates take turns between two directions, and it converges
      for s < 1; at s = 1 these are orthogonal, and it runs in circles as alternating descent does.

    Args:
        eta: Learning rate of both players.
        strength: The share s of the projection that is taken away.
        reference: What is remembered.
    """

    strength: float = 0.5
    reference: Literal["gradient", "update"] = "gradient"

    def step(self, game: Game, z: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next point; remembers the gradient or the update."""
        g = vector_field(game, z)
        p = g if memory is None else project_orthogonal(g, memory, strength=self.strength)
        return z - self.eta * p, g if self.reference == "gradient" else p

    def factor(self, J: Tensor, num_x: int) -> float | None:
        """Exact on f = b x y for eta b < 1; not known for another game, or another reference.

        There z is turned by an angle and stretched in every step. With t the tangent of the angle,
        t^3 - e (1 + s) t^2 + t - e (1 - s) = 0 for e = eta b, and the factor is
        sqrt(1 + t^2) |1 - e s t / (1 + t^2)|. From e = 1 on several such motions are possible.
        """
        rotates = len(J) == 2 and torch.equal(J, -J.mT)
        e, s = self.eta * J.abs().max().item(), self.strength
        if self.reference != "gradient" or not rotates or e >= 1:
            return None
        roots = np.roots([1.0, -e * (1 + s), 1.0, -e * (1 - s)])
        real = roots[np.abs(roots.imag) < 1e-7].real
        if len(real) != 1:
            return None
        t = float(real[0])
        return math.hypot(1, t) * abs(1 - e * s * t / (1 + t * t))
