"""FineQuant: the group size of each matrix follows from how much smaller groups shrink the ranges; no calibration data.

Problem    a few weights far out stretch the range of their group and take the steps from all others in it. Small groups confine
           them, at 16 bits of scale for each group: so small groups for the matrices that need them, and large ones for the rest.
Steps      1. g = g_max. The range of a group is max |w|, which is what a symmetric grid has to cover.
           2. Halve every group. Each half has a ratio, the range of the whole over that of the half: one of two halves always has
              1, and a half of zeros has 1 too, for it gains nothing.
           3. Where the `percentile` of all ratios of the matrix is above alpha: g <- g / 2, and again from 2. Stop otherwise,
              where g is odd, or where g / 2 < g_min.
           4. Round to nearest on a symmetric grid, see `uniform_grid`, in groups of g columns.
Percentile the least ratio that at least `percentile` per cent of all ratios do not exceed; 100 is the largest. The largest of
           many thousand ratios is an accident, and grows with the size of the matrix.
Shapes     weight W (out, in), codes (out, in), scale (out, in / g) in bfloat16; g is one number per matrix.
Defaults   alpha and the percentile are ours, as the paper's are not known; 32 columns are what kernels want at least. The 99.9th
           percentile of a Gaussian matrix is 1.5 at 4096 columns, 2.0 at 128 and 2.3 at 64: with alpha 2 such a matrix keeps its
           rows whole, and what has weights far out does not. Measured on a small llama of no such weights, 4 bits, KL to the
           original: 4.083 bits per weight 0.0221, from 128 columns down 4.328 and 0.0152; with one size for all it is 4.052 and
           0.0228 (rows), 4.25 and 0.0157 (64), 4.5 and 0.0129 (32). So there the choice is worth nothing: use a fixed size.
Failures   the rule looks one halving ahead, and ratios grow as groups get smaller: a matrix that stops at a large g might have
           gained from a much smaller one. It does not see the inputs either.
Source     the heuristic of FineQuant (arXiv 2308.09723), on a percentile of the ratios instead of the largest.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import Stats
from compress.methods.method import Bits, Described, Method, Result, group_columns, indivisible
from compress.methods.solvers.uniform_grid import Range, encode, fit
from compress.weights.uniform import Uniform, uniform_bits
from compress.weights.weight import CompressedWeight


def finequant(
    weight: Tensor,
    *,
    bits: int,
    g_min: int,
    g_max: int,
    alpha: float,
    percentile: float,
    range: Range,
) -> Result:
    """Round weight (out, in) to nearest in groups of a size that is chosen; the notes have it as `group_size`."""
    if weight.dtype != torch.float64:
        weight = weight.float()
    size = granularity(weight, sizes(weight.shape[1], g_min, g_max), alpha, percentile)
    grid = fit(weight, bits, size, symmetric=True, search=range == "mse")
    part = Uniform(encode(weight, grid, size), grid.scale, bits, size)
    return Result(CompressedWeight(part), {"group_size": size})


def sizes(columns: int, g_min: int, g_max: int) -> list[int]:
    """Return the group sizes that come into question, from g_max down by halves."""
    found = [group_columns(g_max, columns)]
    while found[-1] % 2 == 0 and found[-1] // 2 >= g_min:
        found.append(found[-1] // 2)
    return found


def granularity(weight: Tensor, sizes: list[int], alpha: float, percentile: float) -> int:
    """Return the size, of those given, at which another halving does not shrink the ranges of weight (out, in) by alpha."""
    ranges = [weight.reshape(weight.shape[0], -1, sizes[-1]).abs().amax(2)]  # (out, groups) of the smallest groups
    for _ in sizes[1:]:
        ranges.append(ranges[-1].unflatten(1, (-1, 2)).amax(2))
    ranges.reverse()
    for size, whole, halves in zip(sizes, ranges, ranges[1:], strict=False):
        ratio = torch.where(halves > 0, whole.repeat_interleave(2, dim=1) / halves, 1.0).flatten()
        rank = max(1, math.ceil(round(ratio.numel() * percentile / 100, 6)))
        if float(ratio.kthvalue(rank).values) <= alpha:
            return size
    return sizes[-1]


class FineQuant(Method):
    """Options of FineQuant."""

    # The ratios of all rows decide together.
    rows_independent: ClassVar[bool] = False

    bits: Bits = 4
    g_min: Annotated[int, Field(ge=1, description="the least group size")] = 32
    g_max: Annotated[int, Field(ge=-1, description="the group size to begin with; -1: the whole row")] = -1
    alpha: Annotated[float, Field(ge=1, description="halve groups while that shrinks their ranges by more than this factor")] = (
        2.0
    )
    percentile: Annotated[float, Field(gt=0, le=100, description="of the factors of a matrix, the one that counts")] = 99.9
    range: Annotated[Range, Field(description="minmax: cover every weight; mse: the range of least squared error")] = "mse"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.g_max != -1 and self.g_max < self.g_min:
            raise ValueError(f"g_max={self.g_max} is below g_min={self.g_min}; expected g_max >= g_min, or -1 for the whole row")
        return self

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether the largest group size does not divide the columns of a weight (out, in)."""
        return indivisible(shape[1], self.g_max, "g_max")

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        # Where there is but one group size for it the bits are known; else only the weights tell which groups they get.
        found = [uniform_bits(shape, self.bits, size, zero=False) for size in sizes(shape[1], self.g_min, self.g_max)]
        return Described(None, min(found), (min(found) + max(found)) // 2, max(found))

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in); the statistics are not looked at."""
        return finequant(weight, **self.model_dump())


METHOD = FineQuant
