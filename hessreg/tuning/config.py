"""What a search is asked for, as flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hessreg.gan.checks import check_types, require, require_at_least

__all__ = ["TuneConfig"]


@dataclass
class TuneConfig:
    """Options of a search for hyperparameters.

    Args:
        trials: Of the whole study, those that are done already among them.
        workers: Trials at once on this machine; each is a process of its own.
        sampler: What proposes values: tree-structured Parzen estimators, chance, every point of a
            grid, or covariance matrix adaptation.
        pruner: What ends hopeless trials early; with several objectives none is.
        objectives: Metrics, with commas; by default that by which runs of the data set are ranked.
            Several give a Pareto front.
        directions: minimize or maximize for each objective, with commas; known for the metrics of
            the judges.
        space: YAML file that declares what to vary; by default what guides to training name.
        storage: Where the study is, to be shared by several searches: an SQLAlchemy URL such as
            sqlite:///study.db, or journal:FILE. By default a file in the folder.
        study: Name of the study in the storage; by default that of the data set.
        leaders: Trials with the best values that are trained with two further seeds each before one
            of them is named the best; 1 for none.
        confirm: Fresh seeds on which the best configuration is trained beside the one the search
            started from; 0 for none.
    """

    trials: int = 20
    workers: int = 1
    sampler: Literal["tpe", "random", "grid", "cmaes"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    objectives: str = ""
    directions: str = ""
    space: str = ""
    storage: str = ""
    study: str = ""
    leaders: int = 3
    confirm: int = 5

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(self, 1, "trials", "workers", "leaders")
        require_at_least(self, 0, "confirm")
        require(self.workers <= 1024, "workers", "at most 1024", self.workers)
