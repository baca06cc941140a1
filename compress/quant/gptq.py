"""GPTQ: round column by column, letting the columns still to come make up for the error (arXiv 2210.17323).

Problem   minimise E(Q) = tr((W - Q) H (W - Q)^T), H the mean of x x^T over calibration tokens, over codes on a grid.
"""

from __future__ import annotations

import builtins
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats
from compress.method import Bits, GroupSize, Method, Result
from compress.quant._grid import Grid, Range, fit, indivisible
from compress.quant._solver import Sweep, factorise
from compress.weight import CompressedWeight, Uniform

Order = Literal["static", "none", "desc_act"]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    range: Range = "mse",
    order: Order = "static",
    damp: float = 0.01,
    block: int = 32,
) -> Result:
    """Round weight (out, in) under hessian (in, in)."""
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    weight, hessian = weight.to(dtype), hessian.to(dtype)
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    factor = factorise(hessian, damp, descending=order != "none")
    target = weight.T[factor.order].contiguous()
    grids: list[Grid | None] = [None] * (columns // size)

    def fit_group(part: Tensor) -> Grid:
        return fit(part, bits, -1, symmetric=symmetric, range=range)

    if order == "static":
        groups = (factor.order // size).tolist()
        whole = fit(weight, bits, size, symmetric=symmetric, range=range)
        grids = [
            Grid(whole.scale[:, g : g + 1], None if whole.zero is None else whole.zero[:, g : g + 1], bits)
            for g in builtins.range(columns // size)
        ]
    else:
        groups = (torch.arange(columns) // size).tolist()
    sweep = Sweep(
        target,
        target.clone(),
        torch.empty_like(target, dtype=torch.uint8),
        factor.feedback,
        groups,
        grids,
        block,
        None if order == "static" else fit_group,
        size,
    )
    sweep.run(0, columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    codes[:, factor.order] = sweep.codes.T
    done = [g for g in sweep.grids if g is not None]
    scale = torch.cat([g.scale for g in done], 1)
    zero = None if symmetric else torch.cat([g.zero for g in done if g.zero is not None], 1)
    index = None
    if order == "desc_act":
        index = torch.empty(columns, dtype=_smallest(columns // size), device=weight.device)
        index[factor.order] = torch.tensor(groups, device=weight.device).to(index.dtype)
    notes: dict[str, Any] = {"damp": factor.damp, "dead_columns": factor.dead}
    if factor.fallback is not None:
        notes["fallback"] = factor.fallback
    return Result(CompressedWeight(Uniform(codes, scale, bits, size, zero, index)), notes)


def _smallest(count: int) -> torch.dtype:
    """The smallest integer type for indices below `count`."""
    return torch.uint8 if count <= 1 << 8 else torch.int16 if count <= 1 << 15 else torch.int32


class GPTQ(Method):
    """Options of GPTQ."""

    needs: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    range: Range = "mse"
    order: Order = "static"
    damp: Annotated[float, Field(ge=0, le=10)] = 0.01

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether the group size does not divide the columns of a weight (out, in)."""
        return indivisible(shape[1], self.group_size)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in) under the Hessian of its inputs."""
        statistic = stats[Hessian]
        assert isinstance(statistic, Hessian)
        return gptq(weight, statistic.matrix(), **self.model_dump())


METHOD = GPTQ
