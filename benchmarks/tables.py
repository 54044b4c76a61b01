"""What a row of measurements says: ratios, shares of the floor, and tables of several rows.

A row, as `benchmarks.harness` makes it and as it lies in the files of ``benchmarks/results``:
``group`` and ``case``; ``milliseconds`` of each contestant, of which ``ours`` are ours and
``references`` are in no race; who was ``left out`` and why; ``errors``; ``work`` and ``floor``. Or,
in place of all that, why it ``failed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def cost(row: Row, who: str, figure: str = "median") -> float:
    """Milliseconds."""
    return row["milliseconds"][who][figure]


def rivals(row: Row, figure: str = "median") -> dict[str, float]:
    """How many times as long as ours each rival takes."""
    if not row.get("ours"):
        return {}
    own = cost(row, row["ours"][0], figure)
    others = [w for w in row["milliseconds"] if w not in (*row["ours"], *row["references"])]
    return {who: cost(row, who, figure) / own for who in others}


def best_rival(row: Row, among: Sequence[str] = ()) -> tuple[str, float] | None:
    """The fastest, of those whose name begins with one of the given; None if there is none."""
    found = rivals(row)
    names = [who for who in found if not among or who.startswith(tuple(among))]
    return min(((who, found[who]) for who in names), key=lambda pair: pair[1], default=None)


def in_units(row: Row) -> dict[str, float]:
    """What we take in each unit, such as plain steps; a floor is none."""
    units = [who for who in row["references"] if not who.startswith("floor") and row["ours"]]
    return {who: cost(row, row["ours"][0]) / cost(row, who) for who in units}


def less_exact(row: Row, who: str) -> str:
    """A rival's error, where it is ten times ours, to stand behind its name."""
    errors = row["errors"]
    if who not in errors or errors[who] < 10 * errors[row["ours"][0]]:
        return ""
    return f", error {errors[who]:.0e}, ours {errors[row['ours'][0]]:.0e}"


def share_of_floor(row: Row) -> float | None:
    """What nobody could stay below, as a share of what we take."""
    if not row.get("floor") or not row.get("ours"):
        return None
    return row["floor"]["milliseconds"] / row["milliseconds"][row["ours"][0]]["median"]


def digits(number: float) -> str:
    """Three digits, or all before the point."""
    if 0 < abs(number) < 0.1:
        return f"{number:.2g}"
    return f"{number:.{max(0, 3 - len(str(int(abs(number)))))}f}"


def spread(t: dict[str, float]) -> str:
    """A median with its quartiles."""
    return f"{digits(t['median'])} ({digits(t['low'])} - {digits(t['high'])})"


def percent(share: float | None) -> str:
    """A share, or nothing."""
    return "" if share is None else f"{100 * share:.0f} %"


def limit_rows(limits: dict[str, Any]) -> list[tuple[str, str]]:
    """What the machine can do at most."""
    names = [name for name in limits if name.endswith((" flops", " exps"))]
    rates = [(name, f"{limits[name] / 1e9:.1f} G/s") for name in names]
    traffic = [
        (f"{what} {_size(size)}", f"{rate / 1e9:.1f} GB/s")
        for what in ("read", "copied")
        for size, rate in limits[what]
    ]
    return [*rates, *traffic]


def _size(num_bytes: float) -> str:
    kilobytes = num_bytes / 1024
    return f"{kilobytes:.0f} kB" if kilobytes < 1024 else f"{kilobytes / 1024:.0f} MB"


# ---- on the terminal ---------------------------------------------------------------------------


