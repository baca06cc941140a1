"""Uniform grids per group of columns: fitting a scale and a zero point to weights, and rounding onto the grid.

    value = (code - zero) * scale + offset,    code - zero = clamp(round((w - offset) / scale), -zero, 2^b - 1 - zero)

symmetric   zero is the middle code, so `code - zero` is -2^(b-1) .. 2^(b-1)-1 (at one bit -1/2 and +1/2).
            minmax: scale = 2 max|w| / (2^b - 1), which cuts half a step off the upper end.
            mse: scales of both signs; a negative one turns the longer end of the range upwards.
bipolar     zero is half a step below the middle code, so `code - zero` is -(2^b - 1)/2 .. (2^b - 1)/2 in whole steps: the grid is
            its own mirror image, 0 is not on it, and minmax cuts nothing off.
asymmetric  zero is an integer. minmax: lo = min(w, 0), hi = max(w, 0), scale = (hi - lo) / (2^b - 1), zero = round(-lo / scale),
            so 0 is exact. mse: the same ranges shrunk.
offset      0, but where a method finds one of its own.

Shapes: weight (out, in); scale and zero (out, groups); a group is `group_size` consecutive columns, -1 is the whole row.
Scales are rounded to bfloat16, the type they are stored in, before any weight is rounded against them.
Source: the ranges of GPTQ (arXiv 2210.17323), with its mirrored end also where a group has no negative weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.methods.method import GroupSize, group_columns
from compress.weights.uniform import middle

Range = Literal["minmax", "mse"]

# A smaller scale is that of an empty group: 2^-60 is a bfloat16 whose inverse is finite in float32.
_TINY = 2.0**-60
# Elements searched at a time: all candidates of a chunk are tried while it is in the cache.
_CHUNK = 1 << 16
# The step of least squared error on a unit Gaussian, by bits (Max, "Quantizing for minimum distortion", 1960).
_GAUSSIAN_STEP = (1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
# Ranges tried, each with every sign or zero point. With the least-squares step that follows, 40 give the same error to 0.1 %.
_RANGES = 8


@dataclass(frozen=True, eq=False)
class Grid:
    """Scale, zero point and offset of every group."""

    scale: Tensor  # (out, groups) bfloat16, may be negative
    zero: Tensor | None  # (out, groups) uint8; None: the middle of a symmetric grid
    bits: int
    offset: Tensor | None = None  # (out, groups) bfloat16; None: 0
    bipolar: bool = False  # the middle is between two codes

    def levels(self, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Return the lowest and the highest `code - zero`, and the zero: (out, groups) each, or numbers."""
        zero: Tensor | float = middle(self.bits, self.bipolar) if self.zero is None else self.zero.to(dtype)
        return -zero, ((1 << self.bits) - 1) - zero, zero


