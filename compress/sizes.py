"""The bytes of a result before it is made: its weight files go through the code that will write them, without their data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress import packed, seal
from compress.calibration.claims import Claims
from compress.checkpoint import INDEX, Source
from compress.container import DTYPE_NAMES, Entry, file_size
from compress.errors import FormatError
from compress.recipe import Assignment


@dataclass(frozen=True)
class Sizes:
    """Bytes of a result: of all tensors, and of the files that hold them, index included."""

    tensors: int
    files: dict[str, int]
    exact: bool

    @property
    def total(self) -> int:
        """Bytes of all weight files."""
        return sum(self.files.values())


def _bits(spec: packed.Spec) -> int:
    return 8 * sum(_nbytes(*tensor) for tensor in packed.layout(spec).values())


def description(method: Any, shape: tuple[int, int]) -> packed.Spec | None:
    """Return how a weight of this shape (out, in) will be stored; None where that, or its size, depends on the values."""
    bits, spec = method.stored_bits(shape), method.described(shape)
    if bits is None or spec is None:
        return None
    try:
        return spec if _bits(spec) == bits else None
    except FormatError:  # a description as far as it is known: widths that follow from the weights are not in it
        return None


def _nbytes(dtype: Any, shape: tuple[int, ...]) -> int:
    size = int(dtype.itemsize)
    for axis in shape:
        size *= axis
    return size


def sizes(
    source: Source, claims: Claims, assignments: list[Assignment], limit: int, added: Mapping[str, int] | None = None
) -> Sizes:
    """Return the bytes of the weight files that a run will write, in shards of at most `limit` bytes.

    `added` is the bits that what comes after the method adds to a site, by name.
    """
    specs: dict[str, packed.Spec] = {}
    parts: dict[str, Entry] = {}
    known: dict[tuple[int, tuple[int, int]], packed.Spec | None] = {}
    rough: dict[str, int] = {}
    exact = True
    for a in assignments:
        key = a.step, a.site.shape
        if key not in known:
            known[key] = description(a.method, a.site.shape)
        spec, name = known[key], a.site.name
        more = (added or {}).get(name, 0)
        if spec is None or more:  # a tensor of so many bytes stands for what is not known
            exact = False
            rough[name] = (a.method.likely_bits(a.site.shape) + more) // 8
            continue
        specs[name] = spec
        for leaf, (dtype, shape) in packed.layout(spec).items():
            parts[f"{name}.{leaf}"] = _entry(f"{name}.{leaf}", DTYPE_NAMES[dtype], shape, _nbytes(dtype, shape), source)
    stand_ins = {name: _entry(f"{name}.codes", "U8", (size,), size, source) for name, size in rough.items()}
    tensors, _ = seal.plan(source, claims, specs, parts, stand_ins)
    cut = seal.shards(tensors, limit)
    files = {name: file_size(members) for name, members in seal.named(cut).items()}
    if len(files) > 1:
        files[INDEX] = len(seal.index(seal.named(cut)).encode())
    return Sizes(sum(entry.nbytes for entry in tensors), files, exact)


def _entry(name: str, dtype: str, shape: tuple[int, ...], nbytes: int, source: Source) -> Entry:
    return Entry(name, dtype, shape, 0, nbytes, source.folder)
