"""HQQ: half-quadratic quantization, a zero point that leaves the large errors to a few weights; no calibration data.

Problem    minimise, for every group of columns, sum_j |w_j - q_j|^p with p < 1, which wants most errors small and lets a few be
           large, as those of weights far out are. q_j = (code_j - middle) scale + offset, codes 0 .. 2^b - 1. The scale stays
           that of the range, the offset is sought: with middle = 2^(b-1) (1/2 at one bit) the zero point is the real number
           middle - offset / scale, and 0 need not be on the grid.
Splitting  d = (w - q) / scale, and errors e of their own that are penalised for not being d:
               min over e, offset of   sum_j |e_j|^p / p + (beta / 2) (e_j - d_j)^2
Steps      1. offset = lo + middle (hi - lo) / (2^b - 1), lo and hi the ends of the group, in bfloat16; the scale is the
              least that reaches both ends from where the offset came to lie. So a narrow group far from 0 stays covered.
           2. code = the nearest on the grid as it is stored; d.
           3. e = sign(d) relu(|d| - |d|^(p-1) / beta): generalised shrinkage, in place of the minimum over e.
           4. offset <- mean over the group of w - (code - middle) scale - e scale = offset + scale mean(d - e), in bfloat16;
              beta <- kappa beta.
           Steps 2 to 4 `iterations` times. Of all its offsets each group keeps the one of least sum |d|^p, the first included.
Shapes     weight W (out, in), codes (out, in), scale and offset (out, groups) in bfloat16.
Units      d, e and beta are in steps of the grid, so that codes do not depend on the unit of the weights. The public
           implementation takes the unit of the weights: there, shrinkage leaves nothing of any error below beta^(-1/(2-p)), 0.17
           at its defaults, which is every error of a usual weight, and the loop is one of least squares. It also calls a range
           below 1e-4 none, never lets beta grow, stops for all groups at once and returns a zero point two updates past the best.
Defaults   p, kappa and 20 iterations are those of the public implementation; beta is 10 too, but in steps. Measured on a small
           llama, mean KL to the original on held-out text, group 64: the search takes 13 % (2 bits) or 10 % (3 and 4 bits) off
           the first grid. beta of 1 instead of 10, and p of 1 instead of 0.7, change little (2 and 3 bits); with beta at 100,
           e follows d so closely that little moves. 50 iterations take less than another 1 % off the squared error.
Failures   no better scale is sought: at 2 bits the range of least squared error, as RTN and GPTQ have it, is worth more than the
           offset. From 6 bits on a bfloat16 offset is about as coarse as a step: the search gains little or nothing.
Source     half-quadratic quantization (Badri and Shaji, 2023); the shrinkage is that of Chartrand (2012).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Stats
from compress.methods.method import Described, Grouped, GroupSize, Result, group_columns, uniform_described
from compress.methods.solvers.uniform_grid import nearest, stored
from compress.weights.uniform import Uniform, middle
from compress.weights.weight import CompressedWeight

# Elements worked on at a time: all iterations on a chunk are done while it is in the cache.
_CHUNK = 1 << 16


def hqq(
    weight: Tensor,
    *,
    bits: int,
    group_size: GroupSize,
    p: float,
    beta: float,
    kappa: float,
    iterations: int,
) -> Result:
    """Round weight (out, in), in float32, or in float64 where it is."""
    if weight.dtype != torch.float64:
        weight = weight.float()
    size = group_columns(group_size, weight.shape[1])
    grouped = weight.reshape(weight.shape[0], -1, size)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale, offset = (torch.empty(grouped.shape[:2], dtype=torch.bfloat16, device=weight.device) for _ in range(2))
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        found = _Offsets(grouped[part], bits, p)
        found.run(beta, kappa, iterations)
        codes[part], scale[part], offset[part] = found.codes(), found.scale, found.offset
    return Result(CompressedWeight(Uniform(codes, scale, bits, size, offset=offset)))


class _Offsets:
    """Finds the offset of least sum |d|^p of each group."""

    def __init__(self, grouped: Tensor, bits: int, p: float) -> None:
        self.grouped, self.p = grouped, p  # (rows, groups, group size)
        self.middle, self.top = middle(bits), (1 << bits) - 1
        low, high = grouped.amin(2), grouped.amax(2)
        below, above = self.middle, self.top - self.middle  # steps from the offset to the ends
        self.offset = _bfloat16(low + below * ((high - low) / self.top))  # (rows, groups), as are all that follow
        self.scale = stored(torch.maximum((self.offset - low) / below, (high - self.offset) / above))
        self._inverse = self.scale.reciprocal().unsqueeze(2)

    def _round(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Return `code - middle` and the error that is left, in steps, (rows, groups, group size)."""
        scaled = (self.grouped - offset.unsqueeze(2)).mul_(self._inverse)
        code = nearest(scaled.clone(), -self.middle, self.top - self.middle)
        return code, scaled.sub_(code)

    def run(self, beta: float, kappa: float, iterations: int) -> None:
        """Go through the offsets; the best of each group is in `offset`."""
        offset = self.offset
        _, left = self._round(offset)
        least = left.abs().pow_(self.p).sum(2)
        for _ in range(iterations):
            size = left.abs()
            kept = (
                (size - size.pow(self.p - 1).div_(beta)).clamp_(min=0).copysign_(left)
            )  # 0 to a power below 0 is inf: nothing is kept
            # The grid moves by the mean of what is left without what was kept: offset + scale mean(d - e).
            offset = _bfloat16(offset + self.scale * left.sub_(kept).mean(2))
            beta *= kappa
            _, left = self._round(offset)
            loss = left.abs().pow_(self.p).sum(2)
            better = loss < least
            least, self.offset = torch.where(better, loss, least), torch.where(better, offset, self.offset)

    def codes(self) -> Tensor:
        """Return the codes (rows, in) on the grid as it is stored."""
        return (self._round(self.offset)[0] + self.middle).to(torch.uint8).flatten(1)


def _bfloat16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


class HQQ(Grouped):
    """Options of half-quadratic quantization."""

    group_size: GroupSize = 64
    p: Annotated[float, Field(gt=0, le=1, description="the norm of errors that is minimised")] = 0.7
    beta: Annotated[
        float, Field(gt=0, le=1e6, description="how closely errors are held to what is left; in steps of the grid")
    ] = 10.0
    kappa: Annotated[float, Field(ge=1, le=10, description="growth of beta per iteration")] = 1.01
    iterations: Annotated[int, Field(ge=0, le=1000, description="offsets tried after the first")] = 20

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        return uniform_described(shape, self.bits, self.size(shape[1]), offset=True)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in); the statistics are not looked at."""
        return hqq(weight, **self.model_dump())


METHOD = HQQ
