"""The file that holds one block's packed tensors while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from compress.checkpoint.packing import Spec, layout, pack, unpack
from compress.checkpoint.tensor_file import read_header, read_tensor, save
from compress.errors import FormatError
from compress.weights.weight import CompressedWeight


@dataclass(frozen=True)
class BlockFileWriter:
    """The packed sites of a block on their way into one file."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    specs: dict[str, Spec] = field(default_factory=dict)

    def add(self, site: str, weight: CompressedWeight) -> None:
        """Pack a weight."""
        tensors, self.specs[site] = pack(weight)
        self.tensors.update({f"{site}.{leaf}": tensor for leaf, tensor in tensors.items()})

    def write(self, path: Path, others: Mapping[str, Tensor] | None = None) -> None:
        """Write all sites that were added, and tensors that replace the source's."""
        write_block_file(path, self.tensors, self.specs, others)


def write_block_file(
    path: Path, tensors: dict[str, Tensor], specs: dict[str, Spec], others: Mapping[str, Tensor] | None = None
) -> None:
    """Write the packed tensors of some sites, with their descriptions, and tensors that replace the source's, into one file."""
    others = dict(others or {})
    names = json.dumps(sorted(others), separators=(",", ":"))
    save(path, tensors | others, {"sites": json.dumps(specs, separators=(",", ":")), "others": names})


def others_of(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a block file that replace those of the source, by disk name."""
    entries, metadata = read_header(path)
    return {name: read_tensor(entries[name]) for name in json.loads(metadata.get("others", "[]"))}


def specs_of(metadata: Mapping[str, str]) -> dict[str, Spec]:
    """Return the descriptions that `write_block_file` put into a file's metadata."""
    try:
        specs = json.loads(metadata["sites"])
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"a part has no description of its sites ({error}); remove the job folder and run again") from error
    if not isinstance(specs, dict) or not all(isinstance(spec, dict) for spec in specs.values()):
        raise FormatError("a part describes its sites by something else than objects; remove the job folder and run again")
    return specs


def read_block_file(path: Path) -> Iterator[tuple[str, CompressedWeight]]:
    """Yield the sites of a block file, each with its compressed weight."""
    entries, metadata = read_header(path)
    for site, spec in specs_of(metadata).items():
        names = {leaf: f"{site}.{leaf}" for leaf in layout(spec)}
        if missing := [name for name in names.values() if name not in entries]:
            raise FormatError(f"{path}: no tensor {missing[0]!r}; remove the job folder and run again")
        yield site, unpack(spec, {leaf: read_tensor(entries[name]) for leaf, name in names.items()})
