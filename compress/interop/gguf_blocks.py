"""Blocks of GGUF (llama.cpp): which types hold our numbers exactly, and their bytes. A block is 32 neighbours and one scale.

    Q4_0   F16 d, 16 bytes                 value = d (u - 8)
    Q5_0   F16 d, U32 of high bits, 16     value = d (u - 16)
    Q8_0   F16 d, 32 signed bytes          value = d q
    MXFP4  U8 exponent, 16 bytes           value = 2^(e - 127) times E2M1

Of 4 and 5 bits, byte i holds value i low and value i + 16 high. Groups of 64, 128, ... columns are blocks of one scale. Grids
become signed whole numbers (code - zero), so that those with zero points fit too, where a type has the range; Q4_1 and Q5_1 would
hold zero points as floats, which round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.interop import affine_grid as _grid
from compress.weights.table import Table
from compress.weights.weight import CompressedWeight

HOLDS = "whole numbers of up to 8 bits in groups of 32 columns or a multiple of that, with float16 scales, and mxfp4"
BLOCK = 32
BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34, "MXFP4": 17}  # of a block
_HALF = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # whole numbers from -half to half - 1
ORDER = ("Q4_0", "Q5_0", "Q8_0")  # a type holds what those before it hold


@dataclass(frozen=True)
class Blocks:
    """How a site is stored."""

    shape: tuple[int, int]  # (out, in)
    kind: str
    group_size: int
    bits: int  # of a code
    scale: str = "F16"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[1] // BLOCK * BYTES[self.kind]


def scheme(spec: Mapping[str, Any]) -> Blocks:
    """Return how a described site is stored. Raises FormatError with the reason where it cannot be."""
    base = spec["base"]
    rows, columns = spec["shape"]
    size = base.get("group_size", 0)
    if base["format"] == "table" and base["datatype"] == "fp4" and base["scale"] == "e8m0" and set(spec) == {"shape", "base"}:
        kind, bits = "MXFP4", 4
    else:
        found = _grid.reach(spec)
        if found.scattered:
            raise FormatError("has groups of columns that are not neighbours (act-order)")
        fits = [kind for kind in ORDER if -_HALF[kind] <= found.low and found.high < _HALF[kind]]
        if not fits:
            raise FormatError(f"has values from {found.low} to {found.high} scales")
        kind, bits = fits[0], {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}[fits[0]]
    if columns % BLOCK or size % BLOCK:
        raise FormatError(f"has in={columns} in groups of {size}, where a block has {BLOCK} columns and one scale")
    return Blocks((rows, columns), kind, size, bits)


def widest(kinds: Sequence[str]) -> str | None:
    """Return the type that holds what all of these hold, None where there is none: experts of a layer are one tensor."""
    if len(set(kinds)) == 1:
        return kinds[0]
    return max(kinds, key=ORDER.index) if set(kinds) <= set(ORDER) else None


def pack(scheme: Blocks, weight: CompressedWeight) -> Tensor:
    """Return the blocks of a weight, row by row: (out, row bytes) uint8. Raises FormatError where float16 cannot hold a scale."""
    rows = scheme.shape[0]
    if scheme.kind == "MXFP4":
        assert isinstance(weight.base, Table)
        codes = weight.base.codes.view(rows, -1, BLOCK)
        scale = weight.base.scale.repeat_interleave(scheme.group_size // BLOCK, 1)
        return torch.cat((scale.unsqueeze(2), _halves(codes)), 2).flatten(1)
    values, scale, _ = _grid.lattice(weight)
    half = _HALF[scheme.kind]
    d = _grid.exact(scale, torch.float16).repeat_interleave(scheme.group_size // BLOCK, 1)
    head = d.unsqueeze(2).contiguous().view(torch.uint8)  # (out, blocks, 2)
    if scheme.kind == "Q8_0":
        return torch.cat((head, values.to(torch.int8).view(torch.uint8).view(rows, -1, BLOCK)), 2).flatten(1)
    codes = (values + half).to(torch.uint8).view(rows, -1, BLOCK)
    if scheme.kind == "Q4_0":
        return torch.cat((head, _halves(codes)), 2).flatten(1)
    bit = torch.arange(8, dtype=torch.uint8)
    high = ((codes >> 4).view(rows, -1, 4, 8) << bit).sum(3, dtype=torch.uint8)  # bit i of four little-endian bytes
    return torch.cat((head, high, _halves(codes & 15)), 2).flatten(1)


def _halves(codes: Tensor) -> Tensor:
    """(rows, blocks, 32) codes of 4 bits -> (rows, blocks, 16) bytes: value i low, value i + 16 high."""
    return codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
