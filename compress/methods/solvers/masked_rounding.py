"""Rounding what a mask keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compress.methods.method import GroupSize, group_columns
from compress.methods.solvers.compensated import compensated
from compress.methods.solvers.uniform_grid import encode, fit
from compress.weights.uniform import Uniform

_REFINEMENTS = 2


def quantized(
    weight: Tensor,
    keep: Tensor,
    values: Tensor | None,
    hessian: Tensor | None,
    bits: int,
    group_size: GroupSize,
    symmetric: bool,
) -> tuple[Uniform, dict[str, Any]]:
    """Round what a mask (out, in) keeps of a weight (out, in), or the values (out, in) in its place, on grids of kept weights.

    Under a hessian (in, in) every error, of pruning too, is made up for by columns that are kept, as GPTQ does; without one
    weights are rounded to nearest. Return codes and notes.
    """
    wanted = (weight if values is None else values).masked_fill(~keep, 0.0)
    size = group_columns(group_size, weight.shape[1])
    if hessian is None:
        grid = fit(wanted, bits, size, symmetric=symmetric, search=True)
        return Uniform(encode(wanted, grid, size), grid.scale, bits, size, grid.zero), {}
    codes, grid, factor = compensated(
        weight, hessian, bits, size, symmetric=symmetric, refinements=_REFINEMENTS, keep=keep, start=values
    )
    notes: dict[str, Any] = {"damp": factor.damp}
    if factor.fallback is not None:
        notes["fallback"] = factor.fallback
    return Uniform(codes, grid.scale, bits, size, grid.zero), notes
