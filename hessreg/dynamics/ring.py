"""The ring of eight Gaussians as a game of two small networks, played for a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hessreg.curvature import NonFiniteError
from hessreg.dynamics.games import AdversarialGame, AdversarialLoss, Game
from hessreg.dynamics.methods import Method
from hessreg.gan.mixtures import MixtureJudge, load_mixture
from hessreg.gan.networks import Discriminator, Generator

__all__ = ["RingGame", "RingResult", "play_ring"]

_BETAS = (0.5, 0.999)
_LATENT, _ACTIVATION = 2, "leaky_relu"


class RingGame(AdversarialGame):
    """Two perceptrons with two hidden layers, on batches of points of eight Gaussians.

    Args:
        loss: Of the two.
        width: Units of a hidden layer.
        batch_size: Points in a batch.
        seed: Of weights, batches and noise.
    """

    def __init__(self, loss: AdversarialLoss, width: int, batch_size: int, seed: int = 0) -> None:
        self.adversarial_loss = loss
        self.dataset = load_mixture()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._generator = Generator("mlp", _LATENT, width, _ACTIVATION, shape=(2,))
            self._critic = Discriminator("mlp", width, _ACTIVATION, shape=(2,))
        self.num_x = _flat(self._generator).numel()
        self._random = torch.Generator().manual_seed(seed)
        self._batch_size = batch_size
        self.next_batch()

    def start(self) -> Tensor:
        """The weights that the networks were made with."""
        return torch.cat([_flat(self._generator), _flat(self._critic)])

    def next_batch(self) -> None:
        """Draw real points and noise."""
        points, count = self.dataset.train_samples, self._batch_size
        self._real = points[torch.randint(len(points), [count], generator=self._random)]
        self._noise = torch.randn(count, _LATENT, generator=self._random)

    def real(self) -> Tensor:
        """Real points of the batch: ``[b, 2]``."""
        return self._real

    def generate(self, x: Tensor) -> Tensor:
        """Generated points of the batch: ``[b, 2]``."""
        return functional_call(self._generator, _named(self._generator, x), (self._noise,))

    def critic(self, y: Tensor, samples: Tensor) -> Tensor:
        """Logits of points: ``[b]``."""
        return functional_call(self._critic, _named(self._critic, y), (samples,))

    def draw(self, z: Tensor, count: int) -> Tensor:
        """Points of the generator at z, ``[count, 2]``, always of the same noise."""
        noise = torch.randn(count, _LATENT, generator=torch.Generator().manual_seed(0))
        weights = _named(self._generator, z[: self.num_x])
        return functional_call(self._generator, weights, (noise,)).detach()


def _flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def _named(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    return {name: v.view_as(p) for (name, p), v in zip(named.items(), parts, strict=True)}


@dataclass(frozen=True)
class RingResult:
    """What a method made of the ring.

    Attributes:
        method: Its name.
        steps: Taken.
        cpu_seconds: Spent on them.
        metrics: See `MixtureJudge`; empty if it diverged.
        points: Generated at the end, ``[n, 2]``.
    """

    method: str
    steps: int
    cpu_seconds: float
    metrics: dict[str, float]
    points: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        outcome = "trained" if self.metrics else "diverges"
        seconds = round(self.cpu_seconds, 2)
        head = {"method": self.method, "outcome": outcome, "steps": self.steps}
        return head | {"cpu_seconds": seconds} | self.metrics


def play_ring(
    name: str,
    ring: RingGame,
    game: Game,
    method: Method,
    *,
    seconds: float,
    adam: bool,
) -> RingResult:
    """Play for a given CPU time and judge the points drawn at the end.

    Args:
        name: Of the method.
        ring: Draws the points.
        game: The ring, or what is made of it.
        method: How to move.
        seconds: CPU time of the steps.
        adam: Give each move, divided by the learning rate, to Adam as if it were the gradient.
    """
    with _one_thread():
        steps, begin = 0, time.process_time()
        for z in _points(game, method, ring.start(), adam):
            steps += 1
            spent = time.process_time() - begin
            if spent >= seconds or not math.isfinite(z.sum()):
                break
    judge = MixtureJudge(ring.dataset)
    points = ring.draw(z, judge.num_samples)
    metrics = judge.evaluate(points) if points.isfinite().all() else {}
    return RingResult(name, steps, spent, metrics, points)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Waiting threads use CPU time as well, and batches are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _points(game: Game, method: Method, z: Tensor, adam: bool) -> Iterator[Tensor]:
    """One point after another."""
    memory = None
    weights = z.clone()  # what Adam moves; a method may remember z
    optimizer = torch.optim.Adam([weights], lr=method.eta, betas=_BETAS)
    while True:
        game.next_batch()
        try:
            moved, memory = method.step(game, z, memory)
        except NonFiniteError:
            moved = torch.full_like(z, math.nan)
        if adam:
            weights.grad = (z - moved) / method.eta
            optimizer.step()
            moved = weights.clone()
        z = game.constrain(moved)
        weights.copy_(z)
        yield z
