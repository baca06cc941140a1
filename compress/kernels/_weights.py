"""Quantized weights as kernels read them: codes in tiles, and the metadata of groups in records of 16 rows.

A value is `scale * number + shift`, where the number is the code minus the middle of its range, or an entry of a table.
`Meta` in _decode.cuh says what a record holds. Scales are exact in bfloat16, or in float32 next to their shifts;
scales of whole rows are separate, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import _tiles
from compress.weights import bit_stream as _bits
from compress.weights.mixed import Mixed
from compress.weights.table import DATATYPES, Table, code_bits
from compress.weights.two_level import STEP_BITS, TwoLevel
from compress.weights.uniform import Uniform, middle
from compress.weights.weight import Part

STEP = 16  # columns of a tensor core's product
RECORD = {"SYMMETRIC": 32, "HALF": 32, "ZERO": 48, "SHIFT": 96, "WIDE": 128, "TWO_LEVEL": 32, "SELECT": 48}  # bytes


@dataclass(frozen=True, eq=False)
class Tiles:
    """A weight as the kernels read it."""

    codes: Tensor  # int32, see _tiles
    meta: Tensor  # (groups, row-blocks, record) uint8
    table: Tensor | None  # (tables * 2^bits,) float32
    row_scale: Tensor | None  # (out,) float32
    order: Tensor | None  # (in,) int64: the column of x for each column of the tiles
    shape: tuple[int, int]
    bits: int
    steps: int  # steps of 16 columns per group
    kind: str  # kind of records
    field: int = 16  # bits that a code takes in a register: 16, or 8 if x consists of bytes


def reason(spec: Mapping[str, Any]) -> str | None:
    """Return why the kernels do not read codes of this description, or None if they do."""
    base, columns, kind = spec["base"], spec["shape"][1], packing.base_type(spec)
    if kind not in (Uniform, Table, TwoLevel, Mixed):
        return f"format {base['format']} has no kernel"
    size = base["group_size"]
    if size % STEP and size != columns:
        return f"groups of {size} columns; expected a multiple of {STEP}, or one group per row"
    if kind is TwoLevel and max(base["scale_bits"], base["zero_bits"]) > 4:
        return f"scales of {base['scale_bits']} and zeros of {base['zero_bits']} bits; expected at most 4 of each"
    return None


def _of_blocks(values: Tensor, rows: int, groups: int) -> Tensor:
    """Lay out values (out, groups) by record: (groups, row-blocks, 16) in the order 0, 8, 1, 9, ..., padded with zeros."""
    high = _tiles.padded((rows, 1))[0]
    whole = torch.nn.functional.pad(values, (0, groups - values.shape[1], 0, high - rows))
    return whole.T.reshape(groups, high // 16, 2, 8).transpose(2, 3).flatten(2)


def _octets(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


@dataclass(frozen=True, eq=False)
class Beside:
    """Metadata of groups, by row: the value of a code is (code - middle) * scale + shift."""

    kind: str
    scale: Tensor  # (out, groups) bfloat16; float32 for WIDE
    second: Tensor | None  # (out, groups): zero codes for ZERO, shifts in float32 for SHIFT and WIDE

    def rows(self, start: int, stop: int) -> Beside:
        """Return those of rows start..stop."""
        return Beside(self.kind, self.scale[start:stop], None if self.second is None else self.second[start:stop])


def beside(part: Uniform) -> Beside:
    """Return the metadata of a part's groups."""
    bits, scale = part.bits, part.scale
    wide = scale.dtype != torch.bfloat16  # as stored by other tools
    if part.offset is not None or wide:
        away = middle_of(bits) - (middle(bits, part.bipolar) if part.zero is None else part.zero.float())
        shift = scale.float() * away + (0 if part.offset is None else part.offset.float())
        return Beside("WIDE" if wide else "SHIFT", scale.float() if wide else scale, shift)
    if part.zero is not None:
        return Beside("ZERO", scale, part.zero)
    return Beside("SYMMETRIC" if middle(bits, part.bipolar) == middle_of(bits) else "HALF", scale, None)


def record_blocks(more: Beside, groups: int) -> Tensor:
    """Lay out the metadata of groups in records: (groups, row-blocks, record) uint8."""
    values = [_of_blocks(v, len(v), groups) for v in (more.scale, more.second) if v is not None]
    return torch.cat([_octets(v) for v in values], 2).contiguous()


