"""Parts that are stored in two levels or sparsely: their definitions, and damage that a shape does not show."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from examples.sparse import sparse
from examples.two_level import two_level

from compress import registry
from compress.errors import FormatError
from compress.weights.sparse import Sparse, column_dtype, sparse_bits
from compress.weights.two_level import TwoLevel, two_level_bits


def sparse_rows() -> Any:
    return registry.lookup("formats", "sparse")


@pytest.mark.parametrize("group", [None, torch.uint8])
def test_two_levels_by_their_definition(group: torch.dtype | None) -> None:
    part = two_level(35, 3, 4, 3, 4, 5, group)
    decoded = part.dequantize()
    for row in range(35):
        for column in range(12):
            g, tile = column // 4 if part.group is None else int(part.group[column]), row // 16
            scale = float(part.scale_top[tile, g]) * (1 - int(part.scale_code[row, g]) * int(part.scale_step[tile, g]) / 2**11)
            zero = int(part.zero_offset[tile, g]) + int(part.zero_code[row, g]) * int(part.zero_step[tile, g]) / 32
            assert float(part.scale()[row, g]) == scale  # both exact
            assert float(part.zero()[row, g]) == zero / 32
            assert float(decoded[row, column]) == pytest.approx((int(part.codes[row, column]) - zero / 32) * scale, rel=2**-24)


def test_rows_of_two_levels_begin_at_a_tile() -> None:
    part = two_level(40, 2, 4, 3, 3, 3)
    for start, stop in ((0, 40), (16, 17), (16, 40), (32, 40), (0, 5)):
        assert torch.equal(part.rows(start, stop).dequantize(), part.dequantize()[start:stop])
    with pytest.raises(ValueError, match="multiple of 16"):
        part.rows(8, 24)


def test_two_levels_count_every_bit() -> None:
    # 64 x 64 codes of 3 bits, 256 scale codes of 4 and zero codes of 2, 4 x 4 tiles of 40 bits.
    assert two_level_bits((64, 64), 3, 16, 4, 2) == 64 * 64 * 3 + 256 * 6 + 16 * 40
    # 3 x 5 codes of 3 bits are 2 words; 3 codes of either kind one word each; one tile; a byte per column.
    assert two_level_bits((3, 5), 3, 5, 4, 2, 8) == 64 + 32 + 32 + 40 + 40
    assert sparse_bits((64, 256), 10) == 65 * 32 + 10 * 24
    assert sparse_bits((64, 257), 10) == 65 * 32 + 10 * 32
    assert sparse_bits((64, 1 << 16), 10) == 65 * 32 + 10 * 48


def test_sparse_rows_by_their_definition() -> None:
    part = sparse(20, 30, 0.2)
    decoded, entry = torch.zeros(20, 30), 0
    for row in range(20):
        for _ in range(int(part.pointers[row]), int(part.pointers[row + 1])):
            decoded[row, int(part.columns[entry])] = float(part.values[entry])
            entry += 1
    assert entry == len(part.values) > 50
    assert torch.equal(part.dequantize(), decoded)
    for start, stop in ((0, 20), (3, 4), (7, 20), (0, 1)):
        assert torch.equal(part.rows(start, stop).dequantize(), decoded[start:stop])


def test_no_column_needs_a_sign() -> None:
    for columns, dtype in ((256, torch.uint8), (257, torch.int16), (1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)):
        assert column_dtype(columns) == dtype
        assert torch.iinfo(dtype).max >= columns - 1
        where = torch.zeros(2, columns, dtype=torch.bool)
        where[1, columns - 1] = True
        part = Sparse.of(torch.full((2, columns), 3.0), where)
        assert float(part.dequantize()[1, columns - 1]) == 3.0
        assert int(part.columns[0]) == columns - 1


def damaged(name: str, change: dict[int, int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A part of 3 rows, 2, 0 and 2 values at columns 1, 4 and 0, 299, with some entries of a tensor changed."""
    where = torch.zeros(3, 300, dtype=torch.bool)
    where[[0, 0, 2, 2], [1, 4, 0, 299]] = True
    part = Sparse.of(torch.ones(3, 300), where)
    tensors = {**sparse_rows().pack(part)}
    tensors[name] = tensors[name].clone()
    for index, value in change.items():
        tensors[name][index] = value
    return sparse_rows().describe(part), tensors


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pointers", {0: 1}, "pointers do not rise from 0 to nnz=4"),
        ("pointers", {3: 3}, "pointers do not rise"),
        ("pointers", {3: 5}, "pointers do not rise"),
        ("pointers", {1: 3, 2: 2}, "pointers do not rise"),
        ("pointers", {1: -1}, "pointers do not rise"),
        ("pointers", {2: 2**31 - 1}, "pointers do not rise"),
        ("columns", {3: 300}, r"columns names a column outside 0\.\.299"),
        ("columns", {0: -1}, r"columns names a column outside 0\.\.299"),
        ("columns", {0: 4}, "columns do not rise within a row"),
        ("columns", {0: 5}, "columns do not rise within a row"),
        ("pointers", {1: 3, 2: 3}, "columns do not rise within a row"),
    ],
)
def test_damage_of_sparse_rows_is_refused(name: str, change: dict[int, int], message: str) -> None:
    described, tensors = damaged(name, {})
    sparse_rows().unpack(described, (3, 300), tensors)
    described, tensors = damaged(name, change)
    with pytest.raises(FormatError, match=f"sparse: {message}"):
        sparse_rows().unpack(described, (3, 300), tensors)


