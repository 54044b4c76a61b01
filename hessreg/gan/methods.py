"""Names of methods, such as ``relativistic+r1+r2``, and what they change in a configuration.

After a name there may be settings: ``r1@r1.gamma=10@g.lr=1e-4``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hessreg.gan.checks import require
from hessreg.gan.config import REGULARIZERS, TrainConfig, with_values
from hessreg.gan.losses import LOSSES

__all__ = ["with_method"]

_MODES = ("terms", "previous", "game", "weights")
_ORTHOGONAL = {f"orthogonal_{mode}": mode for mode in _MODES}  # by what methods call them
# What makes methods comparable: the data, the limits, and where they run.
_DATA = ("dataset", "data", "ring", "grid", "mnist", "images", "arrays")
_SHARED = (*_DATA, "seed", "seconds", "steps", "eval_every", "threads", "device")


def with_method(config: TrainConfig, name: str) -> TrainConfig:
    """Return a configuration with the methods that a name joins by +, and no others.

    Args:
        config: Everything else.
        name: ``none``, or any of the regularisers, one loss, ``hsc``, and one of
            ``orthogonal_terms`` and its kin: ``relativistic+r1+r2``. Settings of any options but
            the data, the seed, the limits and the device may follow, each after an @.

    Raises:
        ValueError: If a part or an option is unknown or there twice, or they cannot be used
            together.

    Example:
        >>> chosen = with_method(TrainConfig(), "relativistic+r1+r2")
        >>> chosen.loss, chosen.regularizer, chosen.correction
        ('relativistic', 'r1+r2', 'none')
        >>> with_method(TrainConfig(), "r1@r1.gamma=0.5@g.lr=1e-4").r1.gamma
        0.5
    """
    joined, *settings = name.split("@")
    return with_values(_with_parts(config, joined), _settings(settings))


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        require(bool(equals), "setting of a method", "option=value", text)
        fits = name.partition(".")[0] not in _SHARED and name not in values
        require(fits, "setting of a method", f"given once, of none of {', '.join(_SHARED)}", text)
        values[name] = _value(value)
    return values


def _value(text: str) -> Any:
    """A number, true, false or null; else what was written."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with_parts(config: TrainConfig, name: str) -> TrainConfig:
    parts = [] if name == "none" else name.split("+")
    losses = [part for part in parts if part in LOSSES]
    modes = [_ORTHOGONAL[part] for part in parts if part in _ORTHOGONAL]
    corrections = [part for part in parts if part == "hsc"]
    regularizers = [part for part in parts if part in REGULARIZERS]
    known = len({*losses, *modes, *corrections, *regularizers}) == len(parts)
    unique = len(losses) < 2 and len(modes) < 2
    every = [*LOSSES, "hsc", *_ORTHOGONAL, *REGULARIZERS]
    wanted = f"none, or {', '.join(every)} joined by +, at most one loss and one projection"
    require(known and unique, "method", wanted, name)
    chosen: dict[str, Any] = {"loss": losses[0]} if losses else {}
    chosen["orthogonal"] = modes[0] if modes else "none"
    chosen["correction"] = "hsc" if corrections else "none"
    return replace(config, regularizer="+".join(regularizers) or "none", **chosen)
