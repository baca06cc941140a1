"""Charts as SVG for pages, drawn by matplotlib.

A page's colours follow the reader's light or dark scheme, which matplotlib cannot know. So everything is drawn in stand-in
colours, which are then replaced by the page's CSS variables. Fonts are the page's too. What only standalone files need is
removed, as drawings are embedded in a page, several in one.

One unit is one pixel. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from compress.report.charts import LEVELS, HeatMap, Panel, Spread, axis_over
from compress.report.comparison import Entry
from compress.system.files import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 960.0  # width of a heat map
_LONGEST = 40  # most characters of a row's name; longer names keep their end
_TEXT = 11  # pixels
_COLOURS = ("ink", "soft", "line", "accent", "on-low", "on-high", "best", "rest", *(f"s{n}" for n in range(LEVELS)))
_STAND_IN = "#01fe"  # an unused colour; the last byte is an index of _COLOURS


@dataclass(frozen=True)
class Drawing:
    """An SVG element, and the data for the page's script to describe what is under the pointer."""

    svg: str
    hover: dict[str, Any]


@dataclass(frozen=True)
class Margins:
    """Room around the axes for labels."""

    left: float
    top: float
    right: float
    bottom: float


def _colour(name: str) -> str:
    return f"{_STAND_IN}{_COLOURS.index(name):02x}"


def _shown(text: str) -> str:
    """A text on one line, with unprintable characters replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def _width(text: str) -> float:
    """Width of a text in matplotlib's own font, which is wider than those of browsers."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts draw it, not matplotlib's
        return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=_TEXT), ismath=False)[0])


def _blank(width: float, height: float, margins: Margins) -> tuple[Figure, Axes]:
    """A figure with bare axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    across, down = width - margins.left - margins.right, height - margins.top - margins.bottom
    axes = figure.add_axes((margins.left / width, margins.bottom / height, across / width, down / height))
    for patch in (figure.patch, axes.patch, *axes.spines.values()):
        patch.set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _finish_axes(axes: Axes) -> None:
    """Put labels in the page's soft colour, without tick marks; names with math characters are not parsed as formulas."""
    soft, line = _colour("soft"), _colour("line")
    axes.tick_params(which="both", left=False, bottom=False, length=0, labelsize=_TEXT, labelcolor=soft, grid_color=line)
    axes.tick_params(axis="y", pad=8)
    axes.tick_params(axis="x", pad=6)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)


def _named_ticks(names: Sequence[str], size: float, room: float) -> tuple[list[int], list[str]]:
    """Choose which of the names, `size` pixels apart, to show, so that each has `room` pixels."""
    from matplotlib.ticker import MaxNLocator

    most = max(1, int(len(names) * size / room))
    ticks = MaxNLocator(most, steps=[1, 2, 5, 10], integer=True).tick_values(0, len(names) - 1)
    places = [int(tick) for tick in ticks if 0 <= tick < len(names)]
    return places, [_shown(names[place]) for place in places]


def _svg(figure: Figure, label: str, titles: Mapping[str, str] | None = None, name: str = "") -> str:
    """Write a figure as an element of a page; `titles` are tooltips of artists, by their id."""
    import matplotlib

    text = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "compress", "path.simplify": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(text.getvalue())
    for element in root.iter():
        _strip(element, titles or {})
    wide = root.get("viewBox", "0 0 0 0").split()[2]
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "width": wide,
        "role": "img",
        "aria-label": _shown(label),
    } | ({"class": name} if name else {})
    return ElementTree.tostring(root, encoding="unicode")


def _strip(element: ElementTree.Element, titles: Mapping[str, str]) -> None:
    """Remove what only a standalone file needs from an element, and add colours, classes and titles."""
    for child in list(element):
        if child.tag.rpartition("}")[2] in ("metadata", "defs"):
            element.remove(child)
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    if element.tag not in ("text", "title"):
        element.text = None
    attributes = {key: value for key, value in element.attrib.items() if key not in ("clip-path", "id")}
    if (style := attributes.pop("style", None)) is not None:
        kept = [part.strip() for part in style.split(";") if part.strip() and not part.strip().startswith("font")]
        attributes["style"] = re.sub(
            f"{_STAND_IN}([0-9a-f]{{2}})", lambda found: f"var(--{_COLOURS[int(found[1], 16)]})", ";".join(kept)
        )
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    if "d" in attributes:
        path = re.sub(r"\s*([A-Za-z])\s*", r"\1", _rounded(attributes["d"])).strip()
        attributes["d"] = re.sub(r"M(\S+) (\S+)L(\S+) \2(?![^ML])", r"M\1 \2H\3", path)  # halves the path of a field
    for key in ("x", "y"):
        if key in attributes:
            attributes[key] = _rounded(attributes[key])
    mark = element.get("id", "")
    if mark in titles:
        attributes["class"] = mark.split("-")[0]
        title = ElementTree.Element("title")
        title.text = _shown(titles[mark])
        element.insert(0, title)
    element.attrib = attributes


