"""One block of a run: what the recipe does to it, and the file that its compressed weights go into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.blockwise import stages
from compress.blockwise.compress import CompressedSite, compress_block
from compress.blockwise.view import BlockRun
from compress.calibration.cache import BlockCache
from compress.checkpoint.block_file import BlockFileWriter, others_of, read_block_file
from compress.checkpoint.packing import digest
from compress.model.streamed import Weights
from compress.recipe.assignment import Assignment, StageAssignment
from compress.report.rows import SiteRow
from compress.system import distributed
from compress.weights.weight import CompressedWeight


@dataclass(frozen=True)
class BlockWork:
    """What a recipe does to one block."""

    assignments: list[Assignment]
    transforms: list[StageAssignment]
    tuning: list[StageAssignment]

    @property
    def alone(self) -> list[Assignment]:
        """Sites whose methods see one weight at a time."""
        return [a for a in self.assignments if a.method.scope == "site"]

    @property
    def together(self) -> list[Assignment]:
        """Sites whose methods see the whole block."""
        return [a for a in self.assignments if a.method.scope == "block"]


def compress_to_file(
    around: BlockRun, work: BlockWork, cache: BlockCache | None, folder: Path
) -> tuple[str | None, list[SiteRow]]:
    """Compress this rank's sites of a filled block into one file; return its name, None without a file, and the report rows."""
    part = BlockFileWriter()
    rows = []
    for site, (weight, row) in _compressed(around, work, cache, folder):
        part.add(site, weight)
        rows.append(replace(row, sha256=digest(weight)))
    others = around.others if distributed.rank() == 0 else {}
    if not part.specs and not others:
        return None, rows
    name = f"block-{around.number:05d}.{distributed.rank()}of{distributed.world()}.safetensors"
    part.write(folder / name, others)
    return name, rows


def stored_weights(folder: Path, names: Mapping[str, str], dtype: torch.dtype) -> Weights:
    """Return what the files of a block hold, decoded from disk: what runs on is what is stored."""
    paths = [folder / name for name in names]
    sites = (pair for path in paths for pair in read_block_file(path))
    return Weights.of(sites, {name: value for path in paths for name, value in others_of(path).items()}, dtype)


def _compressed(
    around: BlockRun, work: BlockWork, cache: BlockCache | None, folder: Path
) -> Iterator[tuple[str, CompressedSite]]:
    """Transform the block, then yield this rank's sites as they are stored."""
    notes = stages.transform(around, work.transforms)
    found = compress_block(
        around.streamed, work.alone, around.send, around.budget, around.progress, around.weight, cache, around.known
    )
    if work.together or work.tuning:
        found = _as_a_whole(around, work, found, folder)
    for site, (weight, row) in found:
        noted = notes.get(site, {})
        taken = [row.fallback, *(f"{stage}: {note['fallback']}" for stage, note in noted.items() if "fallback" in note)]
        fallback = "; ".join(text for text in taken if text) or None
        yield site, (weight, replace(row, notes=noted | row.notes, fallback=fallback))


def _as_a_whole(
    around: BlockRun, work: BlockWork, found: Iterator[tuple[str, CompressedSite]], folder: Path
) -> Iterator[tuple[str, CompressedSite]]:
    """Go on with methods that see the block, which need what all ranks have made of its sites."""
    mine = dict(found)
    weights = {name: weight for name, (weight, _) in mine.items()}
    if distributed.world() > 1:
        weights = _exchange(around.number, work, weights, folder)
    around.streamed.set_weights(around.number, Weights.of(weights.items()))
    for name, done in stages.together(around, work.together):
        weights[name] = done[0]
        if distributed.rank() == 0:
            mine[name] = done
    notes = stages.tune(around, work.tuning, weights)
    for name, (_, row) in mine.items():
        weight = weights[name]
        row = replace(row, notes=row.notes | notes.get(name, {}))
        yield name, (weight, replace(row, bits_per_weight=weight.bits_per_weight, stored_bits=weight.stored_bits))


def _exchange(block: int, work: BlockWork, mine: Mapping[str, CompressedWeight], folder: Path) -> dict[str, CompressedWeight]:
    """Return the compressed weights of all ranks, which pass through files."""
    drafts = [folder / f"draft-{block:05d}.{rank}of{distributed.world()}.safetensors" for rank in distributed.ranks()]
    part = BlockFileWriter()
    for site, weight in mine.items():
        part.add(site, weight)
    part.write(drafts[distributed.rank()])
    distributed.barrier()
    found = dict(pair for path in drafts for pair in read_block_file(path))
    distributed.barrier()
    drafts[distributed.rank()].unlink()
    return {a.site.name: found[a.site.name] for a in work.assignments if a.site.name in found}
