"""Examples of what `formats/bitmask` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from compress.weights.mask import Bitmask


def bitmask(rows: int, runs: int, size: int, share: float = 0.5, seed: int = 0) -> Bitmask:
    """A random mask that keeps about this share of the runs."""
    return Bitmask(torch.rand(rows, runs, generator=torch.Generator().manual_seed(seed)) < share, size)


@st.composite
def drawn(draw: st.DrawFn) -> Bitmask:
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return bitmask(draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.integers(1, 8)), share, draw(st.integers(0, 999)))


def fixed() -> Iterator[Bitmask]:
    for rows, runs, size in ((1, 1, 1), (3, 5, 1), (32, 16, 2), (33, 7, 3), (97, 33, 1), (64, 48, 4)):
        for share in (0.0, 0.5, 1.0):
            yield bitmask(rows, runs, size, share)


# Rows 1 0 0 1 1, 0 1 0 0 0 and 1 1 1 1 1 from the first column on: bits from the lowest of each byte.
KEPT = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)

# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[Bitmask, dict[str, str]]] = [
    (Bitmask(KEPT), {"bits": "597c0000"}),
    (Bitmask(KEPT, 16), {"bits": "597c0000"}),
]
