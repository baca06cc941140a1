"""A compressed weight as numbers, before bytes: the sum of its parts, which know their values and nothing about files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor


class Part(Protocol):
    """One summand of a weight: a frozen dataclass of tensors and numbers, of which `compress/formats` stores each kind."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        ...

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        ...

    def dequantize(self) -> Tensor:
        """Return the values (out, in) in float32."""
        ...

    def rows(self, start: int, stop: int) -> Self:
        """Return the rows start..stop as a part of their own, sharing memory where it can."""
        ...


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """What replaces one weight: the sum of its parts."""

    base: Part
    outliers: Part | None = None  # what the base misses at a few places

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by role, in the order they are stored."""
        return {"base": self.base} | ({} if self.outliers is None else {"outliers": self.outliers})

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
        values = self.base.dequantize()
        return values if self.outliers is None else values.add_(self.outliers.dequantize())

    def rows(self, start: int, stop: int) -> CompressedWeight:
        """Return the rows start..stop as a weight of their own, sharing memory where it can."""
        outliers = None if self.outliers is None else self.outliers.rows(start, stop)
        return CompressedWeight(self.base.rows(start, stop), outliers)


def relative_error(weight: Tensor, decoded: Tensor, hessian: Tensor | None = None) -> float:
    """Return tr((W-Q) H (W-Q)^T) / tr(W H W^T) of weights (out, in); H (in, in) is the identity if None. 0 for a zero weight."""
    delta = weight - decoded
    lost = delta.square().sum() if hessian is None else ((delta @ hessian) * delta).sum()
    whole = weight.square().sum() if hessian is None else ((weight @ hessian) * weight).sum()
    return float(lost / whole) if float(whole) > 0 else 0.0
