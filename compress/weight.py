"""A compressed weight as numbers, before bytes: parts that know their values and count their bits, and nothing about files."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

WORD = 32  # bits of the words that codes are packed into


def stream_bits(count: int, bits: int) -> int:
    """Bits that `count` fields of `bits` bits occupy in one dense stream cut into 32-bit words."""
    return -(-count * bits // WORD) * WORD


def middle(bits: int) -> float:
    """The zero point of a symmetric grid: the code 2^(b-1), or half a step at one bit, where -s/2 and +s/2 are the two values."""
    return float(1 << (bits - 1)) if bits > 1 else 0.5


def uniform_bits(shape: tuple[int, int], bits: int, group_size: int, zero: bool, group_bits: int = 0) -> int:
    """Stored bits of codes on an affine grid, (out, in): codes, bfloat16 scales, zero codes, and `group_bits` per column."""
    rows, columns = shape
    groups = rows * (columns // group_size)
    return stream_bits(rows * columns, bits) + groups * 16 + (stream_bits(groups, bits) if zero else 0) + columns * group_bits


@dataclass(frozen=True, eq=False)
class Uniform:
    """Codes on an affine grid per group of columns: `value = (code - zero) * scale`."""

    codes: Tensor  # (out, in) uint8, each below 2^bits
    scale: Tensor  # (out, groups) bfloat16; may be negative
    bits: int
    group_size: int  # columns per group; `in` for one group per row
    zero: Tensor | None = None  # (out, groups) uint8 zero codes; None: the middle of a symmetric grid
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
        return uniform_bits(self.shape, self.bits, self.group_size, self.zero is not None, group_bits)

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in float32; exact, because codes and bfloat16 scales are exact in float32."""
        codes = self.codes.float()
        if self.group is None:
            codes = codes.unflatten(1, (-1, self.group_size))  # (out, groups, group size)
            zero = middle(self.bits) if self.zero is None else self.zero.float().unsqueeze(2)
            values: Tensor = (codes - zero) * self.scale.float().unsqueeze(2)
            return values.flatten(1)
        group = self.group.long()
        zero = middle(self.bits) if self.zero is None else self.zero.float()[:, group]
        return (codes - zero) * self.scale.float()[:, group]

    def rows(self, start: int, stop: int) -> Uniform:
        """Return the rows start..stop as a weight of their own, sharing memory."""
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=zero)


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """What replaces one weight: the sum of its parts."""

    base: Uniform

    @property
    def parts(self) -> dict[str, Uniform]:
        """The parts by role, in the order they are stored."""
        return {"base": self.base}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.base.shape

    @property
    def stored_bits(self) -> int:
        """Every bit that the weight occupies on disk."""
        return sum(part.stored_bits for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the number of weights."""
        rows, columns = self.shape
        return self.stored_bits / (rows * columns)

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in float32."""
        return self.base.dequantize()

    def rows(self, start: int, stop: int) -> CompressedWeight:
        """Return the rows start..stop as a weight of their own, sharing memory."""
        return CompressedWeight(self.base.rows(start, stop))


def relative_error(weight: Tensor, decoded: Tensor, hessian: Tensor | None = None) -> float:
    """Return tr((W-Q) H (W-Q)^T) / tr(W H W^T) of weights (out, in); H (in, in) is the identity if None. 0 for a zero weight."""
    delta = weight - decoded
    lost = delta.square().sum() if hessian is None else ((delta @ hessian) * delta).sum()
    whole = weight.square().sum() if hessian is None else ((weight @ hessian) * weight).sum()
    return float(lost / whole) if float(whole) > 0 else 0.0
