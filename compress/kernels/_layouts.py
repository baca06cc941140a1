"""The layout of pruned weights that kernels read: a packet per tile of 16 rows, with all that is needed of it.

    SINGLE       64 columns, weights anywhere: records of groups, 128 bytes of mask, fields of kept weights
    RUNS         64 columns, runs of 16 columns of a row: 16 bytes of mask, fields, scales of runs, zero codes or shifts of runs
    TWO_OF_FOUR  128 columns, two kept of every four: records of groups, 256 bytes of places, codes of a tile of 64 kept columns;
                 or 64 columns: 128 bytes of places, values

Fields are codes, cut into planes of 8, 4, 2 and 1 bits as in `_tiles`, or 16-bit values where there are no codes. Those of SINGLE
lie in the order (pair, lane, half) of the elements of `_tiles`, those of a run in the order (lane of four, pair, half), so that
neighbouring lanes read neighbouring fields. Masks have a bit per weight, or per run (step of 16 columns, row). Planes begin at
multiples of 8 bytes and packets at multiples of 16; `offsets` says where. Records are those of `_weights`, of the groups of the
tile's columns.

The places of TWO_OF_FOUR are the metadata of mma.sp.m16n8k32: 4 bits for every four columns, 16 columns of the rows g and g + 8
in a word, lane 4 g + 2 (step mod 2) + half, word step // 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels import _tiles
from compress.kernels._weights import RECORD, STEP, Beside, record_blocks

VALUE = 16  # bits of a field that is a value
ALIGN = 16  # bytes


def width_of(layout: str, bits: int) -> int:
    """Columns of a tile."""
    return 128 if layout == "TWO_OF_FOUR" and bits != VALUE else 64


@dataclass(frozen=True, eq=False)
class Packets:
    """A pruned weight as the kernels read it."""

    data: Tensor  # (bytes,) uint8
    offsets: Tensor  # (row-blocks * tiles + 1,) int32, in units of 16 bytes
    order: Tensor | None  # (in,) int64: the column of x that each column of the tiles belongs to
    shape: tuple[int, int]
    layout: str
    bits: int  # of a field; 16 for values
    kind: str  # of records, see _weights; of values FP16 or BF16
    steps: int  # a quarter of a tile each, in a group
    room: int  # bytes of the longest packet

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return width_of(self.layout, self.bits)

    @property
    def tiles(self) -> int:
        """Tiles along the columns."""
        return -(-self.shape[1] // self.width)

    @property
    def record_bits(self) -> int:
        """The logarithm of the number of records in a packet."""
        whole = self.steps >= 4 * self.tiles
        return 0 if whole or self.steps % 4 == 0 else 1 if self.steps % 2 == 0 else 2

    @property
    def record_bytes(self) -> int:
        """Bytes of all records in a packet."""
        return 0 if self.bits == VALUE or self.layout == "RUNS" else RECORD[self.kind] << self.record_bits


def _cut(values: Tensor, wide: int) -> Tensor:
    """(rows, columns) -> (row-blocks, tiles, 16, wide), padded with zeros."""
    rows, columns = values.shape
    whole = torch.nn.functional.pad(values, (0, -columns % wide, 0, -rows % _tiles.ROWS))
    cut: Tensor = whole.unflatten(0, (-1, _tiles.ROWS)).unflatten(2, (-1, wide))
    return cut.transpose(1, 2)


def uncut(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The reverse of `_cut`."""
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns]


def _elements(device: torch.device) -> Tensor:
    """Where in a tile the elements are in the order (pair, lane, half): (1024,)."""
    return _tiles.places(16, device).permute(1, 0, 2).flatten()


def _planes(bits: int) -> list[int]:
    return [VALUE] if bits == VALUE else _tiles.plane_widths(bits)


