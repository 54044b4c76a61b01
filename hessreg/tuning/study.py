"""A study in a storage that several searches, here or on other machines, may share."""

from __future__ import annotations

import json
import math
import random
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hessreg.tuning.config import TuneConfig
from hessreg.tuning.space import SearchSpace

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage, RDBStorage
    from optuna.trial import FrozenTrial

__all__ = ["STUDY_ID", "StudyError", "open_study", "queued_point"]

STUDY_ID = "id"  # attribute of a study whose first trials are queued
Direction = Literal["minimize", "maximize"]
_DIRECTIONS: dict[str, Direction] = {"minimize": "minimize", "maximize": "maximize"}
_LARGER_IS_BETTER = "modes", "quality", "classes", "precision", "recall", "density", "coverage"
_SEARCHES = " (searches)"  # after the name of a study, that of one of the searches that opened it
_NEIGHBOURS = 9  # with the start the ten trials after which TPE begins to propose
_TABLES = 2.0  # seconds in which another process makes the tables
_DATABASE_TIMEOUT = 60  # seconds to wait for another process that writes
_QUEUE_TIMEOUT = 60.0  # seconds to wait for another process that queues
_EXCLUSIVE = "BEGIN IMMEDIATE"


class StudyError(ValueError):
    """A study cannot be opened, or is another one."""


def open_study(
    config: TuneConfig, path: Path, space: SearchSpace, objectives: Sequence[str], seed: int
) -> Study:
    """Open the study in its storage, or make it.

    What searches propose does not repeat: each one that opens the study draws from a stream of its
    own, which follows from the seed and from how many opened it before.

    Args:
        config: Of the search.
        path: Folder for the storage, if no other is given.
        space: What is varied.
        objectives: Names of the metrics.
        seed: Of the sampler.

    Raises:
        StudyError: If the storage cannot be used, or has a study of that name with other objectives
            or another space.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = _directions(config.directions, objectives)
    try:
        storage = _storage(config.storage, path)
        study = optuna.create_study(
            study_name=config.study or space.base.dataset,
            storage=storage,
            directions=directions,
            load_if_exists=True,
        )
    except _storage_errors() as error:
        reason = " ".join(str(error).split())
        raise StudyError(f"storage {config.storage or path}: {reason:.200}") from None
    _require_same(study, config, space, objectives)
    order = _order(study, storage)
    own = int(np.random.SeedSequence([seed, order]).generate_state(1)[0])
    study.sampler = _SAMPLERS[config.sampler](own)
    study.pruner = _pruner(config.pruner, space.base.eval_every)
    if order > 0:
        _wait_for_queue(study)
    # Of a grid there may be room for more points than before.
    if config.sampler == "grid" or STUDY_ID not in study.user_attrs:
        _enqueue(study, _first_points(config, space, random.Random(seed)))  # noqa: S311
    return study


def _storage(url: str, path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    if url and not url.startswith("journal:"):
        try:
            return _database(url)
        except SQLAlchemyError:  # two that make the tables at once: the second finds them made
            time.sleep(_TABLES)
            return _database(url)
    file = Path(url.removeprefix("journal:") or path / "study.journal")
    # The lock is a link to the file, and is never broken if it leads nowhere, as a relative one.
    return JournalStorage(JournalFileBackend(str(file.absolute())))


def _database(url: str) -> RDBStorage:
    """A database; in SQLite each transaction has it to itself from its first statement on.

    SQLite has no SELECT FOR UPDATE, with which other databases keep two searches from taking the
    same queued trial, and Python begins a transaction no sooner than something is written.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    if not url.startswith("sqlite"):
        return RDBStorage(url)
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _DATABASE_TIMEOUT}})
    event.listen(storage.engine, "connect", lambda raw, _: setattr(raw, "isolation_level", None))
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql(_EXCLUSIVE))
    storage.engine.dispose()  # connections from before
    return storage


def _storage_errors() -> tuple[type[Exception], ...]:
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    return OSError, ValueError, RuntimeError, ImportError, OptunaError, SQLAlchemyError


