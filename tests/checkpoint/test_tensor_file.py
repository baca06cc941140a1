"""Safetensors files that others wrote: read exactly as the reference reads them, or refused quickly with a message that helps."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.architecture.inventory import claim
from compress.checkpoint import tensor_file as container
from compress.checkpoint.source import INDEX, SINGLE, Source, check_finite
from compress.checkpoint.tensor_file import (
    DTYPES,
    MAX_HEADER,
    Entry,
    copy_entries,
    load,
    read_header,
    read_tensor,
    save,
    stream_entry,
)
from compress.errors import CheckpointError, OutputError
from compress.model.detect import find

# The same examples each time: a commit does not fail for what another one broke. The folder is shared between them, which is
# fine, since each example writes the whole file.
fuzz = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@contextmanager
def quickly(seconds: float = 5.0, nbytes: int | None = None) -> Iterator[None]:
    """Fail where the block takes long, or allocates more than `nbytes` at a time."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if nbytes is not None:
        tracemalloc.start()
    try:
        yield
        assert nbytes is None or tracemalloc.get_traced_memory()[1] <= nbytes
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to write hostile bytes into."""
    return tmp_path_factory.mktemp("files") / "model.safetensors"


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


# ---------------------------------------------------------------------------------------------------- headers


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


BIG = 10**4000  # Python refuses to write numbers beyond 4300 digits, so a product of two must never get into a message
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
    with quickly(20.0, nbytes=40 * len(content) + (1 << 20)), pytest.raises(CheckpointError, match=expected) as caught:
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


# ---------------------------------------------------------------------------------------------------- fuzzing

numbers = st.integers(-3, 40) | st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), BIG])
odd = (
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=4) | st.sampled_from(sorted(DTYPES)) | st.just("\ud800")
)
anything = st.recursive(odd, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3))
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


# ---------------------------------------------------------------------------------------------------- reading and writing


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits, NaN and all; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    octets = torch.randint(0, high, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return octets.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def all_bits(found: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {name: bits(tensor) for name, tensor in found.items()}


SHAPES = ((), (1,), (5,), (0,), (3, 0, 2), (2, 3), (7, 1, 3), (1,) * 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_there_and_back_and_as_the_reference_has_it(tmp_path: Path, dtype: str) -> None:
    written = {f"t{n}": random_tensor(DTYPES[dtype], shape, n) for n, shape in enumerate(SHAPES)}
    save(tmp_path / "ours", written, {"note": "é"})
    found, metadata = load(tmp_path / "ours")
    assert metadata == {"format": "pt", "note": "é"}
    assert all_bits(found) == all_bits(written)
    assert all_bits(safetensors.torch.load_file(tmp_path / "ours")) == all_bits(written)
    safetensors.torch.save_file(written, tmp_path / "theirs", metadata={"format": "pt"})
    assert all_bits(load(tmp_path / "theirs")[0]) == all_bits(written)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ours", "theirs"]


dtype_and_shape = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4).map(tuple))
names_to_tensors = st.dictionaries(st.text(max_size=8).filter(lambda n: n != "__metadata__"), dtype_and_shape, max_size=8)


@settings(fuzz, max_examples=150)
@given(described=names_to_tensors, seed=st.integers(0, 1000))
def test_any_tensors_there_and_back_and_aligned(path: Path, described: dict[str, tuple[str, tuple[int, ...]]], seed: int) -> None:
    written = {name: random_tensor(DTYPES[dtype], shape, seed) for name, (dtype, shape) in described.items()}
    save(path, written)
    entries = check(path)
    assert entries is not None
    assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in entries.values())
    assert all_bits(load(path)[0]) == all_bits(written)
    for name, entry in entries.items():
        assert b"".join(stream_entry(entry)) == bits(written[name])[2]
        for index in range(entry.shape[0] if entry.shape else 0):
            assert bits(read_tensor(entry, index)) == bits(written[name][index])


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    written = {"turned": whole.T, "cut": whole[1:3, 2:5], "spread": whole[:, ::2], "wide": whole[0].expand(3, 6)}
    save(tmp_path / "f", written)
    assert all_bits(load(tmp_path / "f")[0]) == all_bits(written)


def test_copies_are_byte_for_byte_from_any_file_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "CHUNK", 7)  # several chunks, and a tail
    first = {name: random_tensor(DTYPES[name], (3, 5), n) for n, name in enumerate(DTYPES)}
    second = {"x": random_tensor(torch.uint8, (3,)), "y": random_tensor(torch.float64, ()), "none": torch.empty(0, 4)}
    save(tmp_path / "first", first)
    save(tmp_path / "second", second)
    chosen = [*read_header(tmp_path / "second")[0].values(), *read_header(tmp_path / "first")[0].values()]
    copy_entries(tmp_path / "both", chosen, {"x": "renamed"}, {"k": "v"})
    found, metadata = load(tmp_path / "both")
    assert metadata == {"format": "pt", "k": "v"}
    assert all_bits(found) == all_bits({**first, "renamed": second["x"], "y": second["y"], "none": second["none"]})
    entries = check(tmp_path / "both")
    assert entries is not None
    assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in entries.values())


def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    save(tmp_path / "source", {"a": torch.ones(100), "b": torch.ones(100)})
    entries, _ = read_header(tmp_path / "source")
    os.truncate(tmp_path / "source", (tmp_path / "source").stat().st_size - 100)
    assert bits(read_tensor(entries["a"])) == bits(torch.ones(100))
    for use in (lambda: read_tensor(entries["b"]), lambda: list(stream_entry(entries["b"]))):
        with pytest.raises(CheckpointError, match="'b' ends"):
            use()
    with pytest.raises(CheckpointError, match="'b' ends"):
        copy_entries(tmp_path / "copy", entries.values())
    (tmp_path / "source").unlink()
    for use in (lambda: read_tensor(entries["a"]), lambda: list(stream_entry(entries["a"]))):
        with pytest.raises(CheckpointError, match="cannot be read"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), MemoryError()], ids=lambda f: type(f).__name__
)
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, earlier: bool
) -> None:
    path = tmp_path / "file"
    save(tmp_path / "source", {"a": torch.ones(3), "b": torch.zeros(3)})
    entries, _ = read_header(tmp_path / "source")
    (tmp_path / "source").rename(tmp_path.with_name(tmp_path.name + "-source"))
    entries = {
        n: Entry(e.name, e.dtype, e.shape, e.start, e.nbytes, tmp_path.with_name(tmp_path.name + "-source"))
        for n, e in entries.items()
    }
    if earlier:
        path.write_bytes(b"earlier")
    calls = iter([None, failure])

    def fail(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if (raised := next(calls, None)) is not None:
                raise raised
            return real(*args)

        return call

    expected = OutputError if isinstance(failure, OSError) else type(failure)
    monkeypatch.setattr(container, "bytes_of", fail(container.bytes_of))
    with pytest.raises(expected):
        save(path, {"a": torch.ones(3), "b": torch.zeros(3)})
    calls = iter([None, failure])
    monkeypatch.setattr(container, "stream_entry", fail(container.stream_entry))
    with pytest.raises(expected):
        copy_entries(path, entries.values())
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if earlier else [])
    assert not earlier or path.read_bytes() == b"earlier"


# ---------------------------------------------------------------------------------------------------- folders

LLAMA = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.post_attention_layernorm.weight": (4,),
    **{f"model.layers.0.self_attn.{name}_proj.weight": (4, 4) for name in "qkvo"},
    **{f"model.layers.0.mlp.{name}_proj.weight": (4, 4) for name in ("gate", "up", "down")},
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}
CONFIG: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4}


def checkpoint(folder: Path, config: Any = CONFIG, files: dict[str, list[str]] | None = None, index: Any = None) -> Path:
    """Write a llama of one block: whole, or cut into `files` with an index that is right unless given."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    files = {SINGLE: list(LLAMA)} if files is None else files
    for file, names in files.items():
        save(folder / file, {name: torch.ones(LLAMA[name]) for name in names})
    if index is None and SINGLE not in files:
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    if index is not None:
        (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    return folder


HALVES = {"one.safetensors": list(LLAMA)[:6], "two.safetensors": list(LLAMA)[6:]}
MAP = {name: file for file, names in HALVES.items() for name in names}
LAST = list(LLAMA)[-1]


def folder_refusal(folder: Path, pattern: str | None = None) -> str:
    with quickly(), pytest.raises(CheckpointError, match=pattern) as caught:
        Source.open(folder)
    return advice(caught.value, folder)


def test_whole_and_cut_and_linked_folders_are_read(tmp_path: Path) -> None:
    whole = Source.open(checkpoint(tmp_path / "whole"))
    cut = Source.open(checkpoint(tmp_path / "cut", files=HALVES))
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "cut").iterdir():  # as the Hub's cache has it
        (tmp_path / "linked" / file.name).symlink_to(file)
    linked = Source.open(tmp_path / "linked")
    assert set(whole.entries) == set(cut.entries) == set(linked.entries) == set(LLAMA)
    assert whole.numel == cut.numel == sum(math.prod(shape) for shape in LLAMA.values())
    assert whole.nbytes == 4 * whole.numel
    assert torch.equal(linked.tensor(LAST), torch.ones(LLAMA[LAST]))
    assert Source.open(str(tmp_path / "whole")).folder == whole.folder
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        whole.tensor("other")


