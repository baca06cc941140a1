"""Examples of what `formats/dense` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from compress.weights.dense import Dense

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dense(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Dense:
    """Random values."""
    return Dense(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype))


@st.composite
def drawn(draw: st.DrawFn) -> Dense:
    return dense(draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999)))


def fixed() -> Iterator[Dense]:
    for dtype in DTYPES:
        for rows, columns in ((1, 1), (3, 5), (32, 16), (33, 7), (97, 33)):
            yield dense(rows, columns, dtype)


VALUES = torch.tensor([[1.0, -0.5], [0.0, 3.0]])

# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[Dense, dict[str, str]]] = [
    (Dense(VALUES.bfloat16()), {"values": "803f00bf00004040"}),
    (Dense(VALUES.half()), {"values": "003c00b800000042"}),
    (Dense(VALUES), {"values": "0000803f000000bf0000000000004040"}),
]
