"""Games played and measured: how the distance to the equilibrium changes per step."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import hessreg
from hessreg.curvature import NonFiniteError
from hessreg.dynamics import pictures
from hessreg.dynamics.calculus import jacobian
from hessreg.dynamics.catalogue import GAMES, METHODS, RING, chosen_games, chosen_methods
from hessreg.dynamics.config import DynamicsConfig
from hessreg.dynamics.games import Game
from hessreg.dynamics.methods import Method
from hessreg.dynamics.ring import RingGame, RingResult, play_ring
from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.progress import say

__all__ = ["Lab", "Outcome", "Trajectory", "play"]

Outcome = Literal["converges", "diverges", "cycles", "stalls"]

_SMALL, _LARGE = 1e-12, 1e12  # of the distance at the start: far enough
_CHANGE = 1e-2  # of the distance in a quarter of the steps: less is none
_MOVE = 1e-3  # of a step of gradient descent on f = xy: less is none


@dataclass(frozen=True)
class Trajectory:
    """How one method played one game.

    Attributes:
        method: Its name.
        points: From the start on: ``[t + 1, n]``, finite.
        num_x: How many parameters are the first player's.
        outcome: What became of the distance to the equilibrium in the last quarter of the steps.
        factor: Its change per step, fitted to the second half of them.
        theory: The same near the equilibrium, by theory; None if nothing is known.
    """

    method: str
    points: Tensor
    num_x: int
    outcome: Outcome
    factor: float
    theory: float | None

    @property
    def distances(self) -> Tensor:
        """Distances to the equilibrium: ``[t + 1]``."""
        return self.points.norm(dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not a finite number is None."""
        return {
            "method": self.method,
            "outcome": self.outcome,
            "factor": _number(self.factor),
            "theory": None if self.theory is None else _number(self.theory),
            "steps": len(self.points) - 1,
            "distance": {"start": self.distances[0].item(), "end": self.distances[-1].item()},
        }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def play(name: str, game: Game, method: Method, steps: int) -> Trajectory:
    """Play a game whose equilibrium is 0, and measure.

    It ends early where the distance to the equilibrium has shrunk or grown 10^12-fold.

    Args:
        name: Of the method.
        game: The game.
        method: How to move.
        steps: How often, at least 10.

    Example:
        >>> from hessreg.dynamics import Extragradient, bilinear_game
        >>> found = play("extragradient", bilinear_game(), Extragradient(eta=0.2), 400)
        >>> found.outcome, round(found.factor, 4), round(found.theory, 4)
        ('converges', 0.9806, 0.9806)
    """
    start = game.constrain(game.start())
    points, distances = [start], [start.norm().item()]
    for z in _points(game, method, start, steps):
        distances.append(z.norm().item())
        if not math.isfinite(distances[-1]):
            break
        points.append(z)
        if not _SMALL * distances[0] < distances[-1] < _LARGE * distances[0]:
            break
    outcome = _outcome(torch.stack(points), distances, method.eta)
    theory = method.factor(jacobian(game, 0 * start), game.num_x) if game.smooth else None
    return Trajectory(name, torch.stack(points), game.num_x, outcome, _fit(distances), theory)


def _points(game: Game, method: Method, z: Tensor, steps: int) -> Iterator[Tensor]:
    memory = None
    for _ in range(steps):
        game.next_batch()
        try:
            z, memory = method.step(game, z, memory)
        except NonFiniteError:
            z = torch.full_like(z, math.nan)
        z = game.constrain(z)
        yield z