def _directions(text: str, objectives: Sequence[str]) -> list[Direction]:
    if not text:
        return ["maximize" if name in _LARGER_IS_BETTER else "minimize" for name in objectives]
    given = [part.strip() for part in text.split(",")]
    if not set(given) <= _DIRECTIONS.keys() or len(given) != len(objectives):
        raise StudyError(
            f"directions must be minimize or maximize for each of {', '.join(objectives)},"
            f" got {text!r:.60}"
        )
    return [_DIRECTIONS[name] for name in given]


def _require_same(
    study: Study, config: TuneConfig, space: SearchSpace, objectives: Sequence[str]
) -> None:
    """Refuse to mix trials that cannot be compared."""
    directions = _directions(config.directions, objectives)
    found = [direction.name.lower() for direction in study.directions]
    described = {"objectives": list(objectives), "directions": directions, **space.described()}
    stored = study.user_attrs.get("search")
    if stored is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("search", described)
    elif stored != described or found != directions:
        known = stored or {}
        changed = [key for key, value in described.items() if known.get(key) != value]
        what = ", ".join(changed) or "directions"
        raise StudyError(
            f"study {study.study_name} exists with other {what}: choose another --study and --out"
        )


def _order(study: Study, storage: BaseStorage) -> int:
    """Return how many searches opened the study before this one.

    No two get the same: they are the trials of a study beside it, which the storage numbers.
    """
    import optuna

    searches = optuna.create_study(
        study_name=f"{study.study_name}{_SEARCHES}", storage=storage, load_if_exists=True
    )
    opened = searches.ask()
    searches.tell(opened, time.time())
    return opened.number


def _tpe(seed: int) -> BaseSampler:
    from optuna.samplers import TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Optuna, that groups are experimental
        # Values one by one would be far from every good trial in something. Running trials count as
        # bad: several at once differ.
        return TPESampler(seed=seed, multivariate=True, group=True)


def _random(seed: int) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _cmaes(seed: int) -> BaseSampler:
    from optuna.samplers import CmaEsSampler

    return CmaEsSampler(seed=seed, warn_independent_sampling=False)


# The points of a grid are queued: the sampler has nothing to choose.
_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": _tpe,
    "random": _random,
    "cmaes": _cmaes,
    "grid": _random,
}


def _pruner(name: str, first: int) -> BasePruner:
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    if name == "hyperband":
        return HyperbandPruner(min_resource=first)
    return MedianPruner() if name == "median" else NopPruner()


def _enqueue(study: Study, points: Sequence[dict[str, Any]]) -> None:
    """Queue what is to be tried in any case and is not there yet; what is lost is not."""
    trials = study.get_trials(deepcopy=False)
    there = {_key(queued_point(trial)) for trial in trials if "lost" not in trial.user_attrs}
    for point in points:
        if _key(point) not in there:
            study.enqueue_trial(point)
    if STUDY_ID not in study.user_attrs:
        study.set_user_attr(STUDY_ID, uuid.uuid4().hex)


def _key(point: dict[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def queued_point(trial: FrozenTrial) -> dict[str, Any]:
    """Return what was queued as a trial, which may not have got to all of it; else its values."""
    return trial.system_attrs.get("fixed_params", trial.params)


def _first_points(
    config: TuneConfig, space: SearchSpace, chance: random.Random
) -> list[dict[str, Any]]:
    """A grid, or where the search starts from, for TPE with what is near; no more than trials."""
    if config.sampler == "grid":
        points = space.grid()
        chance.shuffle(points)
        return points[: config.trials]
    start = space.base_point()
    near = space.neighbours(_NEIGHBOURS, chance) if config.sampler == "tpe" else []
    return [] if start is None else [start, *near][: config.trials]


def _wait_for_queue(study: Study) -> None:
    """Let whoever opened the study first finish the queue: nobody may propose before.

    One whose queue has not grown for so long was ended meanwhile.
    """
    known, deadline = -1, math.inf
    while STUDY_ID not in study.user_attrs and time.monotonic() < deadline:
        queued = len(study.get_trials(deepcopy=False))
        if queued != known:
            known, deadline = queued, time.monotonic() + _QUEUE_TIMEOUT
        time.sleep(0.2)
