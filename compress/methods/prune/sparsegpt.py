"""SparseGPT: remove weights column by column, and let later columns make up for it (Frantar and Alistarh, arXiv 2301.00774).

Problem   minimise E(V) = tr((W - V) H (W - V)^T) over a mask and the values V it keeps: H is the mean of x x^T over tokens.
Shapes    weight W (out, in), Hessian H (in, in), mask and values (out, in).
Steps     1. H <- H / mean(diag H) + damp I, H = R R^T in the order of columns, pivots r_k: the sweep of `error_feedback`.
          2. Before each run of `block` columns, all their weights are brought up to date with the errors made so far, to w'. Of
             the whole run (all rows, or each row) the lowest w'_k^2 r_k^2 go: what removing one weight costs after all later
             columns have made up for it. For N:M a run is one group.
          3. Column by column: what goes becomes 0, what stays keeps its up-to-date value, the error is fed on.
Quotas    a run gets what is due by then, so that the total is exact. Columns that no token touched score 0 and go first.
Bits      `bits` rounds what stays in the same pass: both errors are fed on together. The grid of a group is fitted when the group
          is reached, to the weights that are then expected to stay; two passes of refinement follow, as in GPTQ.
Update    `update: true` solves for the values once more, given the mask, see `masked_least_squares`: only later columns can make
          up for earlier ones here, which costs some.
Defaults  block 128, damp 0.01: those of the authors. The order of columns is natural: quotas are per run, so that sorting columns
          by importance would force removing important ones.
Failures  as GPTQ: too few tokens make H singular, and damping decides. Without any token it is magnitude pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Stats, statistic
from compress.methods.method import Damp, GroupSize, Result, group_columns
from compress.methods.pruning import Pruning
from compress.methods.solvers.error_feedback import (
    ColumnRounding,
    Factor,
    GridLayout,
    Rounder,
    RoundingGrid,
    factorise,
    full_precision,
    refine,
)
from compress.methods.solvers.mask_scores import exact
from compress.methods.solvers.mask_selection import Target, Within, as_part, highest, select
from compress.methods.solvers.masked_least_squares import updated
from compress.methods.solvers.uniform_grid import fit
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

_INNER = 32  # columns that are solved one by one between matrix products
_REFINEMENTS = 2


@dataclass(eq=False)
class Unrounded:
    """A grid of all numbers, whose codes are the numbers."""

    scale: Tensor  # (1, out) ones
    inverse: Tensor  # (1, out)

    def rounder(self) -> Rounder:
        """Return what leaves a column as it is."""
        return lambda scaled, group: None

    def encode(self, steps: Tensor, groups: Tensor) -> Tensor:
        """Return the steps."""
        return steps

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the codes."""
        return codes.to(dtype)

    def storable(self, scale: Tensor) -> Tensor:
        """Every scale can be stored."""
        return scale

    def group(self, index: int) -> Unrounded:
        """The one group."""
        return self


class Chooser:
    """Chooses run by run what goes."""

    def __init__(self, factor: Factor, unseen: Tensor, keep: Tensor, target: Target) -> None:
        self.keep, self.target = keep, target  # keep (in, out), 1 until a run is chosen
        self.cost = torch.where(unseen, 0.0, factor.pivots.square())  # (in,) of a square of a weight
        self._gone = 0  # units of each competition that went in earlier runs

    def score(self, weights: Tensor, steps: slice) -> Tensor:
        """Return the root of what removing each of the weights (n, out) costs, (out, n)."""
        return (weights.abs() * self.cost[steps].sqrt().unsqueeze(1)).T

    def choose(self, weights: Tensor, steps: slice) -> None:
        """Choose among up-to-date weights (n, out)."""
        score, target = self.score(weights, steps), self.target
        if target.pattern is not None:
            kept = highest(score, target.pattern[0])
        else:
            competitors = score.shape[0] if target.within == "matrix" else 1
            units, due = score.shape[1] // target.group * competitors, target.pruned(steps.stop // target.group * competitors)
            gone, self._gone = due - self._gone, due
            kept = select(score, Target(gone / units, None, target.group, target.within))
        self.keep[steps] = kept.T.to(self.keep.dtype)

    def expect(self, weights: Tensor, steps: slice) -> Tensor:
        """Return the mask (n, out) that runs within these steps will give if weights (n, out) stay as they are."""
        target = self.target
        runs = target.pattern is None and len(weights) % target.group == 0
        kept = select(self.score(weights, steps), target if runs or target.pattern else Target(target.sparsity))
        return kept.T


