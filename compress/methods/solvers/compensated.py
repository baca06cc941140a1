"""GPTQ's solution with static groups, as a start for other methods."""

from __future__ import annotations

from torch import Tensor

from compress.methods.solvers.error_feedback import (
    BLOCK,
    Factor,
    GridLayout,
    factorise,
    full_precision,
    importance,
    refine,
    swept,
)
from compress.methods.solvers.uniform_grid import Grid, fit


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
        layout = GridLayout.of(grid, weight.dtype)
        turned, kept = weight.T.contiguous(), None if keep is None else keep.T.to(weight.dtype).contiguous()
        delta, codes = swept(first.T.contiguous(), factor, layout, size, kept)
        if start is not None:
            delta += turned - start.T
        if refinements and not factor.plain:
            refine(turned, factor.hessian, layout, delta, codes, refinements, BLOCK, kept)
    return codes.T.contiguous(), layout.grid(bits), factor
