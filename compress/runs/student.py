"""A compressed model in memory: read from parts or from a checkpoint, and written into the parts of a job again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.architecture.inventory import Inventory
from compress.checkpoint import block_file, packed_source, packing
from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import bytes_of
from compress.errors import CheckpointError
from compress.model.streamed import StreamedModel, Weights
from compress.output.job import Job, Record
from compress.report.rows import SiteRow
from compress.system.files import sha256
from compress.weights.weight import CompressedWeight


@dataclass(frozen=True)
class Student:
    """What stands for the original's tensors: compressed weights by site, and other tensors that differ, by disk name."""

    weights: dict[str, CompressedWeight]
    others: dict[str, Tensor]

    @classmethod
    def of_parts(cls, parts: Iterable[Path]) -> Student:
        """Read the parts of a job."""
        weights: dict[str, CompressedWeight] = {}
        others: dict[str, Tensor] = {}
        for path in parts:
            weights |= block_file.read_block_file(path)
            others |= block_file.others_of(path)
        return cls(weights, others)

    def of_block(self, model: StreamedModel, block: int) -> Weights:
        """Return what stands for the tensors of one block."""
        sites = [site.name for site in model.sites[block] if site.name in self.weights]
        others = {name: value for name, value in self.others.items() if model.holds(block, name)}
        return Weights.of(((name, self.weights[name]) for name in sites), others)

    @classmethod
    def of_checkpoint(cls, source: packed_source.PackedSource, original: Source, inventory: Inventory) -> Student:
        """Read a compressed checkpoint of an original. Raises CheckpointError where it was made from another model."""
        shapes = {site.name: site.shape for site in inventory.sites}
        for name, spec in source.table.items():
            if shapes.get(name) != tuple(spec["shape"]):
                raise CheckpointError(
                    f"{source.folder}: {name} is {spec['shape']}, in the original {shapes.get(name, 'there is none')}; give the "
                    "model that it was made from with --original"
                )
        others = {}
        for name in inventory.copied:
            if name in getattr(original, "added", ()) and name not in source.entries:
                continue  # a bias that this training is to add
            if name not in source.entries or source.entries[name].shape != original.entries[name].shape:
                raise CheckpointError(f"{source.folder}: {name} is not as in {original.folder}; give the model it was made from")
            value = source.tensor(name)
            if bytes_of(value) != bytes_of(original.tensor(name)):
                others[name] = value
        return cls({name: source.compressed(name) for name in source.table}, others)


def records(student: Student, rows: Iterable[SiteRow], path: str, notes: Mapping[str, Any], job: Job) -> list[Record]:
    """Write a student into parts, a file for each block, and return what stands for the job's own records of blocks."""
    by_block: dict[int | None, list[SiteRow]] = {}
    for row in rows:
        by_block.setdefault(row.block, []).append(row)
    found = []
    others = dict(student.others)
    last = max(number for number in by_block if number is not None) if set(by_block) != {None} else -1
    for block, members in by_block.items():
        part = block_file.BlockFileWriter()
        now = []
        for row in members:
            weight = student.weights[row.site]
            part.add(row.site, weight)
            sizes = replace(
                row, bits_per_weight=weight.bits_per_weight, stored_bits=weight.stored_bits, sha256=packing.digest(weight)
            )
            now.append(replace(sizes, notes=row.notes | {path: dict(notes)}).plain())
        number = last + 1 if block is None else block
        name = f"retrained-{number:05d}.safetensors"
        part.write(job.parts / name, others)
        others = {}  # all of them lie in the first part
        found.append(Record(number, {name: sha256(job.parts / name)}, {}, now))
    return found