def _rounded(numbers: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), numbers)


def _stroke(axes: Axes, lines: Iterable[Sequence[tuple[float, float]]], width: float, colour: str, **style: Any) -> None:
    """Draw lines of one colour as one path, so that thousands of them make a small file that browsers draw at once."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points: list[tuple[float, float]] = []
    codes: list[int] = []
    for line in lines:
        points += line
        codes += [int(Path.MOVETO), *[int(Path.LINETO)] * (len(line) - 1)]
    drawn = {"capstyle": "butt", "joinstyle": "miter"} | style
    if points:
        axes.add_artist(PathPatch(Path(points, codes), fill=False, edgecolor=_colour(colour), linewidth=width, **drawn))


def heat_map(shown: HeatMap) -> Drawing:
    """Draw a heat map; a field is a short line as thick as the field is high."""
    rows = [_shown(name) for name in shown.rows]
    rows = [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in rows]
    left = math.ceil(12 + max(map(_width, rows)))
    wide = min(46.0, math.floor((WIDTH - left) / len(shown.columns) * 10) / 10)  # few digits make a small file
    high = 24.0 if len(rows) <= 16 else 14.0 if len(rows) <= 40 else 9.0
    gap = 2.0 if min(wide, high) > 14 else 1.0 if wide > 6 else 0.5
    thick = high - max(gap, 0.6)
    across, down = wide * len(shown.columns), high * len(rows)
    margins = Margins(left, 0, max(0.0, 320 - left - across), 20)
    figure, axes = _blank(left + across + margins.right, down + margins.bottom, margins)
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)
    fields: dict[int, list[list[tuple[float, float]]]] = {}
    outlines = []
    for (row, column), cell in sorted(shown.cells.items()):
        x, y, end = column * wide, row * high, (column + 1) * wide - gap
        fields.setdefault(cell.level, []).append([(x, y + thick / 2), (end, y + thick / 2)])
        if cell.outlined:
            bottom = y + thick
            outlines.append([(x, y), (end, y), (end, bottom), (x, bottom), (x, y)])
        if cell.number and wide >= 40:
            colour = _colour("on-high" if cell.level > LEVELS // 2 else "on-low")
            middle: dict[str, Any] = {
                "ha": "center",
                "va": "center_baseline",
                "fontsize": _TEXT,
                "color": colour,
                "parse_math": False,
            }
            axes.text((x + end) / 2, y + thick / 2 + 0.5, cell.number, **middle)
    for level, lines in sorted(fields.items()):
        _stroke(axes, lines, thick, f"s{level}")
    _stroke(axes, outlines, min(1.5, wide / 4), "accent", capstyle="projecting")
    places, names = _named_ticks(shown.columns, wide, 26)
    axes.set_xticks([(place + 0.5) * wide - gap / 2 for place in places], names)
    places, _ = _named_ticks(rows, high, 11)
    axes.set_yticks([place * high + thick / 2 for place in places], [rows[place] for place in places])
    _finish_axes(axes)
    said = [
        [list(shown.cells[r, c].values) if (r, c) in shown.cells else 0 for c in range(len(shown.columns))]
        for r in range(len(rows))
    ]
    hover = {"left": left, "wide": wide, "high": high, "sentence": shown.sentence}
    return Drawing(
        _svg(figure, f"{shown.title}. {shown.caption}", name="map"),
        hover | {"rows": shown.rows, "columns": shown.spoken, "fields": said},
    )


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    """Make the y axis logarithmic, with grid lines at 1, 2, 5, 10, ... or fewer."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    down = axes.get_window_extent().height
    steps, room = ((1.0, 2.0, 5.0), 1000) if 3 * decades <= down / 17 else ((1.0,), int(down / 20))
    axes.yaxis.set_major_locator(LogLocator(10.0, subs=steps, numticks=room))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", linewidth=1)


