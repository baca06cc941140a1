"""Safetensors files changed at random: read exactly as the reference reads them, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_headers import DATA, VALID, anything, check, numbers, odd, of, packed, refusal

from compress.checkpoint.tensor_file import (
    DTYPES,
    read_header,
)

# The same examples each time: a commit does not fail for what another one broke. The folder is shared between them, which is
# fine, since each example writes the whole file.
fuzz = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


tensors = st.sampled_from([name for name in VALID if name != "__metadata__"])


@fuzz
@given(data=st.data())
def test_fuzzed_descriptions(path: Path, data: st.DataObject) -> None:
    header = json.loads(json.dumps(VALID))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(tensors)
        if not isinstance(header.get(name), dict) or not isinstance(header[name].get("data_offsets"), list):
            continue
        kind = data.draw(
            st.sampled_from(["field", "offset", "shape", "dtype", "add", "remove", "tensor", "metadata", "consistent"])
        )
        if kind == "field":
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(anything)
        elif kind == "offset" and len(header[name]["data_offsets"]) == 2:
            header[name]["data_offsets"][data.draw(st.integers(0, 1))] = data.draw(odd)
        elif kind == "shape":
            header[name]["shape"] = data.draw(st.lists(numbers, max_size=4) | st.lists(odd, max_size=3))
        elif kind == "dtype":
            header[name]["dtype"] = data.draw(st.sampled_from(sorted(DTYPES)))
        elif kind == "add":
            header[data.draw(st.text(max_size=3))] = data.draw(st.just(of("U8", [0], 0, 0)) | anything)
        elif kind == "remove":
            header[name].pop(data.draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
        elif kind == "tensor":
            header[name] = data.draw(anything)
        elif kind == "metadata":
            header["__metadata__"] = data.draw(anything)
        elif kind == "consistent":  # another shape of the same size
            begin, end = VALID[name]["data_offsets"]
            header[name] = of("U8", [1, end - begin], begin, end)
    path.write_bytes(packed(header, DATA))
    check(path)


@fuzz
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["set", "flip", "insert", "delete"])), max_size=4
    )
)
def test_fuzzed_bytes(path: Path, changes: list[tuple[int, int, str]]) -> None:
    content = bytearray(packed(VALID, DATA))
    for place, value, kind in changes:
        at = place % len(content)
        if kind == "set":
            content[at] = value
        elif kind == "flip":
            content[at] ^= 1 << value % 8
        elif kind == "insert":
            content.insert(at, value)
        else:
            del content[at]
    path.write_bytes(content)
    check(path)


def test_every_bit_of_the_length_and_every_byte_of_the_header(path: Path) -> None:
    whole = packed(VALID, DATA)
    for bit in range(64):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        refusal(path, bytes(changed))
    for at in range(8, len(whole) - len(DATA)):
        for value in b'"}9\x00':
            changed = bytearray(whole)
            changed[at] = value
            path.write_bytes(changed)
            check(path)


def test_damage_to_the_data_leaves_the_header(path: Path) -> None:
    path.write_bytes(packed(VALID, DATA))
    entries = read_header(path)
    path.write_bytes(packed(VALID, bytes(255 - byte for byte in DATA)))
    assert read_header(path) == entries


@fuzz
@given(content=st.binary(max_size=200))
def test_noise(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check(path)
    path.write_bytes(packed(content))
    check(path)


@fuzz
@given(value=anything)
def test_any_json(path: Path, value: Any) -> None:
    path.write_bytes(packed(json.dumps(value)))
    check(path)
    path.write_bytes(packed({"a": value}, bytes(8)))
    check(path)
