"""A few single weights, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def column_dtype(columns: int) -> torch.dtype:
    """The smallest integer type that holds every index below `columns` without its sign bit."""
    return torch.uint8 if columns <= 1 << 8 else torch.int16 if columns <= 1 << 15 else torch.int32


def sparse_bits(shape: tuple[int, int], count: int) -> int:
    """Stored bits of `count` single weights of a matrix (out, in): row pointers, columns and values."""
    return 32 * (shape[0] + 1) + count * (8 * column_dtype(shape[1]).itemsize + 16)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Compressed sparse rows: row r has `values[pointers[r]:pointers[r+1]]` at as many `columns`, and zeros elsewhere.

    Values are bfloat16: they are what a base misses, so that 8 bits of them are precise enough, and none of them overflows.
    """

    pointers: Tensor  # (out + 1,) int32, from 0 to nnz, never falling
    columns: Tensor  # (nnz,) rising within each row, in the smallest of uint8, int16 and int32 that holds them
    values: Tensor  # (nnz,) bfloat16
    width: int  # in

    @classmethod
    def of(cls, values: Tensor, where: Tensor) -> Sparse:
        """Take the values (out, in) at the places (out, in) that are true."""
        counts = where.sum(1)
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        columns = where.nonzero()[:, 1].to(column_dtype(where.shape[1]))
        return cls(pointers, columns, values[where].to(torch.bfloat16), where.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.pointers.shape[0] - 1, self.width

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        return sparse_bits(self.shape, self.columns.shape[0])

    def dequantize(self) -> Tensor:
        """Return the values (out, in) in float32, zeros where there is none."""
        rows, columns = self.shape
        counts = self.pointers.diff().long()
        row = torch.arange(rows, device=counts.device).repeat_interleave(counts, output_size=self.columns.shape[0])
        result = torch.zeros(rows, columns, device=self.values.device)
        result[row, self.columns.long()] = self.values.float()
        return result

    def rows(self, start: int, stop: int) -> Sparse:
        """Return the rows start..stop as a part of their own, sharing memory where it can."""
        first, last = int(self.pointers[start]), int(self.pointers[stop])
        return Sparse(self.pointers[start : stop + 1] - first, self.columns[first:last], self.values[first:last], self.width)
