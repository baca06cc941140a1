"""SpQR: small groups on grids in two levels, and the few weights that fit no grid stored by themselves (arXiv 2306.03078).

Problem     minimise E(Q) = tr((W - Q) H (W - Q)^T), H the mean of x x^T over calibration tokens, where Q is a grid per row and
            group of `group_size` columns plus single weights (outliers), within a number of stored bits.
Storage     value = (code - zero) * scale; scale and zero are codes of `scale_bits` and `zero_bits`, on a grid that 16 rows share
            (`weights.two_level`): bits + (scale_bits + zero_bits) / group_size + 40 / (16 group_size) bits per weight. An outlier
            is stored as what the grid misses of it, a bfloat16, with its column in compressed sparse rows (`weights.sparse`):
            24, 32 or 48 bits each, and 32 bits per row as soon as there is one.
Shapes      weight W (out, in), Hessian H (in, in), codes (out, in), scale and zero codes (out, groups), second level
            (ceil(out / 16), groups).
Steps       1. Columns are put in processing order; H <- H / mean(diag H) + damp I, where a column that no token touched gets
               H_jj = 1 before the damping; H = R R^T with pivots r_k, see `error_feedback`. Such a column is rounded plainly, and
               never an outlier: nothing is known of what its errors cost.
            2. The limit is t = outlier_threshold * mean over columns of r_k^2 mean(W_k^2), over columns with tokens.
            3. Group by group, on weights c that hold all errors so far (`outliers.Solver` has the equations):
               a. a weight is a likely outlier where leaving it out of a min-max fit lowers sum_k r_k^2 (c_k - Q_k)^2 by more
                  than t, its own error included;
               b. the others are fitted: range of least error, placed on second levels, then both levels and codes in turn;
               c. column by column: round, and where r_k^2 (c_k - Q_k)^2 > t store the rest of the weight, which leaves no error
                  to compensate. This alone decides what is an outlier, not the guess of a;
               d. twice: the best grid for these codes, whatever columns of the group are correlated (`two_level_grid`), then c
                  again; 16 rows keep the result of least error, an outlier counted with t.
            4. `refinements` times, group by group: the best grid for its codes given all other columns, then its codes one
               by one, outliers staying where they are with the value that is best there. Each lowers E.
Orders      grouped   groups of neighbours by descending mean of diag H, columns by descending diag H within each
            none      natural order
            desc_act  groups cut in the order of descending diag H: the group of each column has to be stored
Defaults    measured on a small llama, 8 weights, mean of ln(E / tr(W H W^T)), 3 bits, group 16, no outliers, all at 3.53 bits:
            order none -5.435, grouped -5.462, desc_act -5.391; step 3d once, twice, four times: -5.474, -5.481, -5.483; scale
            and zero codes of 3 and 3 bits -5.481, of 4 and 2 -5.487; refinements 2, 4, 8: -5.487, -5.499, -5.506. Damping from
            0.001 to 0.03 makes no difference; the paper's 1.0 costs 0.2.
            That model has few outliers: 0.06 % of weights beyond the threshold 1.0, whose bits lower E as much as
            more bits elsewhere would. The paper's 0.2 finds 2 % there, at 0.6 bits per weight, which do not pay.
Differences from the reference implementation, each with a test: equal scales of 16 rows decode to themselves; ranges hold
            0, so that no far group spoils the zeros of its tile; outliers are residuals, so that what is evaluated is what is
            stored; damping does not hide columns without input; any number of rows.
Failures    row pointers cost 32 / in bits per weight: below 1024 columns outliers hardly pay. As for GPTQ, a Hessian that cannot
            be factored gets more damping, then every weight counts alike; the notes say so.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.methods.method import INDEX_NAMES, Bits, Damp, Described, Grouped, GroupSize, Result, group_columns
from compress.methods.solvers.error_feedback import full_precision
from compress.methods.solvers.outliers import Order, Solver
from compress.weights.sparse import Sparse, column_dtype, sparse_bits
from compress.weights.two_level import two_level_bits


def spqr(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: GroupSize,
    scale_bits: int,
    zero_bits: int,
    outlier_threshold: float | None,
    target_bits: float | None,
    order: Order,
    damp: float,
    refinements: int,
) -> Result:
    """Compress weight (out, in) under hessian (in, in), in float32, or in float64 where either is.

    The notes have `damp`, `dead_columns`, `outliers` (their share of the weights), with `target_bits` the `threshold` that was
    found, and, where the Hessian could not be used as it is, `fallback`. Raises CalibrationError where the Hessian is not finite.
    """
    options = SpQR(
        bits=bits, group_size=group_size, scale_bits=scale_bits, zero_bits=zero_bits, target_bits=target_bits, order=order
    )
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    with full_precision():
        size = group_columns(group_size, weight.shape[1])
        solver = Solver(weight.to(dtype), hessian.to(dtype), bits, size, scale_bits, zero_bits, order, damp)
        notes = solver.factor.notes
        if target_bits is None:
            solver.sweep(math.inf if outlier_threshold is None else outlier_threshold)
        else:
            threshold = solver.search(options.room((weight.shape[0], weight.shape[1])))
            notes["threshold"] = threshold if math.isfinite(threshold) else None
        for _ in range(0 if solver.factor.plain else refinements):
            solver.refine()
        result = solver.result()
    outliers = result.outliers
    notes["outliers"] = outliers.columns.shape[0] / weight.numel() if isinstance(outliers, Sparse) else 0.0
    return Result(result, notes)


class SpQR(Grouped):
    """Options of SpQR."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)
    rows_independent: ClassVar[bool] = False  # 16 rows share a second level, and all rows the threshold

    bits: Bits = 3
    group_size: GroupSize = 16
    scale_bits: Annotated[int, Field(ge=2, le=8, description="bits per scale code")] = 4
    zero_bits: Annotated[int, Field(ge=2, le=8, description="bits per zero code")] = 2
    outlier_threshold: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="error that makes an outlier, over the mean power of a weight; null: none"),
    ] = 1.0
    target_bits: Annotated[
        float | None,
        Field(
            gt=0,
            le=32,
            description="stored bits per weight, never exceeded; the threshold is then searched; null: as it is given",
        ),
    ] = None
    order: Annotated[Order, Field(description="order of columns and of groups")] = "grouped"
    damp: Damp = 0.01
    refinements: Annotated[int, Field(ge=0, le=100, description="passes over grids and codes after the first")] = 4

    def base_bits(self, shape: tuple[int, int]) -> int:
        """Stored bits of a weight of this shape (out, in) without outliers."""
        size = self.size(shape[1])
        index = column_dtype(shape[1] // size).itemsize * 8 if self.order == "desc_act" else 0
        return two_level_bits(shape, self.bits, size, self.scale_bits, self.zero_bits, index)

    def bits_with(self, shape: tuple[int, int], outliers: int) -> int:
        """Stored bits of a weight of this shape (out, in) with so many outliers."""
        return self.base_bits(shape) + (sparse_bits(shape, outliers) if outliers else 0)

    def room(self, shape: tuple[int, int]) -> int:
        """Number of outliers that fit into `target_bits`."""
        assert self.target_bits is not None
        empty = sparse_bits(shape, 0)
        left = math.floor(self.target_bits * shape[0] * shape[1]) - self.base_bits(shape) - empty
        return min(max(0, left // (sparse_bits(shape, 1) - empty)), shape[0] * shape[1])

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether the group size does not divide the columns of a weight (out, in), or the target is below its grid."""
        if complaint := super().check(shape):
            return complaint
        least = self.base_bits(shape) / (shape[0] * shape[1])
        if self.target_bits is not None and self.target_bits < least:
            return (
                f"target_bits={self.target_bits:g} is less than the {least:.4f} of the grid alone; lower bits or raise group_size"
            )
        return None

    def outliers(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many outliers a weight of this shape (out, in) is likely to have, and at most.

        All that there is room for; or what a threshold leaves in the mean over a model, and four times as many, or 1 % of the
        weights where that is more. Weights with heavier tails than those seen may have more still.
        """
        if self.target_bits is not None:
            return self.room(shape), self.room(shape)
        if self.outlier_threshold is None:
            return 0, 0
        # Errors grow with the square of the step: 1.55 % at 2 bits and threshold 1, 0.93 % at 3 bits and 0.3, 0.04 % at 3 bits
        # and 1 were measured on a dense Llama of 5.8 M parameters, 2026-11-21, and lie on a power of threshold * 4^bits.
        share = min(0.1, 0.0155 * math.pow(self.outlier_threshold * 4.0**self.bits / 16, -2.65))
        count = shape[0] * shape[1]
        return round(share * count), max(1, round(max(0.01, 4 * share) * count))

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored: with a number of outliers that follows from its values."""
        size = self.size(shape[1])
        widths = {"bits": self.bits, "scale_bits": self.scale_bits, "zero_bits": self.zero_bits}
        base: dict[str, Any] = {"format": "two_level", **widths, "group_size": size}
        if self.order == "desc_act":
            base["group"] = INDEX_NAMES[column_dtype(shape[1] // size)]
        likely, most = self.outliers(shape)
        bits = self.base_bits(shape), self.bits_with(shape, likely), self.bits_with(shape, most)
        return Described({"shape": list(shape), "base": base}, *bits, whole=likely == 0)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Compress weight (out, in) under the Hessian of its inputs."""
        return spqr(weight, statistic(stats, Hessian).matrix(), **self.model_dump())


METHOD = SpQR
