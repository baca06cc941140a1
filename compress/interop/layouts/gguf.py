"""GGUF, the file of llama.cpp: one file with the tokenizer in it, whose tensors are blocks of 32 values and a scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.interop import gguf_blocks, gguf_file
from compress.interop.gguf_blocks import Blocks
from compress.interop.layout import SHARD, Exporting, Layout, Step
from compress.system.files import replacing, sha256


class Gguf(Layout[Blocks]):
    """The blocks of llama.cpp."""

    name = "gguf"
    holds = gguf_blocks.HOLDS
    readers = "llama.cpp and what is built on it; transformers, which decodes it (`gguf_file=`)"

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> Blocks:
        """Return how a described site is stored. Raises FormatError with the reason where it cannot be."""
        return gguf_blocks.scheme(spec)

    def check_model(self, source: Source) -> None:
        """Raise FormatError where llama.cpp has no place for a model, OutputError where the package gguf is missing."""
        gguf_file.check_model(source)
        gguf_file.library()

    def check(self, source: PackedSource, schemes: Mapping[str, Blocks]) -> None:
        """Raise FormatError where llama.cpp has no place for a model, OutputError where the package gguf is missing."""
        gguf_file.plan(source, schemes)
        gguf_file.library()

    def write(self, work: Exporting, folder: Path, step: Step, limit: int = SHARD) -> dict[str, Any]:
        """Write one file, whatever its size, and read it back; return what the record says of it."""
        members, left, notes = gguf_file.plan(work.source, work.schemes)
        path = folder / gguf_file.FILE
        with replacing(path) as temporary:
            gguf_file.write(work.source, work.schemes, members, temporary, lambda site: step(site, "exporting"))
        gguf_file.check(work.source, work.schemes, members, path, lambda site: step(site, "reading back"))
        kinds: dict[str, int] = {}
        for member in members:
            kinds[member.kind] = kinds.get(member.kind, 0) + 1
        return {
            "bytes": sum(member.nbytes for member in members),
            "files": {path.name: sha256(path)},
            "types": kinds,
            "left_out": left,
            "notes": notes,
            "values": dict(gguf_file.digests(path)),
        }

    def digests(self, folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield name and SHA-256 of the values of every tensor, as llama.cpp's own reader decodes them. Raises FormatError."""
        yield from gguf_file.digests(folder / gguf_file.FILE)


EXPORT = Gguf()
