"""The bytes of a result before it is made: its weight files go through the code that will write them, without their data."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from compress.architecture.inventory import Claims
from compress.checkpoint import packing
from compress.checkpoint.source import INDEX, Source
from compress.checkpoint.tensor_file import DTYPE_NAMES, Entry, file_size
from compress.errors import FormatError
from compress.output import seal
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


def _bits(spec: packing.Spec) -> int:
    return 8 * sum(_nbytes(*tensor) for tensor in packing.layout(spec).values())


def description(method: Any, shape: tuple[int, int]) -> packing.Spec | None:
    """Return how a weight of this shape (out, in) will be stored, surely or most likely; None where not even that is known."""
    spec = method.described(shape)
    if spec is None:
        return None
    try:
        return spec if _bits(spec) == method.likely_bits(shape) else None
    except FormatError:  # a description as far as it is known: widths that follow from the weights are not in it
        return None


def _nbytes(dtype: Any, shape: tuple[int, ...]) -> int:
    size = int(dtype.itemsize)
    for axis in shape:
        size *= axis
    return size


def sizes(
    source: Source,
    claims: Claims,
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
    known: dict[tuple[int, tuple[int, int], str], packing.Spec | None] = {}
    rough: dict[str, int] = {}
    exact = True
    below = above = 0  # bits that the result may have less, and more
    for a in assignments:
        name = a.site.name
        held = "F32" if name in changed else source.entries[a.site.tensor].dtype
        key = a.step, a.site.shape, held
        if key not in known:
            known[key] = description(_surely_on(a.method, held), a.site.shape)
        spec, more = known[key], (added or {}).get(name, 0)
        likely, least, most = _expected(a, held)
        below, above = below + likely - least, above + most - likely
        exact = exact and spec is not None and not more and least == most
        if spec is None or more:  # a tensor of so many bytes stands for what is not known
            rough[name] = (likely + more) // 8
            continue
        specs[name] = spec
        for leaf, (dtype, shape) in packing.layout(spec).items():
            parts[f"{name}.{leaf}"] = _entry(f"{name}.{leaf}", DTYPE_NAMES[dtype], shape, _nbytes(dtype, shape), source)
    stand_ins = {name: _entry(f"{name}.codes", "U8", (size,), size, source) for name, size in rough.items()}
    tensors, _ = seal.plan(source, claims, specs, parts, stand_ins)
    cut = seal.shards(tensors, limit)
    files = {name: file_size(members) for name, members in seal.named(cut).items()}
    if len(files) > 1:
        files[INDEX] = len(seal.index(seal.named(cut)).encode())
    whole = sum(entry.nbytes for entry in tensors)
    return Sizes(whole, files, exact, whole - -(-below // 8), whole + -(-above // 8))


def _surely_on(method: Any, dtype: str) -> Any:
    """The method with the type of kept values where that of the source tells: of float32 ones, 16 bits may hold all."""
    return method.on(dtype) if dtype in ("BF16", "F16") else method


def _expected(a: Assignment, dtype: str) -> tuple[int, int, int]:
    """Likely, least and most bits of a site, whether its own method takes it or the one for few tokens."""

    def ends(method: Any) -> tuple[int, int]:
        return _surely_on(method, dtype).bits_range(a.site.shape)  # type: ignore[no-any-return]

    likely, (least, most) = a.method.on(dtype).likely_bits(a.site.shape), ends(a.method)
    if a.fallback is not None and a.min_tokens > 0:
        other = ends(a.fallback)
        least, most = min(least, other[0]), max(most, other[1])
    return likely, least, most


def _entry(name: str, dtype: str, shape: tuple[int, ...], nbytes: int, source: Source) -> Entry:
    return Entry(name, dtype, shape, 0, nbytes, source.folder)
