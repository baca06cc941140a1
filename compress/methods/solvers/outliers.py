"""SpQR over one weight: groups on grids in two levels, outliers by their error, refinements. Equations: `spqr.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.methods.solvers.error_feedback import factorise
from compress.methods.solvers.two_level_grid import Moments, TwoLevelGrid
from compress.methods.solvers.uniform_grid import fit
from compress.weights.sparse import Sparse, column_dtype
from compress.weights.weight import CompressedWeight

Order = Literal["grouped", "none", "desc_act"]

_FITS = 3  # of a group's two levels to its weights before any is rounded for good
_TRIALS = 2  # of a group's grid, fitted to the codes that it led to
_SEARCH = 20  # thresholds tried for a number of bits
_SLACK = 0.01  # of the outliers there is room for, that may stay unused


def likely_outliers(weight: Tensor, cost: Tensor, bits: int, limit: float) -> Tensor:
    """Say which of weight (out, size), left out of the min-max fit, take more than `limit` off its error, by cost (size,).

    Only the ends of the range change it, so that three fits say it of all weights: with and without the highest and the lowest.
    """
    top = (1 << bits) - 1

    def errors(low: Tensor, high: Tensor) -> Tensor:
        low, high = low.clamp(max=0), high.clamp(min=0)  # (out, 1)
        scale = (high - low) / top
        scale = torch.where(scale > 0, scale, 1.0)
        zero = -low / scale
        code = (weight / scale + zero).round_().clamp_(0, top)
        return ((code - zero) * scale - weight).square_().mul_(cost)

    count = min(2, weight.shape[1])
    highest, where_highest = weight.topk(count, 1)
    lowest, where_lowest = weight.topk(count, 1, largest=False)
    own = errors(lowest[:, :1], highest[:, :1])
    whole, gain = own.sum(1, keepdim=True), own
    without = (
        (where_highest[:, :1], errors(lowest[:, :1], highest[:, -1:])),
        (where_lowest[:, :1], errors(lowest[:, -1:], highest[:, :1])),
    )
    for place, other in without:
        left = other.sum(1, keepdim=True) - other.gather(1, place)
        gain = gain.scatter(1, place, whole - left)
    return gain > limit


@dataclass(frozen=True, eq=False)
class Rounded:
    """Some columns (columns, out) as they came out."""

    codes: Tensor  # whole numbers
    residual: Tensor  # what the grid misses of outliers, as bfloat16 holds it; 0 elsewhere
    outlier: Tensor  # bool
    delta: Tensor  # weight - rounded


def round_columns(
    target: Tensor,
    weight: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    *,
    bound: list[float] | None = None,
    outlier: Tensor | None = None,
) -> Rounded:
    """Round columns one after another, each towards its target (columns, out) plus the feedback of the errors before it.

    `scale` and `zero` are (out,), or (columns, out). A squared error above the column's `bound` makes an outlier; without bounds
    outliers are given.
    """
    top = (1 << bits) - 1
    inverse = scale.reciprocal()
    target, delta = target.clone(), weight.clone()
    codes, residual = torch.empty_like(target), torch.zeros_like(target)
    found = torch.zeros_like(target, dtype=torch.bool) if outlier is None else outlier
    search = bound is not None and min(bound) < math.inf
    for k in range(len(target)):
        if k:
            target[k].addmv_(delta[:k].T, feedback[k, :k])
        torch.addcmul(zero, target[k], inverse, out=codes[k]).round_().clamp_(0, top)
        value = (codes[k] - zero).mul_(scale)
        delta[k].sub_(value)
        if search or outlier is not None:
            rest = target[k] - value
            if bound is not None:
                torch.gt(rest.square(), bound[k], out=found[k])
            torch.mul(rest.to(torch.bfloat16).to(rest.dtype), found[k], out=residual[k])
            delta[k].sub_(residual[k])
    return Rounded(codes, residual, found, delta)


class Solver:
    """One weight with its Hessian; columns in processing order, layout (in, out)."""

    def __init__(
        self, weight: Tensor, hessian: Tensor, bits: int, size: int, scale_bits: int, zero_bits: int, order: Order, damp: float
    ) -> None:
        self.size, self.order, self.widths = size, order, (bits, scale_bits, zero_bits)
        diagonal = hessian.diagonal()
        self.place = processing_order(diagonal, size, order)
        self.factor = factorise(hessian[self.place][:, self.place], damp, descending=False)
        self.cost = self.factor.pivots.square()  # of a squared error in each column, once all later ones have made up for it
        self.live = (diagonal > 0)[self.place] | self.factor.plain
        self.weight = weight.T[self.place].contiguous()
        self.power = float((self.cost * self.weight.square().mean(1))[self.live].mean())
        self.restart()

    def restart(self) -> None:
        """Forget what was rounded."""
        columns, rows = self.weight.shape
        self.target, self.delta = self.weight.clone(), self.weight.clone()
        self.codes = torch.zeros_like(self.weight, dtype=torch.uint8)
        self.residual, self.outlier = torch.zeros_like(self.weight), torch.zeros_like(self.weight, dtype=torch.bool)
        self.grid = TwoLevelGrid.empty(columns // self.size, rows, self.weight, *self.widths)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.weight) // self.size

    def _span(self, index: int) -> slice:
        return slice(index * self.size, (index + 1) * self.size)

    # ---------------------------------------------------------------- the sweep

    def sweep(self, threshold: float) -> None:
        """Fit and round all groups; infinity finds no outliers."""
        self.restart()
        limit = threshold * self.power if math.isfinite(threshold) else math.inf
        self._sweep(0, self.groups, limit)

    def _sweep(self, start: int, stop: int, limit: float) -> None:
        """Do the groups start..stop, whose targets hold the errors of all groups before, in halves with a product between."""
        if stop - start == 1:
            self._reach(start, limit)
            return
        half = (start + stop + 1) // 2
        self._sweep(start, half, limit)
        first, second = slice(start * self.size, half * self.size), slice(half * self.size, stop * self.size)
        self.target[second].addmm_(self.factor.feedback[second, first], self.delta[first])
        self._sweep(half, stop, limit)

    def _reach(self, index: int, limit: float) -> None:
        """Fit one group and round its columns, some times over, and keep the best of each tile."""
        span, master = self._span(index), self.grid.group(index)
        weight, feedback, cost = self.weight[span], self.factor.feedback[span, span], self.cost[span]
        # A target is complete only once the columns before it in the group are rounded. As a group they want: S + A S = T - W.
        shift = torch.linalg.solve_triangular(feedback, self.target[span] - weight, upper=False, unitriangular=True)
        wanted = weight + shift
        grid = self._fit(wanted, cost, self.live[span], limit)
        # The cost of errors D in the group, once later columns have made up for them: sum_k r_k^2 (D_k + sum_i D_i a_ik)^2.
        bend = feedback.tril(-1)
        bend.diagonal().add_(1.0)
        inner = bend.T @ (cost.unsqueeze(1) * bend)
        bound = torch.where(self.live[span], limit / cost, math.inf).tolist()

        def attempt() -> tuple[Rounded, Tensor]:
            """Round on the grid as it is; and what that costs, by tiles (1, tiles)."""
            rounded = round_columns(wanted, wanted, feedback, grid.scale()[0], grid.zero()[0], grid.bits, bound=bound)
            price = (rounded.delta * (inner @ rounded.delta)).sum(0)
            if math.isfinite(limit):
                price += rounded.outlier.sum(0) * limit
            return rounded, grid.total(price.unsqueeze(0))

        rounded, least = attempt()
        better = torch.ones_like(least, dtype=torch.bool)
        for trial in range(_TRIALS + 1):
            if trial:
                beside = torch.where(rounded.outlier, rounded.delta, wanted)  # what is left when nothing is on the grid
                free = (~rounded.outlier).to(weight.dtype)
                grid.improve(Moments.full(rounded.codes, free, inner, inner @ beside))
                rounded, price = attempt()
                better, least = price < least, torch.minimum(price, least)
            master.assign(grid, better)
            self._take(span, rounded, grid.spread(better)[0], shift)

    def _fit(self, wanted: Tensor, cost: Tensor, live: Tensor, limit: float) -> TwoLevelGrid:
        """Fit the two levels of one group to wanted (size, out), errors weighted by cost (size,), likely outliers left out."""
        bits, scale_bits, zero_bits = self.widths
        rows = wanted.T.contiguous()  # (out, size)
        free, kept = torch.ones_like(wanted), rows
        if math.isfinite(limit):
            likely = likely_outliers(rows, cost, bits, limit) & live
            free = (~likely).T.to(wanted.dtype)
            mean = (wanted * free).sum(0) / free.sum(0).clamp_min_(1)
            kept = torch.where(likely, mean.unsqueeze(1), rows)
        first = fit(kept, bits, -1, symmetric=False, search=True, importance=cost)
        assert first.zero is not None
        scale, zero = first.scale.T.to(wanted.dtype), first.zero.T.to(wanted.dtype)
        grid = TwoLevelGrid.covering(scale, zero, bits, scale_bits, zero_bits)
        for _ in range(_FITS):
            codes = (wanted / grid.scale() + grid.zero()).round_().clamp_(0, (1 << bits) - 1)
            grid.improve(Moments.diagonal(codes, wanted, free * cost.unsqueeze(1)))
        return grid

    def _take(self, span: slice, rounded: Rounded, better: Tensor, shift: Tensor | float) -> None:
        """Take over the rows that came out better; errors are to the weight, not to what the group wanted."""
        self.codes[span] = torch.where(better, rounded.codes.to(torch.uint8), self.codes[span])
        self.residual[span] = torch.where(better, rounded.residual, self.residual[span])
        self.outlier[span] = torch.where(better, rounded.outlier, self.outlier[span])
        self.delta[span] = torch.where(better, rounded.delta - shift, self.delta[span])

    def search(self, room: int) -> float:
        """Sweep with a threshold that leaves at most `room` outliers, and not many fewer; return it.

        Bisection of its logarithm, cut where counts falling like a power of the threshold would hit, in the middle every third
        time. A count jumps a little from one threshold to the next, as all later columns change with each outlier: where none
        is found that leaves less than 1 % unused, the one that leaves least is taken.
        """
        low, high = -14.0, 5.0
        many, few = float(self.weight.numel()), 0.5
        aim = room * (1 - _SLACK / 2)
        best, most = math.inf, 0
        for attempt in range(_SEARCH if room else 0):
            share = math.log(many / aim) / math.log(many / few) if attempt % 3 != 2 else 0.5
            middle = low + (high - low) * min(max(share, 0.05), 0.95)
            self.sweep(math.exp(middle))
            found = int(self.outlier.sum())
            if found > room:
                low, many = middle, float(found)
                continue
            high, few = middle, max(float(found), 0.5)
            if found >= room * (1 - _SLACK):
                return math.exp(middle)
            if found > most:
                best, most = math.exp(middle), found
        self.sweep(best)
        return best

    # ---------------------------------------------------------------- refinement

    def refine(self) -> None:
        """One pass of descent over all groups: the grid for the codes, then the codes one by one."""
        for index in range(self.groups):
            span, grid = self._span(index), self.grid.group(index)
            weight, inner = self.weight[span], self.factor.hessian[span, span]
            free = (~self.outlier[span]).to(weight.dtype)
            codes = self.codes[span].to(weight.dtype)
            old = (codes - grid.zero()).mul_(grid.scale()).mul_(free)
            gradient = torch.addmm(inner @ old, self.factor.hessian[span], self.delta)  # as if nothing were on the grid
            grid.improve(Moments.full(codes, free, inner, gradient))
            new = (codes - grid.zero()).mul_(grid.scale()).mul_(free)
            gradient.addmm_(inner, new, alpha=-1)
            delta = self.delta[span] + old - new

            # A column goes where its row of H D vanishes; what columns before it in the group contribute is fed back.
            pivots = inner.diagonal().unsqueeze(1)
            target = gradient.addmm_(inner.tril(), delta, alpha=-1).div_(pivots).add_(weight)
            scale, zero, outlier = grid.scale()[0], grid.zero()[0], self.outlier[span]
            rounded = round_columns(target, weight, inner.tril(-1).div_(pivots), scale, zero, grid.bits, outlier=outlier)
            self._take(span, rounded, torch.ones_like(scale, dtype=torch.bool), 0.0)

    # ---------------------------------------------------------------- the result

    def result(self) -> CompressedWeight:
        """Return what was found, columns and groups in natural order."""
        back = torch.argsort(self.place)
        grid, group = self.grid, None
        if self.order == "grouped":
            grid = grid.reordered(back[:: self.size] // self.size)
        elif self.order == "desc_act":
            group = (back // self.size).to(column_dtype(self.groups))
        base = grid.part(self.codes[back].T.contiguous(), self.size, group)
        where = (self.outlier & (self.residual != 0))[back].T
        return CompressedWeight(base, Sparse.of(self.residual[back].T, where) if bool(where.any()) else None)


def processing_order(diagonal: Tensor, size: int, order: Order) -> Tensor:
    """Return the column (in,) that is processed at each step, given the diagonal of the Hessian."""
    natural = torch.arange(len(diagonal), device=diagonal.device)
    if order == "none":
        return natural
    if order == "desc_act":
        return torch.argsort(diagonal, descending=True, stable=True)
    grouped = diagonal.unflatten(0, (-1, size))
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True) + natural[::size].unsqueeze(1)
    return inside[torch.argsort(grouped.mean(1), descending=True, stable=True)].flatten()
