"""Examples of what `formats/bitpack` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import strategies as st

from compress.weights.uniform import Uniform


def uniform(
    rows: int,
    groups: int,
    size: int,
    bits: int,
    zero: bool,
    group: torch.dtype | None,
    seed: int = 0,
    code: int | None = None,
    offset: bool = False,
    bipolar: bool = False,
    scale: torch.dtype = torch.bfloat16,
) -> Uniform:
    """A random part; `group` is the type of the groups' numbers where columns of a group are not neighbours."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, high: int = 1 << bits) -> torch.Tensor:
        return (
            torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)
            if code is None
            else torch.full(shape, code, dtype=torch.uint8)
        )

    columns = groups * size
    order = torch.randperm(columns, generator=generator)
    return Uniform(
        codes=draw(rows, columns),
        scale=torch.randn(rows, groups, generator=generator).to(scale),
        bits=bits,
        group_size=size,
        zero=draw(rows, groups) if zero else None,
        group=None if group is None else (order // size).to(group),
        offset=torch.randn(rows, groups, generator=generator).to(torch.bfloat16) if offset else None,
        bipolar=bipolar and not zero,
    )


@st.composite
def drawn(draw: st.DrawFn) -> Uniform:
    bits, groups, size = draw(st.integers(1, 8)), draw(st.integers(1, 6)), draw(st.integers(1, 40))
    group = draw(st.sampled_from([None, torch.uint8, torch.int16, torch.int32]))
    code = draw(st.sampled_from([None, None, 0, (1 << bits) - 1]))
    return uniform(
        draw(st.integers(1, 70)),
        groups,
        size,
        bits,
        draw(st.booleans()),
        group,
        draw(st.integers(0, 999)),
        code,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
    )


def fixed() -> Iterator[Uniform]:
    for bits in range(1, 9):
        for zero in (False, True):
            for group in (None, torch.uint8):
                for rows, groups, size in ((1, 1, 1), (3, 1, 5), (32, 2, 16), (33, 7, 1), (7, 3, 11), (64, 3, 16), (97, 1, 33)):
                    yield uniform(rows, groups, size, bits, zero, group)
                yield uniform(33, 3, 5, bits, zero, group, offset=True, bipolar=not zero)
    for scale in (torch.float16, torch.float32):  # of checkpoints that other tools have made
        yield uniform(33, 3, 5, 4, True, torch.uint8, scale=scale)
    yield uniform(2, 300, 1, 3, True, torch.int16)  # more groups than fit into a byte


def golden_uniform(bits: int, zero: bool, group: bool) -> Uniform:
    """Codes 3 + 5 i mod 2^b row by row, scales 1, -1/2, 1/4, ..., zero codes 1 + 3 i: three rows, two groups of five columns."""
    codes = (3 + 5 * torch.arange(30)).remainder(1 << bits).to(torch.uint8).view(3, 10)
    scale = torch.tensor([(-0.5) ** i for i in range(6)]).to(torch.bfloat16).view(3, 2)
    zeros = (1 + 3 * torch.arange(6)).remainder(1 << bits).to(torch.uint8).view(3, 2)
    index = torch.tensor([1, 0, 0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.uint8)
    return Uniform(codes, scale, bits, 5, zeros if zero else None, index if group else None)


OFFSETS = torch.tensor([[2.0, -1.0], [0.5, -0.25], [0.0, -3.0]]).to(torch.bfloat16)

# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[Uniform, dict[str, str]]] = [
    (
        golden_uniform(1, zero=False, group=True),
        {"codes": "55555515", "scale": "803f00bf803e00be803d00bd", "group": "01000001000101000100"},
    ),
    (
        golden_uniform(2, zero=True, group=False),
        {"codes": "9393939393939303", "scale": "803f00bf803e00be803d00bd", "zero": "b1010000"},
    ),
    (
        golden_uniform(3, zero=True, group=True),
        {
            "codes": "4375c64375c64375c6437502",
            "scale": "803f00bf803e00be803d00bd",
            "zero": "e1550000",
            "group": "01000001000101000100",
        },
    ),
    (
        golden_uniform(4, zero=False, group=False),
        {"codes": "832dc7610ba54fe9832dc7610ba54f00", "scale": "803f00bf803e00be803d00bd"},
    ),
    (
        golden_uniform(5, zero=True, group=False),
        {"codes": "03357979300b56fd497213777158b41b14f52800", "scale": "803f00bf803e00be803d00bd", "zero": "811cd520"},
    ),
    (
        golden_uniform(6, zero=False, group=True),
        {
            "codes": "03d24817179a2b5ceb3f913813d689271bdb3b50280f0500",
            "scale": "803f00bf803e00be803d00bd",
            "group": "01000001000101000100",
        },
    ),
    (
        golden_uniform(7, zero=False, group=False),
        {"codes": "03444372e1844c2b584df723269d536c577c66c7ed7b4041f1a00000", "scale": "803f00bf803e00be803d00bd"},
    ),
    (
        golden_uniform(8, zero=True, group=False),
        {
            "codes": "03080d12171c21262b30353a3f44494e53585d62676c71767b80858a8f940000",
            "scale": "803f00bf803e00be803d00bd",
            "zero": "0104070a0d100000",
        },
    ),
    (
        replace(golden_uniform(4, zero=False, group=False), offset=OFFSETS),
        {"codes": "832dc7610ba54fe9832dc7610ba54f00", "scale": "803f00bf803e00be803d00bd", "offset": "004080bf003f80be000040c0"},
    ),
    (
        replace(golden_uniform(2, zero=True, group=False), offset=OFFSETS),
        {
            "codes": "9393939393939303",
            "scale": "803f00bf803e00be803d00bd",
            "zero": "b1010000",
            "offset": "004080bf003f80be000040c0",
        },
    ),
    (
        replace(golden_uniform(3, zero=False, group=False), bipolar=True),
        {"codes": "4375c64375c64375c6437502", "scale": "803f00bf803e00be803d00bd"},
    ),
    (
        replace(golden_uniform(4, zero=False, group=False), scale=golden_uniform(4, zero=False, group=False).scale.half()),
        {"codes": "832dc7610ba54fe9832dc7610ba54f00", "scale": "003c00b8003400b0002c00a8"},
    ),
    (
        replace(golden_uniform(4, zero=False, group=False), scale=golden_uniform(4, zero=False, group=False).scale.float()),
        {"codes": "832dc7610ba54fe9832dc7610ba54f00", "scale": "0000803f000000bf0000803e000000be0000803d000000bd"},
    ),
]
