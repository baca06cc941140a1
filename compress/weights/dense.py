"""Weights as they are, in a floating-point type: the base of a pruned weight that is not quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.weights.kept_values import Stream

DENSE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def smallest_dtype(values: Tensor) -> torch.dtype:
    """The type of 16 bits that holds all values exactly, bfloat16 before float16, or else float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return dtype
    return torch.float32


@dataclass(frozen=True, eq=False)
class Dense:
    """Values in bfloat16, float16 or float32."""

    values: Tensor  # (out, in)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.values.shape[0], self.values.shape[1]

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        return self.values.numel() * self.values.element_size() * 8

    def kept_bits(self, keep: Tensor) -> int:
        """Every bit that it occupies where only the weights of a mask (out, in) are stored."""
        stream = Stream.of(keep, 1)
        return stream.count * self.values.element_size() * 8 + stream.pointer_bits

    def under(self, keep: Tensor) -> Dense:
        """Return it with 0 at what a mask (out, in) does not keep, and without negative zeros."""
        return Dense(torch.where(keep & (self.values != 0), self.values, torch.zeros((), dtype=self.values.dtype)))

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in float32."""
        return self.values.to(torch.float32, copy=True)

    def rows(self, start: int, stop: int) -> Dense:
        """Return the rows start..stop as a weight of their own, sharing memory."""
        return Dense(self.values[start:stop])
