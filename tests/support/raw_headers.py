"""Safetensors files byte by byte, right and wrong, and what every refusal has to say."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
from hypothesis import strategies as st
from limits import quickly

from compress.checkpoint.tensor_file import (
    DTYPES,
    Entry,
    read_header,
    read_tensor,
)
from compress.errors import CheckpointError


def of(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, bytes or text as it is and anything else as JSON; `length` is a lie about its size."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    raw = text if isinstance(text, bytes) else text.encode("utf-8")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


VALID: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "empty": of("I64", [0, 5], 0, 0),
    "matrix": of("F32", [2, 3], 0, 24),
    "half": of("BF16", [4], 24, 32),
    "scalar": of("U8", [], 32, 33),
    "flags": of("BOOL", [3], 33, 36),
}


DATA = bytes(33) + bytes([0, 1, 1])


def advice(error: CheckpointError, place: Path) -> str:
    """Check what every message has, and return it: the place, one line of sane length that any terminal can show."""
    message = str(error)
    assert str(place) in message
    assert len(message) < len(str(place)) + 600
    assert message.isprintable()
    assert any(word in message for word in ("expected", "fetch", "found"))
    return message


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with quickly(), pytest.raises(CheckpointError) as caught:
        read_header(path)
    return advice(caught.value, path)


def check(path: Path) -> dict[str, Entry] | None:
    """Read a file that may be damaged: None where it is refused. What is accepted is sound, and as the reference reads it."""
    content = path.read_bytes()
    try:
        with quickly():
            entries, metadata = read_header(path)
    except CheckpointError as error:
        advice(error, path)
        return None
    assert all(isinstance(text, str) for item in metadata.items() for text in item)
    ends = 8 + struct.unpack("<Q", content[:8])[0]
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        assert entry.start == ends
        assert entry.nbytes == math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        ends += entry.nbytes
    assert ends == len(content)
    if b"-0" not in content:  # Python's JSON takes -0 for 0, the reference does not; nothing depends on it
        mine = {e.name: (e.dtype, list(e.shape), content[e.start : e.start + e.nbytes]) for e in entries.values()}
        theirs = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(content)}
        assert mine == theirs
    for entry in entries.values():
        tensor = read_tensor(entry)
        assert tuple(tensor.shape) == entry.shape
        assert tensor.dtype == DTYPES[entry.dtype]
    return entries


BIG = 10**4000  # Python refuses to write numbers beyond 4300 digits, so a product of two must never get into a message


numbers = st.integers(-3, 40) | st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), BIG])


odd = (
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=4) | st.sampled_from(sorted(DTYPES)) | st.just("\ud800")
)


anything = st.recursive(odd, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3))
