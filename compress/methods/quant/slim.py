"""SliM: more bits for groups of columns whose errors cost more, at a mean that is given (SliM-LLM, arXiv 2405.14917).

Problem     minimise E(Q) = tr((W - Q) H (W - Q)^T), H the mean of x x^T over calibration tokens, where group g of columns has b_g
            bits per code in all rows and the sum of b_g is floor(bits * groups): any mean from 1 to 8, also 2.5.
Shapes      weight W (out, in), Hessian H (in, in), codes (out, in), scale and zero (out, groups), widths b (groups,).
Salience    r_j^2 is what a unit error of column j costs after all later columns have made up for it (`error_feedback`; the
            paper's 1 / U_jj^2). Salience of an element: w_ij^2 r_j^2; of a column or a group: the sum over its elements.
Steps       1. H is damped and factored as in GPTQ.
            2. Columns are gathered into groups, `grouping`: salience  by descending salience, so that groups differ as much as
                                                                       they can; the group of each column is stored
                                                             neighbours  the paper's
            3. Widths, `allocation`:
               free      a grid of each admitted width is fitted to each group; c_gb = sum over its elements of r_j^2 (w - q)^2.
                         The widths of least sum of c_gb are found by dynamic programming, so they are the best of all that are
                         within `spread` of the mean and have the right sum.
               balanced  the paper's: with N bits on average, the i least salient groups get N - 1, the i most salient N + 1;
                         i = 0, 1, ..., groups / 2 - 1 is chosen by the error E of plain rounding. i = 0 changes nothing, and is
                         all there is below 4 groups, and at 1 and 8 bits.
            4. Columns are rounded and compensated as in GPTQ, each group on the grid of its width; `order`:
               groups  group after group, each fitted when it is reached, on weights that hold all errors made so far
               static  columns by descending diag H on grids fitted to the original weight
            5. `refinements` passes over scales and codes, `error_feedback.refine`.
Grids       those of `uniform_grid`; at one bit always -s/2, +s/2: a grid with zero points would hold 0 and one other value.
            `range`: minmax    covers every weight
            mse       of least sum of r_j^2 (w - q)^2
            salience  the paper's: the covering range stretched by 0.9 to 1.1 (at one bit the scale 2 mean|w|, so stretched), of
                      least sum of |w - q|^2.4, where elements whose salience is more than 2 standard deviations above the mean
                      of their group count `salience_weight` times. At 1, the default of the reference, that is no weighting.
Why not KL  The paper chooses i by the divergence of softmax(x Q^T) from softmax(x W^T). Outputs of a linear inside a block are no
            logits: a softmax over them looks at the few largest, and changes with a bias that the block does not feel. E is the
            squared error of all outputs over all tokens and needs no inputs but H. It costs one product with H in all, because
            from one i to the next only two groups change.
Defaults    measured on a small llama, mean of log E over its linears against GPTQ at the same mean bits (group 32 and 128):
            grouping  neighbours 0 to 3 % better than grouped alike with all widths equal, salience 12 to 23 %
            order     groups 2 to 7 % better than static, once groups are gathered by salience
            spread    1: 12 %; 2: 18 % from 3 bits on; 3: 23 % at 4 bits; more changes nothing
            balanced  half to two thirds of what free with spread 1 gains
            range     salience up to 20 % worse than mse at 2 bits, where a tenth of the range is not enough; at 4 bits as good.
                      Weights of 2 to 10 win at most 0.6 % (2 bits) and lose up to 9 % elsewhere.
Failures    In groups of neighbours all may be about equally salient: then nothing is won. Rows share widths, so that stacked
            sites cannot be compressed in one call.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.methods.method import (
    AUTO,
    Damp,
    Described,
    GroupSize,
    Method,
    Refinements,
    Result,
    Symmetric,
    group_columns,
    indivisible,
)
from compress.methods.solvers.error_feedback import BLOCK, ColumnRounding, GridLayout, factorise, full_precision, refine
from compress.methods.solvers.uniform_grid import Grid, encode, fit, stored
from compress.weights.bit_stream import stream_bits
from compress.weights.mixed import WIDTHS, Mixed, group_dtype, mixed_bits
from compress.weights.weight import CompressedWeight

Allocation = Literal["free", "balanced"]
SlimRange = Literal["minmax", "mse", "salience"]
Grouping = Literal["salience", "neighbours"]
Order = Literal["groups", "static"]

_SALIENT = 2.0  # standard deviations above the mean salience of a group
_POWER = 2.4  # of an error, in the search of the range
_STRETCH, _STEPS = 0.1, 50  # ranges tried on either side of the covering one: up to a tenth wider or narrower


def slim(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: float,
    group_size: GroupSize,
    symmetric: bool,
    allocation: Allocation,
    spread: int,
    grouping: Grouping,
    range: SlimRange,
    salience_weight: float,
    order: Order,
    damp: float,
    refinements: int,
    block: int = BLOCK,
) -> Result:
    """Round weight (out, in) under hessian (in, in), in float32, or in float64 where either is.

    `block` columns are solved one by one between matrix products; it changes the speed and not the codes. The notes have
    `damp`, `dead_columns`, `groups` (their number by bits) and, where the Hessian could not be used as it is, `fallback`. Raises
    CalibrationError where the Hessian is not finite.
    """
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    weight, columns = weight.to(dtype), weight.shape[1]
    size = group_columns(group_size, columns)
    groups = columns // size
    natural = torch.arange(columns, device=weight.device)

    def fitted(part: Tensor, width: int, importance: Tensor) -> Grid:
        even = symmetric or width == 1
        if range == "salience":
            return salient_range(part, width, size, even, importance, salience_weight)
        return fit(part, width, size, symmetric=even, search=range == "mse", importance=importance)

    with full_precision():
        hessian = hessian.to(dtype)
        factor = factorise(hessian, damp, descending=order == "static")
        importance = torch.empty_like(factor.pivots).scatter_(0, factor.order, factor.pivots.square())
        place = natural
        if grouping == "salience":  # from here on columns lie as their groups want them
            place = torch.argsort(salience(weight, importance, 1), descending=True, stable=True)
            weight, hessian = weight[:, place], hessian[place][:, place]
            factor = factorise(hessian, damp, descending=order == "static")
            importance = torch.empty_like(factor.pivots).scatter_(0, factor.order, factor.pivots.square())
        choice = admitted(bits, spread if allocation == "free" else 1)
        grids = {width: fitted(weight, width, importance) for width in choice}
        if allocation == "free":
            widths = cheapest(
                torch.stack([costs(weight, grids[w], importance, size) for w in choice]), choice, budget(bits, groups)
            )
        else:
            widths = balanced(weight, factor.hessian, salience(weight, importance, size), grids, int(bits), size)
        layout = _layout([grids[width] for width in widths], dtype)
        target = weight.T.contiguous()[factor.order]  # a copy: the sweep works on it
        delta, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)

        def reached(steps: slice) -> None:
            group = steps.start // size
            grid = fitted(sweep.current(steps).T.contiguous(), widths[group], importance[steps])
            layout.group(group).assign(GridLayout.of(grid, dtype))

        again = None if order == "static" else {size: reached}
        sweep = ColumnRounding(target, delta, codes, factor.feedback, layout, factor.order // size, block, again)
        sweep.run(0, columns)
        back = torch.empty_like(natural).scatter_(0, factor.order, natural)
        delta, codes = delta[back], codes[back]
        if refinements and not factor.plain:
            refine(weight.T, factor.hessian, layout, delta, codes, refinements, block)
    scale = layout.scale.T.to(torch.bfloat16).contiguous()
    used = torch.tensor(widths, dtype=torch.uint8, device=weight.device)
    zero = None
    if not symmetric:
        assert isinstance(layout.zero, Tensor)
        zero = torch.where(used > 1, layout.zero.T, 0.0).to(torch.uint8)
    stored_place = torch.empty_like(natural).scatter_(0, place, natural)
    index = None if grouping == "neighbours" or groups == 1 else (stored_place // size).to(group_dtype(groups))
    part = Mixed(codes[stored_place].T.contiguous(), scale, used, size, zero, index)
    counts = {str(width): count for width, count in zip(WIDTHS, part.counts, strict=True) if count}
    return Result(CompressedWeight(part), factor.notes | {"groups": counts})


def budget(bits: float, groups: int) -> int:
    """The sum of the widths of all groups: the average times their number, rounded down to a whole number."""
    return math.floor(bits * groups + 1e-9)


def admitted(bits: float, spread: int) -> list[int]:
    """The widths that groups may have."""
    return [w for w in WIDTHS if math.floor(bits) - spread <= w <= math.ceil(bits) + spread]


def decoded(weight: Tensor, grid: Grid, size: int) -> Tensor:
    """Round weight (out, in) to the nearest points of its grid."""
    zero: Any = grid.levels(weight.dtype)[2]
    code = encode(weight, grid, size).to(weight.dtype).unflatten(1, (-1, size))
    step = code - (zero.unsqueeze(2) if isinstance(zero, Tensor) else zero)
    values: Tensor = step * grid.scale.to(weight.dtype).unsqueeze(2)
    return values.flatten(1)


def costs(weight: Tensor, grid: Grid, importance: Tensor, size: int) -> Tensor:
    """Return (groups,), what rounding each group onto its grid costs after compensation: sum of r_j^2 (w - q)^2."""
    columns = (weight - decoded(weight, grid, size)).double().square().sum(0) * importance
    return columns.view(-1, size).sum(1)


def salience(weight: Tensor, importance: Tensor, size: int) -> Tensor:
    """Sum the salience of each group of neighbours of weight (out, in): (groups,)."""
    return (weight.double().square().sum(0) * importance).view(-1, size).sum(1)


def cheapest(cost: Tensor, choice: list[int], total: int) -> list[int]:
    """Widths of least summed cost (widths, groups) among all that add up to `total`, by dynamic programming."""
    cost = cost.cpu()
    count = cost.shape[1]
    spare = total - choice[0] * count  # bits beyond the least that every group takes
    best = torch.full((spare + 1,), math.inf, dtype=torch.float64)
    best[0] = 0
    taken = []
    for column in cost.unbind(1):
        options = torch.full((len(choice), spare + 1), math.inf, dtype=torch.float64)
        for more, value in enumerate(column[: spare + 1].tolist()):
            options[more, more:] = best[: spare + 1 - more] + value
        best, more_of = options.min(0)
        taken.append(more_of)
    widths = []
    for more_of in reversed(taken):
        more = int(more_of[spare])
        widths.append(choice[0] + more)
        spare -= more
    return widths[::-1]


def balanced(weight: Tensor, hessian: Tensor, salient: Tensor, grids: dict[int, Grid], bits: int, size: int) -> list[int]:
    """Return the widths of the balanced allocation with least E of rounding, given the salience of groups (groups,)."""
    count = len(salient)
    if bits - 1 not in grids or bits + 1 not in grids:
        return [bits] * count
    order = torch.argsort(salient, stable=True).tolist()
    down, up = ((weight - decoded(weight, grids[w], size)) for w in (bits - 1, bits + 1))
    delta = weight - decoded(weight, grids[bits], size)
    cost, least, chosen = 0.0, 0.0, 0
    for i in range(1, count // 2):
        for group, other in ((order[i - 1], down), (order[-i], up)):
            span = slice(group * size, (group + 1) * size)
            change = other[:, span] - delta[:, span]
            cost += float((change * (2 * (delta @ hessian[:, span]) + change @ hessian[span, span])).sum(dtype=torch.float64))
            delta[:, span] = other[:, span]
        if cost < least:
            least, chosen = cost, i
    widths = [bits] * count
    for i in range(chosen):
        widths[order[i]], widths[order[-1 - i]] = bits - 1, bits + 1
    return widths


def salient_range(weight: Tensor, bits: int, size: int, symmetric: bool, importance: Tensor, salience_weight: float) -> Grid:
    """Fit a grid to each group of weight (out, in) by `range: salience`; importance (in,) is r_j^2."""
    cover = fit(weight, bits, size, symmetric=symmetric, search=False)
    grouped = weight.unflatten(1, (-1, size))  # (out, groups, size)
    scale = cover.scale.to(weight.dtype)
    if bits == 1:
        scale = stored(2 * grouped.abs().mean(2))
    element = grouped.square() * importance.view(-1, size)
    mean, deviation = element.mean((0, 2), keepdim=True), element.std((0, 2), keepdim=True, correction=0)
    emphasis = torch.where(element > mean + _SALIENT * deviation, salience_weight, 1.0)
    least, best = torch.full_like(scale, math.inf), scale
    stretches = [0.0] + [sign * _STRETCH * step / _STEPS for sign in (1, -1) for step in range(1, _STEPS + 1)]
    for stretch in stretches:
        tried = stored(scale * (1 + stretch))
        grid = Grid(tried.to(torch.bfloat16), cover.zero, bits)
        error = ((weight - decoded(weight, grid, size)).abs().pow(_POWER).unflatten(1, (-1, size)) * emphasis).sum(2)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, tried, best)
    return Grid(best.to(torch.bfloat16), cover.zero, bits)


def _layout(grids: list[Grid], dtype: torch.dtype) -> GridLayout:
    """Lay out, for group g, the g-th group of the g-th of these grids."""
    scale = torch.stack([grid.scale[:, g] for g, grid in enumerate(grids)]).to(dtype)
    low: list[Tensor | float] = []
    high: list[Tensor | float] = []
    zero = []
    for g, grid in enumerate(grids):
        least, most, middle = (x[:, g] if isinstance(x, Tensor) else x for x in grid.levels(dtype))
        low.append(least)
        high.append(most)
        zero.append(middle if isinstance(middle, Tensor) else torch.full_like(scale[0], middle))
    return GridLayout(scale, scale.reciprocal(), low, high, torch.stack(zero))


class SliM(Method):
    """Options of SliM."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)
    rows_independent: ClassVar[bool] = False  # the width of a group is one for all rows

    bits: Annotated[float, Field(ge=1, le=8, description="mean bits per code: any number, also 2.5")] = 2.0
    group_size: GroupSize = AUTO
    symmetric: Symmetric = True
    allocation: Annotated[
        Allocation, Field(description="free: the widths of least error; balanced: as many groups a bit above the mean as below")
    ] = "free"
    spread: Annotated[int, Field(ge=0, le=7, description="bits that a free width may be away from the mean")] = 3
    grouping: Annotated[Grouping, Field(description="columns of a group: of similar salience, or neighbours")] = "salience"
    range: Annotated[
        SlimRange, Field(description="minmax: cover every weight; mse: least error after compensation; salience: the paper's")
    ] = "mse"
    salience_weight: Annotated[
        float, Field(gt=0, le=1e6, description="weight of salient elements in `range: salience`; at 1 they are like others")
    ] = 1.0
    order: Annotated[
        Order, Field(description="groups: each fitted when it is reached; static: by the Hessian, fitted beforehand")
    ] = "groups"
    damp: Damp = 0.01
    refinements: Refinements = 2

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.allocation == "balanced" and self.bits != int(self.bits):
            raise ValueError(f"bits={self.bits:g} with allocation=balanced; use a whole number, or allocation=free")
        if self.salience_weight != 1 and self.range != "salience":
            raise ValueError(
                f"salience_weight={self.salience_weight:g} has no effect with range={self.range}; use range=salience"
            )
        return self

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether the group size does not divide the columns of a weight (out, in)."""
        return indivisible(shape[1], self.group_size)

    @property
    def _admitted(self) -> list[int]:
        return admitted(self.bits, self.spread if self.allocation == "free" else 1)

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored.

        Likely are two neighbouring widths: others of the same sum differ in the padding to words alone, if there is any, and in
        groups of one bit, which have no zero codes. The least is without both, the most with as much of both as can be.
        """
        rows, columns = shape
        size = group_columns(self.group_size, columns)
        groups = columns // size
        scattered = self.grouping == "salience" and groups > 1
        total = budget(self.bits, groups)
        few, more = divmod(total, groups)
        counts = [groups - more if width == few else more if width == few + 1 else 0 for width in WIDTHS]
        likely = mixed_bits(shape, counts, size, not self.symmetric, scattered)
        # Which groups get which width follows from the weights; that there are several does not.
        spec = {"shape": list(shape), "base": {"format": "mixed", "group_size": size}}
        if rows * size % 32 == 0 and (self.symmetric or (rows % 32 == 0 and 1 not in self._admitted)):
            return Described(spec, likely, likely, likely, whole=False)
        beside = mixed_bits(shape, counts, size, False, scattered)
        beside -= sum(stream_bits(rows * size * count, width) for count, width in zip(counts, WIDTHS, strict=True))
        kinds = min(groups, len(self._admitted))
        least = most = rows * size * total
        most += kinds * 31
        if not self.symmetric:
            least += rows * max(0, total - groups) if 1 in self._admitted else rows * total
            most += rows * total + kinds * 31
        return Described(spec, least + beside, likely, most + beside, whole=False)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in) under the Hessian of its inputs."""
        return slim(weight, statistic(stats, Hessian).matrix(), **self.model_dump())


METHOD = SliM
