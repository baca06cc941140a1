"""Codes on an affine grid per group of columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights.bit_stream import WORD, stream_bits
from compress.weights.kept_values import Stream, kept_groups, stored_groups


def middle(bits: int, bipolar: bool = False) -> float:
    """The zero point of a symmetric grid: the code 2^(b-1); half a step below it where no code means 0, as always at one bit."""
    return ((1 << bits) - 1) / 2 if bipolar or bits == 1 else float(1 << (bits - 1))


def uniform_bits(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    zero: bool,
    group_bits: int = 0,
    offset: bool = False,
    scale_bits: int = 16,
) -> int:
    """Stored bits of codes on an affine grid, (out, in): codes, scales, zero codes or offsets, `group_bits` per column."""
    rows, columns = shape
    groups = rows * (columns // group_size)
    beside = groups * (scale_bits + (16 if offset else 0)) + (stream_bits(groups, bits) if zero else 0)
    return stream_bits(rows * columns, bits) + beside + columns * group_bits


@dataclass(frozen=True, eq=False)
class Uniform:
    """Codes on an affine grid per group of columns: `value = (code - zero) * scale + offset`."""

    codes: Tensor  # (out, in) uint8, each below 2^bits
    scale: Tensor  # (out, groups) bfloat16; float16 or float32 in what other tools have made; may be negative
    bits: int
    group_size: int  # columns per group; `in` for one group per row
    zero: Tensor | None = None  # (out, groups) uint8 zero codes; None: the middle of a symmetric grid
    group: Tensor | None = (
        None  # (in,) group of each column, in the smallest of uint8, int16 and int32 that holds it; None: contiguous
    )
    offset: Tensor | None = None  # (out, groups) bfloat16, added to every value of a group; None: 0
    bipolar: bool = False  # the zero point is (2^bits - 1) / 2 and no code means 0: values are odd multiples of scale / 2

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        group_bits = 0 if self.group is None else self.group.element_size() * 8
        scale_bits = self.scale.element_size() * 8
        offset = self.offset is not None
        return uniform_bits(self.shape, self.bits, self.group_size, self.zero is not None, group_bits, offset, scale_bits)

    def kept_bits(self, keep: Tensor) -> int:
        """Every bit that it occupies where only the weights of a mask (out, in) are stored, and the grids of groups with some."""
        stream, live = Stream.of(keep, WORD), stored_groups(keep, self.group_size, self.group)
        groups = self.shape[0] * (self.scale.shape[1] if live is None else live)
        beside = groups * 16 * (1 if self.offset is None else 2) + (0 if self.zero is None else stream_bits(groups, self.bits))
        index = 0 if self.group is None else self.shape[1] * self.group.element_size() * 8
        return stream_bits(stream.count, self.bits) + stream.pointer_bits + beside + index

    def under(self, keep: Tensor) -> Uniform:
        """Return it as it is stored under a mask (out, in): code 0 where nothing is kept, scale 1 in groups that keep nothing."""
        live = kept_groups(keep, self.group_size, self.group)

        def kept(values: Tensor | None, where: Tensor, other: int) -> Tensor | None:
            return None if values is None else torch.where(where, values, values.new_full((), other))

        codes, scale = kept(self.codes, keep, 0), kept(self.scale, live, 1)
        assert codes is not None
        assert scale is not None
        return replace(self, codes=codes, scale=scale, zero=kept(self.zero, live, 0), offset=kept(self.offset, live, 0))

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in float32; exact without offsets, as codes and 16-bit scales are exact in float32."""

        def spread(values: Tensor) -> Tensor:
            """(out, groups) -> what fits the codes."""
            return values.float().unsqueeze(2) if self.group is None else values.float()[:, self.group.long()]

        codes = self.codes.float()
        if self.group is None:
            codes = codes.unflatten(1, (-1, self.group_size))  # (out, groups, group size)
        zero = middle(self.bits, self.bipolar) if self.zero is None else spread(self.zero)
        values: Tensor = (codes - zero) * spread(self.scale)
        if self.offset is not None:
            values += spread(self.offset)
        return values.flatten(1)

    def rows(self, start: int, stop: int) -> Uniform:
        """Return the rows start..stop as a weight of their own, sharing memory."""
        zero = None if self.zero is None else self.zero[start:stop]
        offset = None if self.offset is None else self.offset[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=zero, offset=offset)