def fit(
    weight: Tensor,
    bits: int,
    group_size: GroupSize,
    *,
    symmetric: bool,
    search: bool,
    importance: Tensor | None = None,
    bipolar: bool = False,
) -> Grid:
    """Fit a grid to each group of weight (out, in); a bipolar one is symmetric.

    With `search`, the one of least sum_j importance_j (w_j - q_j)^2, importance (in,), among shrunk ranges. The min-max range
    is one of them, so that the result is never worse.
    """
    grouped = _grouped(weight, group_size)
    scale, zero = _cover(grouped, bits, symmetric)
    if search:
        cost = torch.ones_like(weight[0]) if importance is None else importance
        rows = max(1, _CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            some = None if zero is None else zero[part]
            found = _Search(grouped[part], cost.view(grouped.shape[1:]), bits, scale[part], some, bipolar)
            found.run()
            scale[part] = found.scale
            if zero is not None and found.zero is not None:
                zero[part] = found.zero
    return Grid(scale.to(torch.bfloat16), None if zero is None else zero.to(torch.uint8), bits, bipolar=bipolar)


def encode(weight: Tensor, grid: Grid, group_size: GroupSize) -> Tensor:
    """Round weight (out, in) onto its grid and return codes (out, in) uint8."""
    grouped = _grouped(weight, group_size)
    low, high, zero = (x.unsqueeze(2) if isinstance(x, Tensor) else x for x in grid.levels(weight.dtype))
    if grid.offset is not None:
        grouped = grouped - grid.offset.to(weight.dtype).unsqueeze(2)
    inverse = grid.scale.to(weight.dtype).reciprocal().unsqueeze(2)
    return (nearest(grouped * inverse, low, high) + zero).to(torch.uint8).flatten(1)


def nearest(scaled: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Round w / scale in place to the nearest `code - zero`: integers, or halves of odd integers where these are low and high."""
    if isinstance(low, float) and isinstance(high, float) and low % 1 == 0.5:
        return scaled.floor_().clamp_(low - 0.5, high - 0.5).add_(0.5)
    return scaled.round_().clamp_(low, high)  # type: ignore[arg-type]


def stored(scale: Tensor) -> Tensor:
    """Round a scale to what bfloat16 holds, in its own dtype, and keep it away from zero."""
    return torch.where(scale.abs() < _TINY, _TINY, scale).to(torch.bfloat16).to(scale.dtype)


def _grouped(weight: Tensor, group_size: GroupSize) -> Tensor:
    """View weight (out, in) as (out, groups, group size)."""
    return weight.reshape(weight.shape[0], -1, group_columns(group_size, weight.shape[1]))


def _cover(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero (out, groups), in the dtype of the weights, that just cover every group (out, groups, group size)."""
    top = (1 << bits) - 1
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    if symmetric:  # both ends mirror the larger one, also where no weight is negative
        return stored(torch.maximum(-low, high) * (2 / top)), None
    scale = stored((high - low) / top)
    return scale, (-low / scale).round_().clamp_(0, top)


class _Search:
    """Finds the range of least weighted squared error of each group: among shrunk ranges, then by least squares on the codes."""

    def __init__(self, grouped: Tensor, cost: Tensor, bits: int, cover: Tensor, zero: Tensor | None, bipolar: bool) -> None:
        self.grouped = grouped  # (rows, groups, group size)
        self.cost = cost  # (groups, group size)
        self.bits, self.bipolar = bits, bipolar
        self.cover, self.scale = cover, cover  # (rows, groups)
        self.middle, self.zero = zero, zero  # (rows, groups), or None on a symmetric grid
        self.error = torch.full_like(cover, math.inf)  # (rows, groups)
        self._scaled, self._code = torch.empty_like(grouped), torch.empty_like(grouped)

    def run(self) -> None:
        """Try everything; the best is in `scale` and `zero`."""
        variants = [(1, 0)]
        if self.middle is not None:
            variants += [(1, -1), (1, 1)]  # where few codes lie below zero, the rounded zero point may be the wrong one
        elif middle(self.bits, self.bipolar) % 1 == 0:
            variants += [(-1, 0)]  # the end that reaches half a step further is then the upper one
        top = (1 << self.bits) - 1
        for scale in self._ranges():
            for sign, offset in variants:
                self._attempt(sign * scale, None if self.middle is None else (self.middle + offset).clamp_(0, top))
        self._polish()

    def _ranges(self) -> Iterator[Tensor]:
        """Yield scales (rows, groups) from the covering one down to less than what a Gaussian of the group's spread wants."""
        total = self.cost.sum(1).clamp_min(torch.finfo(self.cost.dtype).tiny)
        spread = (self.grouped.square().mul_(self.cost).sum(2) / total).sqrt_()
        ratio = (0.7 * _GAUSSIAN_STEP[self.bits - 1] * spread / self.cover).clamp_(0.01, 1.0)
        for step in range(_RANGES):
            yield self.cover * ratio.pow(step / (_RANGES - 1))

    def _encode(self, scale: Tensor, zero: Tensor | None) -> None:
        """Leave w / scale, and the nearest `code - zero`, in the two buffers."""
        torch.mul(self.grouped, scale.reciprocal().unsqueeze(2), out=self._scaled)
        low = -middle(self.bits, self.bipolar) if zero is None else -zero.unsqueeze(2)
        nearest(self._code.copy_(self._scaled), low, low + ((1 << self.bits) - 1))

    def _attempt(self, scale: Tensor, zero: Tensor | None) -> None:
        """Take over the groups where this scale and zero (rows, groups) do better."""
        scale = stored(scale)
        self._encode(scale, zero)
        error = self._scaled.sub_(self._code).square_().mul_(self.cost).sum(2) * scale.square()
        better = error < self.error
        self.error, self.scale = torch.where(better, error, self.error), torch.where(better, scale, self.scale)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def _polish(self) -> None:
        """Try the least-squares scale of the best range's codes: it lies between the ranges tried."""
        self._encode(self.scale, self.zero)
        weighted = torch.mul(self._code, self.cost, out=self._scaled)
        curvature = (weighted * self._code).sum(2)
        slope = weighted.mul_(self.grouped).sum(2)
        self._attempt(torch.where(curvature > 0, slope / curvature, self.scale), self.zero)
