"""Uniform grids per group of columns: fitting a scale and a zero point to weights, and rounding onto the grid.

value = (code - zero) * scale,  code = clamp(round(w / scale) + zero, 0, 2^b - 1)

symmetric   zero is the middle code, so the integers are -2^(b-1) .. 2^(b-1)-1 (at one bit -1/2 and +1/2);
            min-max: scale = 2 max|w| / (2^b - 1), which cuts half a step off both ends
asymmetric  lo = min(w, 0), hi = max(w, 0), scale = (hi - lo) / (2^b - 1), zero = round(-lo / scale): 0 is exact

Shapes: weight (out, in); scale and zero (out, groups); a group is `group_size` consecutive columns.
Scales are rounded to bfloat16, the type they are stored in, before any weight is rounded against them.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.weight import middle

Range = Literal["minmax", "mse"]

# Below this a group counts as zero: the scale stays a normal bfloat16 whose inverse is finite in float32.
_TINY = 2.0**-60
_CHUNK = 1 << 18  # elements searched at a time: candidates then stay in the cache


@dataclass(frozen=True, eq=False)
class Grid:
    """Scale and zero point of every group."""

    scale: Tensor  # (out, groups) bfloat16, may be negative
    zero: Tensor | None  # (out, groups) uint8; None: the middle of a symmetric grid
    bits: int

    def bounds(self, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Return lowest and highest `code - zero`, and the zero itself, each (out, groups) or a number."""
        top = float((1 << self.bits) - 1)
        if self.zero is None:
            return -middle(self.bits), top - middle(self.bits), middle(self.bits)
        zero = self.zero.to(dtype)
        return -zero, top - zero, zero


def whole_groups(weight: Tensor, group_size: int) -> Tensor:
    """View weight (out, in) as (out, groups, group size); -1 is one group per row."""
    return weight.unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))


def fit(weight: Tensor, bits: int, group_size: int, *, symmetric: bool, range: Range = "minmax") -> Grid:
    """Fit a grid to each group of weight (out, in)."""
    grouped = whole_groups(weight, group_size)
    scale, zero = _minmax(grouped, bits, symmetric)
    if range == "mse":
        rows = max(1, _CHUNK // weight.shape[1])
        for start in builtins.range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            scale[part], best_zero = _search(grouped[part], bits, scale[part], None if zero is None else zero[part])
            if zero is not None and best_zero is not None:
                zero[part] = best_zero
    return Grid(scale.to(torch.bfloat16), None if zero is None else zero.to(torch.uint8), bits)


def encode(weight: Tensor, grid: Grid, group_size: int) -> Tensor:
    """Round weight (out, in) onto its grid and return codes (out, in) uint8."""
    grouped = whole_groups(weight, group_size)
    scale = grid.scale.to(weight.dtype).unsqueeze(2)
    low, high, zero = (x.unsqueeze(2) if isinstance(x, Tensor) else x for x in grid.bounds(weight.dtype))
    return (nearest(grouped * scale.reciprocal(), low, high) + zero).to(torch.uint8).flatten(1)


def nearest(scaled: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Round w / scale in place to the nearest `code - zero`: integers, or -1/2 and +1/2 when low is -1/2."""
    if isinstance(low, float) and low == -0.5:
        return scaled.floor_().clamp_(-1.0, 0.0).add_(0.5)
    return scaled.round_().clamp_(low, high)  # type: ignore[arg-type]


def stored(scale: Tensor) -> Tensor:
    """Round a scale to what bfloat16 holds, keeping its dtype and away from zero."""
    safe = torch.where(scale.abs() < _TINY, torch.full_like(scale, _TINY), scale)
    return safe.to(torch.bfloat16).to(scale.dtype)


def _minmax(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero (out, groups) that just cover every group (out, groups, group size), in its dtype."""
    top = (1 << bits) - 1
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    if symmetric:  # both ends mirror the larger one, also where no weight is negative
        return stored(torch.maximum(-low, high) * (2 / top)), None
    scale = stored((high - low) / top)
    return scale, (-low / scale).round_().clamp_(0, top)


def _candidates(scale: Tensor, zero: Tensor | None, bits: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ranges to try: the min-max range first, then shrunk ones."""
    yield scale, zero
    for step in builtins.range(1, 80):
        yield stored(scale * (1 - step / 100)), zero


def _search(grouped: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the candidate scale and zero (rows, groups) of least squared error on every group (rows, groups, group size)."""
    best = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale.clone(), None if zero is None else zero.clone()
    top = float((1 << bits) - 1)
    for new, new_zero in _candidates(scale, zero, bits):
        low = -middle(bits) if new_zero is None else -new_zero.unsqueeze(2)
        code = nearest(grouped * new.reciprocal().unsqueeze(2), low, low + top)
        error = torch.addcmul(grouped, code, new.unsqueeze(2), value=-1).square_().sum(2)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, new, best_scale)
        if best_zero is not None and new_zero is not None:
            best_zero = torch.where(better, new_zero, best_zero)
    return best_scale, best_zero


def indivisible(columns: int, group_size: int) -> str | None:
    """Say what is wrong with a group size that does not divide the columns, and name the nearest ones that do."""
    if group_size == -1 or (group_size > 0 and columns % group_size == 0):
        return None
    sizes = [size for size in builtins.range(1, columns + 1) if columns % size == 0]
    near = sorted(sorted(sizes, key=lambda size: abs(size - group_size))[:3])
    return f"in={columns} is not a multiple of group_size={group_size}; use {', '.join(map(str, near))} or -1 for the whole row"
