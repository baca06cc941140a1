"""Rounding to tables of values, slowly: in float64, one row and one group at a time, from the equations.

Nothing is shared with `compress.methods.solvers.table_grid` but the constants of its ladder of scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.methods.solvers import table_grid as _table

RANGE = {
    "fp3": [(0, 1, 2, 4)],
    "fp4": [(0, 0.5, 1, 1.5, 2, 3, 4, 6)],
    "bitmod-fp3": [(0, 1, 2, 4, x) for x in (3, -3, 6, -6)],
    "bitmod-fp4": [(0, 1, 2, 3, 4, 6, 8, 12, x) for x in (10, -10, 16, -16)],
}


def tables(datatype: str) -> list[dict[int, float]]:
    """Value by code of each table of a datatype, without the code of -0."""
    if datatype == "nf4":
        from compress.weights.table import DATATYPES

        return [dict(enumerate(DATATYPES["nf4"][0]))]
    result = []
    for values in RANGE[datatype]:
        count = 4 if "fp3" in datatype else 8
        magnitudes, special = values[:count], values[count:]
        table = {code: float(value) for code, value in enumerate(magnitudes)}
        table |= {count + code: -float(value) for code, value in enumerate(magnitudes) if code}
        if special:
            table[count] = float(special[0])
        result.append(table)
    return result


def nearest(scaled: float, table: dict[int, float]) -> int:
    """The code of the value nearest to w / scale: of two, the even code, or else the lower value."""
    return min(table, key=lambda code: (abs(table[code] - scaled), code % 2, table[code]))


E4M3 = [(1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6 for e in range(16) for m in range(8)][:127]


def bfloat16(value: float) -> float:
    """The nearest number of eight significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def storable(scale: float, kind: str, row: float) -> float:
    """The nearest scale that can be stored."""
    if kind == "bfloat16":
        return bfloat16(scale)
    if kind == "e8m0":
        choices = [2.0**e for e in range(-60, 128)]
    else:
        choices = [row * code for code in (range(1, 256) if kind == "uint8" else E4M3[1:])]
    return min(choices, key=lambda choice: (abs(choice - scale), -choice))


def row_scale(weight: Tensor, datatype: str, kind: str) -> float:
    """What the scales of a row (in,) are multiples of."""
    least = min(max(map(abs, table.values())) for table in tables(datatype))
    cover = float(weight.abs().max()) / least
    if kind == "uint8":
        mantissa, exponent = math.frexp(cover / 255)
        return math.ldexp(math.ceil(mantissa * 256), exponent - 8)
    return 2.0 ** math.ceil(math.log2(cover * 1.5 / 448)) if kind == "e4m3" else 1.0


@dataclass
class Group:
    """The grid of one group of one row."""

    scale: float
    table: int


def fit(weight: list[float], cost: list[float], datatype: str, kind: str, row: float, search: bool) -> Group:
    """The scale and table of least weighted squared error of one group."""
    books = tables(datatype)
    reach = [max(map(abs, book.values())) for book in books]
    peak = max(map(abs, weight))
    best, least = Group(1.0, 0), math.inf

    def attempt(scale: float, numbers: list[int]) -> None:
        nonlocal best, least
        for number in numbers:
            values = [books[number][nearest(w / scale, books[number])] for w in weight]
            error = sum(c * (w / scale - v) ** 2 for c, w, v in zip(cost, weight, values, strict=True)) * scale**2
            if error < least:
                best, least = Group(scale, number), error

    everything = list(range(len(books)))
    for largest in sorted(set(reach)):
        scale = peak / largest
        scale = 2.0 ** math.ceil(math.log2(scale)) if kind == "e8m0" else storable(scale, kind, row)
        attempt(scale, everything if search else [n for n in everything if reach[n] == largest])
    if not search:
        return best
    deviation = math.sqrt(sum(c * w * w for c, w in zip(cost, weight, strict=True)) / sum(cost))
    top, low = 1.5 * peak / min(reach), 1.5 * deviation / max(reach)
    ratio = min(max(low / top, 0.01), 1.0)
    for rung in range(_table._RUNGS):
        attempt(storable(top * ratio ** (rung / (_table._RUNGS - 1)), kind, row), everything)
    for _ in range(2):
        book = books[best.table]
        values = [book[nearest(w / best.scale, book)] for w in weight]
        curvature = sum(c * v * v for c, v in zip(cost, values, strict=True))
        slope = sum(c * v * w for c, v, w in zip(cost, values, weight, strict=True))
        attempt(storable(slope / curvature, kind, row), everything)
    return best


