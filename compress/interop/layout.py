"""What a layout is: how it holds each site, and how a checkpoint in it is written and read back.

A file of `layouts/` has an EXPORT of a subclass of `Layout`: site by site in safetensors by default; a layout with files of
another kind overrides `check`, `write` and `digests`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import INDEX, Source
from compress.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, Entry, write_stream
from compress.errors import FormatError, VerificationError
from compress.interop.foreign import open_any
from compress.output import seal, shards
from compress.system.files import sha256, write_json, write_text
from compress.weights.weight import CompressedWeight

Scheme = TypeVar("Scheme")  # how a layout holds one site
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Step = Callable[[str, str], None]  # told the site in work and what is done with it

RECORD = "export.json"
MARKER = ".compress-export"
SHARD = 5 * 10**9  # bytes of a file
_LEFT = ("evaluation.json", "quantize_config.json", RECORD)  # side files that speak of another checkpoint


@dataclass(frozen=True)
class Exporting:
    """What an export will do: everything that is known before weights are read."""

    source: PackedSource
    form: Layout[Any]
    scale: str | None  # dtype of all scales, where the layout has one for all
    schemes: dict[str, Any] = field(default_factory=dict)  # by site
    config: dict[str, Any] = field(default_factory=dict)  # config.json


class Layout(Generic[Scheme]):
    """How a tool stores compressed weights."""

    name: ClassVar[str]  # as the command line has it
    holds: ClassVar[str]  # what fits, in words
    readers: ClassVar[str]  # what loads it, in words
    scales: ClassVar[tuple[str, ...]] = ()  # dtypes that all scales may have, in the order of what to take; none: each site's own
    narrowest: ClassVar[int] = 0  # bits of a code, where narrower ones are stored in so many
    own: ClassVar[bool] = False  # the format of this package: names, experts and orders of axes are those of the original
    plain: ClassVar[bool] = False  # numbers as they are, which is never proposed where another layout fits

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> Scheme:
        """Return how a described site is stored. Raises FormatError with the reason where it cannot be."""
        raise NotImplementedError

    def layout(self, scheme: Scheme) -> Tensors:
        """Return dtype and shape of the tensors of a site."""
        raise NotImplementedError

    def tensors(self, scheme: Scheme, weight: CompressedWeight) -> dict[str, Tensor]:
        """Return the tensors of a site. Raises FormatError where its scales do not fit."""
        raise NotImplementedError

    def scale_of(self, scheme: Scheme) -> str:
        """Return the dtype of a site's scales."""
        return str(scheme.scale)  # type: ignore[attr-defined]  # what all but one layout call it

    def config(self, schemes: Mapping[str, Scheme], dense: Sequence[str], head: str) -> dict[str, Any]:
        """Return `quantization_config`, empty for none. Raises FormatError where sites differ in what has one setting."""
        return {}

    def model_config(self, original: Mapping[str, Any], table: dict[str, Any]) -> dict[str, Any]:
        """Return config.json, given that of the original and `quantization_config`."""
        plain = {key: value for key, value in original.items() if key != "quantization_config"}
        return plain | ({"quantization_config": table} if table else {})

    def files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return JSON files next to config.json by name, given `quantization_config`."""
        return {}

    def check_model(self, source: Source) -> None:
        """Raise FormatError or OutputError where a model does not fit, whatever is made of its weights."""

    def check(self, source: PackedSource, schemes: Mapping[str, Scheme]) -> None:
        """Raise FormatError or OutputError where a checkpoint as a whole does not fit, before weights are read."""

    def weights(self, folder: Path, sites: Iterable[str]) -> Iterator[tuple[str, CompressedWeight]]:
        """Yield those of some sites that a checkpoint in this layout has, decoded. Raises CheckpointError."""
        source = open_any(folder)
        if not isinstance(source, PackedSource):
            raise FormatError(f"{folder}: config.json names no layout of compressed weights; expected {self.name}")
        yield from ((site, source.compressed(site)) for site in sites if site in source.table)

    def digests(self, folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield SHA-256 of the decoded values, by the names that `write` recorded. Raises CheckpointError."""
        yield from ((site, packing.digest(weight)) for site, weight in self.weights(folder, names))

    def write(self, work: Exporting, folder: Path, step: Step, limit: int = SHARD) -> dict[str, Any]:
        """Write a whole checkpoint into an empty folder and read it back; return what the record says of it.

        Here: safetensors of at most `limit` bytes each, index, side files, and config.json last. Raises FormatError,
        VerificationError.
        """
        files = shards.cut_into_files(units(work), limit, lambda unit: sum(entry.nbytes for entry in unit.entries))
        entries = {name: [entry for unit in members for entry in unit.entries] for name, members in files.items()}
        for name, members in files.items():
            write_stream(folder / name, entries[name], _values(work, members, step))
        if len(files) > 1:
            write_text(folder / INDEX, shards.index(entries))
        seal.carry(work.source, folder, leave=_LEFT)
        for name, value in self.files(work.config.get("quantization_config", {})).items():
            write_json(folder / name, value)
        write_json(folder / "config.json", work.config)
        values = _read_back(work, folder, step)
        there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return {
            "bytes": sum(entry.nbytes for members in entries.values() for entry in members),
            "files": {name: sha256(folder / name) for name in there},
            "values": values,
        }


