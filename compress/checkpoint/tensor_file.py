"""The safetensors container: headers of files we did not write are hostile until checked, and bytes stream in and out.

A file is `u64 header length, header, data`; the header is JSON `{name: {dtype, shape, data_offsets}}`. Reading goes through
read(2) into fresh memory rather than a memory map, so that the resident size is what is in use and not what was touched.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.system.files import CHUNK, replacing
from compress.system.side_files import open_regular

MAX_HEADER = 100_000_000  # the limit of the reference implementation
MAX_TENSORS = 250_000  # in a file; the largest models have 100,000 in all of their files
MAX_NAME = 1000  # characters; also keeps every number in a name small enough for int()
MAX_AXES = 64  # the limit of torch
MAX_SIZE = 2**63 - 1  # elements and bytes, counting an empty axis as one element: torch computes strides that way
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: offsets are absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: Path
    seen: tuple[int, int] | None = field(default=None, compare=False)  # size and ns of change of the file when it was described

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Bytes that it takes in files."""
        return self.nbytes


@dataclass(frozen=True)
class Coded(Entry):
    """A tensor that no file holds as it is read: it is decoded from others, each time it is."""

    parts: tuple[Entry, ...] = ()
    decode: Callable[..., Tensor] = torch.clone

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], parts: tuple[Entry, ...], decode: Callable[..., Tensor]) -> Coded:
        """Make one that decodes to bfloat16 of `shape`, from the tensors of `parts` or one element of the first axis of each."""
        nbytes = 2 * math.prod(shape)
        return cls(name, "BF16", shape, parts[0].start, nbytes, parts[0].file, parts[0].seen, parts, decode)

    @property
    def stored(self) -> int:
        """Bytes that it takes in files."""
        return sum(part.nbytes for part in self.parts)