def _words(flags: Tensor) -> Tensor:
    """(..., 32) bool -> (...,) int32, the first in the lowest bit."""
    words = (flags.long() << torch.arange(32, device=flags.device)).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _flags(words: Tensor) -> Tensor:
    """The reverse of `_words`."""
    return ((words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1).bool()


def _octets(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _padded(count: Tensor, to: int) -> Tensor:
    return (count + to - 1) // to * to


def _records(plan: Packets, more: Beside | None, blocks: int, device: torch.device) -> Tensor:
    """The records of each tile: (row-blocks * tiles, bytes)."""
    if more is None:
        return torch.empty(blocks * plan.tiles, 0, dtype=torch.uint8, device=device)
    meta = record_blocks(more, more.scale.shape[1])  # (groups, row-blocks, record)
    meta = torch.cat([meta, meta.new_zeros(1, *meta.shape[1:])])  # beyond the columns
    quarter = torch.arange(4 * plan.tiles, device=device).view(plan.tiles, 1 << plan.record_bits, -1)[:, :, 0]
    group = (quarter // plan.steps).clamp(max=len(meta) - 1)
    return meta[group].permute(2, 0, 1, 3).flatten(2).flatten(0, 1)


def _put(data: Tensor, starts: Tensor, octets: Tensor) -> None:
    """Write rows of bytes (count, n) to where they start (count,)."""
    data[starts.unsqueeze(1) + torch.arange(octets.shape[1], device=data.device)] = octets


def get(data: Tensor, starts: Tensor, count: int) -> Tensor:
    """Rows of `count` bytes from where they start (n,)."""
    return data[starts.unsqueeze(1) + torch.arange(count, device=data.device)]


def _single_sizes(plan: Packets, count: Tensor) -> tuple[list[Tensor], Tensor]:
    """Where the planes begin in packets of so many kept weights, and how long those are."""
    at, starts = torch.full_like(count, plan.record_bytes + 128), []
    for p in _planes(plan.bits):
        starts.append(at)
        at = at + _padded((count * p + 7) // 8, 8)
    return starts, _padded(at, ALIGN)


def _single(plan: Packets, fields: Tensor, mask: Tensor, more: Beside | None) -> tuple[Tensor, Tensor]:
    """Packets of some rows, and their lengths in units of 16 bytes."""
    device = fields.device
    place = _elements(device)
    kept = _cut(mask, 64).flatten(2).flatten(0, 1)[:, place]
    values = _cut(fields, 64).flatten(2).flatten(0, 1)[:, place][kept]
    count = kept.sum(1)
    planes, sizes = _single_sizes(plan, count)
    start = sizes.cumsum(0) - sizes
    data = torch.zeros(int(sizes.sum()), dtype=torch.uint8, device=device)
    _put(data, start, _records(plan, more, -(-len(mask) // 16), device))
    _put(data, start + plan.record_bytes, _octets(_words(kept.unflatten(1, (32, 32)))))
    tile = torch.arange(len(count), device=device).repeat_interleave(count, output_size=len(values))
    rank = torch.arange(len(values), device=device) - (count.cumsum(0) - count)[tile]
    above = plan.bits
    for p, plane in zip(_planes(plan.bits), planes, strict=True):
        above -= p
        at = (start + plane)[tile]
        if p == VALUE:
            data.view(torch.int16)[at // 2 + rank] = values
            continue
        part = ((values >> above) & ((1 << p) - 1)).int() << (rank * p & 7).int()
        data += torch.zeros(len(data), dtype=torch.int32, device=device).index_add_(0, at + (rank * p >> 3), part).to(torch.uint8)
    return data, sizes // ALIGN


def _of_single(plan: Packets, data: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Fields and mask of tiles (tiles, 1024) in the order of rows and columns."""
    kept = _flags(get(data, start + plan.record_bytes, 128).contiguous().view(torch.int32)).flatten(1)
    planes, _ = _single_sizes(plan, kept.sum(1))
    rank = kept.cumsum(1) - 1
    found, above = torch.zeros(kept.shape, dtype=torch.int32, device=data.device), plan.bits
    for p, plane in zip(_planes(plan.bits), planes, strict=True):
        above -= p
        at = (start + plane).unsqueeze(1)
        if p == VALUE:
            found = data.view(torch.int16)[torch.where(kept, at // 2 + rank, 0)].int()
        else:
            octet = data[torch.where(kept, at + (rank * p >> 3), 0)].int()
            found += ((octet >> (rank * p & 7).int()) & ((1 << p) - 1)) << above
    place = _elements(data.device)
    fields, mask = torch.zeros_like(found), torch.zeros_like(kept)
    fields[:, place], mask[:, place] = found.masked_fill(~kept, 0), kept
    return fields, mask


def _run_order(device: torch.device) -> Tensor:
    """Columns of a run in the order (lane of four, pair, half)."""
    c, q, h = (torch.arange(n, device=device) for n in (4, 2, 2))
    return (2 * c.view(4, 1, 1) + 8 * q.view(2, 1) + h).flatten()


def _run_sizes(plan: Packets, count: Tensor) -> tuple[list[Tensor], Tensor]:
    """Where planes, scales and what else there is begin in packets of so many runs, and how long those are."""
    each = [2 * p for p in _planes(plan.bits)]
    if plan.bits != VALUE:
        each += [2, {"ZERO": 1, "SHIFT": 4}.get(plan.kind, 0)]
    at, starts = torch.full_like(count, 16), []
    for size in each:
        starts.append(at)
        at = at + _padded(count * size, 8)
    return starts, _padded(at, ALIGN)


def _runs(plan: Packets, fields: Tensor, mask: Tensor, more: Beside | None) -> tuple[Tensor, Tensor]:
    device = fields.device
    live = _cut(mask[:, ::STEP], 4).transpose(2, 3).flatten(2).flatten(0, 1)  # (tiles, step * row)
    count = live.sum(1)
    places, sizes = _run_sizes(plan, count)
    start = sizes.cumsum(0) - sizes
    data = torch.zeros(int(sizes.sum()), dtype=torch.uint8, device=device)
    _put(data, start, _octets(_words(live.unflatten(1, (2, 32)))))
    units = _cut(fields, 64).unflatten(3, (4, STEP)).transpose(2, 3).flatten(0, 1).flatten(1, 2)[live][:, _run_order(device)]
    tile = torch.arange(len(count), device=device).repeat_interleave(count, output_size=len(units))
    rank = torch.arange(len(units), device=device) - (count.cumsum(0) - count)[tile]
    above = plan.bits
    for p, place in zip(_planes(plan.bits), places, strict=False):
        above -= p
        if p == VALUE:
            octets = _octets(units)
        else:
            part = ((units >> above) & ((1 << p) - 1)).unflatten(1, (-1, 8 // p)).int()
            octets = (part << (p * torch.arange(8 // p, device=device, dtype=torch.int32))).sum(2).to(torch.uint8)
        _put(data, (start + place)[tile] + 2 * p * rank, octets)
    if more is not None:
        group = torch.arange(mask.shape[1] // STEP, device=device) // plan.steps
        for place, values in zip(places[-2:], (more.scale, more.second), strict=True):
            if values is not None:
                octets = _octets(_cut(values[:, group], 4).transpose(2, 3).flatten(2).flatten(0, 1)[live].unsqueeze(1))
                _put(data, (start + place)[tile] + octets.shape[1] * rank, octets)
    return data, sizes // ALIGN


def run_places(plan: Packets, data: Tensor, start: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Which runs there are (tiles, step * row), their numbers, and where planes, scales and so on begin."""
    live = _flags(get(data, start, 8).contiguous().view(torch.int32)).flatten(1)
    places, _ = _run_sizes(plan, live.sum(1))
    return live, (live.cumsum(1) - 1).clamp(min=0), places


def _of_runs(plan: Packets, data: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    live, rank, places = run_places(plan, data, start)
    found, above = torch.zeros(*live.shape, STEP, dtype=torch.int32, device=data.device), plan.bits
    for p, place in zip(_planes(plan.bits), places, strict=False):
        above -= p
        at = torch.where(live, (start + place).unsqueeze(1) + 2 * p * rank, 0)
        octets = get(data, at.flatten(), 2 * p)
        if p == VALUE:
            found = octets.contiguous().view(torch.int16).view(found.shape).int()
        else:
            bits = (octets.int().unsqueeze(2) >> (p * torch.arange(8 // p, device=data.device))) & ((1 << p) - 1)
            found += bits.view(found.shape) << above
    fields = torch.empty_like(found)
    fields[:, :, _run_order(data.device)] = found
    fields = fields.masked_fill(~live.unsqueeze(2), 0)
    whole = live.unsqueeze(2).expand(fields.shape)
    # (tiles, step, row, 16) -> (tiles, row, step, 16)
    return tuple(v.unflatten(1, (4, 16)).transpose(1, 2).flatten(1) for v in (fields, whole))


def _steps(plan: Packets) -> int:
    """Steps of 32 columns in a tile of TWO_OF_FOUR."""
    return plan.width // 32


def _kept_places(steps: int, device: torch.device) -> Tensor:
    """Where in 16 x (16 steps) kept values the registers of steps are, in the order (step, lane, register and half)."""
    place = _tiles.places(16, device)[:, : 4 * steps]
    place = place // 64 * (16 * steps) + place % 64
    by_step: Tensor = place.unflatten(1, (steps, 4))
    return by_step.transpose(0, 1).flatten()


def _pairs(plan: Packets, fields: Tensor, mask: Tensor, more: Beside | None) -> tuple[Tensor, Tensor]:
    device, (rows, columns), steps = fields.device, fields.shape, _steps(plan)
    blocks = -(-rows // 16)
    column = torch.arange(columns, device=device).expand(rows, columns)[mask].view(rows, columns // 4, 2) % 4
    fours = torch.nn.functional.pad(column[:, :, 0] | column[:, :, 1] << 2, (0, 8 * steps * plan.tiles - columns // 4), value=4)
    fours = torch.nn.functional.pad(fours, (0, 0, 0, -rows % 16), value=4)
    half = (fours.unflatten(1, (-1, 4)) << (4 * torch.arange(4, device=device))).sum(2)  # 16 bits for 16 columns
    cut = half.view(blocks, 2, 8, plan.tiles, steps // 2, 2, 2)  # (block, row // 8, g, tile, step // 2, step % 2, half)
    words = cut.permute(0, 3, 2, 5, 6, 4, 1)  # (block, tile, g, step % 2, half, step // 2, row // 8)
    both = words[..., 0] | words[..., 1] << 16
    places = _octets((both - ((both >> 31) << 32)).to(torch.int32).flatten(2).flatten(0, 1))
    kept = fields[mask].view(rows, columns // 2)
    count = blocks * plan.tiles
    if plan.bits == VALUE:
        codes = _octets(_cut(kept, 16 * steps).flatten(2).flatten(0, 1)[:, _kept_places(steps, device)])
    else:
        flat = _tiles.tile(kept, plan.bits).split([32 * count * p for p in _tiles.plane_widths(plan.bits)])
        codes = torch.cat([_octets(plane.view(count, -1)) for plane in flat], 1)
    data = torch.cat([_records(plan, more, blocks, device), places, codes], 1)
    return data.flatten(), torch.full((count,), data.shape[1] // ALIGN, device=device)


def _of_pairs(plan: Packets, data: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    count, device, steps = len(start), data.device, _steps(plan)
    words = get(data, start + plan.record_bytes, 64 * steps).contiguous().view(torch.int32)
    both = words.long().view(count, 8, 2, 2, steps // 2)
    half = torch.stack([both & 0xFFFF, (both >> 16) & 0xFFFF], 1)  # (tile, row // 8, g, step % 2, half, step // 2)
    half = half.permute(0, 1, 2, 5, 3, 4).reshape(count, 16, 2 * steps)
    fours = ((half.unsqueeze(3) >> (4 * torch.arange(4, device=device))) & 15).flatten(2)  # (tile, 16, columns / 4)
    column = torch.stack([fours & 3, fours >> 2], 3) + 4 * torch.arange(8 * steps, device=device).unsqueeze(1)
    column = column.flatten(2)  # (tile, 16, columns / 2)
    codes = get(data, start + plan.record_bytes + 64 * steps, 32 * steps * plan.bits)
    if plan.bits == VALUE:
        cut = codes.contiguous().view(torch.int16)
        kept = torch.empty_like(cut)
        kept[:, _kept_places(steps, device)] = cut
        kept = kept.view(count, 16, 16 * steps).int()
    else:
        pieces = codes.contiguous().view(torch.int32).split([32 * p for p in _tiles.plane_widths(plan.bits)], 1)
        flat = torch.cat([piece.flatten() for piece in pieces])
        kept = _tiles.untile(flat, (16 * count, 64), plan.bits).view(count, 16, 64).int()
    fields = torch.zeros(count, 16, plan.width, dtype=torch.int32, device=device).scatter_(2, column, kept)
    mask = torch.zeros(count, 16, plan.width, dtype=torch.bool, device=device).scatter_(2, column, True)
    return fields.flatten(1), mask.flatten(1)


LAY_OUT = {"SINGLE": _single, "RUNS": _runs, "TWO_OF_FOUR": _pairs}
READ = {"SINGLE": _of_single, "RUNS": _of_runs, "TWO_OF_FOUR": _of_pairs}
