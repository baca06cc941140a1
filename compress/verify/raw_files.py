"""Where the bytes of a compressed checkpoint lie, read by numpy alone: what the second reader decodes.

Written from the documents of safetensors and from docs/format.md; it shares no code with what writes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "C64": 8}
SIZES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: bytes start..stop of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """A checkpoint's tensors by name, and the description of each compressed site."""

    folder: Path
    tensors: dict[str, Place]
    sites: dict[str, dict[str, Any]]


def header(path: Path) -> dict[str, Place]:
    """Read where the tensors of a safetensors file lie. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header claims {length} bytes")
            values = json.loads(stream.read(length))
        values.pop("__metadata__", None)
        places = {}
        for name, value in values.items():
            begin, end = value["data_offsets"]
            shape = tuple(int(n) for n in value["shape"])
            if int(np.prod(shape, dtype=np.int64)) * SIZES[value["dtype"]] != end - begin or begin < 0:
                raise ValueError(f"{name} does not fill its {end - begin} bytes")
            places[name] = Place(path, value["dtype"], shape, 8 + length + begin, 8 + length + end)
        ends = sorted((place.start, place.stop) for place in places.values())
        if [8 + length, *(stop for _, stop in ends)] != [*(start for start, _ in ends), size]:
            raise ValueError("its tensors do not fill the file one after the other")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected a safetensors file. Fetch it again") from error
    return places


def _unfolded(pattern: str) -> Iterator[str]:
    """`a.{0-1,4}.b` -> a.0.b, a.1.b, a.4.b"""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    for run in found[1].split(","):
        first, _, last = run.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _unfolded(f"{pattern[: found.start()]}{number}{pattern[found.end() :]}")


def open_stored(folder: Path) -> Stored:
    """Read the headers and the table of a compressed checkpoint. Raises CheckpointError."""
    try:
        table = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        if table["quant_method"] != "compress" or table["format_version"] != 1:
            raise ValueError("quantization_config is not that of format version 1")
        sites = {site: table["specs"][number] for pattern, number in table["sites"].items() for site in _unfolded(pattern)}
        index = folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if not (folder / files[0]).exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); expected a checkpoint that compress wrote") from error
    tensors: dict[str, Place] = {}
    for file in files:
        found = header(folder / file)
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(f"{folder / file}: holds {min(twice)}, which another file holds too; fetch both again")
        tensors |= found
    return Stored(folder, tensors, sites)


def read_bytes(place: Place, start: int = 0, stop: int | None = None) -> Bytes:
    """Read bytes start..stop of a tensor, all of them if none are named. Raises CheckpointError."""
    size = place.stop - place.start
    stop = size if stop is None else min(stop, size)
    with place.file.open("rb") as stream:
        stream.seek(place.start + start)
        found = np.frombuffer(stream.read(max(stop - start, 0)), dtype=np.uint8)
    if len(found) != max(stop - start, 0):
        raise CheckpointError(f"{place.file}: ends within a tensor; fetch it again")
    return found


def chunks(place: Place) -> Iterator[bytes]:
    """Yield the bytes of a tensor in pieces."""
    for start in range(0, place.stop - place.start, _CHUNK):
        yield read_bytes(place, start, start + _CHUNK).tobytes()
