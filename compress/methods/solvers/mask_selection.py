"""Which weights are kept, given a score for each: exact numbers, ties broken by index.

    row       the floor(s in) lowest of every row go, as in the published programs
    matrix    the round(s out in) lowest of the whole matrix go
    group     the same, of runs of `group` neighbouring columns; the score of a run is the root of its scores' sum of squares
    pattern   of every M neighbouring columns the N highest are kept, whatever the sparsity

Of equal scores the first columns are kept, in a matrix those of the first rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.weights.mask import Bitmask, Pattern
from compress.weights.weight import Keep

Within = Literal["row", "matrix"]
LARGEST_PATTERN = 8  # M of what is stored as numbers of combinations


@dataclass(frozen=True)
class Target:
    """How much is pruned, and what competes with what."""

    sparsity: float = 0.5  # share that goes; of a pattern 1 - N / M
    pattern: tuple[int, int] | None = None  # N kept of M
    group: int = 1  # columns that go or stay together
    within: Within = "row"

    def pruned(self, units: int) -> int:
        """How many of so many competing units go; of a row no more than the share, but for what a product of floats is off by."""
        exact = self.sparsity * units
        return math.floor(exact + 1e-6) if self.within == "row" else round(exact)


def select(score: Tensor, target: Target) -> Tensor:
    """Return the mask (out, in) bool of what is kept by scores (out, in), higher ones first."""
    rows, columns = score.shape
    if target.pattern is not None:
        kept, of = target.pattern
        return highest(score.reshape(-1, of), kept).view(rows, columns)
    if target.group > 1:
        # Roots of sums of squares in the scale of the largest: squares of tiny scores would vanish.
        unit = score.abs().amax().clamp_min(torch.finfo(score.dtype).tiny)
        score = (score / unit).unflatten(1, (-1, target.group)).square().sum(2)
    flat = score if target.within == "row" else score.reshape(1, -1)
    units = flat.shape[1]
    keep = highest(flat, units - target.pruned(units)).view(rows, -1)
    return keep.repeat_interleave(target.group, 1) if target.group > 1 else keep


def highest(score: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` highest of each row of scores, of equal ones the first."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # Selecting takes a fraction of the time of sorting, which on a whole matrix would be most of what a solver does.
    least = score.kthvalue(score.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = score > least, score == least
    left = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= left))


def as_part(keep: Tensor, target: Target) -> Keep:
    """Return a mask (out, in) that was selected for a target as what is stored of it."""
    if target.pattern is not None and target.pattern[1] <= LARGEST_PATTERN:
        return Pattern.from_mask(keep, *target.pattern)
    return Bitmask(keep[:, :: target.group].contiguous(), target.group)
