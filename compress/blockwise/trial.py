"""Compression in memory, block by block, next to the original model, for a plan or a sweep to measure. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress.blockwise import stages as block_stages
from compress.blockwise.compress import compress_block
from compress.blockwise.stream import COMPRESSED, Stream
from compress.blockwise.view import BlockRun
from compress.blockwise.walk import walk
from compress.model.streamed import StreamedModel, Weights
from compress.recipe.assignment import Assignment, StageAssignment, within
from compress.report.rows import SiteRow
from compress.system.progress import Progress


@dataclass
class Before:
    """What is done to every block before its calibration, and the calibration stream through the original's blocks."""

    stages: Sequence[StageAssignment]
    untouched: Stream
    seed: int


def compress_in_memory(
    streamed: StreamedModel,
    assignments: Sequence[Assignment],
    fit: Stream | None,
    others: Sequence[Stream],
    memory_budget: int,
    progress: Progress,
    before: Before | None = None,
) -> list[SiteRow]:
    """Compress all blocks and send streams through them; return the report rows.

    As in a run, the calibration stream `fit` continues through the compressed weights. It may be None if no method needs
    calibration and `before` is None. Each of `others` says whether it follows the original or the compressed weights.
    """
    blocks = len(streamed.blocks)
    rows = []

    def visit(block: int) -> Iterator[tuple[str, Weights]]:
        def observe() -> None:
            if fit is not None:
                fit.send(streamed, block)

        def say(step: str, share: float) -> None:
            progress(block, blocks, step, share)

        read, known = None, None
        if before is not None:
            assert fit is not None
            entering = before.untouched.states
            around = BlockRun(streamed, block, fit.states, entering, None, observe, memory_budget, before.seed, say)
            block_stages.transform(around, within(before.stages, block))
            read, known = around.weight, around.known
        mine = [a for a in assignments if a.site.block == block]
        made = []
        for name, (weight, row) in compress_block(streamed, mine, observe, memory_budget, say, read, known=known):
            made.append((name, weight))
            rows.append(row)
        yield COMPRESSED, Weights.of(made)

    streams = [*others, *([fit] if fit is not None else []), *([before.untouched] if before is not None else [])]
    walk(streamed, streams, range(blocks), visit, lambda block, step, share: progress(block, blocks, step, share))
    return rows
