"""Pieces of an HTML page: what is not markup already is escaped on its way in."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Html", "Series", "element", "line_chart", "page", "picture", "table"]

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 36  # margins of the plot
_POINTS = 300  # of a line
_COLOURS = 8
_PNG = b"\x89PNG\r\n\x1a\n"
_VOID = {"img", "meta", "link"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --back: #fff;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #cf222e; --c5: #0e7c86;
  --c6: #9a6700; --c7: #bf3989; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --back: #0d1117; --c0: #4493f8; --c1: #f0883e; --c2: #3fb950; --c3: #ab7df8; --c4: #f85149;
  --c5: #39c5cf; --c6: #d29922; --c7: #db61a2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3, p, li, td, th, code, summary { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
p { margin: .5rem 0; max-width: 65ch; }
.soft, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody th, thead th:first-child, td.text { text-align: left; }
td.long { white-space: normal; text-align: left; min-width: 18rem; }
tr.reference { color: var(--soft); }
.grid { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: .25rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
ul.legend { list-style: none; margin: .25rem 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .1rem 1rem; font-size: .85rem; }
ul.legend svg { display: inline-block; width: 1.6rem; height: .6rem; margin-right: .3rem; }
.dash1 { stroke-dasharray: 6 3; } .dash2 { stroke-dasharray: 2 3; }
""" + "".join(f".s{i} {{ stroke: var(--c{i}); }}\n" for i in range(_COLOURS))
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is markup already."""


Content = str | Iterable[str]


def element(name: str, content: Content = "", /, **attributes: object) -> Html:
    """Return an element; text and attributes are escaped, `Html` is taken as it is.

    Args:
        name: Of the element.
        content: Text, `Html`, or several of them.
        attributes: ``class_`` for ``class``, ``aria_label`` for ``aria-label``; None for none.

    Example:
        >>> element("p", ["1 < 2", element("b", "&")], class_='"')
        '<p class="&quot;">1 &lt; 2<b>&amp;</b></p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    parts = [content] if isinstance(content, str) else content
    inner = "".join(part if isinstance(part, Html) else html.escape(part) for part in parts)
    return Html(f"<{name}{given}>" + ("" if name in _VOID else f"{inner}</{name}>"))


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole document, which may load nothing from anywhere."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(_STYLE)),
    ]
    document = [element("head", head), "\n", element("body", element("main", body))]
    return "<!doctype html>\n" + element("html", document, lang="en") + "\n"


