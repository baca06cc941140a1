"""Where the bytes of a compressed checkpoint lie, read by numpy alone: what the second reader decodes.

Written from the documents of safetensors and from docs/format.md; it shares no code with what writes, but the bounded way in
which all side files are opened.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import CheckpointError
from compress.system.side_files import open_regular, parse_json, read_json

Bytes = npt.NDArray[np.uint8]

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "C64": 8}
SIZES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
_CHUNK = 16 << 20
MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation of safetensors
MAX_AXES = 64
MAX_SITES = 500_000
_MAX_RANGES = 8  # in one pattern
MAX_UNSTORED = 1 << 26  # weights that need no bytes of their own, such as those of an expert that was pruned away
MAX_RATIO = 1024  # weights that a byte may stand for


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
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"its header claims {length} bytes")
            values = parse_json(stream.read(length), f"the header of {path}")
        values.pop("__metadata__", None)
        places = {}
        for name, value in values.items():
            begin, end = value["data_offsets"]
            shape = tuple(value["shape"])
            if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)) or len(shape) > MAX_AXES:
                raise ValueError(f"{name} has no shape")
            if math.prod(shape) * SIZES[value["dtype"]] != end - begin or begin < 0:
                raise ValueError(f"{name} does not fill its {end - begin} bytes")
            places[name] = Place(path, value["dtype"], shape, 8 + length + begin, 8 + length + end)
        ends = sorted((place.start, place.stop) for place in places.values())
        if [8 + length, *(stop for _, stop in ends)] != [*(start for start, _ in ends), size]:
            raise ValueError("its tensors do not fill the file one after the other")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected a safetensors file. Fetch it again") from error
    return places


def _unfolded(pattern: str) -> Iterator[str]:
    """`a.{0-1,4}.b` -> a.0.b, a.1.b, a.4.b"""
    pieces = re.split(r"\{([^}]*)\}", pattern)
    if len(pieces) > 2 * _MAX_RANGES:
        raise ValueError(f"{pattern[:80]!r} has too many ranges")
    choices = []
    for piece in pieces[1::2]:
        runs = [re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", run) for run in piece.split(",")]
        ranges = [range(int(run[1]), int(run[2] or run[1]) + 1) for run in runs if run is not None]
        if len(ranges) < len(runs):
            raise ValueError(f"{pattern[:80]!r} has a range that is none")
        choices.append(ranges)
    if math.prod(sum(map(len, ranges)) for ranges in choices) > MAX_SITES:  # counted before anything is made
        raise ValueError(f"{pattern[:80]!r} stands for more than {MAX_SITES} sites")
    first, *rest = pieces[::2]
    for combination in itertools.product(*map(itertools.chain.from_iterable, choices)):
        yield first + "".join(f"{number}{piece}" for number, piece in zip(combination, rest, strict=True))


def _sites(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The description of each site of `quantization_config`."""
    sites: dict[str, dict[str, Any]] = {}
    for pattern, number in table["sites"].items():
        if not isinstance(table["specs"][number], dict):
            raise ValueError(f"{pattern[:80]!r} is described by something else than an object")
        for site in _unfolded(pattern):
            if site in sites or len(sites) >= MAX_SITES:
                raise ValueError(f"{pattern[:80]!r} names a site twice, or there are more than {MAX_SITES}")
            rows, columns = table["specs"][number]["shape"]
            if not all(type(n) is int and 0 < n < 2**31 for n in (rows, columns)):
                raise ValueError(f"{site} has no shape")
            sites[site] = table["specs"][number]
    return sites


def _within_reason(sites: dict[str, dict[str, Any]], tensors: dict[str, Place]) -> None:
    """Raise ValueError where sites announce far more weights than bytes could describe."""
    stored = sum(place.stop - place.start for place in tensors.values())
    announced = sum(math.prod(spec["shape"]) for spec in sites.values())
    if announced > MAX_UNSTORED + MAX_RATIO * stored:
        raise ValueError(f"{stored:,} bytes stand for {announced:,} weights")


def open_stored(folder: Path) -> Stored:
    """Read the headers and the table of a compressed checkpoint. Raises CheckpointError."""
    try:
        table = read_json(folder / "config.json")["quantization_config"]
        if table["quant_method"] != "compress" or table["format_version"] != 1:
            raise ValueError("quantization_config is not that of format version 1")
        sites = _sites(table)
        index = folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if not (folder / files[0]).exists():
            weight_map = read_json(index)["weight_map"]
            files = sorted(set(weight_map.values()))
            if any(Path(file).name != file or "\0" in file for file in files):
                raise ValueError("its index names files of other folders")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); expected a checkpoint that compress wrote") from error
    tensors: dict[str, Place] = {}
    for file in files:
        found = header(folder / file)
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(f"{folder / file}: holds {min(twice)}, which another file holds too; fetch both again")
        tensors |= found
    try:
        _within_reason(sites, tensors)
    except ValueError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); expected a checkpoint that compress wrote") from error
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
