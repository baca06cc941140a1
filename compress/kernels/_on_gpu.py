"""A weight laid out for a kernel of a GPU, with the parts that are added to what the kernel multiplies by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from compress.kernels import _cuda, low_rank, sparse_rows
from compress.kernels.kernel import Kernel, Use

W = TypeVar("W")
ROLES = frozenset({"base", "outliers", "low_rank"})  # the base, and what `Added` has


@dataclass(frozen=True, eq=False)
class Added:
    """The parts that are added to the base under its mask, as they are stored."""

    outliers: tuple[Tensor, Tensor, Tensor] | None  # pointers, columns, values
    low_rank: tuple[Tensor, Tensor] | None  # left, right

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Added:
        """Find them among the packed tensors of a site."""
        outliers = factors = None
        if "outliers_values" in tensors:
            outliers = tensors["outliers_pointers"], tensors["outliers_columns"], tensors["outliers_values"]
        if "low_rank_left" in tensors:
            factors = tensors["low_rank_left"], tensors["low_rank_right"]
        return cls(outliers, factors)

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return self.outliers is None and self.low_rank is None

    def product(self, x: Tensor) -> Tensor | None:
        """x (..., in) times their W^T -> (tokens, out) float32, or None where there are none."""
        y = None
        if self.outliers is not None:
            y = sparse_rows.product(x, *self.outliers)
        if self.low_rank is not None:
            y = low_rank.product(x, *self.low_rank, y)
        return y


@dataclass(frozen=True, eq=False)
class OnGpu(Generic[W]):
    """A `Laid` of a weight in a kernel's own form."""

    kernel: Kernel
    weight: W
    multiply: Callable[[Tensor, W, Tensor | None, Tensor | None], Tensor]  # x, weight, what is added in float32, bias
    again: Callable[[W], dict[str, Tensor]]  # what is replaced, as it was stored
    replaces: tuple[str, ...]
    added: Added
    dtype: torch.dtype | None = None  # the only one of x that the weight's values can be multiplied by

    def takes(self, use: Use) -> bool:
        """Whether the kernel multiplies by such activations."""
        return _cuda.takes(use) and (self.dtype is None or use.dtype == self.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) times W^T, plus bias -> (..., out), rounded once."""
        return self.multiply(x, self.weight, self.added.product(x), bias)

    def stored(self) -> dict[str, Tensor]:
        """Make what it replaces again."""
        return self.again(self.weight)