def _run_length(columns: int, target: Target, block: int, size: int | None) -> int:
    """Columns that are chosen together: a group of a pattern, else `block` or about that, in step with groups of scales."""
    if target.pattern is not None:
        return target.pattern[1]
    length = max(block // target.group, 1) * target.group
    if size is None or size % length == 0 or length % size == 0:
        return length
    return size if size % target.group == 0 else columns


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    target: Target,
    *,
    damp: float,
    block: int,
    bits: int | None,
    group_size: GroupSize,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Uniform | None, Factor]:
    """Return the mask (out, in) bool of weight (out, in) under hessian (in, in), the values on it, codes if any, and the factor.

    In float32, or in float64 where either is.
    """
    dtype = torch.promote_types(weight.dtype, hessian.dtype)
    weight, (rows, columns) = exact(weight.to(dtype)), weight.shape
    dtype, size = weight.dtype, group_columns(group_size, columns)
    with full_precision():
        unseen = hessian.diagonal() <= 0
        factor = factorise(hessian.to(dtype), damp, descending=False)
        if factor.plain:
            unseen = torch.zeros_like(unseen)
        towards = weight.T.contiguous()
        delta, codes = towards.clone(), torch.empty_like(towards, dtype=dtype if bits is None else torch.uint8)
        keep = torch.ones_like(towards)
        chooser = Chooser(factor, unseen, keep, target)
        length = _run_length(columns, target, block, size if bits else None)
        reached: dict[int, Callable[[slice], None]] = {length: lambda steps: chooser.choose(sweep.current(steps), steps)}
        natural = torch.arange(columns, device=weight.device)
        grids: RoundingGrid = Unrounded(towards.new_ones(1, rows), towards.new_ones(1, rows))
        if bits is not None:
            grids = GridLayout.empty(columns // size, towards, bits, symmetric)
            _with_grids(reached, length, size, chooser, grids, factor, lambda: sweep, bits, symmetric)
        sweep = ColumnRounding(
            towards, delta, codes, factor.feedback, grids, natural // size if bits else natural * 0, _INNER, reached, keep
        )
        sweep.run(0, columns)
        mask = keep.T.bool()
        if not isinstance(grids, GridLayout) or bits is None:
            return mask, codes.T.contiguous(), None, factor
        if not factor.plain:
            refine(weight.T.contiguous(), factor.hessian, grids, delta, codes, _REFINEMENTS, _INNER, keep)
        grid = grids.grid(bits)
        base = Uniform(codes.T.contiguous(), grid.scale, bits, size, grid.zero)
        return mask, (weight - delta.T).masked_fill(~mask, 0.0), base, factor


def _with_grids(
    reached: dict[int, Callable[[slice], None]],
    length: int,
    size: int,
    chooser: Chooser,
    layout: GridLayout,
    factor: Factor,
    sweep: Callable[[], ColumnRounding],
    bits: int,
    symmetric: bool,
) -> None:
    """Have the grid of every group fitted when it is reached: to what stays where that is known by then, or is to be expected."""

    def fitted(steps: slice) -> None:
        current = sweep().current(steps)
        kept = chooser.expect(current, steps) if size > length else chooser.keep[steps].bool()
        importance = factor.pivots[steps].square()
        grid = fit((current * kept).T.contiguous(), bits, size, symmetric=symmetric, search=True, importance=importance)
        layout.group(steps.start // size).assign(GridLayout.of(grid, current.dtype))

    choose = reached[length]

    def both(steps: slice) -> None:
        choose(steps)
        fitted(steps)

    reached[size] = both if size == length else fitted


class SparseGPT(Pruning):
    """Options of SparseGPT."""

    within: Annotated[Within, Field(description="what competes in a run of columns: all its weights, or those of a row")] = (
        "matrix"
    )
    damp: Damp = 0.01
    block: Annotated[int, Field(ge=1, description="columns that are chosen together")] = 128
    update: Annotated[bool, Field(description="solve for the values once more, given the mask; not with bits")] = False

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what does not divide the columns of a weight (out, in), or does not go together."""
        if self.update and self.bits is not None:
            return "update and bits do not go together: values are rounded as they are found"
        return super().check(shape)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Prune weight (out, in) under the Hessian of its inputs."""
        keep, values, codes, factor = sparsegpt(
            weight,
            statistic(stats, Hessian).matrix(),
            self.target,
            damp=self.damp,
            block=self.block,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
        )
        notes = factor.notes
        if factor.fallback is not None:
            notes["fallback"] = factor.fallback.replace("rtn", "magnitude")
        if codes is not None:
            return Result(CompressedWeight.pruned(codes, as_part(keep, self.target)), notes)
        if self.update and not factor.plain:
            values = updated(exact(weight), keep, stats)[0]  # type: ignore[assignment]
        return self.result(weight, keep, values, stats, notes)


METHOD = SparseGPT
