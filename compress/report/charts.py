"""Contents of a report's charts, taken from its rows; `svg` draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from compress.report.rows import SiteRow, bits_per_weight

LEVELS = 9  # shades of a colour scale, 0 the faintest


@dataclass(frozen=True)
class Cell:
    """One field of a heat map."""

    level: int
    values: tuple[str, ...]  # values for the map's sentence
    number: str = ""  # written into the field where there is room
    outlined: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Shades by row and column; a field without a cell stays empty."""

    title: str
    caption: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], Cell]
    sentence: str  # describes a field: {row} and {column} are its place, {0}, {1} its values
    spoken: list[str]  # the columns as the sentence calls them
    unit: str  # unit of the legend
    legend: list[tuple[int, str]]

    @property
    def outlined(self) -> bool:
        """Whether some field is outlined."""
        return any(cell.outlined for cell in self.cells.values())


@dataclass(frozen=True)
class Spread:
    """The errors of one kind of weight in one block."""

    middle: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Panel:
    """The error of one kind of weight by block: a line, with a band from least to greatest where a block has several."""

    title: str
    subtitle: str
    blocks: list[str]
    spreads: list[Spread | None]  # by block
    several: bool
    axis: tuple[float, float]  # logarithmic, the same for all panels


@dataclass(frozen=True)
class Bar:
    """One bar of bytes: compressed weights, then untouched tensors; shares in percent of the longest bar."""

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
    """An error that can be compared: NaN is worse than everything."""
    return math.inf if math.isnan(error) else error


def blocks_of(rows: Iterable[SiteRow]) -> list[int | None]:
    """The blocks of some rows in order; the head, which belongs to no block, comes last."""
    found = {row.block for row in rows}
    numbered = sorted(block for block in found if block is not None)
    return [*numbered, None] if None in found else [*numbered]


def name_of(block: int | None) -> str:
    """The label of a block on an axis."""
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
        (names.index(k), order[b]): Cell(levels[round(v, 3)], (f"{v:.3f}", _many(kinds[k][b])), f"{v:.3f}")
        for (k, b), v in values.items()
    }
    same = len(distinct) == 1
    caption = f"All compressed matrices take {low:.3f} bits per weight." if same else "Scales and zero points are counted."
    return HeatMap(
        "Bits per weight by kind and block",
        caption,
        names,
        [name_of(b) for b in blocks],
        cells,
        "{row}, {column}: {0} bits per weight{1}",
        [_place(b) for b in blocks],
        "bits per weight",
        legend,
    )


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
        taken = (block, expert) in fallback
        said = (f"{count:,}", f"{share:.2f}", *([f"; {fallback[block, expert]}"] if taken else []))
        cells[order[block], expert] = Cell(level, said, compact(count), taken)
    legend = [(0, "none"), *((i + 1, text) for i, (_, text) in enumerate(_SHARES))]
    caption = (
        f"Tokens that reached an expert (a column), as a multiple of an even share of its block's (a row). "
        f"An expert saw {min(tokens.values()):,} to {max(tokens.values()):,}."
    )
    columns = [str(e) for e in range(experts)]
    return HeatMap(
        "Calibration tokens by expert",
        caption,
        [_place(b) for b in blocks],
        columns,
        cells,
        "{row}, expert {column}: {0} tokens, {1} of an even share{2}",
        columns,
        "of an even share",
        legend,
    )


def outlier_map(rows: Sequence[SiteRow]) -> HeatMap | None:
    """The share of weights stored as outliers, by kind and block; None where there are no outliers."""
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
            (f"{share:.3%}",),
            f"{share:.2%}",
        )
        for (kind, block), share in shares.items()
    }
    step = most / (LEVELS - 1)
    legend = [(0, "none"), *((i, f"{(i - 1) * step:.2%} to {i * step:.2%}") for i in range(1, LEVELS))]
    caption = "Weights that fit no grid and are stored one by one."
    return HeatMap(
        "Outliers by kind and block",
        caption,
        names,
        [name_of(b) for b in blocks],
        cells,
        "{row}, {column}: {0} of the weights",
        [_place(b) for b in blocks],
        "of the weights",
        legend,
    )


def axis_over(values: Iterable[float]) -> tuple[float, float]:
    """The smallest logarithmic axis that holds all positive values, with ends from 1, 2, 5, 10, ..."""
    positive = [v for v in values if 0 < v < math.inf] or [1.0]
    steps = [s * 10.0**e for e in range(-40, 40) for s in (1, 2, 5)]
    low = max(s for s in steps if s <= min(positive) * (1 + 1e-9) or s == steps[0])
    high = min(s for s in steps if (s >= max(positive) * (1 - 1e-9) and s > low) or s == steps[-1])
    return low, high


def error_panels(rows: Sequence[SiteRow]) -> list[Panel]:
    """The error by block, one panel for each kind, all on one logarithmic axis; the head, which would stretch it, is left out."""
    rows = [row for row in rows if row.block is not None]
    blocks, axis = blocks_of(rows), axis_over(row.error for row in rows)
    return [_panel(kind, members, blocks, axis) for kind, members in by_kind(rows).items()]


def _panel(
    kind: str, members: Mapping[int | None, Sequence[SiteRow]], blocks: Sequence[int | None], axis: tuple[float, float]
) -> Panel:
    spreads: list[Spread | None] = []
    for block in blocks:
        errors = sorted(ordered(row.error) for row in members.get(block, []))
        if not errors:
            spreads.append(None)
            continue
        many = f" (median of {len(errors)}; {errors[0]:.3g} to {errors[-1]:.3g})" if len(errors) > 1 else ""
        text = f"{kind}, {_place(block)}: error {median(errors):.3g}{many}"
        spreads.append(Spread(median(errors), errors[0], errors[-1], text))
    worst = max(spread.high for spread in spreads if spread is not None)
    several = any(len(m) > 1 for m in members.values())
    return Panel(kind, f"at most {worst:.2g}", [name_of(b) for b in blocks], spreads, several, axis)


def bars(before: int, after: int, compressed_after: int) -> list[Bar]:
    """Bytes before and after, split into compressed weights and untouched tensors, which are the same in both."""
    untouched = max(after - compressed_after, 0)
    longest = max(before, after, 1)
    pairs = (("before", max(before - untouched, 0), untouched), ("after", compressed_after, untouched))
    return [Bar(label, a, b, 100 * a / longest, 100 * b / longest) for label, a, b in pairs]
