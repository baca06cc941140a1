"""Which weights are kept: single ones or runs of neighbours anywhere, or N of every M."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from compress.weights.bit_stream import stream_bits


def bitmask_bits(shape: tuple[int, int], size: int = 1) -> int:
    """Stored bits of a mask (out, in) of runs of `size` neighbours: one bit each."""
    return stream_bits(shape[0] * (shape[1] // size), 1)


def pattern_bits(shape: tuple[int, int], kept: int, of: int) -> int:
    """Stored bits of a mask (out, in) that keeps `kept` of every `of`: the number of a combination for each group."""
    return stream_bits(shape[0] * (shape[1] // of), choice_bits(kept, of))


def choice_bits(kept: int, of: int) -> int:
    """Bits of the number of a combination."""
    return (math.comb(of, kept) - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Bitmask:
    """A mask of its own for every weight, or for every run of `size` neighbouring columns of a row."""

    kept: Tensor  # (out, in / size) bool
    size: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.kept.shape[0], self.kept.shape[1] * self.size

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        return bitmask_bits(self.shape, self.size)

    def mask(self) -> Tensor:
        """Return which weights are kept, (out, in) bool."""
        return self.kept if self.size == 1 else self.kept.repeat_interleave(self.size, 1)

    def dequantize(self) -> Tensor:
        """Return 1 where a weight is kept and 0 elsewhere, (out, in) in float32."""
        return self.mask().to(torch.float32)

    def rows(self, start: int, stop: int) -> Bitmask:
        """Return the rows start..stop as a part of their own, sharing memory."""
        return replace(self, kept=self.kept[start:stop])


@cache
def _combinations(kept: int, of: int) -> Tensor:
    """Which places each combination keeps, (combinations, of) bool, in lexicographic order of the places kept."""
    chosen = torch.tensor(list(itertools.combinations(range(of), kept)), dtype=torch.int64)
    return torch.zeros(len(chosen), of, dtype=torch.bool).scatter_(1, chosen, True)


@dataclass(frozen=True, eq=False)
class Pattern:
    """A mask that keeps exactly N of every M consecutive columns of a row."""

    choice: Tensor  # (out, in / of) uint8, the number of the combination that a group keeps
    kept: int  # N
    of: int  # M, at most 8

    @classmethod
    def from_mask(cls, mask: Tensor, kept: int, of: int) -> Pattern:
        """Take a mask (out, in) bool; raises ValueError where a group does not keep exactly `kept` of `of`."""
        groups = mask.unflatten(1, (-1, of))
        if not bool((groups.sum(2) == kept).all()):
            raise ValueError(f"a group keeps another number of weights than {kept} of {of}")
        powers = 1 << torch.arange(of, device=mask.device)
        codes = (_combinations(kept, of).to(mask.device) * powers).sum(1)
        lookup = torch.zeros(1 << of, dtype=torch.uint8, device=mask.device)
        lookup[codes] = torch.arange(len(codes), device=mask.device).to(torch.uint8)
        return cls(lookup[(groups * powers).sum(2)], kept, of)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.choice.shape[0], self.choice.shape[1] * self.of

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        return pattern_bits(self.shape, self.kept, self.of)

    def mask(self) -> Tensor:
        """Return which weights are kept, (out, in) bool."""
        return _combinations(self.kept, self.of).to(self.choice.device)[self.choice.long()].flatten(1)

    def dequantize(self) -> Tensor:
        """Return 1 where a weight is kept and 0 elsewhere, (out, in) in float32."""
        return self.mask().to(torch.float32)

    def rows(self, start: int, stop: int) -> Pattern:
        """Return the rows start..stop as a part of their own, sharing memory."""
        return replace(self, choice=self.choice[start:stop])
