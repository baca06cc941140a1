"""The layout of codes that kernels read: tiles of 16 rows and 64 columns, cut into planes of 8, 4, 2 and 1 bits.

A width is a sum of distinct powers of two; the widest plane has the top bits. A tile of a plane of p bits is `p` words for each
of the 32 lanes of a warp. With row g + 8 (r mod 2), g = lane // 4, and c = lane mod 4, a lane holds

    16-bit fields (mma m16n8k16)   column 2c + h + 8 (r // 2) + 16 step: half h of pair P = 4 step + r
    8-bit fields (mma m16n8k32)    column 4c + h + 16 (r // 2) + 32 step: byte h of quad P = 4 step + r

and the p bits of pair or quad P lie in word P // (L / p) at bit L h + p (P mod (L / p)), L = 16 or 8. Tiles follow each other
along the columns, then along the rows, plane after plane. Rows are padded to 16 and columns to 64 with code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, COLUMNS = 16, 64
_LANES = 32


def plane_widths(bits: int) -> list[int]:
    """The powers of two that a width of 1 to 8 bits is the sum of, widest first."""
    return [p for p in (8, 4, 2, 1) if bits & p]


def padded(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of whole tiles."""
    return -(-shape[0] // ROWS) * ROWS, -(-shape[1] // COLUMNS) * COLUMNS


def places(field: int, device: torch.device | str = "cpu") -> Tensor:
    """Return where in a tile, row * 64 + column, the elements (lanes, registers, elements) of fields of 16 or 8 bits are."""
    share = 32 // field
    lane = torch.arange(_LANES, device=device).view(-1, 1, 1)
    place = torch.arange(32 // share, device=device).view(1, -1, 1)
    element = torch.arange(share, device=device).view(1, 1, -1)
    register, step = place % 4, place // 4
    row = lane // 4 + 8 * (register % 2)
    column = share * (lane % 4) + element + 4 * share * (register // 2) + 8 * share * step
    return row * COLUMNS + column


def tile(codes: Tensor, bits: int, field: int = 16) -> Tensor:
    """Cut codes (out, in) uint8 into planes of tiles: int32 words (tiles * 32 * bits,) for fields of 16 or 8 bits."""
    rows, columns = codes.shape
    high, wide = padded((rows, columns))
    whole = torch.nn.functional.pad(codes, (0, wide - columns, 0, high - rows))
    cut = whole.view(high // ROWS, ROWS, wide // COLUMNS, COLUMNS).transpose(1, 2).reshape(-1, ROWS * COLUMNS)
    elements = cut[:, places(field, codes.device).flatten()].view(len(cut), _LANES, -1, 32 // field)
    planes, above = [], bits
    for p in plane_widths(bits):
        above -= p
        fields = ((elements >> above) & ((1 << p) - 1)).unflatten(2, (-1, field // p))  # (tiles, lanes, words, fields, elements)
        words = torch.zeros(fields.shape[:3], dtype=torch.int64, device=codes.device)
        for f in range(field // p):
            for e in range(32 // field):
                words += fields[:, :, :, f, e].long() << (field * e + p * f)
        planes.append((words - ((words >> 31) << 32)).to(torch.int32).flatten())
    return torch.cat(planes)


def untile(words: Tensor, shape: tuple[int, int], bits: int, field: int = 16) -> Tensor:
    """Return the codes (out, in) uint8 that `tile` was given."""
    high, wide = padded(shape)
    count = high * wide // (ROWS * COLUMNS)
    codes = torch.zeros(count, _LANES, 1024 // _LANES * field // 32, 32 // field, dtype=torch.uint8, device=words.device)
    start, above = 0, bits
    for p in plane_widths(bits):
        above -= p
        plane = words[start : start + count * _LANES * p].view(count, _LANES, p, 1, 1)
        start += count * _LANES * p
        f = torch.arange(field // p, dtype=torch.int32, device=words.device).view(-1, 1) * p
        e = torch.arange(32 // field, dtype=torch.int32, device=words.device) * field
        fields = (plane >> (f + e)) & ((1 << p) - 1)  # (tiles, lanes, words, fields, elements)
        codes |= (fields << above).to(torch.uint8).flatten(2, 3)
    cut = torch.empty(count, ROWS * COLUMNS, dtype=torch.uint8, device=words.device)
    cut[:, places(field, words.device).flatten()] = codes.flatten(1)
    whole = cut.view(high // ROWS, wide // COLUMNS, ROWS, COLUMNS).transpose(1, 2).reshape(high, wide)
    return whole[: shape[0], : shape[1]].contiguous()


def tile_bits(codes: Tensor, bits: int) -> Tensor:
    """Cut codes (out, in) uint8 into single bits for mma m16n8k256: int32 (row-blocks, blocks of 256 columns, bits, 32 lanes, 4).

    Word r of a lane has row g + 8 (r mod 2) and the columns 32 (c + 4 (r // 2)) and on, the first in its lowest bit.
    """
    rows, columns = codes.shape
    high, wide = -(-rows // ROWS) * ROWS, -(-columns // 256) * 256
    whole = torch.nn.functional.pad(codes, (0, wide - columns, 0, high - rows))
    place = torch.arange(32, device=codes.device)
    planes = [(((whole.view(high, -1, 32) >> i) & 1).long() << place).sum(2) for i in range(bits)]  # (rows, words)
    words = torch.stack(planes, 0)
    words = (words - ((words >> 31) << 32)).to(torch.int32).view(bits, high // ROWS, 2, 8, wide // 256, 2, 4)
    # (bits, row-blocks, r % 2, g, column blocks, r // 2, c) -> (row-blocks, column blocks, bits, g, c, r // 2, r % 2)
    return words.permute(1, 4, 0, 3, 6, 5, 2).reshape(high // ROWS, wide // 256, bits, _LANES, 4).contiguous()
