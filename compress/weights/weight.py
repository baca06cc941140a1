"""A compressed weight as numbers, before bytes: the sum of its parts, which know their values and nothing about files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor

from compress.errors import FormatError
from compress.weights.site_input import SiteInput

# What a part of a weight can be, in the order they are stored: keep * base + outliers + low_rank is the weight of what `input`
# makes of the site's input.
ROLES = ("base", "keep", "outliers", "low_rank", "input")
SUMMANDS = ("base", "outliers", "low_rank")


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


class Maskable(Part, Protocol):
    """A base of which only the kept weights are stored, where a mask goes with it."""

    def kept_bits(self, keep: Tensor) -> int:
        """Every bit that it occupies on disk with the mask (out, in) bool."""
        ...

    def under(self, keep: Tensor) -> Self:
        """Return it with the values that are restored from disk at places (out, in) that are not kept."""
        ...


class Keep(Part, Protocol):
    """A mask as a part."""

    def mask(self) -> Tensor:
        """Return which weights are kept, (out, in) bool."""
        ...


class Product(Part, Protocol):
    """A part that is a product of two matrices."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return both, (out, rank) and (rank, in) in float32."""
        ...


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """What replaces one weight: `keep * base + outliers + low_rank`, of which a base alone is the least.

    Where there is an `input`, that is the weight of the transformed input, and `dequantize` still that of the original one.
    """

    base: Part
    outliers: Part | None = None  # what the base misses at a few places
    keep: Keep | None = None  # the base is 0 elsewhere, and not stored there; the base is then a Maskable
    low_rank: Product | None = None
    input: SiteInput | None = None  # what the site's input goes through before the product

    @classmethod
    def pruned(cls, base: Maskable, keep: Keep) -> CompressedWeight:
        """Make one of a base of which only what is kept counts."""
        return cls(base.under(keep.mask()), keep=keep)

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by role, in the order they are stored."""
        return {role: part for role in ROLES if (part := getattr(self, role)) is not None}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.base.shape

    @property
    def stored_bits(self) -> int:
        """Every bit that the weight occupies on disk."""
        bits = sum(part.stored_bits for role, part in self.parts.items() if role != "base")
        if self.keep is None:
            return bits + self.base.stored_bits
        kept_bits: Callable[[Tensor], int] | None = getattr(self.base, "kept_bits", None)
        if kept_bits is None:
            raise FormatError(f"{type(self.base).__name__}: cannot be stored under a mask; use a dense or uniform base")
        return bits + kept_bits(self.keep.mask())

    @property
    def transformed(self) -> bool:
        """Whether the parts are those of a transformed input: values to add to them are not values of the weight."""
        return self.input is not None and self.input.transform is not None

    @property
    def rounded_input(self) -> SiteInput | None:
        """What the site's input goes through, where that rounds it; None otherwise."""
        return self.input if self.input is not None and self.input.activation is not None else None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the number of weights."""
        rows, columns = self.shape
        return self.stored_bits / (rows * columns)

    @property
    def sparsity(self) -> float | None:
        """Share of weights that the base does not keep; None without a mask."""
        return None if self.keep is None else 1 - float(self.keep.mask().double().mean())

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) of the original input in float32."""
        values = self.exact()
        if self.low_rank is not None:
            values.add_(self.low_rank.dequantize())
        return values if self.input is None else self.input.multiply_out(values)

    def exact(self) -> Tensor:
        """Return keep * base + outliers (out, in) in float32: there is no sum in it whose order could change a bit."""
        values = self.base.dequantize()
        if self.keep is not None:
            values.masked_fill_(~self.keep.mask(), 0.0)
        return values if self.outliers is None else values.add_(self.outliers.dequantize())

    def rows(self, start: int, stop: int) -> CompressedWeight:
        """Return the rows start..stop as a weight of their own, sharing memory where it can."""
        cut: dict[str, Any] = {role: part.rows(start, stop) for role, part in self.parts.items()}
        return CompressedWeight(**cut)


def relative_error(weight: Tensor, decoded: Tensor, hessian: Tensor | None = None) -> float:
    """Return tr((W-Q) H (W-Q)^T) / tr(W H W^T) of weights (out, in); H (in, in) is the identity if None. 0 for a zero weight."""
    delta = weight - decoded
    lost = delta.square().sum() if hessian is None else ((delta @ hessian) * delta).sum()
    whole = weight.square().sum() if hessian is None else ((weight @ hessian) * weight).sum()
    return float(lost / whole) if float(whole) > 0 else 0.0