@dataclass
class Reference:
    """Codes (out, in), scales and tables (out, groups), scales of rows (out,)."""

    codes: Tensor
    scale: Tensor
    select: Tensor
    row: Tensor
    values: Tensor = field(default_factory=lambda: torch.empty(0))  # (out, in) what the codes stand for, without the scale


def quantize(
    weight: Tensor,
    hessian: Tensor | None,
    *,
    datatype: str,
    kind: str,
    group_size: int,
    search: bool = True,
    damp: float = 0.01,
    refinements: int = 0,
) -> Reference:
    """Round weight (out, in): to nearest, or column by column on the explicit inverse of the damped Hessian."""
    rows, columns = weight.shape
    groups = columns // group_size
    books = tables(datatype)
    order, importance = list(range(columns)), torch.ones(columns, dtype=torch.float64)
    full = torch.eye(columns, dtype=torch.float64)
    left: list[Tensor] = []
    if hessian is not None:
        full = hessian / hessian.diagonal().mean() + damp * full
        order = torch.sort(hessian.diagonal(), descending=True, stable=True).indices.tolist()
        left = [torch.linalg.inv(full[order[j:]][:, order[j:]]) for j in range(columns)]
        for inverse, column in zip(left, order, strict=True):
            importance[column] = 1 / inverse[0, 0]
    made = Reference(
        torch.empty(rows, columns, dtype=torch.int64),
        torch.empty(rows, groups, dtype=torch.float64),
        torch.empty(rows, groups, dtype=torch.int64),
        torch.tensor([row_scale(line, datatype, kind) for line in weight], dtype=torch.float64),
        torch.empty_like(weight),
    )
    for r in range(rows):
        for g in range(groups):
            span = slice(g * group_size, (g + 1) * group_size)
            found = fit(weight[r, span].tolist(), importance[span].tolist(), datatype, kind, float(made.row[r]), search)
            made.scale[r, g], made.select[r, g] = found.scale, found.table

        def book(column: int, r: int = r) -> dict[int, float]:
            return books[int(made.select[r, column // group_size])]

        def assign(column: int, wanted: float, r: int = r) -> float:
            scale = float(made.scale[r, column // group_size])
            code = nearest(wanted / scale, book(column, r))
            made.codes[r, column], made.values[r, column] = code, book(column, r)[code]
            return book(column, r)[code] * scale

        current = weight[r].clone()
        for j, column in enumerate(order):
            error = float(current[column]) - assign(column, float(current[column]))
            if left:
                current[order[j:]] -= error / left[j][0, 0] * left[j][0]

        for _ in range(refinements):
            for g in range(groups):
                span = slice(g * group_size, (g + 1) * group_size)
                step = torch.zeros(columns, dtype=torch.float64)
                step[span] = made.values[r, span]
                delta = weight[r] - made.values[r] * made.scale[r].repeat_interleave(group_size)
                curvature = float(step @ full @ step)
                change = float(step @ full @ delta) / curvature if curvature > 0 else 0.0
                made.scale[r, g] = storable(float(made.scale[r, g]) + change, kind, float(made.row[r]))
                for column in range(span.start, span.stop):
                    others = weight[r] - made.values[r] * made.scale[r].repeat_interleave(group_size)
                    others[column] = 0
                    assign(column, float(weight[r, column]) + float(others @ full[:, column]) / float(full[column, column]))
    return made