@pytest.mark.parametrize(
    "file",
    [
        "../two.safetensors",
        "/etc/two.safetensors",
        "sub/two.safetensors",
        "./two.safetensors",
        "..\\two.safetensors",
        "C:\\two.safetensors",
        "two.safetensors/",
        "two.safetensors\0",
        "\0.safetensors",
        "two\n.safetensors",
        "\ud800.safetensors",
        "a" * 5000 + ".safetensors",
        "two.bin",
        "two.safetensors.bin",
        *("", ".", "..", None, 3, True, ["two.safetensors"], {"two.safetensors": 1}),
    ],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, file: Any) -> None:
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "two.safetensors", {LAST: torch.ones(LLAMA[LAST])})
    folder = checkpoint(tmp_path / "model", files=HALVES, index={"weight_map": {**MAP, LAST: file}})
    (folder / "sub").symlink_to(tmp_path / "sub")
    message = folder_refusal(folder)
    assert "Do not use" in message or file == "\ud800.safetensors"


@pytest.mark.parametrize(
    "index",
    [
        *(b"", b"\xff", b"{", b"[" * 100_000, b'{"weight_map": NaN}', b'{"weight_map": {"\\ud800": "one.safetensors"}}'),
        *([], None, "x", {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "one"}),
    ],
)
def test_an_index_that_is_no_index(tmp_path: Path, index: Any) -> None:
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    folder_refusal(checkpoint(tmp_path, files=HALVES, index=content))


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({name: file for name, file in MAP.items() if name != LAST}, "does not place there"),
        ({**MAP, LAST: "one.safetensors"}, "does not place there"),
        ({**MAP, "more": "one.safetensors"}, "no file holds"),
        ({**MAP, "m" * 10_000: "one.safetensors"}, "no file holds"),
        ({**MAP, "more": "three.safetensors"}, "three.safetensors: not found"),
    ],
)
def test_an_index_and_headers_that_disagree(tmp_path: Path, weight_map: dict[str, str], expected: str) -> None:
    folder_refusal(checkpoint(tmp_path, files=HALVES, index={"weight_map": weight_map}), expected)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path, files={"one.safetensors": [*HALVES["one.safetensors"], LAST], "two.safetensors": HALVES["two.safetensors"]}
    )
    folder_refusal(folder, "does not place there")


