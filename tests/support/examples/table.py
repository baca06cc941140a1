"""Examples of what `formats/table` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

from compress.weights.table import DATATYPES, SCALE_TYPES, ScaleType, Table, code_bits, select_bits


def table(
    rows: int, groups: int, size: int, datatype: str, scale_type: ScaleType, seed: int = 0, code: int | None = None
) -> Table:
    """A random part; scale bytes take every value that is a number."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, high: int) -> Tensor:
        drawn = torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)
        return drawn if code is None else torch.full(shape, min(code, high - 1), dtype=torch.uint8)

    scale, row_scale = draw(rows, groups, high=255), None
    if scale_type == "bfloat16":
        scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)
    elif scale_type == "uint8":
        row_scale = torch.randn(rows, generator=generator).to(torch.bfloat16)
    elif scale_type == "e4m3":
        scale, row_scale = (
            torch.where(scale & 127 == 127, 126, scale).view(torch.float8_e4m3fn),
            torch.randn(rows, generator=generator),
        )
    return Table(
        codes=draw(rows, groups * size, high=1 << code_bits(datatype)),
        scale=scale,
        datatype=datatype,
        group_size=size,
        row_scale=row_scale,
        select=draw(rows, groups, high=1 << select_bits(datatype)) if select_bits(datatype) else None,
    )


@st.composite
def drawn(draw: st.DrawFn) -> Table:
    return table(
        draw(st.integers(1, 70)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from(list(DATATYPES))),
        draw(st.sampled_from(SCALE_TYPES)),
        draw(st.integers(0, 999)),
        draw(st.sampled_from([None, None, 0, 255])),
    )


def fixed() -> Iterator[Table]:
    for datatype in DATATYPES:
        for scale_type in SCALE_TYPES:
            for rows, groups, size in ((1, 1, 1), (3, 1, 5), (32, 2, 16), (33, 7, 1), (7, 3, 11), (64, 3, 16), (97, 1, 33)):
                yield table(rows, groups, size, datatype, scale_type)


def golden(datatype: str, scale_type: ScaleType) -> Table:
    """Codes 3 + 5 i mod 2^b row by row: three rows, two groups of five columns, scales and choices as below."""
    codes = (3 + 5 * torch.arange(30)).remainder(1 << code_bits(datatype)).to(torch.uint8).view(3, 10)
    octets = torch.tensor([1, 64, 126, 119, 200, 254], dtype=torch.uint8).view(3, 2)
    scale, row_scale = octets, None
    if scale_type == "bfloat16":
        scale = torch.tensor([(-0.5) ** i for i in range(6)]).to(torch.bfloat16).view(3, 2)
    elif scale_type == "uint8":
        row_scale = torch.tensor([1.0, 0.5, 0.75]).to(torch.bfloat16)
    elif scale_type == "e4m3":
        scale, row_scale = octets.view(torch.float8_e4m3fn), torch.tensor([1.0, 0.5, 0.75])
    select = torch.tensor([[3, 0], [1, 2], [2, 1]], dtype=torch.uint8) if select_bits(datatype) else None
    return Table(codes, scale, datatype, 5, row_scale, select)


# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[Table, dict[str, str]]] = [
    (
        golden("fp3", "bfloat16"),
        {"codes": "4375c64375c64375c6437502", "scale": "803f00bf803e00be803d00bd"},
    ),
    (
        golden("fp4", "e8m0"),
        {"codes": "832dc7610ba54fe9832dc7610ba54f00", "scale": "01407e77c8fe"},
    ),
    (
        golden("fp4", "e4m3"),
        {"codes": "832dc7610ba54fe9832dc7610ba54f00", "scale": "01407e77c8fe", "row_scale": "0000803f0000003f0000403f"},
    ),
    (
        golden("nf4", "bfloat16"),
        {"codes": "832dc7610ba54fe9832dc7610ba54f00", "scale": "803f00bf803e00be803d00bd"},
    ),
    (
        golden("bitmod-fp3", "uint8"),
        {"codes": "4375c64375c64375c6437502", "scale": "01407e77c8fe", "row_scale": "803f003f403f", "select": "93060000"},
    ),
    (
        golden("bitmod-fp4", "uint8"),
        {"codes": "832dc7610ba54fe9832dc7610ba54f00", "scale": "01407e77c8fe", "row_scale": "803f003f403f", "select": "93060000"},
    ),
]