def prepare(part: Part, field: int = 16) -> Tiles:
    """Lay out a part for the kernels, on its device. Raises KernelError for a kind of part that they do not read."""
    if not isinstance(part, Uniform | Table | TwoLevel):
        raise KernelError(f"{type(part).__name__}: no kernel reads such a part")
    (rows, columns), size, device = part.shape, part.group_size, part.codes.device
    codes, order = part.codes, None
    group = getattr(part, "group", None)
    if group is not None:
        order = torch.argsort(group.long(), stable=True)
        codes = codes[:, order]
    padded = _tiles.padded((rows, columns))[1] // STEP
    steps = padded if size == columns else size // STEP
    groups = -(-padded // steps)

    def of_blocks(values: Tensor) -> Tensor:
        return _of_blocks(values, rows, groups)

    table = row_scale = None
    if isinstance(part, Table):
        bits = code_bits(part.datatype)
        scale, row_scale = _table_scales(part)
        tables = torch.tensor(DATATYPES[part.datatype], dtype=torch.float32, device=device)
        # No value is encoded as -0; if the table is not symmetric, that code is an ordinary entry.
        table = tables.flatten()
        kind, fields = "SYMMETRIC", [of_blocks(scale)]
        if part.select is not None:
            kind, fields = "SELECT", [of_blocks(scale), of_blocks(part.select)]
    elif isinstance(part, TwoLevel):
        bits, kind = part.bits, "TWO_LEVEL"
        both = part.scale_code | part.zero_code << 4
        unit = 1 << (STEP_BITS + part.scale_bits)
        top = part.scale_top.float()
        zero = part.zero_offset.float() * 2.0 ** (bits - 8) - middle_of(bits)
        zero_step = part.zero_step.float() * 2.0 ** (bits - 8 - part.zero_bits)
        grid = torch.stack((top, top * part.scale_step.float() / unit, zero, zero_step), 2)  # (row-blocks, groups, 4)
        grid = torch.nn.functional.pad(grid, (0, 0, 0, groups - grid.shape[1])).transpose(0, 1)
        fields = [of_blocks(both), grid.contiguous()]
    else:
        bits = part.bits
        more = beside(part)
        kind, fields = more.kind, [record_blocks(more, groups)]
    meta = torch.cat([_octets(field) for field in fields], 2).contiguous()
    assert meta.shape[2] == RECORD[kind]
    return Tiles(_tiles.tile(codes, bits, field), meta, table, row_scale, order, (rows, columns), bits, steps, kind, field)


def middle_of(bits: int) -> int:
    """The middle of the range of codes, which decoders subtract."""
    return 1 << (bits - 1)


def _table_scales(part: Table) -> tuple[Tensor, Tensor | None]:
    """Return the scales of groups, exact in bfloat16, and of rows."""
    row_scale = None if part.row_scale is None else part.row_scale.float()
    scale = part.scales() if part.scale_type == "e8m0" else part.scale.float()
    return scale.to(torch.bfloat16), row_scale


def decode(tiles: Tiles) -> Tensor:
    """Return W (out, in) in float32 from tiles, with columns in the order of x, by plain torch."""
    (rows, columns), high = tiles.shape, _tiles.padded(tiles.shape)[0]
    groups = len(tiles.meta)

    def field(start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Read a field that records have for each of their rows -> (out, groups)."""
        values: Tensor = tiles.meta[:, :, start:stop].contiguous().view(dtype)  # (groups, row-blocks, 16)
        ordered: Tensor = values.unflatten(2, (8, 2)).transpose(2, 3).reshape(groups, high).T
        return ordered[:rows]

    codes = _tiles.untile(tiles.codes, tiles.shape, tiles.bits, tiles.field)
    group = torch.arange(columns, device=codes.device) // (tiles.steps * STEP)
    center, shift = float(middle_of(tiles.bits)), None
    if tiles.kind == "TWO_LEVEL":
        both = field(0, 16, torch.uint8)
        grid = tiles.meta[:, :, 16:].contiguous().view(torch.float32).repeat_interleave(16, 1)[:, :rows].transpose(0, 1)
        top, step, zero, zero_step = grid.unbind(2)
        scale = top - (both & 15).float() * step
        shift = -scale * (zero + (both >> 4).float() * zero_step)
    elif tiles.kind == "WIDE":
        scale, shift = field(0, 64, torch.float32), field(64, 128, torch.float32)
    else:
        scale = field(0, 32, torch.bfloat16).float()
        if tiles.kind == "HALF":
            shift = 0.5 * scale
        elif tiles.kind == "ZERO":
            shift = scale * (center - field(32, 48, torch.uint8).float())
        elif tiles.kind == "SHIFT":
            shift = field(32, 96, torch.float32)
    if tiles.table is None:
        numbers = codes.float() - center
    else:
        place = codes.long()
        if tiles.kind == "SELECT":
            place += field(32, 48, torch.uint8)[:, group].long() << tiles.bits
        numbers = tiles.table[place]
    w: Tensor = numbers * scale[:, group]
    if shift is not None:
        w += shift[:, group]
    if tiles.row_scale is not None:
        w *= tiles.row_scale.unsqueeze(1)
    return w if tiles.order is None else w[:, torch.argsort(tiles.order)]


def stored_codes(tiles: Tiles) -> Tensor:
    """Return the codes of tiles as the formats store them: one dense bit stream, row by row."""
    codes = _tiles.untile(tiles.codes, tiles.shape, tiles.bits, tiles.field)
    if tiles.order is not None:
        codes = codes[:, torch.argsort(tiles.order)]
    return _bits.pack(codes, tiles.bits)
