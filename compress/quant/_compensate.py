"""Error-compensating rounding on grids that are given, and GPTQ's solution as a start for other methods."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant._grid import Grid, fit
from compress.quant._solver import Factor, Levels, Sweep, factorise, full_precision, refine

BLOCK = 32  # columns that are solved one by one between matrix products


def swept(weight: Tensor, factor: Factor, levels: Levels, size: int) -> tuple[Tensor, Tensor]:
    """Round weight (in, out) on levels of groups of `size` columns; return weight - rounded and codes, in natural order."""
    target = weight[factor.order]
    delta, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)
    Sweep(target, delta, codes, factor.feedback, levels, factor.order // size, BLOCK).run(0, len(weight))
    natural = torch.empty_like(factor.order).scatter_(0, factor.order, torch.arange(len(weight), device=weight.device))
    return delta[natural], codes[natural]


def importance(factor: Factor) -> Tensor:
    """What an error of each column (in,) costs after all later ones have made up for it, in natural order."""
    return torch.empty_like(factor.pivots).scatter_(0, factor.order, factor.pivots.square())


def compensated(
    weight: Tensor, hessian: Tensor, bits: int, size: int, *, symmetric: bool, damp: float = 0.01, refinements: int = 2
) -> tuple[Tensor, Grid, Factor]:
    """Return codes (out, in) and grids of GPTQ with static groups, for weight (out, in) under hessian (in, in)."""
    with full_precision():
        factor = factorise(hessian.to(weight.dtype), damp, descending=True)
        grid = fit(weight, bits, size, symmetric=symmetric, search=True, importance=importance(factor))
        levels = Levels.of(grid, weight.dtype)
        turned = weight.T.contiguous()
        delta, codes = swept(turned, factor, levels, size)
        if refinements and not factor.plain:
            refine(turned, factor.hessian, levels, delta, codes, refinements, BLOCK)
    return codes.T.contiguous(), levels.grid(bits), factor