def panel(shown: Panel) -> str:
    """Draw the error of one kind of weight by block."""
    figure, axes = _blank(300, 156, Margins(46, 12, 0, 22))
    low, high = shown.axis
    _logarithmic(axes, low, high)
    count = len(shown.blocks)
    axes.set_xlim(-0.5, count - 0.5)

    def inside(value: float) -> float:
        return high if math.isnan(value) else min(max(value, low), high)  # values without a logarithm lie at an end

    for run in _runs(shown.spreads):
        x = [place for place, _ in run]
        if shown.several:
            around = [*(inside(s.high) for _, s in run), *(inside(s.low) for _, s in reversed(run))]
            axes.fill([*x, *reversed(x)], around, color=_colour("s3"), alpha=0.45, linewidth=0)
        line = list(zip(x, (inside(s.middle) for _, s in run), strict=True))
        _stroke(axes, [line * 2 if len(line) == 1 else line], 1.6, "s6", joinstyle="round", capstyle="round")
        if count <= 24:
            _stroke(axes, [[point, point] for point in line], 4.8, "s6", capstyle="round")
    titles = {}
    for place, spread in enumerate(shown.spreads):
        if spread is not None:
            mark = f"hit-{place}"
            titles[mark] = spread.text
            axes.axvspan(place - 0.5, place + 0.5, color=_colour("ink"), linewidth=0, gid=mark)
    places, names = _named_ticks(shown.blocks, 254 / count, 34)
    axes.set_xticks(places, names)
    _finish_axes(axes)
    return _svg(figure, f"Error of {shown.title} by block, {shown.subtitle}", titles)


def _runs(spreads: Sequence[Spread | None]) -> list[list[tuple[int, Spread]]]:
    """Runs of neighbouring blocks that have the kind, with their positions."""
    result: list[list[tuple[int, Spread]]] = [[]]
    for place, spread in enumerate(spreads):
        if spread is not None:
            result[-1].append((place, spread))
        elif result[-1]:
            result.append([])
    return [run for run in result if run]


def front(entries: Sequence[Entry], width: float = 960.0, height: float = 420.0) -> str:
    """Draw divergence against bytes, with a line through those that no other beats; "" where fewer than two were measured."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    measured = [(entry, entry.kl) for entry in entries if entry.kl is not None and entry.kl > 0]
    if len(measured) < 2:
        return ""
    figure, axes = _blank(width, height, Margins(56, 12, 12, 28))
    ends = [end for entry, kl in measured for end in (*(entry.kl_interval or ()), kl)]
    low, high = axis_over(ends)
    _logarithmic(axes, low, high)
    smallest, largest = min(e.bytes for e, _ in measured), max(e.bytes for e, _ in measured)
    room = (largest - smallest) * 0.08 or largest * 0.05
    axes.set_xlim(smallest - room, largest + room)
    axes.xaxis.set_major_locator(MaxNLocator(max(2, int(width / 130)), steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    _stroke(axes, [[(e.bytes, kl) for e, kl in measured if e.best]], 1.6, "best", joinstyle="round")
    titles = {}
    for number, (e, kl) in enumerate(measured):
        interval = [(float(e.bytes), max(end, low)) for end in e.kl_interval or ()]
        _stroke(axes, [interval] if interval else [], 1.2, "soft")
        _stroke(axes, [[(e.bytes, kl)] * 2], 10, "best" if e.best else "rest", capstyle="round")
        mark = f"point-{number}"
        titles[mark] = (
            f"{e.name}: {human_bytes(e.bytes)}, KL {kl:.5f}, {e.bits_per_compressed_weight:.3f} bits per compressed weight"
        )
        _stroke(axes, [[(e.bytes, kl)] * 2], 26, "ink", capstyle="round", gid=mark)
    _name_points(axes, [(_shown(e.name), float(e.bytes), kl) for e, kl in measured])
    _finish_axes(axes)
    return _svg(figure, "KL divergence from the original against bytes", titles)


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write names next to points, each in the first of four places that is within the axes and free."""
    inside = axes.get_window_extent()
    dots = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for (name, x, y), (across, up) in zip(points, dots, strict=True):
        wide = _width(name)
        places = [(10, 5, "left"), (10, -13, "left"), (-10, 9, "right"), (-10, -13, "right")]
        boxes = [(across + (dx if side == "left" else dx - wide), up + dy, side, dx, dy) for dx, dy, side in places]

        def crossed(box: tuple[float, float, str, int, int], wide: float = wide) -> int:
            left, low = box[:2]
            over: int = sum(left < r and l < left + wide and low < t and b < low + _TEXT for l, b, r, t in taken)
            return over + 10 * bool(left < inside.x0 or left + wide > inside.x1)

        left, low, side, dx, dy = min(boxes, key=crossed)
        taken.append((left, low, left + wide, low + _TEXT))
        style: dict[str, Any] = {"ha": side, "fontsize": _TEXT, "color": _colour("ink"), "parse_math": False}
        axes.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", **style)