def _fit(distances: Sequence[float]) -> float:
    """The factor per step, by least squares on the logarithm over the second half."""
    if not math.isfinite(distances[-1]):
        return math.inf
    if distances[-1] == 0:
        return 0.0
    logs = torch.tensor(distances[len(distances) // 2 :], dtype=torch.float64, device="cpu").log()
    time = torch.arange(len(logs), dtype=torch.float64, device="cpu") - (len(logs) - 1) / 2
    return math.exp((time @ logs / (time @ time)).item()) if len(logs) > 1 else math.nan


def _outcome(points: Tensor, distances: Sequence[float], eta: float) -> Outcome:
    """Compare the largest distance in the last quarter with that in the one before."""
    if not distances[-1] < _LARGE * distances[0]:
        return "diverges"
    if distances[-1] <= _SMALL * distances[0]:
        return "converges"
    quarter = len(distances) // 4
    change = max(distances[-quarter:]) / max(distances[-2 * quarter : -quarter])
    if abs(change - 1) > _CHANGE:
        return "converges" if change < 1 else "diverges"
    moves = points[-quarter:].diff(dim=0).norm(dim=1).mean().item()
    return "stalls" if moves < _MOVE * eta * distances[-1] else "cycles"


class Lab:
    """Games and methods by name, played and written down.

    Args:
        config: Games, methods and their parameters.

    Raises:
        ValueError: If a name is unknown, or a method does not apply to a game.
    """

    def __init__(self, config: DynamicsConfig) -> None:
        self.config = config
        self._chosen = {game: chosen_methods(config, game) for game in chosen_games(config)}

    def run(self, out: Path) -> str:
        """Play, and write ``dynamics.json`` and a picture of each game.

        Args:
            out: Folder; made if it is missing. Files of these names in it are replaced.

        Returns:
            A table for each game and the names of the files.
        """
        out.mkdir(parents=True, exist_ok=True)
        content, tables, files = {}, [], [out / "dynamics.json"]
        for game in self._chosen:
            files.append(out / f"{game}.png")
            rows, table = (self._run_ring if game == RING else self._run_small)(game, files[-1])
            content[game] = rows
            tables.append(table)
        versions = {"hessreg": hessreg.__version__, "torch": torch.__version__}
        described = {"versions": versions, "config": self.config.to_dict(), "games": content}
        write_atomically(files[0], json.dumps(described, indent=2, allow_nan=False).encode())
        return "\n\n".join([*tables, f"written: {', '.join(map(str, files))}"])

    def _run_small(self, game: str, picture: Path) -> tuple[list[dict[str, Any]], str]:
        config, found = self.config, []
        for name in self._chosen[game]:
            entry = METHODS[name]
            played = entry.modify(GAMES[game](config), config)
            found.append(play(name, played, entry.method(config, config.eta), config.steps))
        title = _title(game, config)
        pictures.save_trajectories(picture, title, found)
        return [each.to_dict() for each in found], f"{title}\n{_table(found)}"

    def _run_ring(self, game: str, picture: Path) -> tuple[list[dict[str, Any]], str]:
        options, results = self.config.ring, []
        for name in self._chosen[game]:
            results.append(self._play_ring(name))
            spent = f"{results[-1].steps} steps in {results[-1].cpu_seconds:.1f} s"
            say(f"{game}: {name}, {spent}")
        title = f"ring: {options.loss} loss, {options.optimizer}, eta {options.eta:g}"
        title += f", {options.seconds:g} CPU seconds each"
        pictures.save_rings(picture, title, results)
        return [each.to_dict() for each in results], f"{title}\n{_ring_table(results)}"

    def _play_ring(self, name: str) -> RingResult:
        options, entry = self.config.ring, METHODS[name]
        ring = RingGame(options.loss, options.width, options.batch_size, self.config.seed)
        game, method = entry.modify(ring, self.config), entry.method(self.config, options.eta)
        adam = options.optimizer == "adam"
        return play_ring(name, ring, game, method, seconds=options.seconds, adam=adam)


def _title(game: str, config: DynamicsConfig) -> str:
    q, dim = config.quadratic, config.bilinear.dim
    formulas = {
        "bilinear": "f = xy" if dim == 1 else f"f = x'B y, {dim} + {dim} numbers",
        "quadratic": f"f = {q.a:g}/2 x^2 + {q.b:g} xy - {q.c:g}/2 y^2",
        "dirac": "D(s) = ys, non-saturating loss",
        "dirac_wasserstein": "D(s) = ys, Wasserstein loss",
    }
    return f"{game}: {formulas[game]}; eta {config.eta:g}"


def _table(found: Sequence[Trajectory]) -> str:
    headings = ("method", "factor per step", "theory", "distance", "")
    rows = []
    for each in found:
        factors = (_shown(each.factor), _shown(each.theory))
        rows.append((each.method, *factors, f"{each.distances[-1]:.2g}", each.outcome))
    return _aligned(headings, rows)


def _shown(factor: float | None) -> str:
    if factor is None:
        return "-"
    return f"{factor:.5f}" if factor < 100 else f"{factor:.3g}"


def _ring_table(results: Sequence[RingResult]) -> str:
    headings = ("method", "steps", "modes", "quality", "MMD")
    rows = []
    for each in results:
        cells = ("-", "-", "diverges")
        if each.metrics:
            found = each.metrics
            cells = (f"{found['modes']}", f"{found['quality']:.1%}", f"{found['mmd']:.4f}")
        rows.append((each.method, f"{each.steps}", *cells))
    return _aligned(headings, rows)


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if 0 < len(table.columns) < 4 else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=72, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
