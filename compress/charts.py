"""The report's charts as plain geometry: rows in, SVG paths and labels out. The template draws them, and escapes every text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from compress.report import SiteRow, bits_per_weight

LEVELS = 9  # shades of a colour scale, 0 the faintest
WIDTH = 960.0  # of a heat map, in SVG units
_CHARACTER = 6.6  # width of a character of a label
_LONGEST = 40  # characters of the name of a row; of longer ones the end is shown
_PANEL = (300.0, 156.0, 46.0, 12.0, 22.0)  # of an error chart: width, height, and the margins left, top and bottom


@dataclass(frozen=True)
class Label:
    """A text at a place."""

    x: float
    y: float
    text: str
    strong: bool = False  # on one of the upper shades


@dataclass(frozen=True)
class Cell:
    """One field of a heat map."""

    level: int
    hover: str
    number: str = ""  # written into the field where there is room
    outlined: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Fields of one shade are one path, so that thousands of fields stay a small file that browsers draw at once."""

    title: str
    caption: str
    width: float
    height: float
    shades: list[tuple[int, str]]
    outlines: str
    stroke: float  # width of the outlines
    rows: list[Label]
    columns: list[Label]
    numbers: list[Label]
    unit: str  # of the legend
    legend: list[tuple[int, str]]
    hover: dict[str, Any]  # where the fields are, and the text of each: what the script needs to say what is under the pointer


@dataclass(frozen=True)
class Panel:
    """The error of one kind of weight by block: a line, with a band from least to most where a block has several such weights."""

    title: str
    subtitle: str
    width: float
    height: float
    line: str
    band: str
    dots: list[tuple[float, float]]
    grid: list[Label]
    columns: list[Label]
    hits: list[tuple[float, float, str]]  # x, width, text


@dataclass(frozen=True)
class Bar:
    """One bar of bytes: compressed weights, then what was left as it was; `x` and widths in percent of the longest."""

    label: str
    compressed: int
    untouched: int
    share_compressed: float
    share_untouched: float


