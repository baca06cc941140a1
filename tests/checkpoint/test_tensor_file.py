"""Safetensors files that others wrote: refused quickly, with a message that helps, where they are damaged or hostile."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from limits import PROCESSOR, quickly
from raw_headers import BIG, DATA, VALID, advice, check, of, packed, refusal

from compress.checkpoint import tensor_file
from compress.checkpoint.tensor_file import (
    MAX_HEADER,
    read_header,
    read_tensor,
)
from compress.errors import CheckpointError


def test_the_valid_file_is_valid(path: Path) -> None:
    path.write_bytes(packed(VALID, DATA))
    entries = check(path)
    assert entries is not None
    assert {name: list(entry.shape) for name, entry in entries.items()} == {
        n: v["shape"] for n, v in VALID.items() if "shape" in v
    }
    assert entries["scalar"].numel == 1
    assert entries["empty"].numel == 0


def test_truncated_at_every_length(path: Path) -> None:
    whole = packed(VALID, DATA)
    for length in range(len(whole)):
        refusal(path, whole[:length])


def test_bytes_after_the_last_tensor(path: Path) -> None:
    assert "1 bytes follow" in refusal(path, packed(VALID, DATA + b"x"))
    assert "follow" in refusal(path, packed({}, b"x"))


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**63 + 8, 2**64 - 8, 2**64 - 1])
def test_lies_about_the_length_of_the_header(path: Path, length: int) -> None:
    refusal(path, packed(VALID, DATA, length))


def test_a_header_that_takes_all_of_a_large_file_is_not_read(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER + 1))
        stream.truncate(8 + MAX_HEADER + 1)  # sparse
    with quickly(nbytes=1 << 20), pytest.raises(CheckpointError, match="header claims"):
        read_header(path)
    path.unlink()


ONE = of("U8", [1], 0, 1)


HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": of("U8", [4], 0, 4), "b": of("U8", [4], 2, 6)}, bytes(6), "overlaps"),
    "same bytes twice": ({"a": of("U8", [4], 0, 4), "b": of("U8", [4], 0, 4)}, bytes(4), "overlaps"),
    "gap": ({"a": of("U8", [4], 0, 4), "b": of("U8", [4], 5, 9)}, bytes(9), "gap"),
    "gap at the start": ({"a": of("U8", [4], 1, 5)}, bytes(5), "gap"),
    "empty tensor beyond the end": ({"a": of("U8", [4], 0, 4), "b": of("U8", [0], 5, 5)}, bytes(4), "within the 4 bytes"),
    "empty tensor in a tensor": ({"a": of("U8", [4], 0, 4), "b": of("U8", [0], 2, 2)}, bytes(4), "overlaps"),
    "begin after end": ({"a": of("U8", [4], 4, 0)}, bytes(4), "4..0"),
    "end beyond the data": ({"a": of("U8", [5], 0, 5)}, bytes(4), "within the 4 bytes"),
    "negative offsets": ({"a": of("U8", [4], -4, 0)}, bytes(4), "data_offsets"),
    "negative end": ({"a": of("U8", [4], 0, -4)}, bytes(4), "data_offsets"),
    "offset 2^63": ({"a": of("U8", [4], 2**63, 2**63 + 4)}, bytes(4), "data_offsets"),
    "offset 2^64": ({"a": of("U8", [4], 2**64, 2**64 + 4)}, bytes(4), "data_offsets"),
    "offset of 4000 digits": ({"a": of("U8", [4], 0, BIG)}, bytes(4), "data_offsets"),
    "float offsets": ({"a": of("U8", [4], 0.0, 4.0)}, bytes(4), "data_offsets"),
    "bool offsets": ({"a": of("U8", [1], False, True)}, bytes(1), "data_offsets"),
    "text offsets": ({"a": of("U8", [1], "0", "1")}, bytes(1), "data_offsets"),
    "one offset": ({"a": of("U8", [1], 0)}, bytes(1), "data_offsets"),
    "three offsets": ({"a": of("U8", [1], 0, 1, 1)}, bytes(1), "data_offsets"),
    "offsets no list": ({"a": {**ONE, "data_offsets": {"0": 1}}}, bytes(1), "data_offsets"),
    "negative axes": ({"a": of("U8", [-2, -2], 0, 4)}, bytes(4), "shape"),
    "float axis": ({"a": of("U8", [4.0], 0, 4)}, bytes(4), "shape"),
    "bool axis": ({"a": of("U8", [True], 0, 1)}, bytes(1), "shape"),
    "nested axis": ({"a": of("U8", [[4]], 0, 4)}, bytes(4), "shape"),
    "null axis": ({"a": of("U8", [None], 0, 4)}, bytes(4), "shape"),
    "text shape": ({"a": of("U8", "4", 0, 4)}, bytes(4), "shape"),
    "number shape": ({"a": of("U8", 4, 0, 4)}, bytes(4), "shape"),
    "axis 2^63": ({"a": of("U8", [2**63], 0, 0)}, b"", "shape"),
    "product wraps to 0": ({"a": of("U8", [2**32, 2**32], 0, 0)}, b"", "shape"),
    "product wraps to 4": ({"a": of("F32", [2**62 + 1], 0, 4)}, bytes(4), "shape"),
    "huge axes and an empty one": ({"a": of("U8", [0, 2**62, 2**62], 0, 0)}, b"", "shape"),
    "an empty axis and one of 2^64": ({"a": of("U8", [0, 2**64], 0, 0)}, b"", "shape"),
    "axes of 4000 digits": ({"a": of("U8", [BIG, BIG], 0, 4)}, bytes(4), "shape"),
    "a million axes": ({"a": of("U8", [2] * 1_000_000, 0, 4)}, bytes(4), "shape"),
    "many huge axes": ({"a": of("U8", [BIG] * 1000, 0, 4)}, bytes(4), "shape"),
    "65 axes": ({"a": of("U8", [1] * 65, 0, 1)}, bytes(1), "64"),
    "fewer bytes than shape": ({"a": of("F32", [4], 0, 4)}, bytes(4), "16 bytes"),
    "more bytes than shape": ({"a": of("U8", [1], 0, 4)}, bytes(4), "1 bytes"),
    "scalar without bytes": ({"a": of("F32", [], 0, 0)}, b"", "4 bytes"),
    "unknown dtype": ({"a": of("F4", [1], 0, 1)}, bytes(1), "one of F64"),
    "dtype in small letters": ({"a": of("u8", [1], 0, 1)}, bytes(1), "one of F64"),
    "dtype null": ({"a": of(None, [1], 0, 1)}, bytes(1), "one of F64"),
    "dtype list": ({"a": of(["U8"], [1], 0, 1)}, bytes(1), "one of F64"),
    "long dtype": ({"a": of("U" * 100_000, [1], 0, 1)}, bytes(1), "one of F64"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, bytes(1), "dtype, shape"),
    "one key more": ({"a": {**ONE, "order": "F"}}, bytes(1), "dtype, shape"),
    "tensor is a list": ({"a": [1]}, b"", "dtype, shape"),
    "tensor is null": ({"a": None}, b"", "dtype, shape"),
    "tensor is a long text": ({"a": "x" * 100_000}, b"", "dtype, shape"),
    "name twice": ('{"a":%s,"a":%s}' % ((json.dumps(ONE),) * 2), bytes(1), "twice"),
    "long name twice": ('{"%s":%s,"%s":%s}' % (("n" * 100_000, json.dumps(ONE)) * 2), bytes(1), "twice"),
    "field twice": ('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1), "twice"),
    "long name": ({"n" * 100_000: ONE}, bytes(1), "100000 characters"),
    "name that is no text": ({"\ud800": ONE}, bytes(1), "characters"),
    "digits without end": ({f"model.layers.{'9' * 5000}.mlp": ONE}, bytes(1), "characters"),
    "not UTF-8": (b'{"\xff\xfe":{}}', b"", "not UTF-8 at byte 10"),
    "UTF-16": (json.dumps({"a": ONE}).encode("utf-16"), bytes(1), "not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps({"a": ONE}).encode(), bytes(1), "not JSON"),
    "nothing": (b"", b"", "not JSON"),
    "spaces": (b" " * 64, b"", "not JSON"),
    "zeros": (bytes(64), b"", "not JSON"),
    "half an object": ('{"a":{"dtype"', b"", "not JSON"),
    "two objects": ("{}{}", b"", "not JSON"),
    "list": ([], b"", "JSON list"),
    "number": (5, b"", "JSON int"),
    "null": (None, b"", "JSON NoneType"),
    "text": ('"a"', b"", "JSON str"),
    "NaN": ("NaN", b"", "JSON float"),
    "NaN for a tensor": ('{"a":NaN}', b"", "dtype, shape"),
    "NaN for an axis": ('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', b"", "shape"),
    "infinite offsets": ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[-Infinity,Infinity]}}', b"", "data_offsets"),
    "number too long for Python": ('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}}' % ("9" * 5000), b"", "not JSON"),
    "exponent too large": ('{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}', b"", "shape"),
    "deep lists": ("[" * 1_000_000, b"", "nested too deeply"),
    "deep objects": ('{"a":' * 200_000, b"", "nested too deeply"),
    "deep in a tensor": ('{"a":' + "[" * 900 + "]" * 900 + "}", b"", "dtype, shape|nested"),
    "deep in a shape": ('{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,0]}}' % ("[" * 900 + "]" * 900), b"", "shape|nested"),
    "metadata list": ({"__metadata__": [], "a": ONE}, bytes(1), "__metadata__"),
    "metadata text": ({"__metadata__": "", "a": ONE}, bytes(1), "__metadata__"),
    "metadata zero": ({"__metadata__": 0, "a": ONE}, bytes(1), "__metadata__"),
    "metadata false": ({"__metadata__": False, "a": ONE}, bytes(1), "__metadata__"),
    "metadata number": ({"__metadata__": {"format": 1}, "a": ONE}, bytes(1), "__metadata__"),
    "metadata nested": ({"__metadata__": {"format": {"a": "b"}}, "a": ONE}, bytes(1), "__metadata__"),
    "metadata that is no text": ({"__metadata__": {"format": "\udc00"}, "a": ONE}, bytes(1), "__metadata__"),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', b"", "twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(path: Path, name: str) -> None:
    header, data, expected = HOSTILE[name]
    content = packed(header, data)
    path.write_bytes(content)
    # About as much as parsing needs; tracemalloc itself slows the parser down.
    with (
        quickly(20.0, nbytes=40 * len(content) + (1 << 20), timer=PROCESSOR),
        pytest.raises(CheckpointError, match=expected) as caught,
    ):
        read_header(path)
    advice(caught.value, path)


def test_nesting_at_the_edge_of_the_stack_never_escapes_as_another_error(path: Path) -> None:
    for depth in range(850, 1010, 3):
        for left, right in ("[]", ('{"k":', "}")):
            nested = left * depth + "0" + right * depth
            refusal(path, packed('{"a":' + nested + "}"))
            refusal(path, packed('{"a":{"dtype":"U8","shape":[' + nested + '],"data_offsets":[0,0]}}'))


def test_null_metadata_and_any_order_of_tensors_are_fine(path: Path) -> None:
    path.write_bytes(packed({"__metadata__": None, "z": of("U8", [1], 1, 2), "a": ONE}, b"ab"))
    entries = check(path)
    assert entries is not None
    assert bytes(read_tensor(entries["z"]).tolist()) == b"b"


def test_many_empty_tensors_in_one_place(path: Path) -> None:
    header = {f"e{n}": of("F32", [n, 0], 4, 4) for n in range(50)}
    path.write_bytes(packed({"after": of("F32", [1], 4, 8), **header, "before": of("F32", [1], 0, 4)}, bytes(8)))
    entries = check(path)
    assert entries is not None
    assert len(entries) == 52


def test_more_tensors_than_any_model_has(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "MAX_TENSORS", 20)
    path.write_bytes(packed({f"e{n}": of("F32", [0], 0, 0) for n in range(20)}))
    assert len(read_header(path)[0]) == 20
    path.write_bytes(packed({f"e{n}": of("F32", [0], 0, 0) for n in range(21)}))
    with pytest.raises(CheckpointError, match="describes 21 tensors; expected at most 20"):
        read_header(path)
    path.write_bytes(packed({f"e{n}": of("F32", [0], 0, 0) for n in range(100)}))
    with pytest.raises(CheckpointError, match="commas; expected at most 20 tensors"):
        read_header(path)


def test_what_is_not_a_plain_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="not a file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with quickly(), pytest.raises(CheckpointError, match="not a file"):
        read_header(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "loop")