def test_a_damaged_file_among_several(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, files=HALVES)
    (folder / "two.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:-1])
    assert "two.safetensors" in folder_refusal(folder, "within the")
    (folder / "two.safetensors").unlink()
    folder_refusal(folder, "not found")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, pickle: str) -> None:
    checkpoint(tmp_path, files={})
    (tmp_path / INDEX).unlink()
    (tmp_path / pickle).write_bytes(b"\x80\x04")
    message = folder_refusal(tmp_path)
    assert pickle in message
    assert "save_pretrained" in message
    assert "Source" not in message
    assert len(Source.open(checkpoint(tmp_path)).entries) == len(LLAMA)  # beside safetensors they do not matter


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    folder_refusal(tmp_path, "config.json: not found")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    folder_refusal(tmp_path, "neither model.safetensors nor")
    save(tmp_path / SINGLE, {})
    folder_refusal(tmp_path, "no tensors")


@pytest.mark.parametrize(
    "name",
    ["/no/such/folder", "./no", "~nobody-of-this-name/x", "no/such/thing", "a" * 5000, "a\0b", "-", "no-such-model", "a//b", "é"],
)
def test_names_that_lead_nowhere(name: str) -> None:
    with quickly(20.0), pytest.raises(CheckpointError, match="give the folder of a checkpoint"):
        Source.open(name)


def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    checkpoint(tmp_path / "inner" / "model")
    (tmp_path / "inner").chmod(0)
    try:
        if os.access(tmp_path / "inner", os.R_OK):
            pytest.skip("root may read everything")
        with pytest.raises(CheckpointError):
            Source.open(tmp_path / "inner" / "model")
    finally:
        (tmp_path / "inner").chmod(0o700)


