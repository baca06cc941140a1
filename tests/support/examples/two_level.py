"""Examples of what `formats/two_level` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from compress.weights.two_level import TwoLevel, tiles


def two_level(
    rows: int, groups: int, size: int, bits: int, scale_bits: int, zero_bits: int, group: torch.dtype | None = None, seed: int = 0
) -> TwoLevel:
    """A random part; `group` is the type of the groups' numbers where columns of a group are not neighbours."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

    order = torch.randperm(groups * size, generator=generator)
    return TwoLevel(
        codes=draw(1 << bits, rows, groups * size),
        scale_code=draw(1 << scale_bits, rows, groups),
        zero_code=draw(1 << zero_bits, rows, groups),
        scale_top=torch.randn(tiles(rows), groups, generator=generator).to(torch.bfloat16),
        scale_step=draw(256, tiles(rows), groups),
        zero_offset=draw(256, tiles(rows), groups),
        zero_step=draw(256, tiles(rows), groups),
        bits=bits,
        scale_bits=scale_bits,
        zero_bits=zero_bits,
        group_size=size,
        group=None if group is None else (order // size).to(group),
    )


@st.composite
def drawn(draw: st.DrawFn) -> TwoLevel:
    return two_level(
        draw(st.integers(1, 70)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 8)),
        draw(st.integers(2, 8)),
        draw(st.integers(2, 8)),
        draw(st.sampled_from([None, torch.uint8, torch.int16, torch.int32])),
        draw(st.integers(0, 999)),
    )


def fixed() -> Iterator[TwoLevel]:
    for bits in range(1, 9):
        for group in (None, torch.uint8):
            for rows, groups, size in ((1, 1, 1), (3, 1, 5), (16, 2, 16), (17, 7, 1), (7, 3, 11), (64, 3, 16), (97, 2, 33)):
                yield two_level(rows, groups, size, bits, 2 + (bits + rows) % 7, 2 + (bits + groups) % 7, group)
    yield two_level(2, 300, 1, 3, 3, 3, torch.int16)  # more groups than fit into a byte


def golden_two_level(group: bool) -> TwoLevel:
    """17 rows, so two tiles, of two groups of two columns: codes 3 + 5 i mod 8, scale codes i mod 16, zero codes i mod 4."""
    index = torch.arange(34)
    return TwoLevel(
        codes=(3 + 5 * torch.arange(68)).remainder(8).to(torch.uint8).view(17, 4),
        scale_code=index.remainder(16).to(torch.uint8).view(17, 2),
        zero_code=index.remainder(4).to(torch.uint8).view(17, 2),
        scale_top=torch.tensor([[1.0, -0.5], [0.25, 3.0]]).to(torch.bfloat16),
        scale_step=torch.tensor([[0, 1], [64, 255]], dtype=torch.uint8),
        zero_offset=torch.tensor([[2, 3], [128, 255]], dtype=torch.uint8),
        zero_step=torch.tensor([[4, 5], [6, 255]], dtype=torch.uint8),
        bits=3,
        scale_bits=4,
        zero_bits=2,
        group_size=2,
        group=torch.tensor([1, 0, 0, 1], dtype=torch.uint8) if group else None,
    )


_BYTES = {
    "codes": "4375c6" * 8 + "43050000",
    "scale_code": "1032547698badcfe" * 2 + "10000000",
    "zero_code": "e4" * 8 + "04000000",
    "scale_top": "803f00bf803e4040",
    "scale_step": "000140ff",
    "zero_offset": "020380ff",
    "zero_step": "040506ff",
}

# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[TwoLevel, dict[str, str]]] = [
    (golden_two_level(False), _BYTES),
    (golden_two_level(True), {**_BYTES, "group": "01000001"}),
]
