"""The bytes of a result before it is made: its weight files go through the code that will write them, without their data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compress import packed, seal
from compress.calibration.families import Claims
from compress.checkpoint import INDEX, Source
from compress.container import DTYPE_NAMES, Entry, file_size
from compress.parts.table import DATATYPES, SCALE_DTYPES
from compress.recipe import Assignment

_ROW = -1  # a group of the whole row


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


def _candidates(options: dict[str, Any]) -> Iterator[packed.Spec]:
    """Descriptions of parts that a method with these options may give; `group` says whether columns have an index."""
    asked = options.get("group_size")
    sizes = [asked] if asked else [options.get("g_max") or 128, 16, 32, 64, _ROW]
    if "scale_bits" in options:
        widths = {key: options[key] for key in ("bits", "scale_bits", "zero_bits")}
        for size, index in itertools.product(sizes, (False, True)):
            yield {"format": "two_level", **widths, "group_size": size, "group": index}
    elif "datatype" in options:
        for size, name, scale in itertools.product(sizes, DATATYPES, SCALE_DTYPES):
            if name in (options["datatype"], f"bitmod-{options['datatype']}") or options["datatype"][-3:] == name:
                bits = (len(DATATYPES[name][0]) - 1).bit_length()
                yield {"format": "table", "datatype": name, "bits": bits, "group_size": size, "scale": scale}
    elif isinstance(options.get("bits"), int):
        for size, zero, offset, index in itertools.product(sizes, (False, True), (False, True), (False, True)):
            more = {"offset": True} if offset else {}
            yield {"format": "bitpack", "bits": options["bits"], "group_size": size, "zero": zero, **more, "group": index}


def _fitted(part: packed.Spec, shape: tuple[int, int]) -> packed.Spec | None:
    """The description of a weight of this shape, None where groups do not divide its columns."""
    columns = shape[1]
    size = columns if part["group_size"] == _ROW else part["group_size"]
    if size > columns or columns % size:
        return None
    base = {**part, "group_size": size}
    if base.pop("group", False):
        groups = columns // size
        base["group"] = "U8" if groups <= 1 << 8 else "I16" if groups <= 1 << 15 else "I32"
    return {"shape": list(shape), "base": base}


def _bits(spec: packed.Spec | None) -> int | None:
    return None if spec is None else 8 * sum(_nbytes(*tensor) for tensor in packed.layout(spec).values())


def description(method: Any, shape: tuple[int, int]) -> packed.Spec | None:
    """Return how a weight of this shape (out, in) will be stored: the layout that has the bits the method announces.

    None where a method's size or layout depends on the values. Names, types and shapes of tensors are right; whether a grid
    is bipolar is not known here.
    """
    if method.stored_bits(shape) is None:
        return None
    # Layouts may have the same bits at one shape: an index of columns does not grow with rows, scales of rows not with columns.
    columns = shape[1]
    shapes = [shape, *((r, c * columns) for r in (32, 1024) for c in (1, 2, 3))]
    bits = [method.stored_bits(other) for other in shapes]
    for part in _candidates(method.model_dump()):
        specs = [_fitted(part, other) for other in shapes]
        if [_bits(spec) for spec in specs] == bits:
            return specs[0]
    return None


def _nbytes(dtype: Any, shape: tuple[int, ...]) -> int:
    size = int(dtype.itemsize)
    for axis in shape:
        size *= axis
    return size


def _guess(method: Any, numel: int) -> int:
    """About how many bytes a weight will take whose size depends on its values."""
    options = method.model_dump()
    bits = options.get("target_bits") or options.get("bits")
    return numel * 2 if bits is None else int(numel * (bits + (0 if options.get("target_bits") else 0.5)) / 8)


def sizes(source: Source, claims: Claims, assignments: list[Assignment], limit: int) -> Sizes:
    """Return the bytes of the weight files that a run will write, in shards of at most `limit` bytes."""
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
        if spec is None:  # a tensor of so many bytes stands for what is not known
            bits = a.method.stored_bits(a.site.shape)
            exact = False
            rough[name] = _guess(a.method, a.site.numel) if bits is None else bits // 8
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
