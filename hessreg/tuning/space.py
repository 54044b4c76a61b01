"""The search space: which fields of a configuration to vary, and between what."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from hessreg.gan.config import TrainConfig, flatten, with_values

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

__all__ = ["DEFAULT_SPACE", "Choice", "Range", "SearchSpace", "SpaceError"]

DEFAULT_SPACE = Path(__file__).with_name("default_space.yaml")
_RANGE_KEYS = ("low", "high", "log", "when")
_GRID_POINTS = 4  # of a range
_MAX_GRID = 10_000


class SpaceError(ValueError):
    """A search space cannot be read or used."""


@dataclass(frozen=True)
class Choice:
    """A field that takes one of several values.

    Args:
        name: Of the field.
        values: To choose from: any that YAML knows.
        when: Values of other fields with which this one matters; empty for always.
    """

    name: str
    values: tuple[Any, ...]
    when: Mapping[str, Sequence[Any]]

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values: each must be possible."""
        return self.values

    def suggest(self, trial: Trial) -> Any:
        """Return a value for a trial."""
        labels = [self.stored(value) for value in self.values]
        return self.restored(trial.suggest_categorical(self.name, labels))

    def stored(self, value: Any) -> Any:
        """Return what Optuna knows a value by: the text of what it cannot store."""
        plain = value is None or isinstance(value, str | int | float)
        return value if plain else json.dumps(value)

    def restored(self, label: Any) -> Any:
        """Return the value that Optuna knows by a label."""
        return next(value for value in self.values if self.stored(value) == label)

    def grid(self) -> list[Any]:
        """Return the values of a grid: all."""
        return list(self.values)

    def draw(self, random: Random, old: Any) -> Any:
        """Return one of the values by chance, another than the old one if there is any."""
        others = [value for value in self.values if self.stored(value) != self.stored(old)]
        return random.choice(others or self.values)

    def __contains__(self, value: Any) -> bool:
        return self.stored(value) in map(self.stored, self.values)


