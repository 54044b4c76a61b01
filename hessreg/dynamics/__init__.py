"""Games of two players and the rules by which they are played.

`Game` gives the losses, `Method` the next point; `play` measures by which factor the distance to
the equilibrium changes per step, and says what theory has to say about it.
"""

from hessreg.dynamics.calculus import jacobian, player_gradient, vector_field
from hessreg.dynamics.games import (
    AdversarialGame,
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

__all__ = [
    "AdversarialGame",
    "AlternatingGradientDescent",
    "ClippedCritic",
    "CompetitiveGradientDescent",
    "ConsensusOptimization",
    "DiracGAN",
    "Extragradient",
    "Game",
    "GradientPenalty",
    "HessianCorrected",
    "HessianNormPenalty",
    "Method",
    "NegativeMomentum",
    "OptimisticGradientDescent",
    "PreviousGradientProjection",
    "QuadraticGame",
    "SimultaneousGradientDescent",
    "SymplecticGradientAdjustment",
    "bilinear_game",
    "jacobian",
    "player_gradient",
    "vector_field",
]