@pytest.mark.parametrize("change", [{1: 7, 2: 7, 3: 7}, {1: -3}, {0: 3, 1: 2}])
def test_rows_of_damaged_pointers_are_refused(change: dict[int, int]) -> None:
    described, tensors = damaged("pointers", change)
    with pytest.raises(FormatError, match="sparse: pointers of rows"):
        sparse_rows().cut_rows(described, (3, 300), tensors, 0, 1)


@pytest.mark.parametrize("value", [-1, 901, 2**40, True, 2.0, "4", None, [4]], ids=str)
def test_a_wrong_number_of_values_is_refused(value: Any) -> None:
    with pytest.raises(FormatError, match="sparse: nnz"):
        sparse_rows().layout({"format": "sparse", "nnz": value}, (3, 300))


@pytest.mark.parametrize(
    "change",
    [{"bits": value} for value in (0, 9, True, 4.0, "4", None)]
    + [{"scale_bits": value} for value in (1, 9, None, True)]
    + [{"zero_bits": value} for value in (0, 1, 9, "2")]
    + [{"group_size": value} for value in (0, -1, 7, 2**64, True, None)]
    + [{"group": value} for value in (None, True, "I64", ["U8"])]
    + [{"tile": 16}],
    ids=str,
)
def test_two_levels_refuse_descriptions_that_they_do_not_write(change: dict[str, Any]) -> None:
    codec = registry.lookup("formats", "two_level")
    described = codec.describe(two_level(20, 3, 4, 3, 4, 2, torch.uint8))
    codec.layout(described, (20, 12))
    with pytest.raises(FormatError, match=f"two_level: .*{next(iter(change))}"):
        codec.layout({**described, **change}, (20, 12))


def test_two_levels_refuse_groups_that_do_not_exist() -> None:
    codec = registry.lookup("formats", "two_level")
    part = two_level(20, 3, 4, 3, 4, 2, torch.int16)
    for wrong in (-1, 3, 2**15 - 1):
        tensors = codec.pack(part)
        tensors["group"] = tensors["group"].clone()
        tensors["group"][-1] = wrong
        with pytest.raises(FormatError, match=r"group names a group outside 0\.\.2"):
            codec.unpack(codec.describe(part), part.shape, tensors)


def test_what_is_shown_of_a_part() -> None:
    codec = registry.lookup("formats", "two_level")
    assert codec.short(codec.describe(two_level(4, 2, 8, 3, 4, 2))) == "3-bit g8, 4-bit scales, 2-bit zeros"
    assert codec.short(codec.describe(two_level(4, 2, 8, 3, 4, 2, torch.uint8))).endswith("scattered")
    part = sparse(4, 8, 0.5)
    assert sparse_rows().short(sparse_rows().describe(part)) == f"{len(part.values)} sparse"
    assert isinstance(two_level(4, 2, 8, 3, 4, 2), TwoLevel)
    assert math.prod(part.shape) == 32
