"""The blocks of a run: each calibrated, compressed and stored, and the windows run on through what was stored."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress._version import __version__
from compress.blockwise.stream import COMPRESSED, ORIGINAL, Stream, slices
from compress.blockwise.units import taps, units
from compress.blockwise.view import BlockRun
from compress.blockwise.walk import catch_up, walk
from compress.calibration.cache import BlockCache, StatisticsCache
from compress.calibration.data import fingerprint
from compress.model.streamed import StreamedModel, Weights
from compress.output.job import Job, Record
from compress.recipe.assignment import Assignment, StageAssignment, within
from compress.report.rows import SiteRow
from compress.runs import massive, watch
from compress.runs.block import BlockWork, compress_to_file, stored_weights
from compress.runs.replay import replay
from compress.system import distributed
from compress.system.files import sha256
from compress.system.progress import Progress

SNAPSHOT_SECONDS = 120.0  # hidden states in memory are stored this often; blocks since then are replayed after a crash
CHECK_TOKENS = 128  # of the first window, which the finished checkpoint must give the same hidden states for


@dataclass(frozen=True)
class Settings:
    """What decides how a run is done and not what comes out."""

    offload: bool = False  # hidden states on disk
    memory: int = 4 << 30  # bytes of statistics at a time
    snapshot_seconds: float = SNAPSHOT_SECONDS
    cache: Path | None = None  # folder of statistics, for other recipes
    reload: bool = True  # load the result in a fresh process in the end


@dataclass(frozen=True)
class Work:
    """What is to be done to the blocks of a model."""

    assignments: list[Assignment]
    transforms: list[StageAssignment] = field(default_factory=list)
    tuning: list[StageAssignment] = field(default_factory=list)
    compares: bool = False  # whether a method needs what the original model gives
    own_inputs: bool = False  # statistics are those of the original's own inputs, not of what compressed blocks give
    seed: int = 0
    held: Tensor | None = None  # windows (samples, length) that are kept from the calibration and watched
    limit: float = math.inf  # of the relative difference of their hidden states

    def of(self, block: int | None) -> BlockWork:
        """What is to be done to one block; None: the head."""
        assignments = [a for a in self.assignments if a.site.block == block]
        if block is None:
            return BlockWork(assignments, [], [])
        return BlockWork(assignments, within(self.transforms, block), within(self.tuning, block))


class Run:
    """A run over the blocks of a model, from wherever the job is to the last block."""

    def __init__(
        self, model: StreamedModel, work: Work, ids: Tensor, batch_tokens: int, job: Job, settings: Settings, progress: Progress
    ) -> None:
        self.model, self.job, self.settings, self.progress = model, job, settings, progress
        self.blocks, self.seed, self.limit, self.own_inputs = len(model.blocks), work.seed, work.limit, work.own_inputs
        self.work = [work.of(block) for block in range(self.blocks)]
        head = work.of(None)
        if head.assignments:  # it comes after the last block
            self.work.append(head)
        self.cache: StatisticsCache | None = None
        if settings.cache is not None:
            self.cache = StatisticsCache(settings.cache, _identity(model, ids, batch_tokens))
        folder = job.hidden if settings.offload else None
        cuts = distributed.share(slices(ids, batch_tokens))
        with model.embeddings_and_head():
            follows = ORIGINAL if work.own_inputs else COMPRESSED
            self.calibration = Stream.begin(model, ids, cuts, "calibration", follows, folder, lazy=True)
            self.calibration.stop = len(self.work) - 1  # nothing is calibrated after the last
            self.original = Stream.begin(model, ids, cuts, "original", folder=folder) if work.compares else None
            check = ids[:1, :CHECK_TOKENS]
            self.check = Stream.begin(model, check, slices(check, CHECK_TOKENS), "check", COMPRESSED)
            self.watched: list[Stream] = []  # held-out windows, through compressed blocks and through the original's
            if work.held is not None:
                all_at_once = slices(work.held, work.held.numel())
                self.watched = [
                    Stream.begin(model, work.held, all_at_once, f"held-out-{follows}", follows)
                    for follows in (COMPRESSED, ORIGINAL)
                ]
        self.streams = [stream for stream in (self.original, *self.watched, self.check, self.calibration) if stream is not None]
        self._saved = time.monotonic()
        self._start, self._calibrated = 0, set[int]()  # the first block of this process, and those that were run for statistics

    def all_blocks(self) -> Tensor:
        """Compress what is left; return the last block's output for the check's tokens (1, tokens, width)."""
        # The original's own inputs may not be needed again.
        brought = [s for s in self.streams if s is not self.calibration] if self.own_inputs else self.streams
        self._start = start = replay(self.model, brought, self.job, self._tell)
        if self.own_inputs:
            self._go_as_far_as_needed(start)
        walk(self.model, self.streams, range(start, self.blocks), self._visit, self._tell)
        for head in range(max(start, self.blocks), len(self.work)):
            self._tell(head, "loading", 0.0)
            with self.model.embeddings_and_head():
                for _ in self._visit(head):
                    pass
        return self.check.states.read(0)

    @property
    def cached(self) -> dict[str, int] | None:
        """How many passes of the calibration over a block were found in the cache, and how many were made; None without one."""
        if self.cache is None:
            return None
        found = {"found": self.cache.found, "made": self.cache.kept}
        if self.own_inputs:
            behind = range(max(self._start, self.calibration.position), self.blocks)
            found["blocks_left_out"] = len(set(behind) - self._calibrated)
        return found

    def _tell(self, block: int, step: str, share: float) -> None:
        self.progress(block, len(self.work), step, share)

    def _visit(self, block: int) -> Iterator[tuple[str, Weights]]:
        """Compress a block, or the head, into files, yield its weights as they are stored, and note it in the journal."""
        start = time.perf_counter()
        largest = massive.largest(self.calibration, block)
        name, mine = compress_to_file(self._around(block), self.work[block], self._cache(block), self.job.parts)
        files, rows = self._gathered(block, name, mine)
        difference = None
        if block < self.blocks:
            yield COMPRESSED, stored_weights(self.job.parts, files, self.model.dtype)
            difference = watch.difference(self.watched, block, self.limit) if self.watched else None
        stored = self._store(block) if block < self.blocks else {}
        distributed.barrier()
        record = Record(block, files, stored, rows, time.perf_counter() - start, difference, largest)
        if distributed.rank() == 0:
            self.job.commit(record)
        else:
            self.job.records.append(record)
        distributed.barrier()

    def _around(self, block: int) -> BlockRun:
        calibration, original = self.calibration, self.original

        def progress(share: float) -> None:
            self._tell(block, "calibrating", share)

        def send() -> None:
            self._calibrated.add(block)
            self._bring(block)
            if block < self.blocks:
                calibration.send(self.model, block, progress)
            else:
                for number, cut in enumerate(calibration.cuts):
                    hidden = calibration.states.read(number).to(self.model.device)
                    self.model.rows_to_head(calibration.ids[cut], hidden)

        def say(step: str, share: float) -> None:
            self._tell(block, step, share)

        originals, targets = (original.states, original.outputs) if original is not None else (None, None)
        memory = self.settings.memory
        return BlockRun(self.model, block, calibration.states, originals, targets, send, memory, self.seed, say)

    def _gathered(self, block: int, name: str | None, mine: list[SiteRow]) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """Return the files of all ranks with their SHA-256, and all report rows in the order of the recipe's sites."""
        found = distributed.gather((name, sha256(self.job.parts / name) if name else "", [row.plain() for row in mine]))
        order = {a.site.name: number for number, a in enumerate(self.work[block].assignments)}
        rows = sorted((row for _, _, theirs in found for row in theirs), key=lambda row: order[row["site"]])
        return {n: digest for n, digest, _ in found if n}, rows

    def _cache(self, block: int) -> BlockCache | None:
        """Where statistics of a block may come from: with several ranks, or behind a transform, each run makes its own."""
        if self.cache is None or distributed.world() > 1 or self.work[block].transforms:
            return None
        before = [digest for record in self.job.records for _, digest in sorted(record.parts.items())]
        if self.own_inputs:
            before = ["the original"] if block else []
        return self.cache.at(block, before, self.model.device)

    def _go_as_far_as_needed(self, start: int) -> None:
        """Bring the original's own hidden states to the next block, if statistics of this or a later one are not in the cache."""

        def kept(block: int) -> bool:
            wanted, cache = taps(self.model, units(self.work[block].assignments)), self._cache(block)
            return not wanted or (cache is not None and cache.holds(wanted))

        last = max((block for block in range(start, len(self.work)) if not kept(block)), default=-1)
        self.calibration.stop = max(last, 0)
        if start <= last:
            self._bring(start)

    def _bring(self, block: int) -> None:
        """Send the original's own hidden states to a block, or the head, where they were left behind because of the cache."""
        behind = min(block, self.blocks)
        if self.calibration.position < behind:
            self.calibration.stop = max(behind, self.calibration.stop or 0)
            catch_up(self.model, self.calibration, behind, self._tell)

    def _store(self, block: int) -> dict[str, str]:
        """Put the hidden states on disk when they are not there and it is time, on which ranks agree.

        Return the SHA-256 of all ranks' files by name, {} where none are stored.
        """
        if any(stream.position != block + 1 for stream in self.streams):
            return {}  # nothing goes on with them
        due = self.settings.offload or distributed.gather(time.monotonic() - self._saved >= self.settings.snapshot_seconds)[0]
        if not due:
            return {}
        mine = {name: digest for stream in self.streams for name, digest in stream.save(self.job.hidden, block).items()}
        self._saved = time.monotonic()
        return {name: digest for theirs in distributed.gather(mine) for name, digest in theirs.items()}


def _identity(model: StreamedModel, ids: Tensor, batch_tokens: int) -> dict[str, Any]:
    """What statistics depend on in addition to the blocks before them."""
    return {
        "source": model.source.fingerprint(),
        "calibration": fingerprint(ids),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "batch_tokens": batch_tokens,
        "versions": [__version__, torch.__version__],
    }


def rows_of(job: Job) -> list[SiteRow]:
    """All report rows of a job, in the order of blocks."""
    return [SiteRow.parse(row) for record in job.records for row in record.rows]
