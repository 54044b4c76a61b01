"""The games and methods that the lab knows by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from hessreg.dynamics.config import DynamicsConfig
from hessreg.dynamics.games import (
    ClippedCritic,
    DiracGAN,
    Game,
    GradientPenalty,
    HessianNormPenalty,
    QuadraticGame,
    bilinear_game,
)
from hessreg.dynamics.methods import (
    AlternatingGradientDescent,
    CompetitiveGradientDescent,
    ConsensusOptimization,
    Extragradient,
    HessianCorrected,
    Method,
    NegativeMomentum,
    OptimisticGradientDescent,
    PreviousGradientProjection,
    SimultaneousGradientDescent,
    SymplecticGradientAdjustment,
)
from hessreg.regularizers import HSN1R

__all__ = ["GAMES", "METHODS", "RING", "Entry", "chosen_games", "chosen_methods"]

RING = "ring"
_WITHOUT_DISCRIMINATOR = ("bilinear", "quadratic")


def _quadratic(config: DynamicsConfig) -> Game:
    options = config.quadratic
    P, B, Q = (
        torch.full((1, 1), v, dtype=torch.float64, device="cpu")
        for v in (options.a, options.b, options.c)
    )
    return QuadraticGame(P, B, Q, config.seed)


GAMES: dict[str, Callable[[DynamicsConfig], Game]] = {
    "bilinear": lambda config: bilinear_game(config.bilinear.dim, config.seed),
    "quadratic": _quadratic,
    "dirac": lambda config: DiracGAN("non_saturating", config.seed),
    "dirac_wasserstein": lambda config: DiracGAN("wasserstein", config.seed),
}


def _plain(config: DynamicsConfig, eta: float) -> Method:
    if config.updates == "alternating":
        return AlternatingGradientDescent(eta)
    return SimultaneousGradientDescent(eta)


def _unchanged(game: Game, config: DynamicsConfig) -> Game:
    return game


@dataclass(frozen=True)
class Entry:
    """A method by name.

    Attributes:
        method: Makes it, with a learning rate.
        modify: What it makes of a game.
        needs: What a game without a discriminator lacks for it.
    """

    method: Callable[[DynamicsConfig, float], Method] = _plain
    modify: Callable[[Game, DynamicsConfig], Game] = _unchanged
    needs: str = ""

    def obstacle(self, game: str) -> str:
        """Why it does not apply to a game; empty if it does."""
        return self.needs if game in _WITHOUT_DISCRIMINATOR else ""


def _r1(game: Game, config: DynamicsConfig) -> Game:
    return GradientPenalty(game, config.r1.gamma)


def _wgan_gp(game: Game, config: DynamicsConfig) -> Game:
    options = config.wgan_gp
    return GradientPenalty(game, options.gamma, options.target, config.seed)


def _hsn1r(game: Game, config: DynamicsConfig) -> Game:
    return HessianNormPenalty(game, HSN1R(**asdict(config.hsn1r), seed=config.seed))


METHODS: dict[str, Entry] = {
    "simultaneous": Entry(lambda config, eta: SimultaneousGradientDescent(eta)),
    "alternating": Entry(lambda config, eta: AlternatingGradientDescent(eta)),
    "negative_momentum": Entry(
        lambda config, eta: NegativeMomentum(eta, config.negative_momentum.beta)
    ),
    "extragradient": Entry(lambda config, eta: Extragradient(eta)),
    "optimistic": Entry(lambda config, eta: OptimisticGradientDescent(eta)),
    "consensus": Entry(lambda config, eta: ConsensusOptimization(eta, config.consensus.weight)),
    "symplectic": Entry(
        lambda config, eta: SymplecticGradientAdjustment(eta, config.symplectic.weight)
    ),
    "competitive": Entry(lambda config, eta: CompetitiveGradientDescent(eta)),
    "r1": Entry(modify=_r1, needs="a discriminator, whose gradient in real samples is penalised"),
    "wgan_gp": Entry(
        modify=_wgan_gp, needs="a discriminator, whose gradient between samples is penalised"
    ),
    "weight_clipping": Entry(
        modify=lambda game, config: ClippedCritic(game, config.weight_clipping.bound),
        needs="a discriminator, whose weights are clipped",
    ),
    "hsn1r": Entry(modify=_hsn1r),
    "hsc": Entry(lambda config, eta: HessianCorrected(eta, config.hsc.eps, config.hsc.mu)),
    "orthogonal": Entry(
        lambda config, eta: PreviousGradientProjection(
            eta, config.orthogonal.strength, config.orthogonal.reference
        )
    ),
}


def _names(kind: str, text: str, known: Sequence[str], default: Sequence[str]) -> list[str]:
    if text.strip() == "all":
        return list(default)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; choose from all, {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{kind}s must be different names, got {text!r}")
    return names


def chosen_games(config: DynamicsConfig) -> list[str]:
    """The names of the games asked for.

    Raises:
        ValueError: If there is no such game, or one is named twice.
    """
    return _names("game", config.games, [*GAMES, RING], list(GAMES))


def chosen_methods(config: DynamicsConfig, game: str) -> list[str]:
    """The names of the methods asked for, to be used on a game.

    Raises:
        ValueError: If there is no such method, one is named twice, or one does not apply.
    """
    names = _names("method", config.methods, list(METHODS), list(METHODS))
    if config.methods.strip() == "all":
        return [name for name in names if not METHODS[name].obstacle(game)]
    for name in names:
        if reason := METHODS[name].obstacle(game):
            raise ValueError(f"{name} does not apply to {game}: it needs {reason}")
    return names
