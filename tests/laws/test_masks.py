"""The law of formats for pruned weights: the base keeps what the mask keeps, in exactly the bits that are reported."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from examples.table import table
from masks import BASES, COLUMNS, MASKS, base, mask, pruned

from compress.checkpoint import packing
from compress.errors import FormatError
from compress.runtime.linear import CompressedLinear
from compress.weights import bit_stream as _bits
from compress.weights.kept_values import Stream
from compress.weights.mask import Bitmask, Pattern
from compress.weights.weight import CompressedWeight

every_base = pytest.mark.parametrize("base_kind", BASES)
every_mask = pytest.mark.parametrize("mask_kind", MASKS)


def bits_of(value: Any) -> Any:
    """A value that compares bit for bit."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()


def same(first: Any, second: Any) -> bool:
    """Whether two parts are equal bit for bit."""
    return type(first) is type(second) and all(
        bits_of(getattr(first, field.name)) == bits_of(getattr(second, field.name)) for field in fields(first)
    )


@every_base
@every_mask
@pytest.mark.parametrize("more", [False, True])
def test_a_pruned_weight_is_stored_and_restored_bit_for_bit(base_kind: str, mask_kind: str, more: bool) -> None:
    for rows in (1, 5, 32, 33, 97):
        weight = pruned(base_kind, mask_kind, rows, more=more)
        tensors, spec = packing.pack(weight)
        spec = json.loads(json.dumps(spec))
        assert {leaf: (t.dtype, tuple(t.shape)) for leaf, t in tensors.items()} == packing.layout(spec)
        assert 8 * sum(t.nbytes for t in tensors.values()) == weight.stored_bits
        back = packing.unpack(spec, tensors)
        assert back.parts.keys() == weight.parts.keys()
        assert all(same(back.parts[role], part) for role, part in weight.parts.items())
        assert torch.equal(back.dequantize(), weight.dequantize())
        again, described = packing.pack(back)
        assert json.loads(json.dumps(described)) == spec
        assert {leaf: bits_of(t) for leaf, t in again.items()} == {leaf: bits_of(t) for leaf, t in tensors.items()}


@every_base
@every_mask
def test_rows_that_are_cut_are_the_rows_of_the_whole(base_kind: str, mask_kind: str) -> None:
    weight = pruned(base_kind, mask_kind, 97, more=True)
    tensors, spec = packing.pack(weight)
    for start in range(0, 97, 32):
        for stop in {start + 1, min(start + 32, 97), min(start + 40, 97), 97}:
            cut, expected = packing.unpack_rows(spec, tensors, start, stop), weight.rows(start, stop)
            assert all(same(cut.parts[role], part) for role, part in expected.parts.items())
            assert packing.pack(cut)[0].keys() <= tensors.keys()


@every_base
@every_mask
def test_what_is_not_kept_is_zero_and_the_rest_is_the_base(base_kind: str, mask_kind: str) -> None:
    part, keep = base(base_kind, 40), mask(mask_kind, 40)
    kept = keep.mask()
    decoded = CompressedWeight.pruned(part, keep).dequantize()
    assert torch.equal(decoded[kept], part.dequantize()[kept])
    assert torch.equal(decoded[~kept].view(torch.int32), torch.zeros(int((~kept).sum()), dtype=torch.int32)), "and no -0"


