"""The bytes of a result before it is made: its weight files go through the code that will write them, without their data."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from compress.architecture.inventory import Inventory
from compress.checkpoint import packing
from compress.checkpoint.source import INDEX, Source
from compress.checkpoint.tensor_file import DTYPE_NAMES, Entry, file_size
from compress.methods.method import Described
from compress.output import seal, shards
from compress.recipe.assignment import Assignment


@dataclass(frozen=True)
class Sizes:
    """Bytes of a result: of all tensors, and of the files that hold them, index included.

    Where methods cannot know them beforehand they are not exact, and `least` and `most` say what the tensors may come to.
    """

    tensors: int
    files: dict[str, int]
    exact: bool
    least: int
    most: int

    @property
    def total(self) -> int:
        """Bytes of all weight files."""
        return sum(self.files.values())


def _nbytes(dtype: Any, shape: tuple[int, ...]) -> int:
    size = int(dtype.itemsize)
    for axis in shape:
        size *= axis
    return size


def sizes(
    source: Source,
    inventory: Inventory,
    assignments: list[Assignment],
    limit: int,
    added: Mapping[str, int] | None = None,
    changed: Container[str] = (),
) -> Sizes:
    """Return the bytes of the weight files that a run will write, in shards of at most `limit` bytes.

    `added` is the bits that what comes after the method adds to a site, by name; `changed` are sites that a transform rewrites
    before their method sees them.
    """
    specs: dict[str, packing.Spec] = {}
    parts: dict[str, Entry] = {}
    known: dict[tuple[int, tuple[int, int], str], tuple[Described, int, int]] = {}
    rough: dict[str, int] = {}
    exact = True
    below = above = 0  # bits that the result may have less, and more
    for a in assignments:
        name = a.site.name
        held = "F32" if name in changed else source.entries[a.site.tensor].dtype
        key = a.step, a.site.shape, held
        if key not in known:
            known[key] = _expected(a, held)
        (found, least, most), more = known[key], (added or {}).get(name, 0)
        below, above = below + found.likely - least, above + most - found.likely
        spec = found.spec if found.whole else None
        exact = exact and spec is not None and not more and least == most
        if spec is None or more:  # a tensor of so many bytes stands for what is not known
            rough[name] = (found.likely + more) // 8
            continue
        specs[name] = spec
        for leaf, (dtype, shape) in packing.layout(spec).items():
            parts[f"{name}.{leaf}"] = _entry(f"{name}.{leaf}", DTYPE_NAMES[dtype], shape, _nbytes(dtype, shape), source)
    stand_ins = {name: _entry(f"{name}.codes", "U8", (size,), size, source) for name, size in rough.items()}
    tensors, _ = seal.plan(source, inventory, specs, parts, stand_ins)
    cut = shards.cut_into_files(tensors, limit, lambda entry: entry.nbytes)
    files = {name: file_size(members) for name, members in cut.items()}
    if len(files) > 1:
        files[INDEX] = len(shards.index(cut).encode())
    whole = sum(entry.nbytes for entry in tensors)
    return Sizes(whole, files, exact, whole - -(-below // 8), whole + -(-above // 8))


def _expected(a: Assignment, dtype: str) -> tuple[Described, int, int]:
    """How a site is described, with its least and most bits, whether its own method takes it or the one for few tokens."""
    found: Described = a.method.describe(a.site.shape, dtype)
    if a.fallback is None or a.min_tokens == 0:
        return found, found.least, found.most
    other = a.fallback.describe(a.site.shape, dtype)
    return found, min(found.least, other.least), max(found.most, other.most)


def _entry(name: str, dtype: str, shape: tuple[int, ...], nbytes: int, source: Source) -> Entry:
    return Entry(name, dtype, shape, 0, nbytes, source.folder)
