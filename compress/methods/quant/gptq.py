"""GPTQ: round column by column, letting the columns still to come make up for the errors (arXiv 2210.17323).

Problem     minimise E(Q) = tr((W - Q) H (W - Q)^T), the squared error of the layer's outputs: H is the mean of x x^T over
            calibration tokens, Q lies on a grid with one scale (and zero point) per group of columns, see `uniform_grid`.
Shapes      weight W (out, in), Hessian H (in, in), codes (out, in), scale and zero (out, groups).
Steps       1. H <- H / mean(diag H) + damp I; a column that no token touched (H_jj = 0) gets H_jj = 1, which couples it to
               nothing: it is rounded plainly and not zeroed, for a token to come may touch it.
            2. H = R R^T in processing order; pivots r_k and feedback a_ik, see `error_feedback`.
            3. Fit the grids. `range: mse` weights the squared error of column k by r_k^2, which is what that error costs
               after all later columns have made up for it.
            4. For each column k: c_k = W_k + sum_{i<k} (W_i - Q_i) a_ik, Q_k = the grid point nearest to c_k.
            5. `refinements` times, group by group: the scale that minimises E for the codes as they are (closed form), then
               every code given all others. Each lowers E.
Orders      static    columns by descending diag H, so that errors of important inputs are spread over many columns; groups are
                      contiguous and fitted on the original weight
            none      natural order; a group is fitted when it is reached, on weights that hold all errors made so far
            desc_act  as none, with groups cut in the order of descending diag H: the group of each column has to be stored,
                      and kernels have to gather scales
Defaults    measured on two small models (llama, mixture of experts), mean KL to the original on held-out text, group 128:
            `range: mse` with signs and pivots takes 20 % (4 bits) to 45 % (2 bits) off min-max, two refinements another 4 to
            15 %, four at most 3 % more and only at 2 bits; static is as good as desc_act or better; damp between 0.003 and
            0.1 makes no difference beyond noise.
Failures    H of fewer tokens than columns is singular: damping then decides. A factorisation that fails is tried with more
            damping, then the weight is rounded to nearest; the notes of the result say so.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.methods.method import Damp, Described, GroupedGrid, GroupSize, Refinements, Result, group_columns, uniform_described
from compress.methods.solvers.error_feedback import BLOCK, ColumnRounding, GridLayout, factorise, full_precision, refine, swept
from compress.methods.solvers.uniform_grid import Grid, Range, fit
from compress.weights.mixed import group_dtype
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

Order = Literal["static", "none", "desc_act"]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: GroupSize,
    symmetric: bool,
    range: Range,
    order: Order,
    damp: float,
    refinements: int,
    block: int = BLOCK,
) -> Result:
    """Round weight (out, in) under hessian (in, in), in float32, or in float64 where either is.

    `block` columns are solved one by one between matrix products; it changes the speed and not the codes. The notes have
    `damp`, `dead_columns` and, where the Hessian could not be used as it is, `fallback`. Raises CalibrationError where the
    Hessian is not finite.
    """
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    weight, columns = weight.to(dtype), weight.shape[1]
    size = group_columns(group_size, columns)
    natural = torch.arange(columns, device=weight.device)

    def fitted(part: Tensor, importance: Tensor) -> Grid:
        return fit(part, bits, size, symmetric=symmetric, search=range == "mse", importance=importance)

    with full_precision():
        factor = factorise(hessian.to(dtype), damp, descending=order != "none")
        inverse = torch.empty_like(natural).scatter_(0, factor.order, natural)
        importance = factor.pivots.square()
        if order == "static":
            layout = GridLayout.of(fitted(weight, importance[inverse]), dtype)
            delta, codes = swept(weight.T.contiguous(), factor, layout, size, block=block)
        else:
            target = weight.T.contiguous()[factor.order]  # a copy: the sweep works on it
            delta, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)
            layout, groups = GridLayout.empty(columns // size, target, bits, symmetric), natural // size

            def reached(steps: slice) -> None:
                grid = fitted(sweep.current(steps).T.contiguous(), importance[steps])
                layout.group(steps.start // size).assign(GridLayout.of(grid, dtype))

            sweep = ColumnRounding(target, delta, codes, factor.feedback, layout, groups, block, {size: reached})
            sweep.run(0, columns)

        # Refinement goes from group to group: in natural order, unless groups were cut in processing order.
        damped, place, index = factor.hessian, natural, None
        if order == "desc_act":
            damped, place = damped[factor.order][:, factor.order], factor.order
            index = groups[inverse].to(group_dtype(columns // size))
        if refinements and not factor.plain:
            refine(weight.T[place], damped, layout, delta, codes, refinements, block)
        if order == "desc_act":
            codes = codes[inverse]
    grid = layout.grid(bits)
    return Result(CompressedWeight(Uniform(codes.T.contiguous(), grid.scale, bits, size, grid.zero, index)), factor.notes)


class GPTQ(GroupedGrid):
    """Options of GPTQ."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)

    range: Annotated[Range, Field(description="minmax: cover every weight; mse: least error after compensation")] = "mse"
    order: Annotated[Order, Field(description="order of columns and of groups")] = "static"
    damp: Damp = 0.01
    refinements: Refinements = 2

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        index = group_dtype(shape[1] // self.size(shape[1])) if self.order == "desc_act" else None
        return uniform_described(shape, self.bits, self.size(shape[1]), zero=not self.symmetric, index=index)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in) under the Hessian of its inputs."""
        return gptq(weight, statistic(stats, Hessian).matrix(), **self.model_dump())


METHOD = GPTQ
