"""Four-bit floats and their kin: NF4, E2M1, MXFP4, NVFP4, FP3.

Problem     minimise E(Q) = tr((W - Q) H (W - Q)^T), H the mean of x x^T over calibration tokens, with Q = value * scale and
            values from one table; without calibration data |W - Q|^2.
Datatypes   name   values                                              group  scale
            fp4    E2M1: 0 1/2 1 3/2 2 3 4 6 and their negatives         128  bfloat16
            nf4    16 quantiles of a Gaussian in -1..1, 0 among them      64  bfloat16
            mxfp4  those of fp4                                           32  E8M0: a power of two
            nvfp4  those of fp4                                           16  E4M3 times a float32 of the row
            fp3    0 1 2 4 and their negatives                           128  bfloat16
            The groups of mxfp4 and nvfp4 belong to the datatype; another `group_size` is refused. NVFP4 as hardware knows it has
            one float32 for the whole tensor. Here each row has one, so that rows do not depend on each other (sites that share
            a tap are compressed in one call and cut apart again), and it is a power of two: rows come to a common one, exactly,
            by shifting the exponents of their E4M3 scales as long as these stay normal.
Shapes      weight W (out, in), Hessian H (in, in), codes (out, in), scales (out, groups).
Steps       1. A scale per group among those that its type can hold, see `table_grid`: the least squared error, in which column k
               counts by the square of its pivot if errors are fed back. `range: minmax` covers every weight instead (E8M0
               rounded up). For mxfp4 this takes the place of the usual rules for an exponent from the largest weight.
            2. With `compensate`, columns are rounded one by one with GPTQ's feedback, by descending diag H, and `refinements`
               passes improve scales and codes. Without, weights are rounded to nearest, and no calibration data is needed.
Defaults    groups as in the table; damping and refinements as in `quant/gptq`.
Source      E2M1, E8M0 and E4M3: OCP microscaling formats 1.0; NF4: QLoRA (arXiv 2305.14314).
Failures    NF4 and E2M1 hold no more than 16 values: heavy tails in large groups leave few of them to the rest. Fallbacks of
            the Hessian are those of `quant/gptq`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.methods.method import (
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
from compress.weights.table import ScaleType

Datatype = Literal["fp4", "nf4", "mxfp4", "nvfp4", "fp3"]


class _Kind(NamedTuple):
    """What a datatype's name stands for."""

    table: str
    group_size: int
    scale_type: ScaleType

    @property
    def fixed(self) -> bool:
        """Whether the group size belongs to the datatype."""
        return self.scale_type != "bfloat16"


_KINDS: dict[Datatype, _Kind] = {
    "fp4": _Kind("fp4", 128, "bfloat16"),
    "nf4": _Kind("nf4", 64, "bfloat16"),
    "mxfp4": _Kind("fp4", 32, "e8m0"),
    "nvfp4": _Kind("fp4", 16, "e4m3"),
    "fp3": _Kind("fp3", 128, "bfloat16"),
}


def floating(
    weight: Tensor,
    hessian: Tensor | None = None,
    *,
    datatype: Datatype,
    group_size: GroupSize | None,
    range: Range,
    damp: float,
    refinements: int,
    block: int = BLOCK,
) -> Result:
    """Round weight (out, in) under hessian (in, in), or to nearest without one; in float64 where either is.

    The notes are those of GPTQ. Raises CalibrationError where the Hessian is not finite.
    """
    kind = _KINDS[datatype]
    size = kind.group_size if group_size is None else group_size
    return quantize(
        weight,
        hessian,
        datatype=kind.table,
        scale_type=kind.scale_type,
        group_size=group_columns(size, weight.shape[1]),
        range=range,
        damp=damp,
        refinements=refinements,
        block=block,
    )


class Floating(Method):
    """Options of the floating-point datatypes."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)

    datatype: Annotated[Datatype, Field(description="values, and type of the scales")] = "fp4"
    group_size: Annotated[GroupSize | None, Field(description="columns that share a scale; null: as the datatype has it")] = None
    range: Annotated[Range, Field(description="minmax: cover every weight; mse: least error")] = "mse"
    compensate: Compensate = True
    damp: Damp = 0.01
    refinements: Refinements = 2

    @model_validator(mode="after")
    def _own_groups(self) -> Self:
        kind = _KINDS[self.datatype]
        if kind.fixed and self.group_size not in (None, kind.group_size):
            raise ValueError(f"{self.datatype} has groups of {kind.group_size}, got group_size={self.group_size}; leave it out")
        return self

    @property
    def _size(self) -> GroupSize:
        return _KINDS[self.datatype].group_size if self.group_size is None else self.group_size

    @property
    def needs(self) -> tuple[type[Statistics], ...]:
        """The Hessian where errors are fed back."""
        return self.may_need if self.compensate else ()

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether the group size does not divide the columns of a weight (out, in)."""
        complaint = indivisible(shape[1], self._size)
        if complaint is not None and _KINDS[self.datatype].fixed:
            size = _KINDS[self.datatype].group_size
            return f"in={shape[1]} is not a multiple of {size}, the group of {self.datatype}; use another datatype"
        return complaint

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        kind = _KINDS[self.datatype]
        return table_described(shape, kind.table, group_columns(self._size, shape[1]), kind.scale_type)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in), under the Hessian of its inputs where that is asked for."""
        hessian = statistic(stats, Hessian).matrix() if self.compensate else None
        return floating(weight, hessian, **self.model_dump(exclude={"compensate"}))


METHOD = Floating