def row_lines(row: Row) -> list[str]:
    """One row as a block of lines."""
    lines = [f"\n{row['group']}: {row['case']}"]
    if "failed" in row:
        return [*lines, f"  failed: {row['failed']}"]
    times = row["milliseconds"]
    ratios, width = rivals(row), max(map(len, (*times, *row["left out"], "")))
    for who, t in times.items():
        again = f", again {digits(t['again'])}" if "again" in t else ""
        graph = f", as a graph {_graph(t['graph'])}" if "graph" in t else ""
        line = f"  {who:{width}s} {spread(t) + ' ms' + again + graph:36s}"
        line += f" {digits(ratios[who])} x ours" if who in ratios else ""
        line += f"   error {row['errors'][who]:.1e}" if who in row["errors"] else ""
        lines.append(line.rstrip())
    lines += [f"  {who:{width}s} left out: {why}" for who, why in row["left out"].items()]
    lines += [f"  ours takes {digits(n)} x {who}" for who, n in in_units(row).items()]
    return [*lines, *_floor_line(row)]


def _graph(found: float | str) -> str:
    return found if isinstance(found, str) else digits(found)


def _floor_line(row: Row) -> list[str]:
    share = share_of_floor(row)
    if share is None:
        return []
    floor, work = row["floor"], row["work"]
    needs = f", {_amounts(work)}" if work else ""
    bound = f"{digits(floor['milliseconds'])} ms by {floor['bound']}{needs}"
    return [f"  floor {bound}: {percent(share)} of it reached"]


def _amounts(work: dict[str, Any]) -> str:
    parts = [f"{_unit(work['bytes'])}B"]
    parts += [f"{_unit(work[name])}{name}" for name in ("flops", "exps") if work[name]]
    return ", ".join(parts)


def _unit(number: float) -> str:
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{digits(number / size)} {prefix}"
    return f"{digits(number)} "


# ---- in a document -----------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def group_table(rows: Sequence[Row]) -> str:
    """The rows of one group: our milliseconds, the floor, and how many times each rival takes."""
    good = [row for row in rows if "failed" not in row]
    everyone = [who for row in good for who in (*row["milliseconds"], *row["left out"])]
    others = [who for row in good for who in row["references"]]
    names = [who for who in dict.fromkeys(everyone) if who not in others]
    main = {row["ours"][0] for row in good if row["ours"]}
    units = list(dict.fromkeys(who for row in good for who in in_units(row)))
    columns = [who for who in names if who not in main]
    has_errors = any(row["errors"] for row in good)
    head = ["", "ours, ms", *(["error"] if has_errors else []), "floor, ms", "reached"]
    head += [*(f"ours in `{who}`" for who in units), *(f"`{who}`" for who in columns)]
    return table(head, [_line(row, columns, units, has_errors) for row in rows])


def _line(row: Row, columns: list[str], units: list[str], has_errors: bool) -> list[str]:
    filler = [""] * (len(columns) + len(units) + 2 + has_errors)
    if "failed" in row:
        return [row["case"], f"failed: {row['failed']}", *filler]
    if not row["ours"]:
        why = row["left out"].get("hessreg", "left out").split(":")[0]
        return [row["case"], why, *filler]
    own = row["ours"][0]
    t = row["milliseconds"][own]
    again = f" / {digits(t['again'])}" if "again" in t else ""
    error = [f"{row['errors'][own]:.0e}" if row["errors"] else ""] if has_errors else []
    floor = row.get("floor")
    limit = f"{digits(floor['milliseconds'])}, {floor['bound']}" if floor else ""
    cells = [_cell(row, who) for who in columns]
    found = in_units(row)
    cells = [*(digits(found[who]) if who in found else "" for who in units), *cells]
    return [row["case"], spread(t) + again, *error, limit, percent(share_of_floor(row)), *cells]


def _cell(row: Row, who: str) -> str:
    if who not in row["milliseconds"]:
        return row["left out"].get(who, "").split(":")[0]
    if who in row["ours"]:  # another way of ours
        text = digits(cost(row, who) / cost(row, row["ours"][0]))
    else:
        text = digits(rivals(row)[who])
        text = f"**{text}**" if rivals(row)[who] < 1 else text
    t = row["milliseconds"][who]
    text += f" / {digits(rivals(row, 'again')[who])}" if "again" in t and who in rivals(row) else ""
    return text + (f" ({row['errors'][who]:.0e})" if who in row["errors"] else "")


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by table, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found
