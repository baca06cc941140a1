"""BitMoD: 3- and 4-bit floats whose spare code means a value chosen per group (arXiv 2411.11745).

Problem     minimise E(Q) = tr((W - Q) H (W - Q)^T), H the mean of x x^T over calibration tokens, with Q = value * scale and
            values from small float tables. Sign-magnitude floats have two zeros: the code of -0 is given to one of four special
            values, chosen for each group of columns.
Values      fp3  0 1 2 4 and their negatives, and one of +3 -3 (extra resolution) +6 -6 (extra asymmetry)
            fp4  0 1 2 3 4 6 8 12 and their negatives (E2M1 times two), and one of +10 -10, +16 -16
Shapes      weight W (out, in), Hessian H (in, in), codes (out, in), scales and choices (out, groups).
Scales      8-bit codes times a bfloat16 per row: 1..255 times the row's largest covering scale over 255. Scales are rounded
            first, then codes are chosen against them. Stored bits per weight: b + (8 + 2) / group_size + 16 / in.
Steps       1. For each group every scale of a ladder is tried with each of the four values, see `table_grid`; the least squared
               error wins, in which column k counts by the square of its pivot, which is what an error there costs after all
               later columns have made up for it. `range: minmax` tries one scale per value, max|w| / max|value|, as the paper.
            2. With `compensate`, columns are rounded one by one with GPTQ's feedback, by descending diag H, and `refinements`
               passes improve scales and codes; the choices stay. Without, weights are rounded to nearest, and no calibration
               data is needed.
Defaults    group 128 as in the paper. Damping and refinements as in `quant/gptq`.
Differences from the reference implementation: a group is never left at zero because its error is large, and one whose weights
            are all zero gives zeros and not 0 / 0; the choice and the 8-bit scales are counted and stored, not simulated.
Failures    8-bit scales of a row are multiples of one number: a group whose weights are hundreds of times smaller than the
            largest of its row is rounded coarsely. Fallbacks of the Hessian are those of `quant/gptq`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.methods.method import (
    AUTO,
    Compensate,
    Damp,
    Described,
    GroupSize,
    Method,
    Refinements,
    Result,
    group_columns,
    indivisible,
    table_described,
)
from compress.methods.solvers.error_feedback import BLOCK
from compress.methods.solvers.table_grid import quantize
from compress.methods.solvers.uniform_grid import Range

Datatype = Literal["fp3", "fp4"]


def bitmod(
    weight: Tensor,
    hessian: Tensor | None = None,
    *,
    datatype: Datatype,
    group_size: GroupSize,
    range: Range,
    damp: float,
    refinements: int,
    block: int = BLOCK,
) -> Result:
    """Round weight (out, in) under hessian (in, in), or to nearest without one; in float64 where either is.

    The notes are those of GPTQ. Raises CalibrationError where the Hessian is not finite.
    """
    return quantize(
        weight,
        hessian,
        datatype=f"bitmod-{datatype}",
        scale_type="uint8",
        group_size=group_columns(group_size, weight.shape[1]),
        range=range,
        damp=damp,
        refinements=refinements,
        block=block,
    )


class BitMoD(Method):
    """Options of BitMoD."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)

    datatype: Annotated[Datatype, Field(description="bits of a code and its values")] = "fp4"
    group_size: GroupSize = AUTO
    range: Annotated[Range, Field(description="minmax: cover every weight; mse: least error")] = "mse"
    compensate: Compensate = True
    damp: Damp = 0.01
    refinements: Refinements = 2

    @property
    def needs(self) -> tuple[type[Statistics], ...]:
        """The Hessian where errors are fed back."""
        return self.may_need if self.compensate else ()

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether the group size does not divide the columns of a weight (out, in)."""
        return indivisible(shape[1], self.group_size)

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        return table_described(shape, f"bitmod-{self.datatype}", group_columns(self.group_size, shape[1]), "uint8")

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in), under the Hessian of its inputs where that is asked for."""
        hessian = statistic(stats, Hessian).matrix() if self.compensate else None
        return bitmod(weight, hessian, **self.model_dump(exclude={"compensate"}))


METHOD = BitMoD
