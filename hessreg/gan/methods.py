"""Names of methods, such as ``relativistic+r1+r2``, and what they change in a configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hessreg.gan.checks import require
from hessreg.gan.config import REGULARIZERS, TrainConfig
from hessreg.gan.losses import LOSSES

__all__ = ["with_method"]

_MODES = ("terms", "previous", "game", "weights")
_ORTHOGONAL = {f"orthogonal_{mode}": mode for mode in _MODES}  # by what methods call them


def with_method(config: TrainConfig, name: str) -> TrainConfig:
    """Return a configuration with the methods that a name joins by +, and no others.

    Args:
        config: Everything else.
        name: ``none``, or any of the regularisers, one loss, ``hsc``, and one of
            ``orthogonal_terms`` and its kin: ``relativistic+r1+r2``.

    Raises:
        ValueError: If a part is unknown or there twice, or they cannot be used together.

    Example:
        >>> chosen = with_method(TrainConfig(), "relativistic+r1+r2")
        >>> chosen.loss, chosen.regularizer, chosen.correction
        ('relativistic', 'r1+r2', 'none')
    """
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
