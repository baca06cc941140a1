"""What is done to a site's input before the product: an invertible matrix P (in, in) that is cheap to apply.

With x the input (tokens, in) and V the weight (out, in) that is stored, the product is (x P) V^T = x W^T, so

    W = V P^T                 the weight of the original input (`multiply_out`)
    V = W P^-T                what a method compresses in its place (`apply_to_weight`)
    P^T H P                   the sum of squares of x P, with H that of x (`apply_to_hessian`)

    diagonal    P = diag(d)
    hadamard    P = diag(+-1) blockdiag(H_b / sqrt(b), ...), H_b the Hadamard matrix in Sylvester's order, b a power of two;
                P P^T = 1. The random signs make inputs that are large in one column spread evenly (QuIP, arXiv 2307.13304).
    kronecker   P = L (x) R with L (a, a), R (b, b), a b = in: with X (a, b) the input row by row, x P is L^T X R
                (FlatQuant, arXiv 2410.09426)

`multiply_out` of the first two takes operations in a fixed order, each rounded once, so that its bits are the same everywhere.
What is done to weights and statistics before they are compressed is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.weights.bit_stream import stream_bits


class InputTransform(Protocol):
    """A matrix P (in, in); every function returns what it takes in its own type, and computes in float32 at least."""

    @property
    def columns(self) -> int:
        """in"""
        ...

    @property
    def stored_bits(self) -> int:
        """Every bit that it occupies on disk."""
        ...

    def values(self) -> tuple[Tensor, ...]:
        """Return the numbers that it is made of, in float32."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """Return x P of inputs (..., in)."""
        ...

    def inverse(self, x: Tensor) -> Tensor:
        """Return x P^-1 of transformed inputs (..., in)."""
        ...

    def apply_to_weight(self, weight: Tensor) -> Tensor:
        """Return W P^-T of a weight (out, in), by which transformed inputs give the product that the weight gives."""
        ...

    def multiply_out(self, weight: Tensor) -> Tensor:
        """Return V P^T of a weight (out, in) for transformed inputs: the weight for original ones."""
        ...


def apply_to_hessian(transform: InputTransform, hessian: Tensor) -> Tensor:
    """Return P^T H P of a symmetric H (in, in), the sum or mean of x^T x: that of transformed inputs, without a second pass."""
    half = transform.apply(hessian.double())
    return transform.apply(half.T).to(hessian.dtype)


def hadamard_problem(block: object, columns: int) -> str | None:
    """Say what is wrong with a block size of a Hadamard transform of so many columns, or None."""
    whole = isinstance(block, int) and not isinstance(block, bool) and block > 0
    if not isinstance(block, int) or not whole or block & (block - 1) or columns % block:
        return f"block is {block!r:.80}; expected a power of two that divides in={columns}"
    return None


def butterfly(x: Tensor, block: int) -> Tensor:
    """Return x (..., in) times blockdiag(H_block) / sqrt(block): sums and differences at distances 1, 2, 4, ..., then scaled."""
    shape, distance = x.shape, 1
    while distance < block:
        first, second = x.reshape(*shape[:-1], -1, 2, distance).unbind(-2)
        x = torch.stack((first + second, first - second), -2)
        distance *= 2
    scale: float = block**-0.5
    return x.reshape(shape) * scale


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Diagonal:
    """P = diag(d): a factor for every column, none of them 0."""

    factors: Tensor  # (in,) bfloat16, float16 or float32

    @property
    def columns(self) -> int:
        """in"""
        return self.factors.shape[0]

    @property
    def stored_bits(self) -> int:
        """Every bit that it occupies on disk."""
        return self.factors.numel() * self.factors.element_size() * 8

    def values(self) -> tuple[Tensor, ...]:
        """Return the factors in float32."""
        return (self.factors.float(),)

    def apply(self, x: Tensor) -> Tensor:
        """Return x P of inputs (..., in)."""
        return (_wide(x) * self.factors.to(_wide(x))).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Return x P^-1 of transformed inputs (..., in)."""
        return (_wide(x) / self.factors.to(_wide(x))).to(x.dtype)

    def apply_to_weight(self, weight: Tensor) -> Tensor:
        """Return W P^-T of a weight (out, in)."""
        return (weight.double() / self.factors.double()).to(weight.dtype)

    def multiply_out(self, weight: Tensor) -> Tensor:
        """Return V P^T of a weight (out, in)."""
        return self.apply(weight)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """Signs, then a Hadamard matrix over every run of `block` columns. Raises FormatError where runs do not fit."""

    negative: Tensor  # (in,) bool: columns that change their sign
    block: int

    def __post_init__(self) -> None:
        if (problem := hadamard_problem(self.block, self.columns)) is not None:
            raise FormatError(f"hadamard: {problem}")

    @classmethod
    def random(cls, columns: int, block: int, generator: torch.Generator) -> Hadamard:
        """Return one with random signs."""
        return cls(torch.randint(0, 2, (columns,), generator=generator).bool(), block)

    @property
    def columns(self) -> int:
        """in"""
        return self.negative.shape[0]

    @property
    def stored_bits(self) -> int:
        """Every bit that it occupies on disk: a sign for each column."""
        return stream_bits(self.columns, 1)

    def values(self) -> tuple[Tensor, ...]:
        """Return the signs, 1 or -1."""
        return (1.0 - 2.0 * self.negative.float(),)

    def _signs(self, like: Tensor) -> Tensor:
        return self.values()[0].to(like)

    def apply(self, x: Tensor) -> Tensor:
        """Return x P of inputs (..., in)."""
        wide = _wide(x)
        return butterfly(wide * self._signs(wide), self.block).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Return x P^-1 of transformed inputs (..., in)."""
        wide = _wide(x)
        return (butterfly(wide, self.block) * self._signs(wide)).to(x.dtype)

    def apply_to_weight(self, weight: Tensor) -> Tensor:
        """Return W P^-T of a weight (out, in), which is W P."""
        return self.apply(weight.double()).to(weight.dtype)

    def multiply_out(self, weight: Tensor) -> Tensor:
        """Return V P^T of a weight (out, in), which is V P^-1."""
        return self.inverse(weight)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """P = left (x) right, both square and invertible, in one floating-point type."""

    left: Tensor  # (a, a)
    right: Tensor  # (b, b), a b = in

    @property
    def columns(self) -> int:
        """in"""
        return self.left.shape[0] * self.right.shape[0]

    @property
    def stored_bits(self) -> int:
        """Every bit that it occupies on disk."""
        return (self.left.numel() + self.right.numel()) * self.left.element_size() * 8

    def values(self) -> tuple[Tensor, ...]:
        """Return both matrices in float32."""
        return self.left.float(), self.right.float()

    def apply(self, x: Tensor) -> Tensor:
        """Return x P of inputs (..., in)."""
        wide = _wide(x)
        return _times(wide, self.left.to(wide), self.right.to(wide)).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Return x P^-1 of transformed inputs (..., in)."""
        left, right = (torch.linalg.inv(matrix.to(x.device).double()) for matrix in (self.left, self.right))
        return _times(x.double(), left, right).to(x.dtype)

    def apply_to_weight(self, weight: Tensor) -> Tensor:
        """Return W P^-T of a weight (out, in)."""
        left, right = (torch.linalg.inv(matrix.double()).T for matrix in (self.left, self.right))
        return _times(weight.double(), left, right).to(weight.dtype)

    def multiply_out(self, weight: Tensor) -> Tensor:
        """Return V P^T of a weight (out, in)."""
        wide = _wide(weight)
        return _times(wide, self.left.T.to(wide.dtype), self.right.T.to(wide.dtype)).to(weight.dtype)


def _times(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return x (..., in) times left (x) right."""
    found: Tensor = left.T @ (x.unflatten(-1, (left.shape[0], right.shape[0])) @ right)
    return found.flatten(-2)
