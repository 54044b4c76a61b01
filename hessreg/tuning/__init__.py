"""Search for hyperparameters of training, in parallel and over several machines."""

from hessreg.tuning.config import TuneConfig
from hessreg.tuning.outcome import Outcome, OutcomeError
from hessreg.tuning.space import DEFAULT_SPACE, Choice, Range, SearchSpace, SpaceError
from hessreg.tuning.study import StudyError
from hessreg.tuning.tuner import Tuner, TuningError

__all__ = [
    "DEFAULT_SPACE",
    "Choice",
    "Outcome",
    "OutcomeError",
    "Range",
    "SearchSpace",
    "SpaceError",
    "StudyError",
    "TuneConfig",
    "Tuner",
    "TuningError",
]
