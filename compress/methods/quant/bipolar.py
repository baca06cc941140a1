"""Bipolar integers: weights that are odd multiples of half a step, for products from bit planes, with errors compensated.

Values      code c in 0 .. 2^b - 1 stands for (2c - (2^b - 1)) scale / 2, which is scale / 2 times sum_i (2 c_i - 1) 2^i over the
            bits c_i: every bit is a sign, and every bit plane has a positive weight. The values are symmetric around 0, which is
            not one of them: -scale / 2 and +scale / 2 at one bit.
Why         a product of two bipolar integers takes xor, popcount and the number of columns, but no sum over activations or
            weights. `kernels/_bit_serial` has the products of bit planes, and what other kinds of activations need in addition.
Problem     minimise tr((W - Q) H (W - Q)^T) over codes and scales; H is the mean of x x^T over calibration tokens.
Shapes      weight W (out, in), Hessian H (in, in), codes (out, in), scale (out, groups) in bfloat16; a group is `group_size`
            neighbouring columns.
Steps       1. H <- H / mean(diag H) + damp I, factored with columns by descending diag H, see `error_feedback`.
            2. Fit the scales. minmax: 2 max|w| / (2^b - 1), which reaches both ends. mse: of shrunk ranges, the one of least
               squared error, column k weighted by r_k^2: what an error there costs after later columns have compensated for it.
            3. Column by column, round to the nearest value, c = floor(w / scale) + 2^(b-1) clamped, and feed the error forward.
            4. `refinements` times, group by group: the best scale for the codes, then every code given all others.
Defaults    those of GPTQ. Measured on a small llama, group 128, mean KL to the original on held-out text, here and for GPTQ on
            its symmetric grid at the same size: 0.149 and 0.181 (2 bits), 0.0298 and 0.0287 (3), 0.0074 and 0.0069 (4). With few
            values, symmetry is worth more than a 0; with more, it is worth less than a choice of the longer end.
Failures    0 is not a value: pruned weights come back as half a step. Without tokens the weight is rounded to nearest.
Source      the integers are those of arXiv 2409.17870; the compensation is that of GPTQ (arXiv 2210.17323), as in `gptq`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.methods.method import Damp, Described, Grouped, GroupSize, Refinements, Result, group_columns, uniform_described
from compress.methods.solvers.error_feedback import BLOCK, GridLayout, factorise, full_precision, importance, refine, swept
from compress.methods.solvers.uniform_grid import Range, fit
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight


def bipolar(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: GroupSize,
    range: Range,
    damp: float,
    refinements: int,
    block: int = BLOCK,
) -> Result:
    """Round weight (out, in) under hessian (in, in), in float32, or in float64 if either is float64.

    `block` changes the speed, not the codes. The notes are those of GPTQ. Raises CalibrationError if the Hessian is not finite.
    """
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    weight, columns = weight.to(dtype), weight.shape[1]
    size = group_columns(group_size, columns)
    with full_precision():
        factor = factorise(hessian.to(dtype), damp, descending=True)
        cost = importance(factor)
        layout = GridLayout.of(
            fit(weight, bits, size, symmetric=True, search=range == "mse", importance=cost, bipolar=True), dtype
        )
        delta, codes = swept(weight.T.contiguous(), factor, layout, size, block=block)
        if refinements and not factor.plain:
            refine(weight.T, factor.hessian, layout, delta, codes, refinements, block)
    part = Uniform(codes.T.contiguous(), layout.grid(bits).scale, bits, size, bipolar=True)
    return Result(CompressedWeight(part), factor.notes)


class Bipolar(Grouped):
    """Options of rounding to bipolar integers."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)

    range: Annotated[Range, Field(description="minmax: cover every weight; mse: least error after compensation")] = "mse"
    damp: Damp = 0.01
    refinements: Refinements = 2

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        return uniform_described(shape, self.bits, self.size(shape[1]), words=("bipolar",))

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in) under the Hessian of its inputs."""
        return bipolar(weight, statistic(stats, Hessian).matrix(), **self.model_dump())


METHOD = Bipolar