def compact(count: float) -> str:
    """Write a count in few characters: 61k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit * 0.9995:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"


def ordered(error: float) -> float:
    """An error that can be compared: what is not a number is worse than everything."""
    return math.inf if math.isnan(error) else error


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _every(count: int, size: float, room: float) -> Iterable[int]:
    """Choose which of `count` labels `size` apart to show, so that each has `room`."""
    step = next(s * 10**e for e in range(9) for s in (1, 2, 5) if s * 10**e * size >= room)
    return range(0, count, step)


def heat_map(
    title: str,
    caption: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], Cell],
    unit: str,
    legend: list[tuple[int, str]],
) -> HeatMap:
    """Lay out a heat map; `cells` by (row, column), and where there is none the field stays empty."""
    rows = [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in rows]
    left = 10 + _CHARACTER * max(map(len, rows))
    wide = min(46.0, (WIDTH - left) / len(columns))
    high = 24.0 if len(rows) <= 16 else 14.0 if len(rows) <= 40 else 9.0
    gap = 2.0 if min(wide, high) > 14 else 1.0 if wide > 6 else 0.5
    shades: dict[int, list[str]] = {}
    outlines, numbers = [], []
    for (row, column), cell in sorted(cells.items()):
        x, y = left + column * wide, row * high
        box = f"{_number(x)} {_number(y)}h{_number(wide - gap)}v{_number(high - gap)}h-{_number(wide - gap)}z"
        shades.setdefault(cell.level, []).append("M" + box)
        if cell.outlined:
            outlines.append("M" + box)
        if cell.number and wide >= 40:
            numbers.append(Label(x + (wide - gap) / 2, y + high / 2 + 3, cell.number, cell.level > LEVELS // 2))
    texts = [[cells[r, c].hover if (r, c) in cells else "" for c in range(len(columns))] for r in range(len(rows))]
    height = len(rows) * high
    return HeatMap(
        title,
        caption,
        max(left + len(columns) * wide, 320.0),
        height + 18,
        [(level, "".join(paths)) for level, paths in sorted(shades.items())],
        "".join(outlines),
        min(1.5, wide / 4),
        [Label(left - 8, r * high + high / 2 + 3, rows[r]) for r in _every(len(rows), high, 11)],
        [Label(left + (c + 0.5) * wide - gap / 2, height + 12, columns[c]) for c in _every(len(columns), wide, 26)],
        numbers,
        unit,
        legend,
        {"left": left, "wide": wide, "high": high, "texts": texts},
    )


def blocks_of(rows: Iterable[SiteRow]) -> list[int | None]:
    """The blocks of some rows in order; the head, which belongs to none, comes last."""
    found = {row.block for row in rows}
    numbered = sorted(block for block in found if block is not None)
    return [*numbered, None] if None in found else [*numbered]


def name_of(block: int | None) -> str:
    """What a block is called on an axis."""
    return "head" if block is None else str(block)


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers in order with runs folded: 0-2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _place(block: int | None) -> str:
    return "head" if block is None else f"block {block}"


def by_kind(rows: Iterable[SiteRow]) -> dict[str, dict[int | None, list[SiteRow]]]:
    """Group rows by kind, in the order of appearance, and by block."""
    result: dict[str, dict[int | None, list[SiteRow]]] = {}
    for row in rows:
        result.setdefault(row.kind, {}).setdefault(row.block, []).append(row)
    return result


def bits_map(rows: Sequence[SiteRow]) -> HeatMap | None:
    """Bits per weight by kind and block."""
    kinds, blocks = by_kind(rows), blocks_of(rows)
    if not kinds:
        return None
    values = {(k, b): bits_per_weight(kinds[k][b]) for k in kinds for b in kinds[k]}
    distinct = sorted({round(v, 3) for v in values.values()})
    low, high = distinct[0], distinct[-1]
    if len(distinct) <= 6:
        levels = {v: round((i + 1) * LEVELS / (len(distinct) + 1)) for i, v in enumerate(distinct)}
        legend = [(level, f"{v:.3f}") for v, level in levels.items()]
    else:
        levels = {v: min(1 + int((v - low) / (high - low) * (LEVELS - 1)), LEVELS - 1) for v in distinct}
        step = (high - low) / (LEVELS - 1)
        legend = [(i, f"{low + (i - 1) * step:.2f} to {low + i * step:.2f}") for i in range(1, LEVELS)]
    names, order = list(kinds), {block: i for i, block in enumerate(blocks)}
    cells = {
        (names.index(k), order[b]): Cell(
            levels[round(v, 3)], f"{k}, {_place(b)}: {v:.3f} bits per weight" + _many(kinds[k][b]), f"{v:.3f}"
        )
        for (k, b), v in values.items()
    }
    same = len(distinct) == 1
    caption = f"All compressed matrices take {low:.3f} bits per weight." if same else "Scales and zero points are counted."
    columns = [name_of(b) for b in blocks]
    return heat_map("Bits per weight by kind and block", caption, names, columns, cells, "bits per weight", legend)


def _many(members: Sequence[SiteRow]) -> str:
    return f" ({len(members)} matrices)" if len(members) > 1 else ""


_SHARES = tuple(
    zip(
        (0.125, 0.25, 0.5, 1, 2, 4, math.inf),
        ("under ⅛", "⅛ to ¼", "¼ to ½", "½ to 1", "1 to 2", "2 to 4", "over 4"),
        strict=True,
    )
)


def expert_map(rows: Sequence[SiteRow]) -> HeatMap | None:
    """Calibration tokens by block and expert, as a multiple of an even share; experts with a fallback are outlined."""
    tokens: dict[tuple[int | None, int], int] = {}
    fallback: dict[tuple[int | None, int], str] = {}
    for row in rows:
        if row.expert is None or row.tokens is None:
            continue
        key = row.block, row.expert
        tokens[key] = max(tokens.get(key, 0), row.tokens)
        if row.fallback is not None:
            fallback.setdefault(key, row.fallback)
    if not tokens:
        return None
    blocks = blocks_of(row for row in rows if row.expert is not None)
    experts = 1 + max(expert for _, expert in tokens)
    order = {block: i for i, block in enumerate(blocks)}
    even = {b: sum(n for (block, _), n in tokens.items() if block == b) / sum(block == b for block, _ in tokens) for b in blocks}
    cells = {}
    for (block, expert), count in tokens.items():
        share = count / even[block] if even[block] else 0.0
        level = 0 if not count else 1 + next(i for i, (limit, _) in enumerate(_SHARES) if share <= limit)
        text = f"{_place(block)}, expert {expert}: {count:,} tokens, {share:.2f} of an even share"
        if (block, expert) in fallback:
            text += f"; {fallback[block, expert]}"
        cells[order[block], expert] = Cell(level, text, compact(count), (block, expert) in fallback)
    legend = [(0, "none"), *((i + 1, text) for i, (_, text) in enumerate(_SHARES))]
    caption = (
        f"Tokens that reached an expert (a column), as a multiple of an even share of its block's (a row). "
        f"An expert saw {min(tokens.values()):,} to {max(tokens.values()):,}."
    )
    names, columns = [_place(b) for b in blocks], [str(e) for e in range(experts)]
    return heat_map("Calibration tokens by expert", caption, names, columns, cells, "of an even share", legend)


def outlier_map(rows: Sequence[SiteRow]) -> HeatMap | None:
    """The share of weights stored beside the grid, by kind and block; None where no method looks for such."""
    found: dict[tuple[str, int | None], list[float]] = {}
    for row in rows:
        if isinstance(share := row.notes.get("outliers"), int | float):
            found.setdefault((row.kind, row.block), []).append(float(share))
    if not found or not any(any(shares) for shares in found.values()):
        return None
    shares = {key: sum(values) / len(values) for key, values in found.items()}
    most = max(shares.values())
    names, blocks = list(dict.fromkeys(kind for kind, _ in shares)), blocks_of(row for row in rows if "outliers" in row.notes)
    order = {block: i for i, block in enumerate(blocks)}
    cells = {
        (names.index(kind), order[block]): Cell(
            0 if not share else 1 + min(int(share / most * (LEVELS - 1)), LEVELS - 2),
            f"{kind}, {_place(block)}: {share:.3%} of the weights",
            f"{share:.2%}",
        )
        for (kind, block), share in shares.items()
    }
    step = most / (LEVELS - 1)
    legend = [(0, "none"), *((i, f"{(i - 1) * step:.2%} to {i * step:.2%}") for i in range(1, LEVELS))]
    caption = "Weights that fit no grid and are stored one by one."
    return heat_map("Outliers by kind and block", caption, names, [name_of(b) for b in blocks], cells, "of the weights", legend)


@dataclass(frozen=True)
class _Scale:
    """A logarithmic axis from one of 1, 2, 5, 10, ... to another, shared by all panels."""

    low: float
    high: float
    ticks: list[float] = field(default_factory=list)

    @classmethod
    def over(cls, values: Iterable[float]) -> _Scale:
        """The smallest axis that holds all positive values."""
        positive = [v for v in values if 0 < v < math.inf] or [1.0]
        steps = [s * 10.0**e for e in range(-40, 40) for s in (1, 2, 5)]
        low = max(s for s in steps if s <= min(positive) * (1 + 1e-9) or s == steps[0])
        high = min(s for s in steps if (s >= max(positive) * (1 - 1e-9) and s > low) or s == steps[-1])
        within = [s for s in steps if low <= s <= high]
        if len(within) > 7:  # powers of ten alone, and of these at most about five
            tens = [s for s in within if round(math.log10(s), 6).is_integer()]
            within = tens[:: math.ceil(len(tens) / 5)]
        return cls(low, high, within)

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end; what has no logarithm lies at the end it is nearer to."""
        if math.isnan(value) or value >= self.high:
            return 1.0
        if value <= self.low:
            return 0.0
        return math.log(value / self.low) / math.log(self.high / self.low)


