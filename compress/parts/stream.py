"""What a dense stream of fields occupies: parts count their bits with it, formats write it."""

from __future__ import annotations

WORD = 32  # bits of the words that codes are packed into


def stream_bits(count: int, bits: int) -> int:
    """Bits that `count` fields of `bits` bits occupy in one dense stream cut into 32-bit words."""
    return -(-count * bits // WORD) * WORD
