"""Codes whose width differs from one group of columns to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights.bit_stream import stream_bits
from compress.weights.uniform import middle

WIDTHS = range(1, 9)  # bits per code that a group may have
WIDTH_BITS = 3  # of the field that holds a group's width, less one


def group_dtype(groups: int) -> torch.dtype:
    """The smallest of three integer types that holds the number of a group."""
    return torch.uint8 if groups <= 1 << 8 else torch.int16 if groups <= 1 << 15 else torch.int32


def group_bits(groups: int) -> int:
    """Bits of the field that holds the group of a column: as many as are needed up to 8, beyond that those of `group_dtype`."""
    needed = max(1, (groups - 1).bit_length())
    return needed if needed <= 8 else group_dtype(groups).itemsize * 8


def mixed_bits(shape: tuple[int, int], counts: Sequence[int], group_size: int, zero: bool, scattered: bool) -> int:
    """Stored bits of codes (out, in) of which `counts[b - 1]` groups have b bits each; `scattered`: with the group of columns."""
    (rows, columns), groups = shape, sum(counts)
    codes = sum(stream_bits(rows * group_size * count, bits) for bits, count in zip(WIDTHS, counts, strict=True))
    zeros = sum(stream_bits(rows * count, bits) for bits, count in zip(WIDTHS, counts, strict=True) if bits > 1) if zero else 0
    index = 0
    if scattered:  # a type of whole bytes is not cut into words
        index = stream_bits(columns, group_bits(groups)) if groups <= 1 << 8 else columns * group_bits(groups)
    return codes + zeros + rows * groups * 16 + stream_bits(groups, WIDTH_BITS) + index


@dataclass(frozen=True, eq=False)
class Mixed:
    """Codes on a grid per row and group of columns: `value = (code - zero) * scale`, with one width of codes per group.

    Without zero codes, and always at one bit, where a grid with an exact 0 would have one other value, zero is the middle code
    of a symmetric grid.
    """

    codes: Tensor  # (out, in) uint8, each below 2^width of its group
    scale: Tensor  # (out, groups) bfloat16; may be negative
    widths: Tensor  # (groups,) uint8, 1 to 8
    group_size: int  # columns per group
    zero: Tensor | None = None  # (out, groups) uint8 zero codes, 0 in groups of one bit; None: symmetric grids
    group: Tensor | None = None  # (in,) `group_dtype`, the group of each column; None: groups of neighbours

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def counts(self) -> list[int]:
        """Groups of 1, 2, ..., 8 bits."""
        found: list[int] = torch.bincount(self.widths.long(), minlength=WIDTHS.stop)[1:].tolist()
        return found

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        return mixed_bits(self.shape, self.counts, self.group_size, self.zero is not None, self.group is not None)

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in float32; exact, as codes and bfloat16 scales are."""
        table = torch.tensor([0.0, *(middle(bits) for bits in WIDTHS)], device=self.codes.device)
        zero = table[self.widths.long()].expand_as(self.scale)
        if self.zero is not None:
            zero = torch.where(self.widths > 1, self.zero.float(), zero)
        if self.group is not None:
            index = self.group.long()
            scattered: Tensor = (self.codes.float() - zero[:, index]) * self.scale.float()[:, index]
            return scattered
        codes = self.codes.float().unflatten(1, (-1, self.group_size))  # (out, groups, group size)
        values: Tensor = (codes - zero.unsqueeze(2)) * self.scale.float().unsqueeze(2)
        return values.flatten(1)

    def rows(self, start: int, stop: int) -> Mixed:
        """Return the rows start..stop as a weight of their own, sharing memory."""
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=zero)
