"""What a site's input is rounded to before the product: integers of 2 to 8 bits, or floats of 8 (e4m3).

With s the scale, b the bits, `low` and `high` the least and the largest of the inputs and 0, rounding half to even:

    symmetric   q = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1), value s q          dynamic: s = max |x| / (2^(b-1) - 1)
    otherwise   q = clamp(round(x / s) + z, 0, 2^b - 1), value s (q - z)           dynamic: s = (high - low) / (2^b - 1),
                                                                                   z = clamp(round(-low / s), 0, 2^b - 1)
    e4m3        q = the e4m3 number nearest to clamp(x / s, -448, 448), value s q  dynamic: s = max |x| / 448

A dynamic scale is that of a token, of a group of neighbouring columns of a token, or of all that a product reads at once; where
it would be 0 it is 1. A static one is stored, for the whole input or for each group of columns. Each operation is rounded once,
in float32 (in float64 for inputs of that type).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import FormatError

DATATYPES = (*(f"int{bits}" for bits in range(2, 9)), "e4m3")
GRAINS = ("token", "tensor", "group")  # what has a scale of its own
E4M3_MAX = 448.0


def activation_problem(
    datatype: object, per: object, group_size: object, symmetric: object, static: object, columns: int
) -> str | None:
    """Say what is wrong with the settings of a rounding of inputs of so many columns, or None."""
    if datatype not in DATATYPES:
        return f"datatype is {datatype!r:.80}; expected one of {', '.join(DATATYPES)}"
    if per not in GRAINS:
        return f"per is {per!r:.80}; expected one of {', '.join(GRAINS)}"
    if not isinstance(symmetric, bool) or (datatype == "e4m3" and not symmetric):
        return f"symmetric is {symmetric!r:.80}; expected true{'' if datatype == 'e4m3' else ' or false'} of {datatype}"
    if not isinstance(static, bool) or (static and per == "token"):
        return f"static is {static!r:.80}; expected false{'' if per == 'token' else ' or true'} with a scale per {per}"
    if per != "group":
        return None if group_size is None else f"group_size is {group_size!r:.80}; expected none with a scale per {per}"
    if not isinstance(group_size, int) or isinstance(group_size, bool) or not 0 < group_size <= columns or columns % group_size:
        return f"group_size is {group_size!r:.80}; expected a divisor of in={columns}"
    return None


@dataclass(frozen=True, eq=False)
class Activation:
    """The data type that inputs (..., in) are rounded to, and their scales. Raises FormatError for settings that do not fit."""

    columns: int  # in
    datatype: str  # int2 to int8, e4m3
    per: str = "token"  # or tensor, group
    group_size: int | None = None  # columns per scale, only with `per` group
    symmetric: bool = True
    scale: Tensor | None = None  # static ones, float32 (1,) or (groups,)
    zero: Tensor | None = None  # their zero codes, uint8, where not symmetric

    def __post_init__(self) -> None:
        static = self.scale is not None
        problem = activation_problem(self.datatype, self.per, self.group_size, self.symmetric, static, self.columns)
        expected = (self.columns // self.group_size if self.group_size else 1,)
        if problem is None and self.scale is not None and (self.scale.shape, self.scale.dtype) != (expected, torch.float32):
            problem = f"scale is {self.scale.dtype} {list(self.scale.shape)}; expected float32 {list(expected)}"
        if problem is None and (self.zero is not None) != (static and not self.symmetric):
            problem = "zero is there or not; expected zero codes where scales are static and not symmetric"
        if problem is None and self.zero is not None and (self.zero.shape, self.zero.dtype) != (expected, torch.uint8):
            problem = f"zero is {self.zero.dtype} {list(self.zero.shape)}; expected uint8 {list(expected)}"
        if problem is not None:
            raise FormatError(f"activation: {problem}")

    @property
    def bits(self) -> int:
        """Bits of a rounded input."""
        return 8 if self.datatype == "e4m3" else int(self.datatype.removeprefix("int"))

    @property
    def stored_bits(self) -> int:
        """Every bit that it occupies on disk: static scales and zero codes."""
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in (self.scale, self.zero) if tensor is not None)

    def quantize(self, x: Tensor) -> Tensor:
        """Return inputs (..., in) after rounding, as values, in their own type."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = wide.unflatten(-1, (-1, self.group_size or self.columns))  # (..., groups, columns of a group)
        scale, zero = self._dynamic(grouped) if self.scale is None else self._static(grouped)
        place = grouped / scale
        if self.datatype == "e4m3":
            rounded = place.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(place.dtype)
        elif zero is None:
            half = 1 << self.bits - 1
            rounded = place.round().clamp(-half, half - 1)
        else:
            rounded = (place.round() + zero).clamp(0, (1 << self.bits) - 1) - zero
        values: Tensor = (rounded * scale).flatten(-2)
        return values.to(x.dtype)

    def _static(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return stored scales and zero codes, (groups, 1)."""
        assert self.scale is not None
        scale = self.scale.to(grouped).unsqueeze(1)
        return scale, None if self.zero is None else self.zero.to(grouped).unsqueeze(1)

    def _dynamic(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scales and zero codes of inputs (..., groups, columns of a group), of which they keep all axes."""
        axes = tuple(range(grouped.dim())) if self.per == "tensor" else (-1,)
        if grouped.numel() == 0:
            return grouped.new_ones(1), None if self.symmetric else grouped.new_zeros(1)
        top = E4M3_MAX if self.datatype == "e4m3" else float((1 << self.bits - 1) - 1)
        if self.symmetric:
            return _not_zero(grouped.abs().amax(axes, keepdim=True) / top), None
        low, high = grouped.amin(axes, keepdim=True).clamp_max(0), grouped.amax(axes, keepdim=True).clamp_min(0)
        codes = float((1 << self.bits) - 1)
        scale = _not_zero((high - low) / codes)
        return scale, (-low / scale).round().clamp(0, codes)


def _not_zero(scale: Tensor) -> Tensor:
    """Inputs that are all 0, or too small for a scale, become 0 by the scale 1."""
    return torch.where(scale == 0, 1.0, scale)
