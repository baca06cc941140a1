"""Codes on an affine grid per small group of columns, whose scales and zero points are codes themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.weights.bit_stream import stream_bits

TILE = 16  # consecutive rows that share a second level
STEP_BITS = 7  # a scale step of 2^7 / (2^scale_bits - 1) 2^scale_bits reaches from `scale_top` down to zero


def tiles(rows: int) -> int:
    """Number of tiles of rows; the last one may have fewer."""
    return -(-rows // TILE)


def two_level_bits(
    shape: tuple[int, int], bits: int, group_size: int, scale_bits: int, zero_bits: int, group_bits: int = 0
) -> int:
    """Stored bits of codes (out, in) with scales and zeros in two levels, and `group_bits` per column."""
    rows, columns = shape
    groups = columns // group_size
    first = stream_bits(rows * groups, scale_bits) + stream_bits(rows * groups, zero_bits)
    return stream_bits(rows * columns, bits) + first + tiles(rows) * groups * (16 + 8 + 8 + 8) + columns * group_bits


def decode_scale(code: Tensor, top: Tensor, step: Tensor, scale_bits: int) -> Tensor:
    """`top * (1 - code * step / 2^(7 + scale_bits))`, in the dtype of `top`; in float32 exact for a bfloat16 `top`."""
    unit = 1 << (STEP_BITS + scale_bits)
    return (unit - code.to(top.dtype) * step.to(top.dtype)) * (top / unit)


def decode_zero(code: Tensor, offset: Tensor, step: Tensor, zero_bits: int, bits: int, dtype: torch.dtype) -> Tensor:
    """`(offset + code * step / 2^zero_bits) * 2^(bits - 8)`, exact."""
    fine = offset.to(dtype) * (1 << zero_bits) + code.to(dtype) * step.to(dtype)
    return fine * 2.0 ** (bits - 8 - zero_bits)


@dataclass(frozen=True, eq=False)
class TwoLevel:
    """Codes on an affine grid per group of columns: `value = (code - zero) * scale`, scale and zero from codes in turn.

    Sixteen consecutive rows share, in each group of columns, the grid of their scales and that of their zeros:

        scale = scale_top * (1 - scale_code * scale_step / 2^(7 + scale_bits))
        zero  = (zero_offset + zero_code * zero_step / 2^zero_bits) * 2^(bits - 8)

    The largest scale is bfloat16, for the range of float32. All else is relative to something known, the largest scale or the
    range of codes, so that fixed point does and a byte is precise enough: 40 bits instead of the 64 of four halves. Equal
    scales are the step 0. Scale and zero are exact in float32, and the value is one product, rounded once.
    """

    codes: Tensor  # (out, in) uint8, each below 2^bits
    scale_code: Tensor  # (out, groups) uint8, each below 2^scale_bits
    zero_code: Tensor  # (out, groups) uint8, each below 2^zero_bits
    scale_top: Tensor  # (tiles, groups) bfloat16
    scale_step: Tensor  # (tiles, groups) uint8
    zero_offset: Tensor  # (tiles, groups) uint8
    zero_step: Tensor  # (tiles, groups) uint8
    bits: int
    scale_bits: int
    zero_bits: int
    group_size: int  # columns per group
    group: Tensor | None = (
        None  # (in,) group of each column, in the smallest of uint8, int16 and int32 that holds it; None: contiguous
    )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        group_bits = 0 if self.group is None else self.group.element_size() * 8
        return two_level_bits(self.shape, self.bits, self.group_size, self.scale_bits, self.zero_bits, group_bits)

    def scale(self) -> Tensor:
        """Return the scales (out, groups) in float32, exact."""
        return decode_scale(self.scale_code, self._spread(self.scale_top.float()), self._spread(self.scale_step), self.scale_bits)

    def zero(self) -> Tensor:
        """Return the zero points (out, groups) in float32, exact; they are no integers."""
        offset, step = self._spread(self.zero_offset), self._spread(self.zero_step)
        return decode_zero(self.zero_code, offset, step, self.zero_bits, self.bits, torch.float32)

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in float32."""
        scale, zero, codes = self.scale(), self.zero(), self.codes.float()
        if self.group is None:
            grouped = codes.unflatten(1, (-1, self.group_size))  # (out, groups, group size)
            values: Tensor = (grouped - zero.unsqueeze(2)) * scale.unsqueeze(2)
            return values.flatten(1)
        index = self.group.long()
        return (codes - zero[:, index]) * scale[:, index]

    def _spread(self, values: Tensor) -> Tensor:
        """(tiles, groups) -> (out, groups)"""
        return values.repeat_interleave(TILE, 0)[: self.shape[0]]

    def rows(self, start: int, stop: int) -> TwoLevel:
        """Return the rows start..stop as a part of their own, sharing memory. Raises ValueError for a `start` inside a tile."""
        if start % TILE:
            raise ValueError(f"rows {start}..{stop} of a two-level weight: expected a start that is a multiple of {TILE}")
        rows, tile = slice(start, stop), slice(start // TILE, tiles(stop))
        first = {name: getattr(self, name)[rows] for name in ("codes", "scale_code", "zero_code")}
        second = {name: getattr(self, name)[tile] for name in ("scale_top", "scale_step", "zero_offset", "zero_step")}
        return replace(self, **first, **second)
