"""Error-compensating rounding on grids that are given, and GPTQ's solution as a start for other methods."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods.solvers.error_feedback import Factor, Grids, Levels, Sweep, factorise, full_precision, refine
from compress.methods.solvers.uniform_grid import Grid, fit

BLOCK = 32  # columns that are solved one by one between matrix products


def swept(
    weight: Tensor, factor: Factor, levels: Grids, size: int, keep: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Round weight (in, out) on levels of groups of `size` columns; return weight - rounded and codes, in natural order.

    Where keep (in, out) is 0, the value is 0 whatever the code.
    """
    target = weight[factor.order]
    delta, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)
    kept = None if keep is None else keep[factor.order]
    Sweep(target, delta, codes, factor.feedback, levels, factor.order // size, block, keep=kept).run(0, len(weight))
    natural = torch.empty_like(factor.order).scatter_(0, factor.order, torch.arange(len(weight), device=weight.device))
    return delta[natural], codes[natural]


def importance(factor: Factor) -> Tensor:
    """What an error of each column (in,) costs after all later ones have made up for it, in natural order."""
    return torch.empty_like(factor.pivots).scatter_(0, factor.order, factor.pivots.square())


def compensated(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    size: int,
    *,
    symmetric: bool,
    damp: float = 0.01,
    refinements: int = 2,
    keep: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Grid, Factor]:
    """Return codes (out, in) and grids of GPTQ with static groups, for weight (out, in) under hessian (in, in).

    With a mask keep (out, in) bool values are 0 where nothing is kept, which is an error like those of rounding: later columns
    make up for it. `start` (out, in) are weights on the mask that have made up for pruning already: then these are rounded, and
    refinement goes back to the error against the weight itself.
    """
    with full_precision():
        factor = factorise(hessian.to(weight.dtype), damp, descending=True)
        first = weight if start is None else start
        fitted = first if keep is None else first.masked_fill(~keep, 0.0)
        grid = fit(fitted, bits, size, symmetric=symmetric, search=True, importance=importance(factor))
        levels = Levels.of(grid, weight.dtype)
        turned, kept = weight.T.contiguous(), None if keep is None else keep.T.to(weight.dtype).contiguous()
        delta, codes = swept(first.T.contiguous(), factor, levels, size, kept)
        if start is not None:
            delta += turned - start.T
        if refinements and not factor.plain:
            refine(turned, factor.hessian, levels, delta, codes, refinements, BLOCK, kept)
    return codes.T.contiguous(), levels.grid(bits), factor
