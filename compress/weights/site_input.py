"""The part of the role `input`: what is done to a site's input before the product, a transform and then rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.weights.activation import Activation
from compress.weights.input_transform import InputTransform


@dataclass(frozen=True, eq=False)
class SiteInput:
    """A transform, rounding, or both. All other parts of the weight are those of the input after it."""

    columns: int  # in
    transform: InputTransform | None = None
    activation: Activation | None = None

    def __post_init__(self) -> None:
        for piece in (self.transform, self.activation):
            if piece is not None and piece.columns != self.columns:
                raise FormatError(f"{type(piece).__name__} is for in={piece.columns}; expected in={self.columns}")

    @property
    def shape(self) -> tuple[int, int]:
        """(in, in): it is the same for any number of rows."""
        return self.columns, self.columns

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        return sum(piece.stored_bits for piece in (self.transform, self.activation) if piece is not None)

    def values(self) -> tuple[Tensor, ...]:
        """Return the stored numbers in float32: those of the transform, then static scales and zero codes."""
        numbers = () if self.transform is None else self.transform.values()
        static = () if self.activation is None else (self.activation.scale, self.activation.zero)
        return (*numbers, *(tensor.float() for tensor in static if tensor is not None))

    def seen(self, x: Tensor) -> Tensor:
        """Return what the product reads of inputs (..., in): transformed and rounded, in float32 and then in their own type."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.transform is not None:
            wide = self.transform.apply(wide)
        return (wide if self.activation is None else self.activation.quantize(wide)).to(x.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the inputs (..., in) whose product with the weight of original inputs is that of what `seen` makes of x.

        Gradients pass as if nothing were rounded.
        """
        if self.activation is None:
            return x
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        if self.transform is None:
            values = self.activation.quantize(wide)
        else:
            values = self.transform.inverse(self.activation.quantize(self.transform.apply(wide)))
        values = values.to(x.dtype)
        return values + (x - x.detach()) if x.requires_grad else values

    def multiply_out(self, weight: Tensor) -> Tensor:
        """Return the weight (out, in) of original inputs, given that of transformed ones."""
        return weight if self.transform is None else self.transform.multiply_out(weight)

    def dequantize(self) -> Tensor:
        """Return the matrix (in, in) that inputs are multiplied by, in float32."""
        one = torch.eye(self.columns)
        return one if self.transform is None else self.transform.apply(one)

    def rows(self, start: int, stop: int) -> SiteInput:
        """Return the part of the rows start..stop of a weight: itself, shared."""
        return self