@dataclass(frozen=True)
class Unit:
    """What is written together: the tensors of a site, or one that is copied."""

    entries: list[Entry]  # as they will be
    site: str = ""
    source: Entry | None = None  # where a copied tensor lies


def units(work: Exporting) -> list[Unit]:
    """Return all that will be written, in order."""
    source, form = work.source, work.form
    result = []
    guard = (work.config.get("quantization_config") or {}).get("guard")
    for name in sorted(source.entries, key=seal.natural):
        site = name.removesuffix(".weight")
        if name.endswith(".weight") and site in source.table:
            planned = []
            for leaf, (dtype, shape) in form.layout(work.schemes[site]).items():
                planned.append(_planned(f"{site}.{leaf}", DTYPE_NAMES[dtype], shape, source.folder))
            result.append(Unit(planned, site))
        else:
            entry = source.entries[name]
            result.append(Unit([_planned(name, entry.dtype, entry.shape, source.folder)], source=entry))
    if guard is not None:
        empty = Entry(guard, "BF16", (0,), 0, 0, source.folder)
        result.append(Unit([empty], source=empty))
    return result


def _planned(name: str, dtype: str, shape: tuple[int, ...], folder: Path) -> Entry:
    return Entry(name, dtype, shape, 0, math.prod(shape) * DTYPES[dtype].itemsize, folder)


def _values(work: Exporting, members: Iterable[Unit], step: Step) -> Iterator[tuple[str, Tensor | Entry]]:
    """Make the tensors of some units one after the other. Raises FormatError where numbers do not fit."""
    for unit in members:
        step(unit.site, "exporting")
        if unit.source is not None:
            yield unit.entries[0].name, unit.source
            continue
        try:
            tensors = work.form.tensors(work.schemes[unit.site], work.source.compressed(unit.site))
        except FormatError as error:
            raise FormatError(
                f"{unit.site}: {error}; {work.form.name} holds {work.form.holds}. Export to another format, such as "
                "compressed-tensors, which keeps scales as they are"
            ) from error
        for leaf, tensor in tensors.items():
            yield f"{unit.site}.{leaf}", tensor


def _read_back(work: Exporting, folder: Path, step: Step) -> dict[str, str]:
    """Read every site back with the reader of its layout and compare it, value for value, with the source.

    Return the digests of the values, which `compress verify` compares. Raises VerificationError.
    """
    values: dict[str, str] = {}
    for site, weight in work.form.weights(folder, work.source.table):
        step(site, "reading back")
        values[site] = packing.digest(weight)
        if not torch.equal(weight.dequantize(), work.source.compressed(site).dequantize()):
            raise VerificationError(
                f"{site}: reads back with other values than it was written from; the result is not published, please report this"
            )
    if missing := [site for site in work.source.table if site not in values]:
        raise VerificationError(f"{missing[0]}: was not written; the result is not published, please report this")
    return values
