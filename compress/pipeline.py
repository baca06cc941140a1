"""The one loop over blocks: fill, calibrate, compress, store, decode what was stored, run on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress import distributed, packed
from compress.block import compress_block
from compress.calibration.hidden import Hidden
from compress.calibration.observe import batches
from compress.calibration.skeleton import Skeleton
from compress.files import sha256
from compress.job import Job, Record
from compress.recipe import Assignment
from compress.report import SiteRow

SNAPSHOT_SECONDS = 120.0  # hidden states in memory are stored this often; blocks since then are replayed after a crash
Listen = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """What decides how a run is done and not what comes out."""

    offload: bool = False  # hidden states on disk
    memory: int = 4 << 30  # bytes of statistics at a time
    snapshot_seconds: float = SNAPSHOT_SECONDS


class Run:
    """A run over the blocks of a model, from wherever the job is to the last block."""

    def __init__(
        self,
        skeleton: Skeleton,
        assignments: list[Assignment],
        ids: Tensor,
        batch_tokens: int,
        job: Job,
        settings: Settings,
        listen: Callable[[int, int, str, float], None],
    ) -> None:
        self.skeleton, self.job, self.settings, self.listen = skeleton, job, settings, listen
        self.ids = ids
        self.batches = distributed.share(list(batches(ids.shape[0], ids.shape[1], batch_tokens)))
        self.blocks = len(skeleton.blocks)
        self.work: dict[int, list[Assignment]] = {}
        for assignment in assignments:
            block = assignment.site.block
            self.work.setdefault(self.blocks if block is None else block, []).append(assignment)
        self.total = self.blocks + (self.blocks in self.work)
        self.hidden: Hidden | None = None
        self.end: Tensor | None = None  # output of the last block for the first batch
        self._saved = time.monotonic()

    def _name(self, block: int) -> str:
        return f"after-{block:05d}.{distributed.rank()}of{distributed.world()}.bin"

    def _say(self, block: int) -> Listen:
        return lambda step, share: self.listen(block, self.total, step, share)

    def _ids(self, batch: int) -> Tensor:
        return self.ids[self.batches[batch].start : self.batches[batch].stop]

    def _embed(self) -> Hidden:
        """Run the embeddings; every batch size is seen, so that blocks know their masks and positions."""
        folder = self.job.hidden if self.settings.offload else None
        with self.skeleton.outer():
            if not self.batches:  # more ranks than batches
                return Hidden([], self.ids.shape[1], 0, self.skeleton.dtype, None)
            first = self.skeleton.embed(self._ids(0))
            hidden = Hidden([len(b) for b in self.batches], first.shape[1], first.shape[2], first.dtype, folder)
            rest = (self.skeleton.embed(self._ids(b)) if b else first for b in range(len(self.batches)))
            hidden.update(rest, f"embedded.{distributed.rank()}of{distributed.world()}.bin")
        return hidden

    def _outputs(self, block: int, step: str) -> Iterator[Tensor]:
        assert self.hidden is not None
        for batch in range(len(self.batches)):
            self.listen(block, self.total, step, batch / len(self.batches))
            yield self.skeleton.forward(block, self.hidden.read(batch).to(self.skeleton.device))

    def _observe(self, block: int) -> None:
        """Send the calibration through a block, or to the head, for the hooks on it."""
        assert self.hidden is not None
        if block < self.blocks:
            for _ in self._outputs(block, "calibrating"):
                pass
            return
        for batch in range(len(self.batches)):
            self.skeleton.rows_to_head(self._ids(batch), self.hidden.read(batch).to(self.skeleton.device))

    def _decoded(self, parts: list[str]) -> dict[str, Tensor]:
        """Weights as the parts on disk give them: what runs on is what is stored."""
        decoded: dict[str, Tensor] = {}
        for name in parts:
            for site, weight in packed.read_part(self.job.parts / name):
                decoded[site] = weight.dequantize().to(self.skeleton.dtype)
        return decoded

    def _advance(self, block: int, step: str) -> None:
        """Replace the hidden states before a filled block by those after it, and let the block go."""
        assert self.hidden is not None
        if self._is_end(block):
            self.end = next(self._outputs(block, step), None)  # of all that comes out, only the check looks at one batch
        else:
            self.hidden.update(self._outputs(block, step), self._name(block))
        self.skeleton.release(block)

    def _is_end(self, block: int) -> bool:
        """Whether nothing is calibrated after this block."""
        return block == self.total - 1

    def replay(self) -> int:
        """Bring the hidden states to where the journal ends; return the next block."""
        records = self.job.records
        self.hidden = self._embed()
        start = 0
        for record in reversed(records):
            here = record.hidden and self.hidden.restore(self.job.hidden / self._name(record.block))
            if all(distributed.gather(here)):
                start = record.block + 1
                break
        for record in records[start:]:
            if record.block < self.blocks:
                self.skeleton.load(record.block, self._decoded(list(record.parts)))
                self._advance(record.block, "replaying")
        return len(records)

    def _compress(self, block: int) -> tuple[str | None, list[SiteRow]]:
        """Compress this rank's sites of a block and store them in one part; return its name and the report rows."""
        tensors: dict[str, Tensor] = {}
        specs: dict[str, Any] = {}
        rows = []
        found = compress_block(
            self.skeleton, self.work.get(block, []), lambda: self._observe(block), self.settings.memory, self._say(block)
        )
        for site, (weight, row) in found:
            mine, specs[site] = packed.pack(weight)
            tensors |= {f"{site}.{leaf}": tensor for leaf, tensor in mine.items()}
            rows.append(row)
        if not specs:
            return None, rows
        name = f"block-{block:05d}.{distributed.rank()}of{distributed.world()}.safetensors"
        packed.write_part(self.job.parts / name, tensors, specs)
        return name, rows

    def _one(self, block: int) -> None:
        start = time.perf_counter()
        head = block == self.blocks
        if not head:
            self.skeleton.load(block)
        with self.skeleton.outer() if head else nullcontext():
            name, mine = self._compress(block)
        everyone = distributed.gather((name, sha256(self.job.parts / name) if name else "", [row.plain() for row in mine]))
        parts = {part: digest for part, digest, _ in everyone if part}
        order = {a.site.name: number for number, a in enumerate(self.work.get(block, []))}
        rows = sorted((row for _, _, theirs in everyone for row in theirs), key=lambda row: order[row["site"]])
        stored = False
        if not head:
            for site, weight in self._decoded(list(parts)).items():
                self.skeleton.put(self._site(block, site), weight)
            self._advance(block, "running")
            stored = self._store(block)
        distributed.barrier()
        record = Record(block, parts, stored, rows, time.perf_counter() - start)
        if distributed.rank() == 0:
            self.job.commit(record)
        else:
            self.job.records.append(record)
        distributed.barrier()

    def _site(self, block: int, name: str) -> Any:
        return next(a.site for a in self.work[block] if a.site.name == name)

    def _store(self, block: int) -> bool:
        """Put the hidden states on disk when they are not there and it is time; ranks agree on the time."""
        assert self.hidden is not None
        if self._is_end(block):
            return False
        if self.settings.offload:
            return True
        due = distributed.gather(time.monotonic() - self._saved >= self.settings.snapshot_seconds)[0]
        if due:
            self.hidden.save(self.job.hidden / self._name(block))
            self._saved = time.monotonic()
        return bool(due)

    def all_blocks(self) -> Tensor | None:
        """Compress what is left; return the last block's output for this rank's first batch, None if it has no batch."""
        for block in range(self.replay(), self.total):
            self.listen(block, self.total, "loading", 0.0)
            self._one(block)
        assert self.hidden is not None
        return self.hidden.read(0) if self.end is None and self.batches else self.end


def rows_of(job: Job) -> list[SiteRow]:
    """All report rows of a job, in the order of blocks."""
    return [SiteRow.parse(row) for record in job.records for row in record.rows]
