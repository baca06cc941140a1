"""The part and the format of mixed widths: values by the equation, streams by their definition, damage by its name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from examples.mixed import mixed

from compress.errors import FormatError
from compress.formats.mixed import FORMAT
from compress.weights import bit_stream as _bits
from compress.weights.mixed import Mixed, group_bits, group_dtype, mixed_bits


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
def test_values_are_those_of_the_equation(zero: bool, scattered: bool) -> None:
    part = mixed(5, [1, 2, 3, 8, 1, 4], 3, zero, scattered=scattered)
    values = part.dequantize()
    assert values.dtype == torch.float32
    for row in range(5):
        for column in range(18):
            group = column // 3 if part.group is None else int(part.group[column])
            bits = int(part.widths[group])
            middle = 0.5 if bits == 1 else 2.0 ** (bits - 1)
            shift = middle if part.zero is None or bits == 1 else float(part.zero[row, group])
            assert float(values[row, column]) == (float(part.codes[row, column]) - shift) * float(part.scale[row, group])


@pytest.mark.parametrize("scattered", [False, True])
def test_streams_hold_the_columns_of_a_width_in_order(scattered: bool) -> None:
    part = mixed(7, [3, 1, 3, 2, 5], 4, True, scattered=scattered)
    tensors = FORMAT.pack(part)
    assert part.zero is not None
    for bits in (1, 2, 3, 5):
        groups = [g for g, width in enumerate(part.widths.tolist()) if width == bits]
        columns = [c for c in range(20) if (c // 4 if part.group is None else int(part.group[c])) in groups]
        assert torch.equal(tensors[f"codes{bits}"], _bits.pack(part.codes[:, columns].contiguous(), bits))
        if bits > 1:
            assert torch.equal(tensors[f"zero{bits}"], _bits.pack(part.zero[:, groups].contiguous(), bits))
    assert {"codes4", "codes6", "zero1"}.isdisjoint(tensors)
    assert _bits.unpack(tensors["widths"], 3, 5).tolist() == [2, 0, 2, 1, 4]


def test_every_bit_is_counted() -> None:
    # 32 rows of 8 columns of 1, 2 and 5 bits: 256 fields each; scales; widths in one word; zero codes of 2 and 5 bits.
    codes, scales, widths = 256 * (1 + 2 + 5), 32 * 3 * 16, 32
    assert mixed(32, [1, 2, 5], 8, False).stored_bits == codes + scales + widths
    assert mixed(32, [1, 2, 5], 8, True).stored_bits == codes + scales + widths + 32 * (2 + 5)
    assert mixed(32, [1, 2, 5], 8, False, scattered=True).stored_bits == codes + scales + widths + 64  # 24 columns of 2 bits
    counts = [0, 300, 0, 0, 0, 0, 0, 0]
    assert mixed_bits((32, 300), counts, 1, False, True) - mixed_bits((32, 300), counts, 1, False, False) == 300 * 16
    assert [group_bits(n) for n in (1, 2, 3, 4, 5, 256, 257, 1 << 15, (1 << 15) + 1)] == [1, 1, 2, 2, 3, 8, 16, 16, 32]
    assert [group_dtype(n) for n in (256, 257, (1 << 15) + 1)] == [torch.uint8, torch.int16, torch.int32]


@pytest.mark.parametrize(
    "change",
    [{"group_size": value} for value in (0, -4, 5, 40, 2**64, True, 4.0, "4", None, [4])]
    + [{"groups": value} for value in (None, 5, "5", {}, [], [1] * 7, [0] * 8, [1, 1, 2, 0, 1, 0, 0, 1], [5.0] + [0] * 7)]
    + [
        {"groups": value}
        for value in ([6, -1] + [0] * 6, [True, 1, 2, 0, 1, 0, 0, 0], [10**300] * 8, [5, 0, 0, 0, 0, 0, 0, 0, 0])
    ]
    + [{"zero": value} for value in (None, 0, 1, "true", [])]
    + [{"scattered": value} for value in (None, False, 0, 1, "U8", [])]
    + [{"order": "planes"}, {"bits": 3}],
    ids=str,
)
def test_descriptions_that_are_not_written_are_refused(change: dict[str, Any]) -> None:
    described = FORMAT.describe(mixed(4, [3, 1, 3, 2, 5], 4, True, scattered=True))
    FORMAT.layout(described, (4, 20))
    with pytest.raises(FormatError, match=f"mixed: .*{next(iter(change))}"):
        FORMAT.layout({**described, **change}, (4, 20))


def test_widths_have_to_be_those_described() -> None:
    """Also where every tensor has the size that it should have."""
    part = mixed(4, [3, 1, 3, 2, 5], 4, False)
    described, tensors = FORMAT.describe(part), FORMAT.pack(part)
    swapped = _bits.pack(torch.tensor([2, 0, 2, 1, 3], dtype=torch.uint8), 3)
    with pytest.raises(FormatError, match=r"widths has \[1, 1, 2, 1, 0, 0, 0, 0\].*expected \[1, 1, 2, 0, 1, 0, 0, 0\]"):
        FORMAT.unpack(described, part.shape, {**tensors, "widths": swapped})


@pytest.mark.parametrize("groups", [5, 300])
@pytest.mark.parametrize("wrong", ["uneven", "too high", "negative"])
def test_columns_have_to_be_in_groups_that_exist_and_are_full(groups: int, wrong: str) -> None:
    part = mixed(4, [2] * groups, 2, False, scattered=True)
    described, tensors = FORMAT.describe(part), FORMAT.pack(part)
    assert part.group is not None
    group = part.group.clone()
    first = int(group[0])
    if wrong == "negative" and groups == 5:
        return  # fields have no sign
    group[0] = {"uneven": (first + 1) % groups, "too high": groups, "negative": -1}[wrong]
    damaged = _bits.pack(group, group_bits(groups)) if groups <= 256 else group
    uneven, outside = "group does not give each of the groups 0..{} 2 columns", "group names a group outside 0..{};"
    with pytest.raises(FormatError, match=re.escape((uneven if wrong == "uneven" else outside).format(groups - 1))):
        FORMAT.unpack(described, part.shape, {**tensors, "group": damaged})


def test_short_description() -> None:
    assert FORMAT.short(FORMAT.describe(mixed(4, [3, 1, 3, 2, 5], 4, False))) == "2.8-bit (1..5) g4"
    assert FORMAT.short(FORMAT.describe(mixed(4, [3, 3], 4, True, scattered=True))) == "3-bit g4 with zeros scattered"


def test_rows_share_memory_and_keep_widths() -> None:
    part = mixed(9, [1, 4], 3, True, scattered=True)
    rows = part.rows(2, 5)
    assert isinstance(rows, Mixed)
    assert torch.equal(rows.dequantize(), part.dequantize()[2:5])
    assert rows.codes.data_ptr() == part.codes[2:].data_ptr()
    assert rows.widths is part.widths
