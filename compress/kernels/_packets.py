"""Pruned weights to packets and back, one for each tile of 16 rows; `_layouts` says what is in one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _tiles
from compress.kernels._layouts import ALIGN, LAY_OUT, READ, VALUE, Packets, get, run_places, uncut, width_of
from compress.kernels._weights import STEP, beside, middle_of
from compress.weights.dense import Dense
from compress.weights.mask import Bitmask, Pattern
from compress.weights.uniform import Uniform

_CHUNK = 1 << 22  # weights laid out at a time


def layout_of(keep: Bitmask | Pattern, columns: int, group_size: int | None, scattered: bool) -> str:
    """Choose the layout for a mask and a base with groups, or without."""
    if isinstance(keep, Bitmask):
        return "RUNS" if keep.size % STEP == 0 and not scattered else "SINGLE"
    fits = group_size is None or group_size % (2 * STEP) == 0 or group_size == columns
    pairs = (keep.kept, keep.of) in ((2, 4), (1, 2)) and columns % 4 == 0
    return "TWO_OF_FOUR" if pairs and fits and not scattered else "SINGLE"


def prepare(base: Dense | Uniform, keep: Bitmask | Pattern) -> Packets:
    """Lay out a pruned weight for the kernels, on the device where it is."""
    (rows, columns), mask, order = base.shape, keep.mask(), None
    more = None
    if isinstance(base, Uniform):
        fields, bits, size = base.codes, base.bits, base.group_size
        if base.group is not None:
            order = torch.argsort(base.group.long(), stable=True)
            fields, mask = fields[:, order], mask[:, order]
        layout = layout_of(keep, columns, size, base.group is not None)
        more = beside(base)
        kind = more.kind
        wide = width_of(layout, bits)
        steps = -(-columns // wide) * 4 if size == columns else size // (wide // 4)
    else:
        fields, bits, steps = base.values.view(torch.int16), VALUE, 4
        layout, kind = layout_of(keep, columns, None, False), "BF16" if base.values.dtype == torch.bfloat16 else "FP16"
    empty = torch.empty(0, dtype=torch.uint8, device=fields.device)
    plan = Packets(empty, empty, order, (rows, columns), layout, bits, kind, steps, 0)
    pieces, sizes = [], []
    for start, stop in _chunks(rows, columns):
        some = None if more is None else more.rows(start, stop)
        data, lengths = LAY_OUT[layout](plan, fields[start:stop], mask[start:stop], some)
        pieces.append(data)
        sizes.append(lengths)
    lengths = torch.cat(sizes)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    if int(offsets[-1]) >= 1 << 31:
        raise KernelError(f"{rows} x {columns}: packets are longer than 32 GB; cut the weight")
    room = ALIGN * int(lengths.max())
    return Packets(torch.cat(pieces), offsets.int(), order, (rows, columns), layout, bits, kind, steps, room)


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(_CHUNK // columns // _tiles.ROWS, 1) * _tiles.ROWS
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _starts(packets: Packets, start: int, stop: int) -> Tensor:
    """Where the packets of rows start..stop begin."""
    tiles = packets.tiles
    return packets.offsets[start // 16 * tiles : -(-stop // 16) * tiles].long() * ALIGN


def stored(packets: Packets) -> tuple[Tensor, Tensor]:
    """Return fields (out, in), codes in uint8 or values in their type, 0 where nothing is kept, and the mask (out, in)."""
    rows, columns = packets.shape
    fields, masks = [], []
    for start, stop in _chunks(rows, columns):
        found = READ[packets.layout](packets, packets.data, _starts(packets, start, stop))
        cut = [uncut(v.view(-1, packets.tiles, 16, packets.width), stop - start, columns) for v in found]
        fields.append(cut[0].to(torch.uint8 if packets.bits != VALUE else torch.int16))
        masks.append(cut[1])
    whole, mask = torch.cat(fields), torch.cat(masks)
    if packets.bits == VALUE:
        whole = whole.contiguous().view(torch.bfloat16 if packets.kind == "BF16" else torch.float16)
    if packets.order is None:
        return whole, mask
    back = torch.argsort(packets.order)
    return whole[:, back], mask[:, back]


def _grids(packets: Packets) -> tuple[Tensor, Tensor]:
    """Scale and shift of each quarter of a tile: (row-blocks * tiles, 16, 4) in float32."""
    start, kind = packets.offsets[:-1].long() * ALIGN, packets.kind
    center = float(middle_of(packets.bits))
    if packets.layout == "RUNS":
        live, rank, places = run_places(packets, packets.data, start)

        def of_runs(place: Tensor, size: int, dtype: torch.dtype) -> Tensor:
            at = torch.where(live, (start + place).unsqueeze(1) + size * rank, 0)
            octets = get(packets.data, at.flatten(), size).contiguous()
            runs: Tensor = octets.view(dtype).view(live.shape).float().masked_fill(~live, 0).unflatten(1, (4, 16))
            return runs.transpose(1, 2)

        scale = of_runs(places[-2], 2, torch.bfloat16)
        second = of_runs(places[-1], 1, torch.uint8) if kind == "ZERO" else None
        if kind == "SHIFT":
            second = of_runs(places[-1], 4, torch.float32)
    else:
        records = 1 << packets.record_bits
        meta = get(packets.data, start, packets.record_bytes).unflatten(1, (records, -1))

        def of_records(begin: int, end: int, dtype: torch.dtype) -> Tensor:
            values: Tensor = meta[:, :, begin:end].contiguous().view(dtype).unflatten(2, (8, 2)).permute(0, 3, 2, 1)
            return values.flatten(1, 2).float().repeat_interleave(4 // records, 2)

        scale = of_records(0, 32, torch.bfloat16)
        second = of_records(32, 48, torch.uint8) if kind == "ZERO" else None
        if kind == "SHIFT":
            second = of_records(32, 96, torch.float32)
    if kind == "HALF":
        return scale, 0.5 * scale
    if second is None:
        return scale, torch.zeros_like(scale)
    return scale, scale * (center - second) if kind == "ZERO" else second


def decode(packets: Packets) -> Tensor:
    """Return W (out, in) in float32, in the columns of x, by plain torch."""
    fields, mask = stored(packets)
    if packets.bits == VALUE:
        return fields.float()
    rows, columns = packets.shape
    quarter = packets.width // 4
    scale, shift = (
        uncut(v.view(-1, packets.tiles, 16, 4), rows, 4 * packets.tiles).repeat_interleave(quarter, 1)[:, :columns]
        for v in _grids(packets)
    )
    if packets.order is not None:
        back = torch.argsort(packets.order)
        scale, shift = scale[:, back], shift[:, back]
    return ((fields.float() - middle_of(packets.bits)) * scale + shift).masked_fill(~mask, 0.0)
