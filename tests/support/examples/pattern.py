"""Examples of what `formats/pattern` stores, and golden bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from compress.weights.mask import Pattern


def pattern(rows: int, groups: int, kept: int, of: int, seed: int = 0) -> Pattern:
    """A random mask that keeps `kept` of every `of`."""
    generator = torch.Generator().manual_seed(seed)
    return Pattern(torch.randint(0, math.comb(of, kept), (rows, groups), generator=generator, dtype=torch.uint8), kept, of)


@st.composite
def drawn(draw: st.DrawFn) -> Pattern:
    of = draw(st.integers(2, 8))
    return pattern(
        draw(st.integers(1, 70)), draw(st.integers(1, 20)), draw(st.integers(1, of - 1)), of, draw(st.integers(0, 999))
    )


def fixed() -> Iterator[Pattern]:
    for of in range(2, 9):
        for kept in range(1, of):
            for rows, groups in ((1, 1), (33, 5), (64, 3)):
                yield pattern(rows, groups, kept, of)


# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[Pattern, dict[str, str]]] = [
    # 0, 1, 2, 3, 4, 5 in three bits each: 01 02 03 12 13 23.
    (Pattern(torch.arange(6, dtype=torch.uint8).view(2, 3), 2, 4), {"choice": "88c60200"}),
    (Pattern(torch.arange(4, dtype=torch.uint8).view(4, 1), 1, 4), {"choice": "e4000000"}),
    (Pattern(torch.tensor([[69, 0, 35]], dtype=torch.uint8), 4, 8), {"choice": "45c00800"}),
]
