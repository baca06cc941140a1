"""The one loop over blocks: fill, calibrate, compress, store, decode what was stored, run on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress._version import __version__
from compress.blockwise import stages as block_stages
from compress.blockwise.compress import Done, compress_block
from compress.blockwise.hidden_states import Hidden
from compress.blockwise.units import Cache, taps, units
from compress.blockwise.view import Surroundings
from compress.calibration.cache import StatisticsCache
from compress.calibration.data import fingerprint
from compress.calibration.observe import batches
from compress.checkpoint import packing, part_file
from compress.checkpoint.packing import digest
from compress.checkpoint.tensor_file import read_tensor
from compress.model.streamed import Skeleton
from compress.output.job import Job, Record
from compress.recipe.assignment import Assignment, StageAssignment, within
from compress.report.rows import SiteRow
from compress.run import watch as watching
from compress.system import distributed
from compress.system.files import sha256
from compress.weights.weight import CompressedWeight

SNAPSHOT_SECONDS = 120.0  # hidden states in memory are stored this often; blocks since then are replayed after a crash
Listen = Callable[[str, float], None]


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


class Run:
    """A run over the blocks of a model, from wherever the job is to the last block."""

    def __init__(
        self,
        skeleton: Skeleton,
        todo: Work,
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
        self.todo = todo
        self.work: dict[int, list[Assignment]] = {}
        for assignment in todo.assignments:
            block = assignment.site.block
            self.work.setdefault(self.blocks if block is None else block, []).append(assignment)
        self.total = self.blocks + (self.blocks in self.work)
        self.hidden: Hidden | None = None
        self.original: Hidden | None = None  # the original model's hidden states, where a method compares
        self.targets: Hidden | None = None  # those after the block that is being compressed
        self.watched: list[Hidden] = []  # held-out windows: behind compressed blocks, and behind the original's
        self.end: Tensor | None = None  # output of the last block for the first batch
        self.followed: Hidden | None = None  # with the original's own inputs: the first window, behind compressed blocks
        self.at = 0  # then: the block that the hidden states enter, which falls behind where nothing needs them
        self.last = -1  # then: the last block whose statistics are not kept
        self.left_out: set[int] = set()  # then: blocks that the calibration was not run through
        self._saved = time.monotonic()
        self.cache: StatisticsCache | None = None
        if settings.cache is not None:
            self.cache = StatisticsCache(settings.cache, self._inputs(batch_tokens))

    def _inputs(self, batch_tokens: int) -> dict[str, Any]:
        """What statistics depend on beside the blocks before them."""
        skeleton = self.skeleton
        return {
            "source": skeleton.source.fingerprint(),
            "calibration": fingerprint(self.ids),
            "dtype": str(skeleton.dtype),
            "device": skeleton.device.type,
            "batch_tokens": batch_tokens,
            "versions": [__version__, torch.__version__],
        }

    def _name(self, block: int, what: str = "") -> str:
        return f"after-{block:05d}{what}.{distributed.rank()}of{distributed.world()}.bin"

    def _say(self, block: int) -> Listen:
        return lambda step, share: self.listen(block, self.total, step, share)

    def _ids(self, batch: int) -> Tensor:
        return self.ids[self.batches[batch].start : self.batches[batch].stop]

    def _watch_through(self, block: int, which: int) -> None:
        """Send the held-out windows through a filled block: the compressed one (0) or the original (1)."""
        if self.watched:
            watching.through(self.skeleton, block, self.watched[which])

    def _states(self) -> dict[str, Hidden]:
        """All hidden states that a run needs to go on, by what their files are called."""
        beside = {".original": self.original, ".followed": self.followed}
        watched = {f".watched{number}": hidden for number, hidden in enumerate(self.watched)}
        return {what: hidden for what, hidden in ({"": self.hidden} | beside | watched).items() if hidden is not None}

    def _embed(self, name: str = "embedded") -> Hidden:
        """Run the embeddings; every batch size is seen, so that blocks know their masks and positions."""
        folder = self.job.hidden if self.settings.offload else None
        with self.skeleton.outer():
            if not self.batches:  # more ranks than batches
                return Hidden([], self.ids.shape[1], 0, self.skeleton.dtype, None)
            first = self.skeleton.embed(self._ids(0))
            hidden = Hidden([len(b) for b in self.batches], first.shape[1], first.shape[2], first.dtype, folder)
            rest = (self.skeleton.embed(self._ids(b)) if b else first for b in range(len(self.batches)))
            hidden.update(rest, f"{name}.{distributed.rank()}of{distributed.world()}.bin")
        return hidden

    def _outputs(self, block: int, step: str, hidden: Hidden | None = None) -> Iterator[Tensor]:
        hidden = hidden or self.hidden
        assert hidden is not None
        self.left_out.discard(block)
        for batch in range(len(self.batches)):
            self.listen(block, self.total, step, batch / len(self.batches))
            yield self.skeleton.forward(block, hidden.read(batch).to(self.skeleton.device))

    def _aim(self, block: int, step: str) -> None:
        """Run the original's hidden states through the original block, which is filled."""
        if self.original is not None:
            self.targets = self.original.after(self._outputs(block, step, self.original), self._name(block, ".original"))

    def _observe(self, block: int) -> None:
        """Send the calibration through a block, or to the head, for the hooks on it."""
        assert self.hidden is not None
        self._reach(block)
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
            for site, weight in part_file.read_part(self.job.parts / name):
                decoded[site] = weight.dequantize().to(self.skeleton.dtype)
        return decoded

    def _put_others(self, block: int, parts: list[str]) -> None:
        """Give a filled block the tensors that parts on disk have instead of the source's."""
        for name in parts:
            found = part_file.part_others(self.job.parts / name)
            self.skeleton.put_others(block, {tensor: read_tensor(entry) for tensor, entry in found.items()})

    def _run_on(self, block: int, step: str) -> None:
        """Replace the hidden states before a filled block of the original by those after it."""
        assert self.hidden is not None
        self.hidden.update(self._outputs(block, step), self._name(block))
        self.at = block + 1

    def _reach(self, block: int) -> None:
        """Send the original's own hidden states through the blocks before this one that were left out."""
        if self.followed is not None:
            for left in range(self.at, block):
                self.skeleton.load(left)
                self._run_on(left, "running")
                self.skeleton.release(left)

    def _advance(self, block: int, step: str) -> None:
        """Replace the hidden states before a filled block by those after it, and let the block go."""
        assert self.hidden is not None
        self.original, self.targets = self.targets, None
        if self.followed is not None:
            watching.through(self.skeleton, block, self.followed)
        elif self._is_end(block):
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
        self.original = self._embed("embedded.original") if self.todo.compares else None
        if self.todo.held is not None:
            self.watched = [watching.begin(self.skeleton, self.todo.held) for _ in range(2)]
        if self.todo.own_inputs:
            self.followed = watching.begin(self.skeleton, self.ids[:1])
        start = 0
        for record in reversed(records):
            here = record.hidden
            for what, hidden in self._states().items():
                here = here and hidden.restore(self.job.hidden / self._name(record.block, what))
            if all(distributed.gather(here)):
                start = self.at = record.block + 1
                break
        for record in records[start:]:
            if record.block < self.blocks:
                if self.original is not None or self.watched:
                    self.skeleton.load(record.block)
                    self._aim(record.block, "replaying")
                    self._watch_through(record.block, 1)
                self.skeleton.load(record.block, self._decoded(list(record.parts)))
                self._put_others(record.block, list(record.parts))
                self._watch_through(record.block, 0)
                self._advance(record.block, "replaying")
        return len(records)

    def _compress(self, block: int) -> tuple[str | None, list[SiteRow]]:
        """Compress this rank's sites of a block and store them in one part; return its name and the report rows."""
        tensors: dict[str, Tensor] = {}
        specs: dict[str, Any] = {}
        rows = []
        around = self._surroundings(block)
        for site, (weight, row) in self._found(block, around):
            mine, specs[site] = packing.pack(weight)
            tensors |= {f"{site}.{leaf}": tensor for leaf, tensor in mine.items()}
            rows.append(replace(row, sha256=digest(weight)))
        others = around.others if distributed.rank() == 0 else {}
        if not specs and not others:
            return None, rows
        name = f"block-{block:05d}.{distributed.rank()}of{distributed.world()}.safetensors"
        part_file.write_part(self.job.parts / name, tensors, specs, others)
        return name, rows

    def _surroundings(self, block: int) -> Surroundings:
        assert self.hidden is not None

        def send() -> None:
            self._observe(block)

        budget, say = self.settings.memory, self._say(block)
        return Surroundings(self.skeleton, block, self.hidden, self.original, self.targets, send, budget, self.todo.seed, say)

    def _found(self, block: int, around: Surroundings) -> Iterator[tuple[str, Done]]:
        """Yield what becomes of this rank's sites of a block."""
        work = self.work.get(block, [])
        alone = [a for a in work if a.method.scope == "site"]
        joint, tuning = [a for a in work if a.method.scope == "block"], within(self.todo.tuning, block)
        notes = block_stages.transform(around, within(self.todo.transforms, block))
        cache = self._cache(block)
        found = compress_block(self.skeleton, alone, around.send, around.budget, around.listen, around.weight, cache)
        if joint or tuning:
            found = self._jointly(block, around, found, joint, tuning)
        for site, (weight, row) in found:
            noted = notes.get(site, {})
            taken = [row.fallback, *(f"{stage}: {note['fallback']}" for stage, note in noted.items() if "fallback" in note)]
            fallback = "; ".join(text for text in taken if text) or None
            yield site, (weight, replace(row, notes=noted | row.notes, fallback=fallback))

    def _cache(self, block: int) -> Cache | None:
        """Where statistics of a block may come from: with several ranks, or behind a transform, each run makes its own."""
        if self.cache is None or distributed.world() > 1 or within(self.todo.transforms, block):
            return None
        cache, device = self.cache, self.skeleton.device
        if self.todo.own_inputs:
            cache.before = ["the original"] if block else []
        else:
            cache.before = [digest for record in self.job.records for _, digest in sorted(record.parts.items())]
        return Cache(
            lambda taps: cache.holds(block, taps),
            lambda taps: cache.read(block, taps, device),
            lambda taps, found: cache.write(block, taps, found),
        )

    def _kept(self, block: int) -> bool:
        """Whether the statistics of a block need no pass of the calibration."""
        wanted = taps(self.skeleton, units(self.work.get(block, [])))
        cache = self._cache(block)
        return not wanted or (cache is not None and cache.holds(wanted))

    @property
    def cached(self) -> dict[str, int] | None:
        """How many passes of the calibration over a block were found in the cache, and how many were made; None without one."""
        if self.cache is None:
            return None
        left_out = {"blocks_left_out": len(self.left_out)} if self.todo.own_inputs else {}
        return {"found": self.cache.found, "made": self.cache.kept} | left_out

    def _jointly(
        self,
        block: int,
        around: Surroundings,
        found: Iterator[tuple[str, Done]],
        joint: list[Assignment],
        tuning: list[StageAssignment],
    ) -> Iterator[tuple[str, Done]]:
        """Go on with methods that see the block, which need what all ranks have made of its sites."""
        mine = dict(found)
        everyone = {name: weight for name, (weight, _) in mine.items()}
        if distributed.world() > 1:
            everyone = self._exchange(block, everyone)
        for name, weight in everyone.items():
            self.skeleton.put(self._site(block, name), weight.dequantize())
        for name, done in block_stages.together(around, joint):
            everyone[name] = done[0]
            if distributed.rank() == 0:
                mine[name] = done
        notes = block_stages.tune(around, tuning, everyone)
        for name, (_, row) in mine.items():
            weight = everyone[name]
            row = replace(row, notes=row.notes | notes.get(name, {}))
            yield name, (weight, replace(row, bits_per_weight=weight.bits_per_weight, stored_bits=weight.stored_bits))

    def _exchange(self, block: int, mine: dict[str, CompressedWeight]) -> dict[str, CompressedWeight]:
        """Return the compressed weights of all ranks, which pass through files."""
        drafts = [self.job.parts / f"draft-{block:05d}.{rank}of{distributed.world()}.safetensors" for rank in distributed.ranks()]
        tensors: dict[str, Tensor] = {}
        specs: dict[str, Any] = {}
        for site, weight in mine.items():
            leaves, specs[site] = packing.pack(weight)
            tensors |= {f"{site}.{leaf}": tensor for leaf, tensor in leaves.items()}
        part_file.write_part(drafts[distributed.rank()], tensors, specs)
        distributed.barrier()
        everyone = dict(pair for path in drafts for pair in part_file.read_part(path))
        distributed.barrier()
        drafts[distributed.rank()].unlink()
        order = [a.site.name for a in self.work[block]]
        return {name: everyone[name] for name in order if name in everyone}

    def _one(self, block: int) -> None:
        start = time.perf_counter()
        head = block == self.blocks
        if block <= self.last:
            self._reach(block)  # before the block is filled: one at a time in memory
        if not head:
            self.skeleton.load(block)
            self._aim(block, "running")
            self._watch_through(block, 1)
        with self.skeleton.outer() if head else nullcontext():
            name, mine = self._compress(block)
        everyone = distributed.gather((name, sha256(self.job.parts / name) if name else "", [row.plain() for row in mine]))
        parts = {part: digest for part, digest, _ in everyone if part}
        order = {a.site.name: number for number, a in enumerate(self.work.get(block, []))}
        rows = sorted((row for _, _, theirs in everyone for row in theirs), key=lambda row: order[row["site"]])
        stored, difference = False, None
        if not head:
            if block < self.last:
                self._run_on(block, "running")
            for site, weight in self._decoded(list(parts)).items():
                self.skeleton.put(self._site(block, site), weight)
            self._put_others(block, list(parts))
            self._watch_through(block, 0)
            difference = watching.difference(self.watched, block, self.todo.limit) if self.watched else None
            self._advance(block, "running")
            stored = self._store(block)
        distributed.barrier()
        record = Record(block, parts, stored, rows, time.perf_counter() - start, difference)
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
        if self._is_end(block) or (self.followed is not None and self.at != block + 1):
            return False
        due = self.settings.offload or distributed.gather(time.monotonic() - self._saved >= self.settings.snapshot_seconds)[0]
        if due:
            for what, hidden in self._states().items():
                hidden.save(self.job.hidden / self._name(block, what))
            self._saved = time.monotonic()
        return bool(due)

    def all_blocks(self) -> Tensor | None:
        """Compress what is left; return the last block's output for this rank's first batch, None if it has no batch."""
        start = self.replay()
        if self.followed is not None:
            self.last = max((block for block in range(start, self.total) if not self._kept(block)), default=-1)
            self.left_out = set(range(start, self.blocks))
        for block in range(start, self.total):
            self.listen(block, self.total, "loading", 0.0)
            self._one(block)
        assert self.hidden is not None
        if self.followed is not None:
            return self.followed.read(0)
        return self.hidden.read(0) if self.end is None and self.batches else self.end


def rows_of(job: Job) -> list[SiteRow]:
    """All report rows of a job, in the order of blocks."""
    return [SiteRow.parse(row) for record in job.records for row in record.rows]