def test_every_bit_is_counted() -> None:
    """What formats are said to take, by hand."""
    rows, columns = 64, 256
    count = rows * columns
    half = Bitmask((torch.arange(columns) % 2 == 0).expand(rows, columns).contiguous())
    assert CompressedWeight.pruned(base("bf16", rows, columns), half).bits_per_weight == 1 + 16 / 2
    two_four = mask("2:4", rows, columns)
    assert CompressedWeight.pruned(base("bf16", rows, columns), two_four).bits_per_weight == 3 / 4 + 16 / 2
    assert CompressedWeight.pruned(base("4-bit", rows, columns), two_four).bits_per_weight == 3 / 4 + 4 / 2 + 16 / 16
    ragged = Bitmask(half.kept.clone())
    ragged.kept[0, 1] = True
    pointers = 32 * (rows // 32 + 1)
    dense = CompressedWeight.pruned(base("bf16", rows, columns), ragged)
    assert dense.stored_bits == count + 16 * (count // 2 + 1) + pointers
    # The first tile of codes is filled up to a multiple of 32.
    codes = CompressedWeight.pruned(base("4-bit", rows, columns), ragged)
    assert codes.stored_bits == count + 4 * (count // 2 + 32) + 16 * count // 16 + pointers
    # Of every row one of six runs of 8 is kept, with its scale and no other.
    runs = Bitmask(torch.nn.functional.one_hot(torch.arange(rows) % 6, 6).bool(), 8)
    assert CompressedWeight.pruned(base("4-bit runs", rows, 48), runs).stored_bits == rows * (6 + 8 * 4 + 16)
    assert Pattern.from_mask(two_four.mask(), 2, 4).stored_bits == count * 3 // 4


def test_streams_by_their_definition() -> None:
    keep = mask("ragged", 70).mask()
    fields_ = torch.arange(70 * COLUMNS).view(70, COLUMNS).to(torch.int64) + 1
    stream = Stream.of(keep, 32)
    flat, expected = stream.compact(fields_).tolist(), []
    assert stream.pointers is not None
    for start in range(0, 70, 32):
        assert len(expected) == 32 * int(stream.pointers[start // 32])
        expected += [int(fields_[r, c]) for r in range(start, min(start + 32, 70)) for c in range(COLUMNS) if keep[r, c]]
        expected += [0] * (-len(expected) % 32)
    assert flat == expected
    assert torch.equal(stream.spread(torch.tensor(flat)), fields_ * keep)


@pytest.mark.parametrize("of", range(2, 9))
def test_patterns_name_their_combinations(of: int) -> None:
    for kept in range(1, of):
        every = Pattern(torch.arange(math.comb(of, kept), dtype=torch.uint8).unsqueeze(0), kept, of)
        places = [tuple(row.nonzero().flatten().tolist()) for row in every.mask().view(-1, of)]
        assert places == sorted(set(places))
        assert all(len(place) == kept for place in places)
        assert torch.equal(Pattern.from_mask(every.mask(), kept, of).choice, every.choice)
        wrong = every.mask().clone()
        wrong[0, 0] ^= True
        with pytest.raises(ValueError, match=f"than {kept} of {of}"):
            Pattern.from_mask(wrong, kept, of)


def test_masks_that_do_not_fit_the_base_are_refused() -> None:
    weight, other = pruned("4-bit", "balanced", 40), pruned("4-bit", "ragged", 40)
    tensors, spec = packing.pack(weight)
    ragged, ragged_spec = packing.pack(other)
    with pytest.raises(FormatError, match="does not keep 16 weights in every row"):
        packing.unpack(spec, {**tensors, "keep_bits": ragged["keep_bits"]})
    with pytest.raises(FormatError, match="pointers are not those of the mask"):
        packing.unpack(ragged_spec, {**ragged, "keep_bits": tensors["keep_bits"]})
    with pytest.raises(FormatError, match="pointers do not rise from 0 to"):
        packing.unpack(ragged_spec, {**ragged, "pointers": ragged["pointers"] + 1})
    with pytest.raises(FormatError, match="pointers of rows 32"):
        packing.unpack_rows(ragged_spec, {**ragged, "pointers": ragged["pointers"].flip(0)}, 32, 40)
    with pytest.raises(FormatError, match="no mask beside the base"):
        packing.unpack({k: v for k, v in spec.items() if k != "keep"}, tensors)
    dense_spec = {**spec, "base": {k: v for k, v in spec["base"].items() if k != "kept"}}
    with pytest.raises(FormatError, match="a mask beside the base"):
        packing.unpack(dense_spec, {**tensors, "codes": torch.zeros(_bits.words(40 * COLUMNS, 4), dtype=torch.int32)})
    runs, runs_spec = packing.pack(pruned("4-bit runs", "balanced runs", 40))
    assert runs_spec["base"]["scales"] == 2
    moved = runs["keep_bits"].clone()
    moved[0] = (moved[0] & ~0x3F) | 0b000111  # the first row keeps three runs
    with pytest.raises(FormatError, match="does not keep 16 weights"):
        packing.unpack(runs_spec, {**runs, "keep_bits": moved})


def test_a_base_that_goes_with_no_mask_says_so() -> None:
    part = table(8, 3, 16, "nf4", "bfloat16")
    with pytest.raises(FormatError, match="Table: cannot be stored under a mask"):
        _ = CompressedWeight(part, keep=mask("2:4", 8)).stored_bits
    tensors, spec = packing.pack(CompressedWeight(part))
    with pytest.raises(FormatError, match="'table' is there with a mask"):
        packing.layout({**spec, "keep": {"format": "pattern", "kept": 2, "of": 4}})
    assert packing.layout(spec).keys() == tensors.keys()


@every_base
@every_mask
def test_the_linear_multiplies_with_what_is_decoded(base_kind: str, mask_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.kernels import torch_reference

    monkeypatch.setattr(torch_reference, "_CHUNK", 1)  # 32 rows at a time
    weight = pruned(base_kind, mask_kind, 97, more=True)
    x = torch.randn(3, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = CompressedLinear.of(weight)(x)
    # The factors' product is summed in float32, of 32 rows as of all in some order.
    torch.testing.assert_close(y, x @ weight.dequantize().double().T, rtol=1e-5, atol=1e-5)
