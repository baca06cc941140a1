"""Examples of what `formats/sparse` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from compress.weights.sparse import Sparse


def sparse(rows: int, columns: int, share: float, seed: int = 0) -> Sparse:
    """A random part in which about this share of the places has a value."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(rows, columns, generator=generator) < share
    return Sparse.of(torch.randn(rows, columns, generator=generator), where)


@st.composite
def drawn(draw: st.DrawFn) -> Sparse:
    columns = draw(st.integers(1, 40) | st.sampled_from([255, 256, 257, 300]))
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    return sparse(draw(st.integers(1, 70)), columns, share, draw(st.integers(0, 999)))


def fixed() -> Iterator[Sparse]:
    for rows, columns, share in ((1, 1, 1.0), (3, 5, 0.5), (32, 256, 0.02), (33, 257, 0.02), (97, 11, 0.1), (64, 300, 1.0)):
        yield sparse(rows, columns, share)
    # The last columns that a byte and an int16 hold, and the first that they do not.
    for columns in (256, 257, 1 << 15, (1 << 15) + 1):
        where = torch.zeros(34, columns, dtype=torch.bool)
        where[[0, 1, 1, 33], [columns - 1, 0, columns - 1, columns - 1]] = True
        yield Sparse.of(torch.arange(34.0 * columns).view(34, columns), where)


def golden_sparse(columns: int) -> Sparse:
    """Rows of 2, 0 and 1 values: 1 and -1/2 at the first and the last column, and 3 at the second."""
    where = torch.zeros(3, columns, dtype=torch.bool)
    where[[0, 0, 2], [0, columns - 1, 1]] = True
    values = torch.zeros(3, columns)
    values[where] = torch.tensor([1.0, -0.5, 3.0])
    return Sparse.of(values, where)


# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[Sparse, dict[str, str]]] = [
    (golden_sparse(256), {"pointers": "00000000020000000200000003000000", "columns": "00ff01", "values": "803f00bf4040"}),
    (golden_sparse(32768), {"pointers": "00000000020000000200000003000000", "columns": "0000ff7f0100", "values": "803f00bf4040"}),
    (
        golden_sparse(32769),
        {"pointers": "00000000020000000200000003000000", "columns": "000000000080000001000000", "values": "803f00bf4040"},
    ),
]
