"""RTN: round every weight to the nearest point of its group's grid.

Problem   minimise |W - Q|^2 over codes on a grid with a scale (and zero point) per group: no calibration data.
Grid      value = (code - zero) * scale, see `uniform_grid`: symmetric or asymmetric, 1 to 8 bits, any group size that divides the
          columns (-1: one group per row), scales in bfloat16.
Range     minmax  covers every weight
          mse     the range of least squared error among shrunk ranges
Source    the grids are those of GPTQ (arXiv 2210.17323).
Failures  errors of neighbouring columns add up where inputs are correlated: GPTQ compensates them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.calibration.statistics import Stats
from compress.methods.method import GroupedGrid, GroupSize, Result, group_columns
from compress.methods.solvers.uniform_grid import Range, encode, fit
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight


def rtn(weight: Tensor, *, bits: int, group_size: GroupSize, symmetric: bool, range: Range) -> Result:
    """Round weight (out, in) to nearest."""
    if weight.dtype != torch.float64:
        weight = weight.float()
    grid = fit(weight, bits, group_size, symmetric=symmetric, search=range == "mse")
    size = group_columns(group_size, weight.shape[1])
    return Result(CompressedWeight(Uniform(encode(weight, grid, group_size), grid.scale, bits, size, grid.zero)))


class RTN(GroupedGrid):
    """Options of round-to-nearest."""

    symmetric: bool = True
    range: Range = "mse"

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in); the statistics are not looked at."""
        return rtn(weight, **self.model_dump())


METHOD = RTN
