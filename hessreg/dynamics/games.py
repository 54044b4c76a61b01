"""Games of two players, each of whom has a loss, and what may be added to them.

A point of a game is one vector z [n]: the first player's parameters x, then the second's, y. Small
games have their equilibrium at 0 and are played in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hessreg.regularizers import HSN1R

__all__ = [
    "AdversarialGame",
    "AdversarialLoss",
    "ClippedCritic",
    "DiracGAN",
    "Game",
    "GradientPenalty",
    "HessianNormPenalty",
    "QuadraticGame",
    "adversarial_loss",
    "bilinear_game",
]

AdversarialLoss = Literal["non_saturating", "minimax", "wasserstein"]


class Game(ABC):
    """Two losses of two vectors.

    Attributes:
        num_x: Number of the first player's parameters.
        smooth: Whether the gradients have a Jacobian at the equilibrium that says how the game
            is played near it.
    """

    num_x: int
    smooth: bool = True

    @abstractmethod
    def start(self) -> Tensor:
        """Where to begin: ``[n]``."""

    @abstractmethod
    def loss(self, player: int, x: Tensor, y: Tensor) -> Tensor:
        """The scalar that player 0 (who has x) or player 1 (who has y) wants to be small."""

    def next_batch(self) -> None:
        """Draw what the losses are to be taken on from now on; nothing, unless there are data."""
        return

    def constrain(self, z: Tensor) -> Tensor:
        """The nearest point that the players may choose."""
        return z


class QuadraticGame(Game):
    """The zero-sum game f = x'P x / 2 + x'B y - y'Q y / 2: x wants f to be small, y large.

    Args:
        P: ``[n, n]``, symmetric.
        B: ``[n, m]``.
        Q: ``[m, m]``, symmetric.
        seed: Of the starting point, of norm 1.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> game = QuadraticGame(2 * one, one, one)
        >>> game.loss(0, torch.tensor([1.0]).double(), torch.tensor([3.0]).double()).item()
        -0.5
    """

    def __init__(self, P: Tensor, B: Tensor, Q: Tensor, seed: int = 0) -> None:
        self.P, self.B, self.Q = P, B, Q
        self.num_x = B.shape[0]
        self.seed = seed

    def start(self) -> Tensor:
        """A point of norm 1."""
        return _unit_vector(sum(self.B.shape), self.seed)

    def loss(self, player: int, x: Tensor, y: Tensor) -> Tensor:
        """The value f for player 0, -f for player 1."""
        f = x @ self.P @ x / 2 + x @ self.B @ y - y @ self.Q @ y / 2
        return f if player == 0 else -f


def bilinear_game(dim: int = 1, seed: int = 0) -> QuadraticGame:
    """The game f = x'B y of two vectors ``[dim]``; f = xy if they are numbers.

    Args:
        dim: Size of x and of y. The singular values of B go from 1 to 1/2.
        seed: Of B and of the starting point.

    Example:
        >>> bilinear_game().B.item()
        1.0
    """
    random = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(
            torch.randn(dim, dim, dtype=torch.float64, device="cpu", generator=random)
        ).Q
        for _ in range(2)
    )
    values = torch.linspace(1.0, 0.5, dim, dtype=torch.float64, device="cpu")
    B = left * values @ right.mT if dim > 1 else values[None]
    zero = torch.zeros_like(B)
    return QuadraticGame(zero, B, zero, seed)


def _unit_vector(n: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    vector = torch.randn(n, dtype=torch.float64, device="cpu", generator=random)
    return vector / vector.norm()


class AdversarialGame(Game):
    """A generator with parameters x and a discriminator, or critic, with parameters y."""

    adversarial_loss: AdversarialLoss

    @abstractmethod
    def real(self) -> Tensor:
        """Real samples of the batch: ``[b, ...]``."""

    @abstractmethod
    def generate(self, x: Tensor) -> Tensor:
        """Generated samples of the batch: ``[b, ...]``."""

    @abstractmethod
    def critic(self, y: Tensor, samples: Tensor) -> Tensor:
        """Logits of samples, ``[b]``; positive means "real"."""

    def loss(self, player: int, x: Tensor, y: Tensor) -> Tensor:
        """The generator's or the discriminator's loss."""
        fake = self.critic(y, self.generate(x))
        real = self.critic(y, self.real()) if player == 1 else None
        return adversarial_loss(self.adversarial_loss, fake, real)


def adversarial_loss(kind: AdversarialLoss, fake: Tensor, real: Tensor | None) -> Tensor:
    """The discriminator's loss of logits ``[b]``, or, without real ones, the generator's.

    Example:
        >>> adversarial_loss("wasserstein", torch.tensor([2.0]), torch.tensor([5.0])).item()
        -3.0
    """
    if real is None:
        if kind == "non_saturating":
            return softplus(-fake).mean()
        return -(fake if kind == "wasserstein" else softplus(fake)).mean()
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    return softplus(fake).mean() + softplus(-real).mean()


class DiracGAN(AdversarialGame):
    """One real point, 0, and one generated point, x, told apart by D(s) = y s.

    From Mescheder, Geiger, Nowozin, "Which training methods for GANs do actually converge?", 2018.

    Args:
        loss: Of the two; with "wasserstein" it is the bilinear game, with the others its
            gradients are those of xy / 2 near the equilibrium.
        seed: Of the starting point, of norm 1.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> DiracGAN("wasserstein").loss(0, one, 2 * one).item()
        -2.0
    """

    num_x = 1

    def __init__(self, loss: AdversarialLoss = "non_saturating", seed: int = 0) -> None:
        self.adversarial_loss = loss
        self.seed = seed

    def start(self) -> Tensor:
        """A point of norm 1."""
        return _unit_vector(2, self.seed)

    def real(self) -> Tensor:
        """The point 0."""
        return torch.zeros(1, dtype=torch.float64, device="cpu")

    def generate(self, x: Tensor) -> Tensor:
        """The point x."""
        return x

    def critic(self, y: Tensor, samples: Tensor) -> Tensor:
        """The product y s."""
        return y * samples


class _Modified(Game):
    """A game with something changed: here nothing is."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.num_x = game.num_x
        self.smooth = game.smooth

    def start(self) -> Tensor:
        """Where to begin."""
        return self.game.start()

    def loss(self, player: int, x: Tensor, y: Tensor) -> Tensor:
        """The loss of player 0 or 1."""
        return self.game.loss(player, x, y)

    def next_batch(self) -> None:
        """Draw the next batch."""
        self.game.next_batch()

    def constrain(self, z: Tensor) -> Tensor:
        """The nearest point that the players may choose."""
        return self.game.constrain(z)


