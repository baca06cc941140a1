"""The law of formats: unpacking what was packed gives the part back bit for bit, in exactly the bits that it reports.

The tests run over the folder `compress/formats`. A new format `foo` needs `tests/support/examples/foo.py`: examples of its part,
and golden bytes, which may be added to and never changed, because checkpoints with them exist.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from examples.bitpack import uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import times

from compress import registry
from compress.checkpoint import packing
from compress.errors import FormatError
from compress.weights import bit_stream as _bits
from compress.weights.weight import CompressedWeight

FORMATS = registry.names("formats")
law = settings(max_examples=times(25, 100), deadline=None, derandomize=True)


def form(name: str) -> Any:
    return registry.lookup("formats", name)


# ---------------------------------------------------------------------------------------------------- examples of parts


def examples(name: str) -> Any:
    """The module with examples of a format: `drawn()` a strategy, `fixed()` an iterator, GOLDEN parts with their bytes."""
    return importlib.import_module(f"examples.{name}")


def bits_of(value: Any) -> Any:
    """A value that compares bit for bit, within parts of parts too: -0 is not 0, and a NaN is itself."""
    if dataclasses.is_dataclass(value):
        return type(value), fields(value)
    if not isinstance(value, torch.Tensor):
        return value
    flat = value.contiguous().flatten()
    return value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def some(parts: list[Any], count: int) -> list[Any]:
    """At most about `count` of many, spread evenly."""
    return parts[:: max(1, len(parts) // count)]


def fields(part: Any) -> dict[str, Any]:
    return {field.name: bits_of(getattr(part, field.name)) for field in dataclasses.fields(part)}


def same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and fields(first) == fields(second)


# ---------------------------------------------------------------------------------------------------- the law


def check(name: str, part: Any) -> None:
    codec = form(name)
    described, tensors = codec.describe(part), codec.pack(part)
    assert json.loads(json.dumps(described)) == described
    assert described["format"] == name
    layout = codec.layout(described, part.shape)
    assert {leaf: (tensor.dtype, tuple(tensor.shape)) for leaf, tensor in tensors.items()} == layout
    assert sum(tensor.nbytes for tensor in tensors.values()) * 8 == part.stored_bits
    assert sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values()) * 8 == part.stored_bits
    back = codec.unpack(json.loads(json.dumps(described)), part.shape, tensors)
    assert same(back, part)
    assert codec.pack(back).keys() == tensors.keys()
    assert all(bits_of(tensor) == bits_of(tensors[leaf]) for leaf, tensor in codec.pack(back).items())
    assert bits_of(back.dequantize()) == bits_of(part.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_there_are_examples_and_golden_bytes_of_every_format(name: str) -> None:
    assert form(name).name == name
    found = examples(name)
    assert {type(part) for part in found.fixed()} == {form(name).part}
    assert found.GOLDEN


@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_gives_back_what_was_packed(name: str) -> None:
    for part in examples(name).fixed():
        check(name, part)


@pytest.mark.parametrize("name", FORMATS)
@law
@given(data=st.data())
def test_unpacking_gives_back_any_part(name: str, data: st.DataObject) -> None:
    check(name, data.draw(examples(name).drawn()))


@pytest.mark.parametrize("name", FORMATS)
@law
@given(data=st.data())
def test_rows_that_are_cut_are_the_rows_of_the_whole(name: str, data: st.DataObject) -> None:
    part, codec = data.draw(examples(name).drawn()), form(name)
    rows, columns = part.shape
    start = 32 * data.draw(st.integers(0, (rows - 1) // 32))
    stop = data.draw(st.integers(start + 1, rows))
    described = codec.describe(part)
    fewer, cut = codec.cut_rows(described, part.shape, codec.pack(part), start, stop)
    assert same(codec.unpack(fewer, (stop - start, columns), cut), part.rows(start, stop))


@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_of_a_part(name: str) -> None:
    codec = form(name)
    for part in examples(name).fixed():
        rows, columns = part.shape
        described, tensors = codec.describe(part), codec.pack(part)
        for start in range(0, rows, 32):
            for stop in {min(start + 32, rows), rows, start + 1}:
                fewer, cut = codec.cut_rows(described, part.shape, tensors, start, stop)
                assert same(codec.unpack(fewer, (stop - start, columns), cut), part.rows(start, stop))


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_that_do_not_fit_their_description(name: str) -> None:
    codec = form(name)
    for part in some(list(examples(name).fixed()), 40):
        described, tensors = codec.describe(part), codec.pack(part)
        for leaf, tensor in tensors.items():
            wrong = torch.int64 if tensor.dtype != torch.int64 else torch.int32
            damaged = [
                {other: value for other, value in tensors.items() if other != leaf},
                {**tensors, leaf: tensor.to(wrong)},
                {**tensors, leaf: torch.cat([tensor, tensor[:1]])},
                {**tensors, leaf: tensor[:-1]},
                {**tensors, leaf: tensor.unsqueeze(0)},
                {**tensors, leaf: tensor.flatten()[0]},
            ]
            for case in damaged:
                with pytest.raises(FormatError, match=rf"\b{leaf}\b"):
                    codec.unpack(described, part.shape, case)
        if name != "input":  # of which every row of a weight has the same
            with pytest.raises(FormatError):
                codec.unpack(described, (part.shape[0] + 64, part.shape[1]), tensors)


odd = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.sampled_from([2**31, 2**64, 10**4000])
    | st.floats()
    | st.text(max_size=3)
)
anything = odd | st.lists(odd, max_size=2) | st.dictionaries(st.text(max_size=2), odd, max_size=2)


@pytest.mark.parametrize("name", FORMATS)
@settings(law, max_examples=times(75, 300))
@given(data=st.data())
def test_a_damaged_description_is_refused_or_still_a_layout(name: str, data: st.DataObject) -> None:
    codec = form(name)
    part = data.draw(examples(name).drawn())
    described = codec.describe(part)
    key = data.draw(st.sampled_from([*described, "more"]))
    changed = {**described, key: data.draw(anything)}
    if data.draw(st.booleans()):
        changed.pop(key)
    if changed != described and key == "more":
        with pytest.raises(FormatError):
            codec.layout(changed, part.shape)
    try:
        layout = codec.layout(changed, part.shape)
        back = codec.unpack(changed, part.shape, codec.pack(part))
    except FormatError as error:
        assert len(str(error)) < 400
        return
    assert all(isinstance(dtype, torch.dtype) for dtype, _ in layout.values())
    assert back.shape == part.shape


# ---------------------------------------------------------------------------------------------------- bit streams


def stream(codes: Any, bits: int) -> bytes:
    """The definition of a dense stream: bit k of code i is bit i*b + k; zeros up to a whole word."""
    expanded = (np.asarray(codes, dtype=np.uint16).reshape(-1, 1) >> np.arange(bits, dtype=np.uint16)) & 1
    flat = expanded.astype(np.uint8).ravel()
    padded = np.concatenate([flat, np.zeros(-len(flat) % 32, dtype=np.uint8)])
    return np.packbits(padded, bitorder="little").tobytes()


def words(*codes: int, bits: int) -> list[int]:
    packed_words = _bits.pack(torch.tensor(codes, dtype=torch.uint8), bits)
    return [word & 0xFFFFFFFF for word in packed_words.tolist()]


def test_worked_words() -> None:
    assert words(*range(8), bits=4) == [0x76543210]
    assert words(*(q + 8 for q in range(8)), bits=4) == [0xFEDCBA98]
    assert words(*(q + 8 for q in (-8, -7, -1, 0, 1, 2, 6, 7)), bits=4) == [0xFEA98710]
    assert words(*range(8), *range(8), bits=3) == [0x88FAC688, 0x0000FAC6]
    assert words(*(i % 8 for i in range(32)), bits=3) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert words(1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, bits=1) == [0x0659]
    assert words(bits=3) == []


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_equal_the_definition_at_every_length(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (131,), generator=generator, dtype=torch.uint8)
    for count in range(132):
        made = _bits.pack(codes[:count], bits)
        assert made.dtype == torch.int32
        assert made.numel() == _bits.words(count, bits) == -(-count * bits // 32)
        assert made.numpy().tobytes() == stream(codes[:count], bits)
        assert torch.equal(_bits.unpack(made, bits, count), codes[:count])


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_do_not_depend_on_how_much_is_expanded_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (13, 77), generator=generator, dtype=torch.uint8)
    assert _bits._SLAB % 32 == 0, "slabs must end on words"
    for slab in (32, 96, 1024):
        monkeypatch.setattr(_bits, "_SLAB", slab)
        for count in (slab - 1, slab, slab + 1, 2 * slab, 1001):
            part = codes.flatten()[: min(count, 1001)]
            made = _bits.pack(part, bits)
            assert made.numpy().tobytes() == stream(part, bits)
            assert torch.equal(_bits.unpack(made, bits, part.numel()), part)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_stream_of_more_than_one_slab(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (_bits._SLAB + 33,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = _bits.pack(codes, bits)
    assert made.numpy().tobytes() == stream(codes, bits)
    assert torch.equal(_bits.unpack(made, bits, codes.numel()), codes)


def test_streams_of_views() -> None:
    codes = torch.randint(0, 32, (40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for view in (codes.T, codes[:, ::3], codes[5:9, 2:]):
        assert _bits.pack(view, 5).numpy().tobytes() == stream(view, 5)
    made = _bits.pack(codes, 5)
    spread = torch.stack([made, made], 1)[:, 0]
    assert torch.equal(_bits.unpack(spread, 5, codes.numel()), codes.flatten())


@pytest.mark.parametrize("bits", range(1, 9))
def test_bitpack_is_these_streams(bits: int) -> None:
    part = uniform(5, 3, 7, bits, True, torch.uint8)
    assert part.zero is not None
    tensors = form("bitpack").pack(part)
    assert tensors["codes"].numpy().tobytes() == stream(part.codes, bits)
    assert tensors["zero"].numpy().tobytes() == stream(part.zero, bits)
    assert bits_of(tensors["scale"]) == bits_of(part.scale)
    assert bits_of(tensors["group"]) == bits_of(part.group)


@pytest.mark.parametrize(
    ("dtype", "wrong"), [(torch.uint8, 3), (torch.uint8, 255), (torch.int16, -1), (torch.int16, 3), (torch.int32, 2**31 - 1)]
)
def test_bitpack_refuses_groups_that_do_not_exist(dtype: torch.dtype, wrong: int) -> None:
    part = uniform(4, 3, 5, 4, False, dtype)
    codec = form("bitpack")
    tensors = codec.pack(part)
    group = tensors["group"].clone()
    group[-1] = wrong
    with pytest.raises(FormatError, match=r"group names a group outside 0\.\.2"):
        codec.unpack(codec.describe(part), part.shape, {**tensors, "group": group})


@pytest.mark.parametrize(
    "change",
    [{"bits": value} for value in (0, 9, -1, 10**30, True, 4.0, "4", None, [4], {})]
    + [{"group_size": value} for value in (0, -1, 7, 30, 2**64, True, 5.0, "5", None, [5])]
    + [{"zero": value} for value in (None, 0, 1, "true", [], {})]
    + [{"group": value} for value in (None, True, 8, "I64", "u8", ["U8"], {"U8": 1})]
    + [{"order": "planes"}, {"axis": 0}],
    ids=str,
)
def test_bitpack_refuses_descriptions_that_it_does_not_write(change: dict[str, Any]) -> None:
    codec = form("bitpack")
    described = codec.describe(uniform(4, 3, 5, 4, True, torch.uint8))
    codec.layout(described, (4, 15))
    with pytest.raises(FormatError, match=f"bitpack: .*{next(iter(change))}"):
        codec.layout({**described, **change}, (4, 15))
    if next(iter(change)) in ("bits", "group_size"):
        with pytest.raises(FormatError):
            codec.layout({key: value for key, value in described.items() if key not in change}, (4, 15))


# ---------------------------------------------------------------------------------------------------- golden bytes


@pytest.mark.parametrize("name", FORMATS)
def test_golden_bytes(name: str) -> None:
    for part, expected in examples(name).GOLDEN:
        tensors = form(name).pack(part)
        assert {leaf: bits_of(tensor)[2].hex() for leaf, tensor in tensors.items()} == expected
        described = form(name).describe(part)
        layout = form(name).layout(described, part.shape)
        stored = {
            leaf: torch.frombuffer(bytearray.fromhex(expected[leaf]), dtype=torch.uint8).view(dtype).reshape(shape)
            for leaf, (dtype, shape) in layout.items()
        }
        assert same(form(name).unpack(described, part.shape, stored), part)


# ---------------------------------------------------------------------------------------------------- whole weights


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_of_one_part_is_stored_as_that_part(name: str) -> None:
    """In every role that it may have, others beside a base of the same shape."""
    cases = [(role, part) for part in list(examples(name).fixed())[::7] for role in form(name).roles]
    for role, part in cases:
        beside = uniform(part.shape[0], 1, part.shape[1], 2, False, None)
        weight = CompressedWeight(part) if role == "base" else CompressedWeight(beside, **{role: part})
        if role == "keep":
            weight = CompressedWeight.pruned(beside, part)
        tensors, spec = packing.pack(weight)
        spec = json.loads(json.dumps(spec))
        rows, columns = part.shape
        assert sum(tensor.nbytes for tensor in tensors.values()) * 8 == weight.stored_bits
        assert weight.bits_per_weight == weight.stored_bits / (rows * columns)
        assert {leaf: (tensor.dtype, tuple(tensor.shape)) for leaf, tensor in tensors.items()} == packing.layout(spec)
        assert same(packing.unpack(spec, tensors).parts[role], part)
        for start in range(0, rows, 32):
            assert same(packing.unpack_rows(spec, tensors, start, rows).parts[role], part.rows(start, rows))
