"""What a run will take and give, known before a weight is read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from compress.block import units
from compress.calibration.families import settings
from compress.errors import OutputError
from compress.files import human_bytes
from compress.prepare import Plan
from compress.recipe import Assignment

_BASE = 600 << 20  # bytes that Python, torch and transformers occupy


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes; `bytes_after` is exact for methods that know their size beforehand."""

    bytes_before: int
    bytes_after: int
    exact: bool
    block: int  # the largest block, in the dtype that the calibration computes in
    statistics: int  # of the largest block, all at once
    passes_memory: int  # of one pass
    hidden: int  # the calibration's hidden states
    disk: int  # parts, hidden states and the result, while both are there
    whole: int = 0  # the whole model where it is retrained: as it computes, and its weights before and as they move in float32

    @property
    def memory(self) -> int:
        """Peak resident memory, roughly, with hidden states in memory."""
        return _BASE + max(2 * self.block + self.passes_memory + self.hidden, self.whole)


def estimate(plan: Plan, samples: int, length: int, memory: int, offload: bool) -> Estimate:
    """Add up what a run over `samples` windows of `length` tokens takes."""
    source, item = plan.source, plan.dtype.itemsize
    after, exact = 0, True
    assigned = {a.site.name: a for a in plan.assignments}
    for site in plan.claims.sites:
        if site.name in assigned:
            method = assigned[site.name].method
            exact = exact and method.stored_bits(site.shape) is not None
            more = sum(s.method.added_bits(site.shape) for s in plan.tuning if assigned[site.name] in s.members)
            after += (method.likely_bits(site.shape) + more) // 8
        else:
            after += site.numel * _itemsize(plan, site.tensor)
    after += sum(source.entries[name].nbytes for name in plan.claims.copied)
    blocks: dict[int, int] = {}
    statistics: dict[int, int] = {}
    for site in plan.claims.sites:
        number = -1 if site.block is None else site.block
        blocks[number] = blocks.get(number, 0) + site.numel * item
    by_block: dict[int, list[Assignment]] = {}
    for a in plan.assignments:
        by_block.setdefault(-1 if a.site.block is None else a.site.block, []).append(a)
    for number, members in by_block.items():
        statistics[number] = sum(sum(kind.nbytes(u.columns) for kind in u.kinds) for u in units(members))
    for stage in plan.transforms:  # they look before the methods do
        for number in {a.site.block for a in stage.members}:
            seen = units([a for a in stage.members if a.site.block == number])
            mine = sum(kind.nbytes(u.columns) for u in seen for kind in stage.method.needs)
            statistics[number] = max(statistics[number], mine)
    width = settings(source).get("hidden_size", settings(source).get("n_embd", 0))
    width = width if isinstance(width, int) else 0  # what cannot be right, transformers will say
    # The original's hidden states run along where a method compares: before and after a block.
    hidden = samples * length * width * item * (3 if plan.compares else 1)
    most = max(statistics.values(), default=0)
    kept = hidden * (2 if offload else 1)
    states, disk = 0 if offload else hidden, 2 * after + kept
    whole = source.numel * (item + 8) if plan.retraining else 0
    return Estimate(source.nbytes, after, exact, max(blocks.values()), most, min(most, memory), states, disk, whole)


def _itemsize(plan: Plan, tensor: str) -> int:
    entry = plan.source.entries[tensor]
    return entry.nbytes // max(entry.numel, 1)


def check_disk(expected: Estimate, folder: Path) -> None:
    """Raise OutputError when the disk under `folder` has less room than a run needs."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < expected.disk:
        raise OutputError(
            f"{existing}: {human_bytes(free)} free; a run needs about {human_bytes(expected.disk)} there for parts and "
            "result. Free some space or choose another place"
        )