@dataclass(frozen=True)
class Range:
    """A field that takes numbers between two, integers if both are.

    Args:
        name: Of the field.
        low: Smallest value.
        high: Largest value.
        log: Whether the logarithm is what is uniform.
        when: Values of other fields with which this one matters; empty for always.
    """

    name: str
    low: float
    high: float
    log: bool
    when: Mapping[str, Sequence[Any]]

    @property
    def extremes(self) -> tuple[float, ...]:
        """Both ends: each must be possible."""
        return (self.low, self.high)

    def suggest(self, trial: Trial) -> float:
        """Return a number for a trial."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def stored(self, value: Any) -> Any:
        """Return what Optuna knows a number by: itself."""
        return value

    def restored(self, label: Any) -> Any:
        """Return the number that Optuna stored."""
        return label

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def grid(self) -> list[Any]:
        """Return a few equally spaced numbers."""
        space = np.geomspace if self.log else np.linspace
        values = space(self.low, self.high, _GRID_POINTS).tolist()
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return sorted({round(value) for value in values}) if whole else values

    def draw(self, random: Random, old: float) -> float:
        """Return a number by chance, whatever the old one was."""
        if self.log:
            value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = random.uniform(self.low, self.high)
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return round(value) if whole else min(max(value, self.low), self.high)


Parameter = Choice | Range


class SearchSpace:
    """What to vary around a base configuration.

    Args:
        base: Gives all fields that are not varied.
        declared: Of each field a list of values, or ``low``, ``high`` and optionally ``log``, with
            ``when``, a mapping of other fields to the values with which this one matters; a list
            with ``when`` is under ``values``.

    Raises:
        SpaceError: If a name is unknown or a value is none that the field can have.

    Example:
        >>> rates = {"low": 1e-4, "high": 1e-2, "log": True}
        >>> space = SearchSpace(TrainConfig(), {"g.lr": rates, "batch_size": [32, 64]})
        >>> [parameter.name for parameter in space.parameters]
        ['g.lr', 'batch_size']
    """

    def __init__(self, base: TrainConfig, declared: Any) -> None:
        self.base = base
        self._fields = flatten(base.to_dict())
        if not isinstance(declared, dict) or not declared:
            raise SpaceError(f"a space is a mapping of options to values, got {declared!r:.60}")
        self._declared = declared
        self.parameters = [self._parameter(str(k), v) for k, v in declared.items()]
        for parameter in self.parameters:
            self._check(parameter)

    @classmethod
    def read(cls, base: TrainConfig, path: Path) -> SearchSpace:
        """Read a space from a YAML file.

        Raises:
            SpaceError: If the file is missing, is not YAML, or declares no space.
        """
        import yaml

        try:
            return cls(base, yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise SpaceError(f"space {path}: {reason}") from None
        except SpaceError as error:
            raise SpaceError(f"space {path}: {error}") from None

    def described(self) -> dict[str, Any]:
        """Return what trials must have in common to be compared, as plain values."""
        base = self.base.to_dict()
        runs = {name: base[name] for name in base if name not in ("device", "threads", "data")}
        return json.loads(json.dumps({"space": self._declared, "base": runs}, default=str))

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Return values of the fields that matter, for a trial, by name."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if self._matters(parameter, values):
                values[parameter.name] = parameter.suggest(trial)
        return values

    def grid(self) -> list[dict[str, Any]]:
        """Return every point of the grid, as Optuna stores it: all values, four of each range.

        Raises:
            SpaceError: If there are more than 10,000.
        """
        points: list[dict[str, Any]] = [{}]
        for parameter in self.parameters:
            points = [
                point | {parameter.name: value} if matters else point
                for point in points
                for matters in [self._matters(parameter, point)]
                for value in (parameter.grid() if matters else [None])
            ]
            if len(points) > _MAX_GRID:
                raise SpaceError(f"the grid has more than {_MAX_GRID} points: declare fewer values")
        return [self._stored(point) for point in points]

    def base_point(self) -> dict[str, Any] | None:
        """Return the base's values as Optuna stores them; None if one is not in the space."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            value = self._fields[parameter.name]
            if self._matters(parameter, values):
                if value not in parameter:
                    return None
                values[parameter.name] = value
        return self._stored(values)

    def neighbours(self, count: int, random: Random) -> list[dict[str, Any]]:
        """Return points that differ from the base in two values, as Optuna stores them.

        In a space of many values a random point is bad in some respect, and nothing is learned of
        the others; two changes of something good can be told apart.

        Args:
            count: Points, fewer where chance repeats one; none if the base is not in the space.
            random: Draws them.
        """
        base = self.base_point()
        points = [] if base is None else [base]
        for _ in range(count if points else 0):
            names = sorted(points[0])
            point = self._stored(self._changed(random.sample(names, min(2, len(names))), random))
            if point not in points:
                points.append(point)
        return points[1:]

    def _changed(self, names: Sequence[str], random: Random) -> dict[str, Any]:
        """The base's values, but those of some names, or outside of the space, by chance."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if self._matters(parameter, values):
                value = self._fields[parameter.name]
                is_kept = parameter.name not in names and value in parameter
                values[parameter.name] = value if is_kept else parameter.draw(random, value)
        return values

    def values_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the values that a trial of a study had, by name."""
        return {
            parameter.name: parameter.restored(trial.params[parameter.name])
            for parameter in self.parameters
            if parameter.name in trial.params
        }

    def _matters(self, parameter: Parameter, values: dict[str, Any]) -> bool:
        known = self._fields | values
        return all(known[name] in wanted for name, wanted in parameter.when.items())

    def _stored(self, values: dict[str, Any]) -> dict[str, Any]:
        by_name = {parameter.name: parameter for parameter in self.parameters}
        return {name: by_name[name].stored(value) for name, value in values.items()}

    def _parameter(self, name: str, declared: Any) -> Parameter:
        self._require_known(name)
        if isinstance(declared, list):
            declared = {"values": declared}
        if not isinstance(declared, dict):
            raise SpaceError(f"{name} must be a list of values, or low and high, got {declared!r}")
        when = self._conditions(name, declared.get("when", {}))
        if "values" in declared:
            return _choice(name, declared, when)
        return _range(name, declared, when)

    def _conditions(self, name: str, declared: Any) -> dict[str, list[Any]]:
        if not isinstance(declared, dict):
            raise SpaceError(f"{name}: when must be a mapping of options, got {declared!r}")
        for other in declared:
            self._require_known(str(other))
        return {k: v if isinstance(v, list) else [v] for k, v in declared.items()}

    def _require_known(self, name: str) -> None:
        if name in self._fields:
            return
        near = difflib.get_close_matches(name, self._fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SpaceError(f"{name} is no option of a run{hint}")

    def _check(self, parameter: Parameter) -> None:
        """Try each extreme value alone, with what makes it matter."""
        context = {name: wanted[0] for name, wanted in parameter.when.items()}
        for value in parameter.extremes:
            try:
                with_values(self.base, context | {parameter.name: value})
            except (ValueError, TypeError) as error:
                raise SpaceError(f"{parameter.name} cannot be {value!r}: {error}") from None


def _choice(name: str, declared: dict[str, Any], when: dict[str, list[Any]]) -> Choice:
    values = declared["values"]
    unknown = sorted(declared.keys() - {"values", "when"})
    if unknown or not isinstance(values, list) or not values:
        raise SpaceError(f"{name}: values must be a list, and only when may be beside it")
    return Choice(name, tuple(values), when)


def _range(name: str, declared: dict[str, Any], when: dict[str, list[Any]]) -> Range:
    unknown = sorted(map(str, declared.keys() - set(_RANGE_KEYS)))
    if unknown:
        raise SpaceError(f"{name}: {', '.join(unknown)} is none of {', '.join(_RANGE_KEYS)}")
    low, high = (_number(name, end, declared.get(end)) for end in ("low", "high"))
    log = declared.get("log", False)
    if not isinstance(log, bool):
        raise SpaceError(f"{name}: log must be true or false, got {log!r}")
    if not low < high or (log and low <= 0):
        wanted = "0 < low < high with log" if log else "low < high"
        raise SpaceError(f"{name} needs {wanted}, got low {low} and high {high}")
    return Range(name, low, high, log, when)


def _number(name: str, end: str, value: Any) -> float:
    """A number; YAML takes 1e-4, without a point, for text."""
    try:
        number = float(value) if isinstance(value, str) else value
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if is_number and math.isfinite(number):
            return number
    except ValueError:
        pass
    raise SpaceError(f"{name}: {end} must be a finite number, got {value!r}")