def error_panels(rows: Sequence[SiteRow]) -> list[Panel]:
    """The error by block, one panel for each kind, all on one logarithmic axis; the head is in no block and would stretch it."""
    rows = [row for row in rows if row.block is not None]
    blocks = blocks_of(rows)
    scale = _Scale.over(row.error for row in rows)
    return [_panel(kind, members, blocks, scale) for kind, members in by_kind(rows).items()]


def _panel(kind: str, members: Mapping[int | None, Sequence[SiteRow]], blocks: Sequence[int | None], scale: _Scale) -> Panel:
    width, height, left, top, bottom = _PANEL
    wide = (width - left - 4) / len(blocks)
    tall = height - top - bottom

    def y(value: float) -> float:
        return top + tall * (1 - scale.share(value))

    line, above, dots, hits = "", "", [], []
    bands, below = [], ""
    for column, block in enumerate(blocks):
        if block not in members:
            if above:
                bands.append(f"M{above}L{below}z")
            line, above, below = line + " ", "", ""
            continue
        errors = sorted(ordered(row.error) for row in members[block])
        x, middle = left + (column + 0.5) * wide, median(errors)
        joined = bool(line) and not line.endswith(" ")
        line += f"{'L' if joined else 'M'}{_number(x)} {_number(y(middle))}"
        above += f"{'L' if above else ''}{_number(x)} {_number(y(errors[-1]))}"
        below = f"{_number(x)} {_number(y(errors[0]))}" + (f"L{below}" if below else "")
        dots.append((x, y(middle)))
        many = f" (median of {len(errors)}; {errors[0]:.3g} to {errors[-1]:.3g})" if len(errors) > 1 else ""
        hits.append((left + column * wide, wide, f"{kind}, {_place(block)}: error {middle:.3g}{many}"))
    if above:
        bands.append(f"M{above}L{below}z")
    several = any(len(m) > 1 for m in members.values())
    worst = max(ordered(row.error) for m in members.values() for row in m)
    return Panel(
        kind,
        f"at most {worst:.2g}",
        width,
        height,
        line,
        "".join(bands) if several else "",
        dots,
        [Label(left - 6, y(tick), f"{tick:g}") for tick in scale.ticks],
        [Label(left + (c + 0.5) * wide, height - 7, name_of(blocks[c])) for c in _every(len(blocks), wide, 34)],
        hits,
    )


def bars(before: int, after: int, compressed_after: int) -> list[Bar]:
    """Bytes before and after, split into compressed weights and what was left as it was; the latter is the same in both."""
    untouched = max(after - compressed_after, 0)
    longest = max(before, after, 1)
    pairs = (("before", max(before - untouched, 0), untouched), ("after", compressed_after, untouched))
    return [Bar(label, a, b, 100 * a / longest, 100 * b / longest) for label, a, b in pairs]