def _refuse(path: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: {got}; expected {expected}. The file is damaged or not a safetensors file: fetch it again")


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _refuse(path, f"the header names {twice[:80]!r} twice", "each name once")
    return result


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except UnicodeDecodeError as error:
        raise _refuse(path, f"the header is not UTF-8 at byte {error.start + 8}", "JSON in UTF-8") from error
    except RecursionError as error:
        raise _refuse(path, "the header is nested too deeply", "one object of tensor descriptions") from error
    except ValueError as error:
        raise _refuse(path, f"the header is not JSON ({error})", "one object of tensor descriptions") from error
    if not isinstance(header, dict):
        raise _refuse(path, f"the header is a JSON {type(header).__name__}", "one object of tensor descriptions")
    return header


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _is_text(value: Any) -> bool:
    """Whether a JSON value is a text that can be written again: an escape such as \\ud800 alone gives one that cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _short(value: Any) -> str:
    """A value for a message; as repr, so that no control character of a file reaches the terminal."""
    try:
        return f"{value!r:.80}"
    except RecursionError:
        return f"a nested {type(value).__name__}"


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> Entry:
    if len(name) > MAX_NAME or not _is_text(name):
        raise _refuse(path, f"a name of {len(name)} characters, {name[:80]!r}", f"a text of at most {MAX_NAME}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, f"{name!r} is described by {_short(value)}", "dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _refuse(path, f"{name!r} has dtype {_short(dtype)}", f"one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(_whole(n) for n in shape):
        raise _refuse(path, f"{name!r} has shape {_short(shape)}", f"a list of at most {MAX_AXES} whole numbers")
    if math.prod(max(n, 1) for n in shape) * DTYPES[dtype].itemsize > MAX_SIZE:
        raise _refuse(path, f"{name!r} has shape {_short(shape)}", "fewer elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(n) for n in offsets):
        raise _refuse(path, f"{name!r} has data_offsets {_short(offsets)}", "[begin, end]")
    begin, end = offsets
    if end > size or begin > end:
        raise _refuse(path, f"{name!r} lies at {begin}..{end}", f"a range within the {size} bytes of data")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != end - begin:
        raise _refuse(path, f"{name!r} of {dtype} {_short(shape)} lies in {end - begin} bytes", f"{nbytes} bytes")
    return Entry(name, dtype, tuple(shape), base + begin, nbytes, path)


def described(path: Path, header: dict[str, Any]) -> dict[str, Entry]:
    """Check a header that came without its file, as `{name: {dtype, shape, data_offsets}}`. Raises CheckpointError."""
    return {name: _entry(path, name, value, 0, MAX_SIZE) for name, value in header.items()}


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read and check a header; return the tensors by name and the metadata. Raises CheckpointError; allocates only the header.

    Checked: lengths against the file size, UTF-8 and JSON, names once, known dtypes, whole non-negative shapes and offsets,
    byte counts equal to shape times dtype, and tensors that cover the data without gap or overlap.
    """
    try:
        with open_regular(path) as stream:
            seen = _seen(stream)
            size = seen[0]
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise _refuse(path, f"the file has {size} bytes", "at least 8 bytes")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(size - 8, MAX_HEADER):
                raise _refuse(path, f"the header claims {length} bytes", f"at most {min(size - 8, MAX_HEADER)} bytes")
            raw = stream.read(length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check the path and the permissions") from error
    if len(raw) < length:
        raise _refuse(path, f"the header ends after {len(raw)} bytes", f"{length} bytes")
    if raw.count(b",") > 8 * MAX_TENSORS:  # before anything is made of it; a description of two axes has five
        raise _refuse(path, f"the header holds {raw.count(b','):,} commas", f"at most {MAX_TENSORS:,} tensors")
    header = _parse(path, raw)
    if len(header) > MAX_TENSORS:
        raise _refuse(path, f"the header describes {len(header):,} tensors", f"at most {MAX_TENSORS:,}")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the reference takes null for nothing, and no other value
    if not isinstance(metadata, dict) or not all(_is_text(text) for item in metadata.items() for text in item):
        raise _refuse(path, "__metadata__ holds something else than texts", "texts by name")
    base, data = 8 + length, size - 8 - length
    entries = [_entry(path, name, value, base, data) for name, value in header.items()]
    position = base
    for entry in sorted(entries, key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise _refuse(path, f"{entry.name!r} {kind}", "tensors one after the other")
        position += entry.nbytes
    if position != size:
        raise _refuse(path, f"{size - position} bytes follow the last tensor", "none")
    return {entry.name: replace(entry, seen=seen) for entry in entries}, metadata


def _seen(stream: IO[bytes]) -> tuple[int, int]:
    """Size of an open file and the time of its last change."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _unchanged(entry: Entry, stream: IO[bytes]) -> None:
    """Raise CheckpointError where the file of a tensor is not what it was when its header was read."""
    if entry.seen is not None and _seen(stream) != entry.seen:
        raise CheckpointError(
            f"{entry.file}: was changed while it was in use; wait until it is whole, then start again with an empty place"
        )


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without copying them where they lie in order; writing to them writes to the tensor."""
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B") if tensor.numel() else memoryview(b"")


def read_tensor(entry: Entry, index: int | None = None) -> Tensor:
    """Read a tensor into fresh memory, or only element `index` along its first axis. Raises CheckpointError."""
    if isinstance(entry, Coded):
        return entry.decode(*(read_tensor(part, index) for part in entry.parts))
    shape, start, nbytes = entry.shape, entry.start, entry.nbytes
    if index is not None:
        shape, nbytes = shape[1:], nbytes // shape[0]
        start += index * nbytes
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view = bytes_of(buffer)
    try:
        with entry.file.open("rb", buffering=0) as stream:
            _unchanged(entry, stream)
            stream.seek(start)
            done = 0
            while done < nbytes:
                got = stream.readinto(view[done : done + CHUNK])
                if not got:
                    raise _refuse(entry.file, f"{entry.name!r} ends after {done} bytes", f"{nbytes} bytes")
                done += got
    except OSError as error:
        raise CheckpointError(f"{entry.file}: {entry.name!r} cannot be read ({error.strerror}); fetch the file again") from error
    return buffer.view(DTYPES[entry.dtype]).reshape(shape)


def stream_entry(entry: Entry) -> Iterator[bytes]:
    """Yield the bytes of a tensor as they stand in the file, a chunk at a time. Raises CheckpointError."""
    if isinstance(entry, Coded):
        yield bytes(bytes_of(read_tensor(entry)))
        return
    if entry.nbytes == 0:
        return
    try:
        with entry.file.open("rb") as stream:
            _unchanged(entry, stream)
            stream.seek(entry.start)
            left = entry.nbytes
            while left:
                chunk = stream.read(min(left, CHUNK))
                if not chunk:
                    raise _refuse(entry.file, f"{entry.name!r} ends {left} bytes early", f"{entry.nbytes} bytes")
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{entry.file}: {entry.name!r} cannot be read ({error.strerror}); fetch the file again") from error


def file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Order tensors for a file: wide elements first, so that each is aligned to its element; otherwise as given."""
    return sorted(entries, key=lambda e: -DTYPES[e.dtype].itemsize)


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    """Length and header of a file of tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def file_size(entries: Iterable[Entry]) -> int:
    """Bytes of the file that `copy_entries` would write."""
    ordered = file_order(entries)
    return len(_header(ordered, {})) + sum(entry.nbytes for entry in ordered)


def copy_entries(
    path: Path, entries: Iterable[Entry], names: dict[str, str] | None = None, metadata: dict[str, str] | None = None
) -> None:
    """Write a file of tensors that lie in other files, byte for byte and in constant memory; `names` renames some of them."""
    ordered = file_order(entries)
    renamed = [Entry((names or {}).get(e.name, e.name), e.dtype, e.shape, 0, e.nbytes, path) for e in ordered]
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(_header(renamed, metadata or {}))
        for entry in ordered:
            for chunk in stream_entry(entry):
                stream.write(chunk)


def write_stream(path: Path, planned: Iterable[Entry], values: Iterable[tuple[str, Tensor | Entry]]) -> None:
    """Write a file of planned tensors whose values come one by one in any order, from memory or from another file.

    Raises ValueError when what comes is not what was planned.
    """
    ordered = file_order(planned)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(_header(ordered, {}))
        places: dict[str, tuple[int, Entry]] = {}
        position = stream.tell()
        for entry in ordered:
            places[entry.name] = position, entry
            position += entry.nbytes
        for name, value in values:
            start, entry = places.pop(name)
            got = (value.dtype, value.shape) if isinstance(value, Entry) else (DTYPE_NAMES[value.dtype], tuple(value.shape))
            if got != (entry.dtype, entry.shape):
                raise ValueError(f"{path}: {name} comes as {got}; planned is {(entry.dtype, entry.shape)}")
            stream.seek(start)
            for chunk in stream_entry(value) if isinstance(value, Entry) else (bytes_of(value.detach().cpu().flatten()),):
                stream.write(chunk)
        if places:
            raise ValueError(f"{path}: {len(places)} planned tensors did not come, such as {next(iter(places))}")
        stream.truncate(position)


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors from memory into one file, durably and all at once."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = file_order(
        Entry(n, DTYPE_NAMES[t.dtype], tuple(t.shape), 0, t.numel() * t.element_size(), path) for n, t in flat.items()
    )
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(_header(entries, metadata or {}))
        for entry in entries:
            stream.write(bytes_of(flat[entry.name].flatten()))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole file into memory: tensors by name, and the metadata. Raises CheckpointError."""
    entries, metadata = read_header(path)
    return {name: read_tensor(entry) for name, entry in entries.items()}, metadata
