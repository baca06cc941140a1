"""A product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def low_rank_bits(shape: tuple[int, int], rank: int, width: int = 16) -> int:
    """Stored bits of two factors of a weight (out, in), `width` bits per number."""
    return (shape[0] + shape[1]) * rank * width


@dataclass(frozen=True, eq=False)
class LowRank:
    """`left @ right`, both factors in one floating-point type."""

    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return self.left.shape[1]

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        return low_rank_bits(self.shape, self.rank, self.left.element_size() * 8)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return both factors in float32."""
        return self.left.float(), self.right.float()

    def dequantize(self) -> Tensor:
        """Return the product (out, in) in float32."""
        left, right = self.factors()
        return left @ right

    def rows(self, start: int, stop: int) -> LowRank:
        """Return the rows start..stop as a part of their own, sharing memory."""
        return LowRank(self.left[start:stop], self.right)
