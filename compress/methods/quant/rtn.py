"""RTN: round every weight to the nearest point of its group's grid.

Problem   minimise |W - Q|^2 over codes on a grid with a scale (and zero point) per group: no calibration data.
Grid      value = (code - zero) * scale, see `_grid`: symmetric or asymmetric, 1 to 8 bits, any group size that divides the
          columns (-1: one group per row), scales in bfloat16.
Range     minmax  covers every weight
          mse     the range of least squared error among shrunk ranges
Source    the grids are those of GPTQ (arXiv 2210.17323).
Failures  errors of neighbouring columns add up where inputs are correlated: GPTQ compensates them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.calibration.statistics import Stats
from compress.methods.method import Bits, GroupSize, Method, Result, grid_described
from compress.methods.solvers.uniform_grid import Range, encode, fit, indivisible
from compress.weights.uniform import Uniform, uniform_bits
from compress.weights.weight import CompressedWeight


def rtn(weight: Tensor, *, bits: int = 4, group_size: int = 128, symmetric: bool = True, range: Range = "mse") -> Result:
    """Round weight (out, in) to nearest."""
    if weight.dtype != torch.float64:
        weight = weight.float()
    grid = fit(weight, bits, group_size, symmetric=symmetric, search=range == "mse")
    columns = weight.shape[1] if group_size == -1 else group_size
    return Result(CompressedWeight(Uniform(encode(weight, grid, group_size), grid.scale, bits, columns, grid.zero)))


class RTN(Method):
    """Options of round-to-nearest."""

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    range: Range = "mse"

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether the group size does not divide the columns of a weight (out, in)."""
        return indivisible(shape[1], self.group_size)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits that a weight of this shape (out, in) will occupy."""
        return uniform_bits(shape, self.bits, shape[1] if self.group_size == -1 else self.group_size, not self.symmetric)

    def described(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Say how a weight of this shape (out, in) will be described in a checkpoint."""
        return grid_described(shape, self.bits, self.group_size, zero=not self.symmetric)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in); the statistics are not looked at."""
        return rtn(weight, **self.model_dump())


METHOD = RTN