# ---------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    "config", [b"", b"\xff\xfe{}", b"{", b"[" * 100_000, b"[]", b"null", b"3", b'"x"', b'{"a": "\\ud800"}', b"9" * 5000]
)
def test_a_config_that_is_no_object(tmp_path: Path, config: bytes) -> None:
    assert "config.json" in folder_refusal(checkpoint(tmp_path, config))


def claimed(folder: Path) -> int:
    source = Source.open(folder)
    return len(claim(source, find(source)).sites)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": n} for n in ("3", -1, 0, 1e9, 10**9, 10**18, 10**4000, None, True, [1], {}, 1.0, float("nan"))]
    + [{"n_layer": n} for n in (10**9, True)]
    + [{"text_config": {"num_hidden_layers": 10**9}}]
    + [{"model_type": m} for m in (None, 3, [], ["llama"], {"llama": 1}, "", "no such", "../llama", "x" * 10_000)]
    + [{"quantization_config": q} for q in ([], "x", 3, True, {}, {"quant_method": 3}, {"quant_method": ["gptq"]})],
    ids=lambda change: f"{change}"[:60],
)
def test_a_config_with_other_things_than_expected(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path, {**CONFIG, **change})
    # A model_type that is not known may be looked up in transformers, whose import takes its time.
    limits = {"seconds": 60.0} if "model_type" in change else {"nbytes": 4 << 20}
    with quickly(**limits), pytest.raises(CheckpointError):
        claimed(folder)


def test_a_config_that_says_nothing_of_blocks(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"model_type": "llama"})
    with pytest.raises(CheckpointError, match="num_hidden_layers is None"):
        claimed(folder)


def test_a_config_with_nothing_for_a_quantization(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {**CONFIG, "quantization_config": None, "other": [None, {"deep": 1e300}]})
    assert claimed(folder) == 8
    assert "quantization_config" not in Source.open(folder).config


keys = st.sampled_from(
    ["num_hidden_layers", "n_layer", "text_config", "quantization_config", "tie_word_embeddings", "hidden_size"]
)


@settings(fuzz, max_examples=200)
@given(changes=st.dictionaries(keys, anything, max_size=3))
def test_fuzzed_configs(path: Path, changes: dict[str, Any]) -> None:
    folder = checkpoint(
        path.parent / "model", {**CONFIG, **changes}, None if not (path.parent / "model").exists() else {SINGLE: list(LLAMA)}
    )
    try:
        with quickly(60.0):
            assert claimed(folder) > 0
    except CheckpointError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------- finite values

FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_values_are_finite_although_their_sum_is_not(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    check_finite(torch.full((64, 64), largest, dtype=torch.float64).to(dtype), "place")
    check_finite(torch.tensor([largest, -largest] * 500, dtype=torch.float64).to(dtype), "place")
    check_finite(torch.empty(0, 4).to(dtype), "place")
    check_finite(torch.tensor(largest, dtype=torch.float64).to(dtype), "place")


# float8_e4m3fn has no infinities.
SPECIAL = [(dtype, value) for dtype in FLOATS for value in (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d, v in SPECIAL if math.isnan(v) or d != torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("fill", [0.0, 1.0, "max"])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float, fill: float | str) -> None:
    full = torch.finfo(dtype).max if fill == "max" else fill
    tensor = torch.full((31, 33), full, dtype=torch.float64)
    tensor[30, 32] = value
    with pytest.raises(CheckpointError, match=r"^place: 1 of 1023 values"):
        check_finite(tensor.to(dtype), "place")
    tensor[0, 0] = -value
    with pytest.raises(CheckpointError, match="2 of 1023"):
        check_finite(tensor.to(dtype), "place")


def test_a_source_refuses_values_that_are_not_finite(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    tensors, _ = load(folder / SINGLE)
    tensors[LAST][3, 1] = float("nan")
    tensors["counts"] = torch.tensor([2**62, 2**62, 2**62])  # integers are not summed
    save(folder / SINGLE, tensors)
    source = Source.open(folder)
    with pytest.raises(CheckpointError, match=f"{LAST}: 1 of 32 values"):
        source.tensor(LAST)
    with pytest.raises(CheckpointError, match="1 of 4 values"):
        source.tensor(LAST, 3)
    assert torch.equal(source.tensor(LAST, 2), torch.ones(4))
    assert torch.equal(source.tensor("counts"), tensors["counts"])
