"""Examples of what `formats/mixed` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from hypothesis import strategies as st

from compress.weights.mixed import Mixed, group_dtype


def mixed(
    rows: int,
    widths: Sequence[int],
    size: int,
    zero: bool,
    seed: int = 0,
    full: bool = False,
    scattered: bool = False,
) -> Mixed:
    """A random part, or one whose codes are all the largest of their width; `scattered`: its groups are not of neighbours."""
    generator = torch.Generator().manual_seed(seed)
    groups = len(widths)

    def draw(bits: int, count: int) -> torch.Tensor:
        low = (1 << bits) - 1 if full else 0
        return torch.randint(low, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)

    index = torch.randperm(groups * size, generator=generator) // size if scattered else torch.arange(groups * size) // size
    codes = torch.cat([draw(widths[number], 1) for number in index.tolist()], 1)
    scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)
    zeros = torch.cat([draw(bits, 1) * (bits > 1) for bits in widths], 1)
    return Mixed(
        codes,
        scale,
        torch.tensor(widths, dtype=torch.uint8),
        size,
        zeros if zero else None,
        index.to(group_dtype(groups)) if scattered else None,
    )


@st.composite
def drawn(draw: st.DrawFn) -> Mixed:
    widths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=9))
    rows, size = draw(st.integers(1, 70)), draw(st.integers(1, 20))
    return mixed(rows, widths, size, draw(st.booleans()), draw(st.integers(0, 999)), draw(st.booleans()), draw(st.booleans()))


def fixed() -> Iterator[Mixed]:
    for zero in (False, True):
        for rows, size in ((1, 1), (3, 5), (32, 16), (33, 1), (64, 3), (97, 33)):
            for widths in ([2], [1], [1, 2, 3], [3, 1, 3, 2, 2, 1], [8, 7, 6, 5, 4, 3, 2, 1]):
                yield mixed(rows, widths, size, zero)
                yield mixed(rows, widths, size, zero, scattered=True)
        yield mixed(5, [1, 8] * 40, 2, zero)  # widths that fill several words
        yield mixed(2, [1, 2, 3] * 100, 1, zero, scattered=True)  # more groups than fit into a byte


def golden_mixed(zero: bool, scattered: bool = False) -> Mixed:
    """Two rows of groups of 2, 1, 4 and 2 bits, three columns each: codes 3 + 5 i mod 2^b row by row, zero codes 1 + 3 i."""
    widths = torch.tensor([2, 1, 4, 2], dtype=torch.uint8)
    group = torch.arange(12).flip(0) % 4 if scattered else torch.arange(12) // 3
    codes = (3 + 5 * torch.arange(24)).view(2, 12) % (1 << widths.long()[group])
    scale = torch.tensor([(-0.5) ** i for i in range(8)]).to(torch.bfloat16).view(2, 4)
    zeros = (1 + 3 * torch.arange(8)).view(2, 4) % (1 << widths.long()) * (widths > 1)
    index = group.to(torch.uint8) if scattered else None
    return Mixed(codes.to(torch.uint8), scale, widths, 3, zeros.to(torch.uint8) if zero else None, index)


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
    (
        golden_mixed(zero=True, scattered=True),
        {
            "widths": "c1020000",
            "scale": "803f00bf803e00be803d00bd803c00bc",
            "group": "1b1b1b00",
            "codes1": "3f000000",
            "codes2": "bbbbbb00",
            "zero2": "99000000",
            "codes4": "c840c800",
            "zero4": "37000000",
        },
    ),
]
