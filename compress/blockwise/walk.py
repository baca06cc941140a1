"""Hidden states on the way through the blocks of a model, beside others that go through compressed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.blockwise import stages as block_stages
from compress.blockwise.compress import compress_block
from compress.blockwise.stream import Stream
from compress.blockwise.view import Surroundings
from compress.model.streamed import Skeleton
from compress.recipe.assignment import Assignment, StageAssignment, within
from compress.report.rows import SiteRow
from compress.system import memory
from compress.system.progress import Listen


@dataclass
class Before:
    """What is done to every block before it is calibrated, and the calibration on its way through the original's blocks."""

    stages: Sequence[StageAssignment]
    untouched: Stream
    seed: int


def walk(
    skeleton: Skeleton,
    assignments: Sequence[Assignment],
    fit: Stream | None,
    compressed: Stream,
    original: Stream | None,
    room: int,
    listen: Listen,
    before: Before | None = None,
) -> list[SiteRow]:
    """Send streams through all blocks: one through compressed weights, one, if there is one, through the original's.

    As a run does it, the calibration `fit` goes on through the compressed weights; None for methods that need none, unless
    there is something to do `before`. Nothing is written. Return the report rows.
    """
    blocks = len(skeleton.blocks)
    rows = []
    for block in range(blocks):
        mine = [a for a in assignments if a.site.block == block]
        listen(block, blocks, "loading", 0.0)
        skeleton.load(block)
        if original is not None:
            original.advance(block)

        def observe(block: int = block) -> None:
            for _ in fit.outputs(block) if fit is not None else ():
                pass

        def say(step: str, share: float, block: int = block) -> None:
            listen(block, blocks, step, share)

        read = None
        if before is not None:
            assert fit is not None
            entering = before.untouched.branch()
            before.untouched.advance(block)
            around = Surroundings(skeleton, block, fit, entering, None, observe, room, before.seed, say)
            block_stages.transform(around, within(before.stages, block))
            read = around.weight
        decoded = {}
        for name, (weight, row) in compress_block(skeleton, mine, observe, room, say, read):
            decoded[name] = weight.dequantize()
            rows.append(row)
        for a in mine:
            skeleton.put(a.site, decoded[a.site.name])
        listen(block, blocks, "running", 0.0)
        if fit is not None:
            fit.advance(block)
        compressed.advance(block)
        skeleton.release(block)
        memory.give_back()
    return rows
