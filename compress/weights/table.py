"""Codes that name the entries of a small table of values, scaled per group of columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from compress.weights.bit_stream import stream_bits

ScaleType = Literal["bfloat16", "uint8", "e8m0", "e4m3"]
SCALE_TYPES: tuple[ScaleType, ...] = get_args(ScaleType)
# What a scale is stored in, and the scale of the whole row that it is multiplied by.
SCALE_DTYPES: dict[ScaleType, tuple[torch.dtype, torch.dtype | None]] = {
    "bfloat16": (torch.bfloat16, None),
    "uint8": (torch.uint8, torch.bfloat16),
    "e8m0": (torch.uint8, None),  # 2^(code - 127); 255 is not a number
    "e4m3": (torch.float8_e4m3fn, torch.float32),
}


def _signed(*magnitudes: float, special: float = -0.0) -> tuple[float, ...]:
    """Values of sign-magnitude codes; the code of -0 may stand for a special value."""
    return (*magnitudes, special, *(-value for value in magnitudes[1:]))


# Values by code; a datatype with several tables has one of them chosen for each group.
DATATYPES: dict[str, tuple[tuple[float, ...], ...]] = {
    "fp3": (_signed(0, 1, 2, 4),),
    "fp4": (_signed(0, 0.5, 1, 1.5, 2, 3, 4, 6),),  # E2M1 of the OCP microscaling formats
    # Quantiles of a Gaussian, see tests/methods/quant/test_floating.py for how they come about.
    "nf4": (
        (
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
            *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ),
    ),
    # BitMoD: extra resolution, then extra asymmetry, each with both signs. The four-bit values are twice those of E2M1.
    "bitmod-fp3": tuple(_signed(0, 1, 2, 4, special=value) for value in (3.0, -3.0, 6.0, -6.0)),
    "bitmod-fp4": tuple(_signed(0, 1, 2, 3, 4, 6, 8, 12, special=value) for value in (10.0, -10.0, 16.0, -16.0)),
}


def code_bits(datatype: str) -> int:
    """Bits of a code."""
    return (len(DATATYPES[datatype][0]) - 1).bit_length()


def select_bits(datatype: str) -> int:
    """Bits of the choice among the tables of a datatype; 0 where there is one."""
    return (len(DATATYPES[datatype]) - 1).bit_length()


def table_bits(shape: tuple[int, int], datatype: str, group_size: int, scale_type: ScaleType) -> int:
    """Stored bits of a weight (out, in): codes, scales, choices of tables, scales of rows."""
    rows, columns = shape
    groups = rows * (columns // group_size)
    scale, row = SCALE_DTYPES[scale_type]
    beside = groups * scale.itemsize * 8 + (0 if row is None else rows * row.itemsize * 8)
    return stream_bits(rows * columns, code_bits(datatype)) + beside + stream_bits(groups, select_bits(datatype))


@dataclass(frozen=True, eq=False)
class Table:
    """Codes into a table of values, scaled per group: `value = table[select][code] * scale`."""

    codes: Tensor  # (out, in) uint8, each below the length of the table
    scale: Tensor  # (out, groups) bfloat16, uint8 or float8_e4m3fn
    datatype: str  # a key of DATATYPES
    group_size: int  # columns per group; `in` for one group per row
    row_scale: Tensor | None = None  # (out,) multiplies the scales: bfloat16 with uint8 scales, float32 with float8_e4m3fn
    select: Tensor | None = None  # (out, groups) uint8 table of each group, where the datatype has several

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def scale_type(self) -> ScaleType:
        """How scales are stored."""
        stored = self.scale.dtype, None if self.row_scale is None else self.row_scale.dtype
        return next(name for name, dtypes in SCALE_DTYPES.items() if dtypes == stored)

    @property
    def stored_bits(self) -> int:
        """Every bit that this part occupies on disk."""
        return table_bits(self.shape, self.datatype, self.group_size, self.scale_type)

    def scales(self) -> Tensor:
        """Return the factor of every group, (out, groups) in float32; exact but with E4M3 scales on a row scale that is odd."""
        if self.scale_type == "e8m0":
            # The exponent field of a float32; its code 0 would be read as zero and not as 2^-127.
            fields = torch.where(self.scale == 0, 1 << 22, self.scale.int() << 23)
            return fields.int().view(torch.float32)
        return self.scale.float() if self.row_scale is None else self.scale.float() * self.row_scale.float().unsqueeze(1)

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in float32: one product of a table's value and a scale."""
        tables = torch.tensor(DATATYPES[self.datatype], dtype=torch.float32, device=self.codes.device)
        place = self.codes.int().unflatten(1, (-1, self.group_size))  # (out, groups, group size)
        if self.select is not None:
            place += self.select.int().mul_(tables.shape[1]).unsqueeze(2)
        values = tables.flatten().index_select(0, place.flatten()).view(place.shape)
        return values.mul_(self.scales().unsqueeze(2)).flatten(1)

    def rows(self, start: int, stop: int) -> Table:
        """Return the rows start..stop as a part of their own, sharing memory."""
        row_scale = None if self.row_scale is None else self.row_scale[start:stop]
        select = None if self.select is None else self.select[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], row_scale=row_scale, select=select)
