"""Examples of what `formats/mixed` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from hypothesis import strategies as st

from compress.parts.mixed import Mixed


def mixed(rows: int, widths: Sequence[int], size: int, zero: bool, seed: int = 0, full: bool = False) -> Mixed:
    """A random part, or one whose codes are all the largest of their width."""
    generator = torch.Generator().manual_seed(seed)
    groups = len(widths)

    def draw(bits: int, count: int) -> torch.Tensor:
        low = (1 << bits) - 1 if full else 0
        return torch.randint(low, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)

    codes = torch.cat([draw(bits, size) for bits in widths], 1)
    scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)
    zeros = torch.cat([draw(bits, 1) * (bits > 1) for bits in widths], 1)
    return Mixed(codes, scale, torch.tensor(widths, dtype=torch.uint8), size, zeros if zero else None)


@st.composite
def drawn(draw: st.DrawFn) -> Mixed:
    widths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=9))
    rows, size = draw(st.integers(1, 70)), draw(st.integers(1, 20))
    return mixed(rows, widths, size, draw(st.booleans()), draw(st.integers(0, 999)), draw(st.booleans()))


def fixed() -> Iterator[Mixed]:
    for zero in (False, True):
        for rows, size in ((1, 1), (3, 5), (32, 16), (33, 1), (64, 3), (97, 33)):
            for widths in ([2], [1], [1, 2, 3], [3, 1, 3, 2, 2, 1], [8, 7, 6, 5, 4, 3, 2, 1]):
                yield mixed(rows, widths, size, zero)
        yield mixed(5, [1, 8] * 40, 2, zero)  # widths that fill several words


def golden_mixed(zero: bool) -> Mixed:
    """Two rows of groups of 2, 1, 4 and 2 bits, three columns each: codes 3 + 5 i mod 2^b row by row, zero codes 1 + 3 i."""
    widths = torch.tensor([2, 1, 4, 2], dtype=torch.uint8)
    codes = (3 + 5 * torch.arange(24)).view(2, 12) % (1 << widths.long().repeat_interleave(3))
    scale = torch.tensor([(-0.5) ** i for i in range(8)]).to(torch.bfloat16).view(2, 4)
    zeros = (1 + 3 * torch.arange(8)).view(2, 4) % (1 << widths.long()) * (widths > 1)
    return Mixed(codes.to(torch.uint8), scale, widths, 3, zeros.to(torch.uint8) if zero else None)


# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[Mixed, dict[str, str]]] = [
    (
        golden_mixed(zero=False),
        {
            "widths": "c1020000",
            "scale": "803f00bf803e00be803d00bd803c00bc",
            "codes1": "12000000",
            "codes2": "13399100",
            "codes4": "61db7200",
        },
    ),
    (
        golden_mixed(zero=True),
        {
            "widths": "c1020000",
            "scale": "803f00bf803e00be803d00bd803c00bc",
            "codes1": "12000000",
            "codes2": "13399100",
            "zero2": "99000000",
            "codes4": "61db7200",
            "zero4": "37000000",
        },
    ),
]
