"""Statistics of the rows seen at one tap: sums and counts, so that passes and ranks add up exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

_BLOCK = (
    1024  # columns of a block: measured on 2 CPU cores, 4096 columns take 1.7 s instead of 2.6; narrower matrices gain nothing
)


_TOKENS = 4096  # tokens whose products tensor cores sum before they are added in float64


def _short(rows: Tensor) -> bool:
    """Whether tensor cores multiply these rows: 16-bit values on a GPU, with sums in float32."""
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.mm, "dtype")


def _moments(left: Tensor, right: Tensor) -> Tensor:
    """left^T right in float32 of rows (tokens, columns). A product in the rows' own dtype would round its result to it."""
    if _short(left):
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.float().T @ right.float()


class Statistics(Protocol):
    """An accumulator over the rows (tokens, in) that reach the linears of one tap."""

    tokens: int

    def __init__(self, columns: int, device: torch.device) -> None: ...

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """Bytes that one accumulator over `columns` input features holds."""
        ...

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, in)."""
        ...

    def merge(self, other: Self) -> None:
        """Add another accumulator's sums and counts."""
        ...

    def tensors(self) -> list[Tensor]:
        """The sums, to be reduced in place over ranks."""
        ...


class Hessian:
    """The second moment of a linear's inputs, the sum of x x^T over tokens.

    Products are formed in float32 and summed in float64. Batches do not depend on how the work is split, so totals over
    different passes and ranks differ only by float64 rounding, and the float32 matrix that a method sees is the same. Only the
    upper triangle, with the diagonal, is kept up to date.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.total = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """Bytes of the float64 sum and of the float32 product that is added to it."""
        return columns * columns * 12

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, in); products of bfloat16 and float16 values are exact in float32."""
        if rows.shape[0] == 0:
            return
        for part in rows.split(_TOKENS if _short(rows) else rows.shape[0]):
            # The sum is symmetric: only blocks on and above the diagonal are formed, which saves a third or more of the work.
            for start in range(0, rows.shape[1], _BLOCK):
                self.total[start : start + _BLOCK, start:] += _moments(part[:, start : start + _BLOCK], part[:, start:])
        self.tokens += rows.shape[0]

    def merge(self, other: Hessian) -> None:
        """Add another accumulator's sum and count."""
        self.total += other.total
        self.tokens += other.tokens

    def tensors(self) -> list[Tensor]:
        """The sum, to be reduced in place over ranks."""
        return [self.total]

    def matrix(self) -> Tensor:
        """Return the mean of x x^T, (in, in) float32; zeros when no token was seen."""
        mean = (self.total / max(self.tokens, 1)).float()
        return mean.triu() + mean.triu(1).T

    def divided(self, scales: Tensor) -> Hessian:
        """Return the accumulator of the same inputs divided by scales (in,)."""
        result = Hessian(0, self.total.device)
        result.total = self.total / scales / scales.unsqueeze(1)
        result.tokens = self.tokens
        return result

    def shrunk(self, pooled: Hessian, weight: float) -> Hessian:
        """Return this accumulator with `weight` tokens of the pooled mean added: the estimate for an expert that saw few tokens.

        H = (sum x x^T + weight * pooled mean) / (tokens + weight), see docs/methods.md, "Experts that saw few tokens".
        """
        result = Hessian(0, self.total.device)
        result.total = self.total + pooled.total * (weight / max(pooled.tokens, 1))
        result.tokens = self.tokens + round(weight)
        return result


class _ByChannel:
    """A sum over tokens for each channel of a linear's inputs, in float64."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """Bytes of the sum."""
        return columns * 8

    def merge(self, other: Self) -> None:
        """Add another accumulator's sum and count."""
        self.total += other.total
        self.tokens += other.tokens

    def tensors(self) -> list[Tensor]:
        """The sum, to be reduced in place over ranks."""
        return [self.total]

    def mean(self) -> Tensor:
        """Return the mean over tokens, (in,) float32; zeros when no token was seen."""
        return (self.total / max(self.tokens, 1)).float()


class Magnitude(_ByChannel):
    """The mean magnitude of each channel: the mean of |x|."""

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, in)."""
        self.total += rows.abs().sum(0, dtype=torch.float64)
        self.tokens += rows.shape[0]


class MeanSquare(_ByChannel):
    """The mean square of each channel, the diagonal of the Hessian: the mean of x^2."""

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, in)."""
        self.total += rows.float().square().sum(0, dtype=torch.float64)
        self.tokens += rows.shape[0]


class Drift:
    """How far a linear's inputs x after the compressed blocks are from the original's y: sums of x x^T and (y - x) x^T.

    Sums are in float64, products in float32. Both are stored whole, as the second is not symmetric.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.second = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.cross = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """Bytes of the two float64 sums and of a float32 product that is added to one."""
        return columns * columns * 20

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, in) without drift."""
        self.add_pair(rows, rows)

    def add_pair(self, rows: Tensor, original: Tensor) -> None:
        """Add rows (tokens, in) after the compressed blocks, and those of the same tokens in the original model."""
        rows, original = rows.float(), original.float()
        self.second += rows.T @ rows
        self.cross += (original - rows).T @ rows
        self.tokens += rows.shape[0]

    def merge(self, other: Drift) -> None:
        """Add another accumulator's sums and count."""
        self.second += other.second
        self.cross += other.cross
        self.tokens += other.tokens

    def tensors(self) -> list[Tensor]:
        """The sums, to be reduced in place over ranks."""
        return [self.second, self.cross]


Stats = dict[type[Statistics], Statistics]
Kind = TypeVar("Kind", bound=Statistics)


def statistic(stats: Mapping[type[Statistics], Statistics], kind: type[Kind]) -> Kind:
    """Return the statistic of a kind. Raises RuntimeError if it was not taken: a method gets those it names in `needs`."""
    found = stats.get(kind)
    if not isinstance(found, kind):
        there = ", ".join(other.__name__ for other in stats) or "none"
        raise RuntimeError(f"{kind.__name__}: not among the statistics that were taken ({there}); name it in `needs`")
    return found
