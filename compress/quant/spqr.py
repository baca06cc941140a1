"""SpQR."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats
from compress.method import Bits, Method, Result
from compress.parts.sparse import Sparse, column_dtype, sparse_bits
from compress.parts.two_level import two_level_bits
from compress.quant._grid import Grid, fit, indivisible
from compress.quant._solver import Factor, Levels, Sweep, factorise, full_precision
from compress.quant._two_level import Moments, TwoLevelGrid
from compress.weight import CompressedWeight

Order = Literal["static", "none", "desc_act"]
_FITS = 3


def likely_outliers(weight: Tensor, cost: Tensor, bits: int, limit: float) -> Tensor:
    """Say of weight (out, groups, size) which would, left out of the fit of its group, take more than `limit` off its error."""
    top = (1 << bits) - 1

    def errors(low: Tensor, high: Tensor) -> Tensor:
        low, high = low.clamp(max=0).unsqueeze(2), high.clamp(min=0).unsqueeze(2)
        scale = (high - low) / top
        scale = torch.where(scale > 0, scale, 1.0)
        zero = -low / scale
        code = (weight / scale + zero).round_().clamp_(0, top)
        return ((code - zero) * scale - weight).square_() * cost

    count = min(2, weight.shape[2])
    highest, lowest = weight.topk(count, 2), weight.topk(count, 2, largest=False)
    low, high = lowest.values[..., 0], highest.values[..., 0]
    own = errors(low, high)
    whole = own.sum(2, keepdim=True)
    gain = own
    none = torch.zeros_like(low)
    for ends, without in (
        (highest, lambda second: errors(low, second)),
        (lowest, lambda second: errors(second, high)),
    ):
        second = ends.values[..., 1] if count > 1 else none
        place = ends.indices[..., :1]
        other = without(second)
        left = other.sum(2, keepdim=True) - other.gather(2, place)
        gain = gain.scatter(2, place, whole - left)
    return gain > limit


class OutlierSweep(Sweep):
    """A sweep over grids with zero points that are no integers, which leaves what costs too much to be stored beside."""

    def __init__(self, *arguments: Any, residual: Tensor, outlier: Tensor, bound: Tensor | None, top: int) -> None:
        super().__init__(*arguments)
        self.residual, self.outlier, self.top = residual, outlier, top
        self.bound = None if bound is None else bound.tolist()

    def _columns(self, start: int, stop: int) -> None:
        zeros = self.levels.zero
        assert isinstance(zeros, Tensor)
        for k in range(start, stop):
            group, step = self._group[k], self._step[k - start]
            if k > start:
                self._targets[k].addmv_(self.delta[start:k].T, self.feedback[k, start:k])
            scale, zero = self._scale[group], zeros[group]
            torch.addcmul(zero, self._targets[k], self._inverse[group], out=step).round_().clamp_(0, self.top)
            self.codes[k] = step
            value = step.sub_(zero).mul_(scale)
            rest = self._targets[k] - value
            if self.bound is not None:
                self.outlier[k] = rest.square() > self.bound[k]
            torch.mul(rest.to(torch.bfloat16).to(rest.dtype), self.outlier[k], out=self.residual[k])
            self._deltas[k].sub_(value).sub_(self.residual[k])


def spqr(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 3,
    group_size: int = 16,
    scale_bits: int = 3,
    zero_bits: int = 3,
    outlier_threshold: float | None = 0.2,
    target_bits: float | None = None,
    order: Order = "static",
    damp: float = 0.01,
    refinements: int = 2,
    block: int = 32,
) -> Result:
    """Compress weight (out, in) under hessian (in, in)."""
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    weight, (rows, columns) = weight.to(dtype), weight.shape
    with full_precision():
        factor = factorise(hessian.to(dtype), damp, descending=order != "none")
        problem = _Problem(weight, factor, bits, group_size, scale_bits, zero_bits, order, block, hessian.diagonal() > 0)
        if target_bits is not None:
            index = 0 if order != "desc_act" else 8 * column_dtype(columns // group_size).itemsize
            base = two_level_bits((rows, columns), bits, group_size, scale_bits, zero_bits, index)
            left = math.floor(target_bits * rows * columns) - base - sparse_bits((rows, columns), 0)
            each = sparse_bits((rows, columns), 1) - sparse_bits((rows, columns), 0)
            problem.search(max(left // each, 0))
        else:
            problem.sweep(math.inf if outlier_threshold is None else outlier_threshold)
        if not factor.plain:
            for _ in range(refinements):
                problem.refine()
    notes: dict[str, Any] = {"damp": factor.damp, "dead_columns": factor.dead}
    notes |= problem.notes
    if factor.fallback is not None:
        notes["fallback"] = factor.fallback
    return Result(problem.result(), notes)


class _Problem:
    def __init__(self, weight, factor, bits, size, scale_bits, zero_bits, order, block, live) -> None:
        self.factor, self.bits, self.size, self.order, self.block = factor, bits, size, order, block
        self.widths = bits, scale_bits, zero_bits
        columns = weight.shape[1]
        self.live = live if not factor.plain else torch.ones_like(live)
        natural = torch.arange(columns, device=weight.device)
        inverse = torch.empty_like(natural).scatter_(0, factor.order, natural)
        # Groups are contiguous in `place`, the order in which they are refined.
        self.place = factor.order if order == "desc_act" else natural
        self.back = inverse if order == "desc_act" else natural
        self.to_steps = natural if order == "desc_act" else factor.order  # place -> step
        self.from_steps = natural if order == "desc_act" else inverse
        self.weight = weight.T[self.place].contiguous()  # (in, out)
        self.cost = factor.pivots.square()[self.from_steps]
        self.live = self.live[self.place]
        self.power = float((self.cost * self.weight.square().mean(1))[self.live].mean())
        self.notes = {}

    def _fit(self, weight, cost, live, limit):
        """(out, n)"""
        bits, scale_bits, zero_bits = self.widths
        w = weight.unflatten(1, (-1, self.size))
        c = cost.view(-1, self.size)
        free = torch.ones_like(w)
        kept = weight
        if math.isfinite(limit):
            likely = likely_outliers(w, c, bits, limit) & live.view(-1, self.size)
            free = (~likely).to(w.dtype)
            mean = (w * free).sum(2, keepdim=True) / free.sum(2, keepdim=True).clamp_min(1)
            kept = torch.where(likely, mean, w).flatten(1)
        first = fit(kept, bits, self.size, symmetric=False, search=True, importance=cost)
        grid = TwoLevelGrid.covering(first.scale.T.to(w.dtype), first.zero.T.to(w.dtype), bits, scale_bits, zero_bits)
        w, free = w.permute(1, 2, 0), free.permute(1, 2, 0)
        for _ in range(_FITS):
            code = (w / grid.scale().unsqueeze(1) + grid.zero().unsqueeze(1)).round_().clamp_(0, (1 << bits) - 1)
            grid.improve(Moments.diagonal(code, w, free * c.unsqueeze(2)))
        return grid

    def sweep(self, threshold):
        limit = threshold * self.power
        target = self.weight[self.to_steps]
        columns, rows = target.shape
        delta, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)
        residual, outlier = torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool)
        bound = limit / self.cost
        bound = torch.where(self.live, bound, math.inf)[self.to_steps]
        options = dict(residual=residual, outlier=outlier, bound=bound, top=(1 << self.bits) - 1)
        feedback = self.factor.feedback
        groups = self.to_steps // self.size if self.order == "static" else torch.arange(columns) // self.size
        if self.order == "static":
            grid = self._fit(self.weight.T.contiguous(), self.cost, self.live, limit)
            OutlierSweep(target, delta, codes, feedback, _levels(grid), groups, self.block, **options).run(0, columns)
        else:
            grid = TwoLevelGrid.empty(columns // self.size, rows, target, *self.widths)
            cost, live = self.cost[self.to_steps], self.live[self.to_steps]

            def reached(part, steps):
                one = self._fit(part, cost[steps], live[steps], limit)
                grid.group(steps.start // self.size).assign(one)
                return Grid(one.scale().T, one.zero().T, self.bits)

            levels = Levels.empty(columns // self.size, target, self.bits, False)
            OutlierSweep(target, delta, codes, feedback, levels, groups, self.block, reached, self.size, **options).run(0, columns)
        f = self.from_steps
        self.grid, self.delta, self.codes, self.residual, self.outlier = grid, delta[f], codes[f], residual[f], outlier[f]

    def search(self, budget):
        if budget == 0:
            self.sweep(math.inf)
            return
        low, high = -12.0, 6.0  # log threshold
        best = math.inf
        for _ in range(16):
            middle = (low + high) / 2
            self.sweep(math.exp(middle))
            found = int(self.outlier.sum())
            if found > budget:
                low = middle
            else:
                high, best = middle, middle
                if found >= 0.99 * budget:
                    break
        else:
            self.sweep(math.exp(best) if math.isfinite(best) else math.inf)
        self.notes["threshold"] = math.exp(best)

    def refine(self):
        hessian = self.factor.hessian[self.place][:, self.place] if self.order == "desc_act" else self.factor.hessian
        top = (1 << self.bits) - 1
        for index in range(len(self.grid.top)):
            span, grid = slice(index * self.size, (index + 1) * self.size), self.grid.group(index)
            inner = hessian[span, span]
            free = (~self.outlier[span]).to(self.weight.dtype)
            codes = self.codes[span].to(self.weight.dtype)
            value = (codes - grid.zero()) * grid.scale() * free
            gradient = hessian[span] @ self.delta + inner @ value
            grid.improve(Moments.full(codes, free, inner, gradient))
            new = (codes - grid.zero()) * grid.scale() * free
            gradient -= inner @ new
            delta = self.delta[span]
            delta += value - new
            pivots = inner.diagonal().unsqueeze(1)
            weight = self.weight[span]
            target = gradient.addmm_(inner.tril(), delta, alpha=-1).div_(pivots).add_(weight)
            delta.copy_(weight)
            one = torch.zeros(self.size, dtype=torch.int64, device=weight.device)
            OutlierSweep(
                target, delta, self.codes[span], inner.tril(-1).div_(pivots), _levels(grid), one, self.block,
                residual=self.residual[span], outlier=self.outlier[span], bound=None, top=top,
            ).run(0, self.size)

    def result(self):
        back = self.back
        group = None
        if self.order == "desc_act":
            group = (back // self.size).to(column_dtype(len(back) // self.size))
        base = self.grid.part(self.codes[back].T.contiguous(), self.size, group)
        where = self.outlier[back].T
        outliers = Sparse.of(self.residual[back].T, where) if bool(where.any()) else None
        return CompressedWeight(base, outliers)

    def loss(self):
        hessian = self.factor.hessian[self.place][:, self.place]
        return float(((hessian @ self.delta) * self.delta).sum() / ((hessian @ self.weight) * self.weight).sum())


def _levels(grid):
    scale, zero = grid.scale(), grid.zero()
    return Levels(scale, scale.reciprocal(), -zero, (1 << grid.bits) - 1 - zero, zero)


class SpQR(Method):
    """Options of SpQR."""

    needs: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)
    rows_independent: ClassVar[bool] = False

    bits: Bits = 3
    group_size: int = 16
    scale_bits: int = 3
    zero_bits: int = 3
    outlier_threshold: float | None = 0.2
    target_bits: float | None = None
    order: Order = "static"
    damp: float = 0.01
    refinements: int = 2

    def check(self, shape: tuple[int, int]) -> str | None:
        return indivisible(shape[1], self.group_size)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        return spqr(weight, stats[Hessian].matrix(), **self.model_dump())


METHOD = SpQR
