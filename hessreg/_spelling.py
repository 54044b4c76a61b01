"""The option that somebody may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["suggestion"]

# What jsonargparse says of a flag, of a name in a group of a file, and of one at its top.
_UNKNOWN = (
    r"unrecognized arguments: --(?P<name>[\w.]+)",
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'",
    r"does not accept option '(?P<name>[\w.]+)'",
    r"Option '(?P<name>[\w.]+)' is not accepted",
)


def suggestion(message: str, names: Iterable[str]) -> str:
    """Return what to add to a message that says that a name is unknown, or nothing.

    Example:
        >>> suggestion("unrecognized arguments: --g.lrr 1", ["g.lr", "d.lr"])
        ' (did you mean --g.lr?)'
        >>> suggestion("Group 'g' does not accept option 'optimiser'", ["g.optimizer", "seed"])
        ' (did you mean g.optimizer?)'
        >>> suggestion("--steps: Expected int", ["steps"])
        ''
    """
    found = next(filter(None, (re.search(pattern, message) for pattern in _UNKNOWN)), None)
    if found is None:
        return ""
    parts = found.groupdict()
    name = ".".join(filter(None, (parts.get("group"), parts["name"])))
    near = difflib.get_close_matches(name, list(names), n=1)
    dashes = "--" if message.startswith("unrecognized") else ""
    return f" (did you mean {dashes}{near[0]}?)" if near else ""