def table(
    label: str, head: Sequence[str], rows: Iterable[Sequence[str]], references: int = 0
) -> Html:
    """Return a table that scrolls in its own box.

    Args:
        label: What it shows, for those who do not see it.
        head: Headings.
        rows: A heading and cells each.
        references: How many rows at the end are for comparison only.
    """
    rows = list(rows)
    columns = element("tr", [element("th", cell, scope="col") for cell in head])
    lines = [
        element(
            "tr",
            [element("th", row[0], scope="row"), *map(_cell, row[1:])],
            class_="reference" if number >= len(rows) - references else None,
        )
        for number, row in enumerate(rows)
    ]
    inner = [element("thead", columns), element("tbody", lines)]
    whole = element("table", inner)
    return element("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def _cell(text: str) -> Html:
    kind = "long" if len(text) > 48 else None
    return element("td", text, class_=kind)


def picture(file: Path, text: str, caption: str) -> Html | None:
    """Return a PNG file as part of the page, or None if it is missing or something else."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    if not content.startswith(_PNG):
        return None
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    image = element("img", src=source, alt=text)
    return element("figure", [image, element("figcaption", caption)])


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        label: For the legend; None for a further line of the one before.
        style: Lines of one style look alike.
        points: Finite (x, y), by x.
    """

    label: str | None
    style: int
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, series: Sequence[Series]) -> Html:
    """Return a chart of lines with its title and legend; logarithmic over a wide range.

    Args:
        title: What y is.
        x_label: What x is.
        series: At least one, each with at least one point.
    """
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    scales = _Scale.linear(min(0.0, *xs), max(xs)), _Scale.fitting(ys)
    drawn = [*_axes(*scales, x_label), *(_polyline(line, *scales) for line in series)]
    label = f"{title} against {x_label}, {len(series)} lines"
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    chart = element("svg", drawn, viewBox=box, role="img", aria_label=label)
    return element("figure", [element("h3", title), chart, _legend(series)])


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    is_log: bool = False

    @classmethod
    def linear(cls, low: float, high: float) -> _Scale:
        """From low to high, or about a single value."""
        room = 0.5 * abs(low) or 0.5
        return cls(low, high) if high > low else cls(low - room, low + room)

    @classmethod
    def fitting(cls, values: Sequence[float]) -> _Scale:
        low, high = min(values), max(values)
        is_log = low > 0 and high > 20 * low
        if is_log:
            low, high = math.log10(low), math.log10(high)
        room = 0.05 * (high - low)
        return cls(low - room, high + room, is_log) if room else cls.linear(low, high)

    def place(self, value: float) -> float:
        """From 0 to 1."""
        value = math.log10(value) if self.is_log else value
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """A few round values."""
        if self.is_log:
            return self._log_ticks()
        wanted = (self.high - self.low) / 3
        step = 10.0 ** math.floor(math.log10(wanted))
        step *= max(m for m in (1, 2, 5) if m * step <= wanted)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [n * step for n in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        multiples = (1, 2, 5) if self.high - self.low < 2 else (1,)
        stride = math.ceil(len(decades) / 6)
        values = [m * 10.0**n for n in decades[::stride] for m in multiples]
        return [value for value in values if self.low <= math.log10(value) <= self.high]


def _position(x: float, y: float) -> tuple[float, float]:
    """From the unit square to the picture."""
    across, up = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return _LEFT + across * x, _TOP + up * (1.0 - y)


def _axes(x: _Scale, y: _Scale, x_label: str) -> list[Html]:
    left, bottom = _position(0.0, 0.0)
    right, _ = _position(1.0, 1.0)
    drawn = [_line(left, bottom, right, bottom)]
    for tick in y.ticks():
        _, at = _position(0.0, y.place(tick))
        drawn += [_line(left, at, right, at), _text(left - 5, at + 4, f"{tick:.3g}", "end")]
    for tick in x.ticks():
        at, _ = _position(x.place(tick), 0.0)
        drawn.append(_text(at, bottom + 15, f"{tick:.4g}", "middle"))
    return [*drawn, _text((left + right) / 2, _HEIGHT - 5, x_label, "middle")]


def _line(x1: float, y1: float, x2: float, y2: float) -> Html:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return element("line", class_="axis", **{name: f"{at:.1f}" for name, at in ends.items()})


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _polyline(line: Series, x: _Scale, y: _Scale) -> Html:
    stride = max(1, math.ceil(len(line.points) / _POINTS))
    shown = [*line.points[:-1:stride], line.points[-1]]
    places = [_position(x.place(a), y.place(b)) for a, b in shown]
    places = places * 2 if len(places) == 1 else places  # a line of no length is a dot
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    return element("polyline", points=points, class_=_class(line.style))


def _class(style: int) -> str:
    return f"s{style % _COLOURS} dash{style // _COLOURS % 3}"


def _legend(series: Sequence[Series]) -> Html:
    items = [
        element("li", [_swatch(line.style), line.label, f" {line.points[-1][1]:.3g}"])
        for line in series
        if line.label is not None
    ]
    return element("figcaption", element("ul", items, class_="legend"))


def _swatch(style: int) -> Html:
    line = element("polyline", points="1,5 23,5", class_=_class(style))
    return element("svg", line, viewBox="0 0 24 10", aria_hidden="true")
