"""What a dense stream of fields occupies: parts count their bits with it, formats write it."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32  # bits of the words that codes are packed into


def stream_bits(count: int, bits: int) -> int:
    """Bits that `count` fields of `bits` bits occupy in one dense stream cut into 32-bit words."""
    return -(-count * bits // WORD) * WORD


# Fields expanded at a time: the expansion needs about 5*b bytes per field; a multiple of 32, so that slabs end on words.
_SLAB = 1 << 20


def words(count: int, bits: int) -> int:
    """Number of 32-bit words that `count` fields of `bits` bits fill."""
    return -(-count * bits // 32)


def pack(fields: Tensor, bits: int) -> Tensor:
    """Pack unsigned fields (any shape, uint8, below 2^bits, row-major) into int32 words (words,); the tail is zero."""
    flat = fields.flatten()
    result = torch.empty(words(flat.numel(), bits), dtype=torch.int32, device=flat.device)
    shifts = torch.arange(bits, device=flat.device, dtype=torch.uint8)
    byte = torch.arange(8, device=flat.device, dtype=torch.uint8)
    for start in range(0, flat.numel(), _SLAB):
        part = flat[start : start + _SLAB]
        stream = torch.zeros(words(part.numel(), bits) * 32, dtype=torch.uint8, device=flat.device)
        stream[: part.numel() * bits] = ((part.unsqueeze(1) >> shifts) & 1).flatten()
        packed = (stream.view(-1, 8) << byte).sum(1, dtype=torch.uint8)  # (bytes,)
        first = start * bits // 32
        result[first : first + words(part.numel(), bits)] = packed.view(torch.int32)
    return result


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` fields of a stream of int32 words as uint8 (count,)."""
    octets = stream.contiguous().view(torch.uint8)
    result = torch.empty(count, dtype=torch.uint8, device=stream.device)
    byte = torch.arange(8, device=stream.device, dtype=torch.uint8)
    shifts = torch.arange(bits, device=stream.device, dtype=torch.uint8)
    for start in range(0, count, _SLAB):
        size = min(_SLAB, count - start)
        first = start * bits // 8
        part = octets[first : first + -(-size * bits // 8)]
        if bits == 8:
            result[start : start + size] = part
        elif bits == 4:
            result[start : start + size] = torch.stack((part & 15, part >> 4), 1).flatten()[:size]
        else:
            stretched = ((part.unsqueeze(1) >> byte) & 1).flatten()[: size * bits].view(size, bits)
            result[start : start + size] = (stretched << shifts).sum(1, dtype=torch.uint8)
    return result
