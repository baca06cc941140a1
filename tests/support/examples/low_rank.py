"""Examples of what `formats/low_rank` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from compress.weights.low_rank import LowRank

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def low_rank(rows: int, columns: int, rank: int, dtype: torch.dtype, seed: int = 0) -> LowRank:
    """Random factors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRank(left.to(dtype), right.to(dtype))


@st.composite
def drawn(draw: st.DrawFn) -> LowRank:
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    return low_rank(rows, columns, draw(st.integers(1, columns)), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999)))


def fixed() -> Iterator[LowRank]:
    for dtype in DTYPES:
        for rows, columns, rank in ((1, 1, 1), (3, 5, 3), (33, 7, 2), (97, 33, 8)):
            yield low_rank(rows, columns, rank, dtype)


# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[LowRank, dict[str, str]]] = [
    (
        LowRank(torch.tensor([[1.0], [-0.5]]).bfloat16(), torch.tensor([[3.0, 0.0, 2.0]]).bfloat16()),
        {"left": "803f00bf", "right": "404000000040"},
    ),
    (
        LowRank(torch.tensor([[1.0], [-0.5]]).half(), torch.tensor([[3.0, 0.0, 2.0]]).half()),
        {"left": "003c00b8", "right": "004200000040"},
    ),
]