class GradientPenalty(_Modified):
    """A game whose discriminator pays for the gradient of its logits in the samples.

    Args:
        game: With a discriminator.
        gamma: Weight.
        target: None for R1 (Mescheder et al., 2018), gamma / 2 E |grad D(real)|^2; a number for
            WGAN-GP (Gulrajani et al., 2017), gamma / 2 E (|grad D(s)| - target)^2 on points s
            between a real and a generated one, whose gradient jumps where grad D is 0.
        seed: Of those points.

    Raises:
        TypeError: If the game has no discriminator.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> GradientPenalty(DiracGAN("wasserstein"), gamma=0.5).loss(1, one, 2 * one).item()
        3.0
    """

    def __init__(
        self, game: Game, gamma: float, target: float | None = None, seed: int = 0
    ) -> None:
        if not isinstance(game, AdversarialGame):
            raise TypeError(f"game must have a discriminator, got a {type(game).__name__}")
        super().__init__(game)
        self._adversarial = game
        self.gamma, self.target = gamma, target
        self.smooth = game.smooth and target is None
        self._random = torch.Generator().manual_seed(seed)

    def loss(self, player: int, x: Tensor, y: Tensor) -> Tensor:
        """The loss of player 0 or 1, the penalty with the latter's."""
        loss = super().loss(player, x, y)
        return loss if player == 0 else loss + 0.5 * self.gamma * self._penalty(x, y)

    def _penalty(self, x: Tensor, y: Tensor) -> Tensor:
        samples = self._adversarial.real()
        if self.target is not None:
            shape = [len(samples)] + [1] * (samples.dim() - 1)
            share = torch.rand(shape, dtype=samples.dtype, device="cpu", generator=self._random)
            samples = samples.lerp(self._adversarial.generate(x).detach(), share)
        samples = samples.detach().requires_grad_()
        logits = self._adversarial.critic(y, samples)
        (slope,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
        slope = slope.reshape(len(slope), -1)
        if self.target is None:
            return slope.square().sum(1).mean()
        return (slope.norm(dim=1) - self.target).square().mean()


class ClippedCritic(_Modified):
    """A game whose second player's parameters are kept in [-bound, bound] (Arjovsky et al., 2017).

    Args:
        game: Any.
        bound: The largest absolute value.
    """

    def __init__(self, game: Game, bound: float) -> None:
        super().__init__(game)
        self.bound = bound
        self.smooth = False

    def constrain(self, z: Tensor) -> Tensor:
        """The point with y clipped."""
        x, y = z[: self.num_x], z[self.num_x :]
        return self.game.constrain(torch.cat([x, y.clamp(-self.bound, self.bound)]))


class HessianNormPenalty(_Modified):
    """A game with HSN1R: each player pays for the norm of its own loss's Hessian in its own vector.

    Where that Hessian does not depend on it, as in every quadratic game, nothing changes.

    Args:
        game: Any.
        regularizer: Says which norm, at what weight.
    """

    def __init__(self, game: Game, regularizer: HSN1R) -> None:
        super().__init__(game)
        self.regularizer = regularizer

    def loss(self, player: int, x: Tensor, y: Tensor) -> Tensor:
        """The loss of player 0 or 1 with its penalty."""
        loss = super().loss(player, x, y)
        return loss + self.regularizer.penalty(loss, (x, y)[player])
