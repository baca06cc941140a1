"""Grids that are tables of values per group of columns: fitting scales and choices, rounding, and error compensation.

    value = table[code] * scale,    code = the entry of the table nearest to w / scale

Shapes: weight (out, in); scale and select (out, groups); row (out, 1); a group is `group_size` consecutive columns.

Scales are rounded to what their type holds before any weight is rounded against them:
    bfloat16  any sign
    uint8     1..255 times a bfloat16 per row, which is the largest covering scale of the row over 255, rounded up
    e8m0      a power of two
    e4m3      an E4M3 float times a float32 per row. That one is a power of two, so that rows can be brought to a common one
              exactly (by shifting exponents) where a format wants one for the whole tensor, and the rows stay independent
Fit     minmax  scale = max|w| / max|table|, an e8m0 scale rounded up; of several tables that of least error
        mse     least sum_j importance_j (w_j - q_j)^2 among the min-max scales, a ladder of scales around them, and the
                least-squares scale of the codes found; every scale is tried with every table
Ties    to the even code, as IEEE rounds; between two even or two odd ones to the lower value. The code of -0 is never made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.methods.method import Result
from compress.methods.solvers.error_feedback import Rounder, factorise, full_precision, importance, refine, swept
from compress.methods.solvers.uniform_grid import Range, stored
from compress.weights.table import DATATYPES, ScaleType, Table
from compress.weights.weight import CompressedWeight

_TINY = 2.0**-60  # as in `uniform_grid`: a smaller scale is that of an empty group
_LEAST_E4M3, _MOST_E4M3 = 2.0**-9, 448.0
# The ladder of `mse`, as what the largest value of the table stands for: from half as much again as the largest weight of the
# group (the second entry of a float table is then what covers it) down to 1.5 standard deviations.
_RUNGS = 14
_ABOVE, _DEVIATIONS = 1.5, 1.5
# Elements searched at a time: all candidates of a chunk are tried while it is in the cache.
_CHUNK = 1 << 16


class Codebook:
    """The tables of a datatype in order of their values, with what lies between them."""

    def __init__(self, datatype: str, like: Tensor) -> None:
        tables = torch.tensor(DATATYPES[datatype], dtype=like.dtype, device=like.device)
        self.tables = tables  # (tables, codes)
        ordered, codes = tables.sort(dim=1, stable=True)
        kept = [k for k in range(tables.shape[1]) if k == 0 or bool((ordered[:, k] > ordered[:, k - 1]).all())]
        self.values, self.codes = ordered[:, kept].contiguous(), codes[:, kept].to(torch.uint8).contiguous()
        middle = (self.values[:, 1:] + self.values[:, :-1]) / 2
        # A bound belongs to the value below it, so that a tie which goes up has its bound just below the middle.
        up = (self.codes[:, 1:] % 2 == 0) & (self.codes[:, :-1] % 2 == 1)
        self.bounds = torch.where(up, middle.nextafter(torch.full_like(middle, -torch.inf)), middle)
        # What all tables have, and the one value that is their own.
        alike = (tables == tables[0]).all(0)
        common = tables[0, alike].unique()  # sorted
        self.mirrored = torch.equal(common, -common.flip(0))
        self.common = common[common >= 0].tolist() if self.mirrored else common.tolist()
        self.special = tables[:, ~alike].flatten().tolist()  # one per table, or none
        self.largest = tables.abs().amax(1)  # (tables,)

    def place(self, scaled: Tensor, select: Tensor | None) -> Tensor:
        """Return where in the sorted tables w / scale (..., n) is nearest to; select (...,) int64."""
        if select is None:
            return torch.bucketize(scaled, self.bounds[0], out_int32=True)
        return torch.searchsorted(self.bounds[select], scaled, out_int32=True) + (select * self.values.shape[1]).unsqueeze(-1)

    def value(self, place: Tensor) -> Tensor:
        """Return the values at places."""
        return self.values.flatten().index_select(0, place.flatten()).view(place.shape)

    def code(self, place: Tensor) -> Tensor:
        """Return the codes at places, uint8."""
        return self.codes.flatten().index_select(0, place.flatten()).view(place.shape)

    def errors(self, scaled: Tensor) -> Iterator[Tensor]:
        """Yield for each table the squared distance of w / scale to it."""
        # The least of a few distances takes a third of the time of finding the nearest value.
        single = scaled.abs() if self.mirrored else scaled
        distance = (single - self.common[0]).abs_()
        other = torch.empty_like(scaled)
        for value in self.common[1:]:
            torch.minimum(distance, torch.sub(single, value, out=other).abs_(), out=distance)
        if not self.special:
            yield distance.square_()
        for value in self.special:
            yield torch.minimum(distance, torch.sub(scaled, value, out=other).abs_()).square_()


@dataclass(frozen=True, eq=False)
class Scales:
    """What a scale can be; `row` broadcasts over the scales that are asked about."""

    kind: ScaleType
    row: Tensor | None = None

    @classmethod
    def of(cls, kind: ScaleType, grouped: Tensor, least: float) -> Scales:
        """Choose the scales of rows, for weights (out, groups, group size) and tables that reach at least to `least`."""
        cover = grouped.abs().amax((1, 2)).unsqueeze(1) / least  # (out, 1)
        if kind == "uint8":
            row = stored(cover / 255)
            return cls(kind, torch.where(row * 255 < cover, stored(row * 1.004), row))  # half a step up, and a little: the next
        if kind == "e4m3":
            # The least power of two under which the top of the ladder can be held.
            mantissa, exponent = torch.frexp((cover * (_ABOVE / _MOST_E4M3)).clamp_min(_TINY))
            return cls(kind, torch.ldexp(torch.ones_like(cover), exponent - (mantissa == 0.5).int()))
        return cls(kind)

    def nearest(self, scale: Tensor) -> Tensor:
        """Round scales to the nearest that can be stored, in their own dtype; never 0."""
        if self.kind == "bfloat16":
            return stored(scale)
        if self.kind == "e8m0":
            mantissa, exponent = torch.frexp(scale.clamp_min(_TINY))  # mantissa in [1/2, 1); 3/4 lies between two powers
            return torch.ldexp(torch.ones_like(scale), exponent - (mantissa < 0.75).int())
        assert self.row is not None
        if self.kind == "uint8":
            return (scale / self.row).round_().clamp_(1, 255).mul_(self.row)
        # Above 448 a conversion saturates on some devices and versions of torch, and gives NaN on others.
        return (scale / self.row).clamp_(_LEAST_E4M3, _MOST_E4M3).to(torch.float8_e4m3fn).to(scale.dtype).mul_(self.row)

    def covering(self, scale: Tensor) -> Tensor:
        """Round the scales of min-max: powers of two upwards, so that nothing is cut off."""
        if self.kind != "e8m0":
            return self.nearest(scale)
        mantissa, exponent = torch.frexp(scale.clamp_min(_TINY))
        return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())

    def part(self, rows: slice) -> Scales:
        """Those of some rows."""
        return Scales(self.kind, None if self.row is None else self.row[rows])

    def pack(self, scale: Tensor) -> Tensor:
        """Return scales (out, groups), each of which can be stored, as they are stored."""
        if self.kind == "bfloat16":
            return scale.to(torch.bfloat16)
        if self.kind == "e8m0":
            return (torch.frexp(scale).exponent + 126).to(torch.uint8)
        assert self.row is not None
        scale = scale / self.row
        return scale.round().to(torch.uint8) if self.kind == "uint8" else scale.to(torch.float8_e4m3fn)

    def pack_row(self) -> Tensor | None:
        """Return the scales of rows (out,) as they are stored."""
        if self.row is None:
            return None
        return self.row.squeeze(1).to(torch.bfloat16 if self.kind == "uint8" else torch.float32)


@dataclass(frozen=True, eq=False)
class TableGrid:
    """Scale and table of every group."""

    scale: Tensor  # (out, groups), each of which can be stored
    select: Tensor | None  # (out, groups) int64
    scales: Scales

    def part(self, codes: Tensor, datatype: str, group_size: int) -> Table:
        """Return codes (out, in) on this grid as they are stored."""
        select = None if self.select is None else self.select.to(torch.uint8)
        return Table(codes, self.scales.pack(self.scale), datatype, group_size, self.scales.pack_row(), select)


def fit(weight: Tensor, book: Codebook, kind: ScaleType, group_size: int, search: bool, importance: Tensor | None) -> TableGrid:
    """Fit scales, and choices of tables, to weight (out, in); importance (in,) weighs squared errors, None: all alike."""
    grouped = weight.unflatten(1, (-1, group_size))
    cost = (torch.ones_like(weight[0]) if importance is None else importance).view(grouped.shape[1:])
    scales = Scales.of(kind, grouped, float(book.largest.min()))
    scale = torch.empty_like(grouped[:, :, 0])
    select = torch.zeros_like(scale, dtype=torch.int64)
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        found = _Fit(grouped[part], cost, book, scales.part(part))
        found.run(search)
        scale[part], select[part] = found.scale, found.select
    return TableGrid(scale, select if book.special else None, scales)


class _Fit:
    """Finds the scale and the table of least weighted squared error of each group."""

    def __init__(self, grouped: Tensor, cost: Tensor, book: Codebook, scales: Scales) -> None:
        self.grouped, self.cost, self.book, self.scales = grouped, cost, book, scales
        self.peak = grouped.abs().amax(2)
        self.error = torch.full_like(self.peak, torch.inf)  # all four (rows, groups)
        self.scale = scales.covering(self.peak / float(book.largest.min()))  # stays where squared errors overflow
        self.select = torch.zeros_like(self.peak, dtype=torch.int64)

    def run(self, search: bool) -> None:
        """Try everything; the best is in `scale` and `select`."""
        for largest in self.book.largest.unique().tolist():
            own = (self.book.largest == largest).tolist()
            self._attempt(self.scales.covering(self.peak / largest), [True] * len(own) if search else own)
        if search:
            for scale in self._ladder():
                self._attempt(self.scales.nearest(scale), [True] * len(self.book.largest))
            for _ in range(2):
                self._polish()

    def _ladder(self) -> Iterator[Tensor]:
        """Yield scales (rows, groups) from those that leave the largest values of a table empty down to those that cut off."""
        total = self.cost.sum(1).clamp_min(torch.finfo(self.cost.dtype).tiny)
        spread = (self.grouped.square().mul_(self.cost).sum(2) / total).sqrt_()
        top = self.peak * (_ABOVE / float(self.book.largest.min()))
        low = spread * (_DEVIATIONS / float(self.book.largest.max()))
        ratio = (low / top.clamp_min(torch.finfo(top.dtype).tiny)).clamp_(0.01, 1.0)
        for step in range(_RUNGS):
            yield top * ratio.pow(step / (_RUNGS - 1))

    def _attempt(self, scale: Tensor, tables: list[bool]) -> None:
        """Take over the groups where this scale (rows, groups) does better with one of these tables."""
        scaled = self.grouped * scale.reciprocal().unsqueeze(2)
        for index, error in enumerate(self.book.errors(scaled)):
            if tables[index]:
                total = error.mul_(self.cost).sum(2) * scale.square()
                better = total < self.error
                self.error, self.scale = torch.where(better, total, self.error), torch.where(better, scale, self.scale)
                self.select = torch.where(better, index, self.select)

    def _polish(self) -> None:
        """Try the least-squares scale of the codes that the best scale and table make."""
        scaled = self.grouped * self.scale.reciprocal().unsqueeze(2)
        value = self.book.value(self.book.place(scaled, self.select if self.book.special else None))
        weighted = value * self.cost
        curvature = (weighted * value).sum(2)
        slope = weighted.mul_(self.grouped).sum(2)
        best = torch.where(curvature > 0, slope / curvature, self.scale)
        self._attempt(self.scales.nearest(best), [True] * len(self.book.largest))


def encode(weight: Tensor, grid: TableGrid, book: Codebook, group_size: int) -> Tensor:
    """Round weight (out, in) to the nearest values and return codes (out, in) uint8."""
    scaled = weight.unflatten(1, (-1, group_size)) * grid.scale.reciprocal().unsqueeze(2)
    return book.code(book.place(scaled, grid.select)).flatten(1)


class TableLayout:
    """Tables in the working layout of `error_feedback`: one row of scales, and of choices of tables, per group."""

    def __init__(self, scale: Tensor, inverse: Tensor, select: Tensor | None, scales: Scales, book: Codebook) -> None:
        self.scale, self.inverse, self.select = scale, inverse, select  # (groups, out)
        self.scales, self.book = scales, book  # the rows of `scales` are (out,) here

    @classmethod
    def of(cls, grid: TableGrid, book: Codebook) -> TableLayout:
        """Lay out a grid for solving."""
        scale = grid.scale.T.contiguous()
        row = None if grid.scales.row is None else grid.scales.row.squeeze(1)
        select = None if grid.select is None else grid.select.T.contiguous()
        return cls(scale, scale.reciprocal(), select, Scales(grid.scales.kind, row), book)

    def rounder(self) -> Rounder:
        """Return what replaces a column w / scale (out,) in place by the nearest values of its group's tables."""
        book, select = self.book, self.select

        def nearest_value(scaled: Tensor, group: int) -> None:
            if select is None:
                scaled.copy_(book.value(book.place(scaled, None)))
            else:
                scaled.copy_(book.value(book.place(scaled.unsqueeze(1), select[group])).squeeze(1))

        return nearest_value

    def encode(self, steps: Tensor, groups: Tensor) -> Tensor:
        """Return the codes of values (n, out) that belong to groups (n,)."""
        if self.select is None:
            return self.book.code(self.book.place(steps, None))
        return self.book.code(self.book.place(steps.unsqueeze(2), self.select.index_select(0, groups))).squeeze(2)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of codes (n, out); only of a single group."""
        place = codes.long() if self.select is None else codes.long() + self.select * self.book.tables.shape[1]
        return self.book.tables.flatten().index_select(0, place.flatten()).view(codes.shape).to(dtype)

    def storable(self, scale: Tensor) -> Tensor:
        """Round a scale (out,) to the nearest that can be stored."""
        return self.scales.nearest(scale)

    def group(self, index: int) -> TableLayout:
        """One group, sharing memory."""
        one = slice(index, index + 1)
        select = None if self.select is None else self.select[one]
        return TableLayout(self.scale[one], self.inverse[one], select, self.scales, self.book)


def quantize(
    weight: Tensor,
    hessian: Tensor | None,
    *,
    datatype: str,
    scale_type: ScaleType,
    group_size: int,
    range: Range,
    damp: float,
    refinements: int,
    block: int,
) -> Result:
    """Round weight (out, in) to tables: to nearest without hessian (in, in), else with GPTQ's feedback of errors.

    With a Hessian, columns go in the order of descending diag H, scales and tables are fitted on the original weights with
    squared errors weighted by squared pivots, and `refinements` passes improve scales and codes (see `error_feedback`). `block`
    changes the speed and not the codes. The notes are those of GPTQ. Raises CalibrationError where the Hessian is not finite.
    """
    double = weight.dtype == torch.float64 or (hessian is not None and hessian.dtype == torch.float64)
    weight = weight.to(torch.float64 if double else torch.float32)
    book, search = Codebook(datatype, weight), range == "mse"
    if hessian is None:
        grid = fit(weight, book, scale_type, group_size, search, None)
        return Result(CompressedWeight(grid.part(encode(weight, grid, book, group_size), datatype, group_size)))
    with full_precision():
        factor = factorise(hessian.to(weight.dtype), damp, descending=True)
        grid = fit(weight, book, scale_type, group_size, search, importance(factor))
        layout = TableLayout.of(grid, book)
        delta, codes = swept(weight.T.contiguous(), factor, layout, group_size, block=block)
        if refinements and not factor.plain:
            refine(weight.T, factor.hessian, layout, delta, codes, refinements, block)
    refined = TableGrid(layout.scale.T.contiguous(), grid.select, grid.scales)
    return Result(CompressedWeight(refined.part(codes.T.contiguous(), datatype, group_size)), factor.notes)
