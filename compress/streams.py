"""Hidden states on the way through the blocks of a model, beside others that go through compressed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import block_methods, memory
from compress.block import compress_block
from compress.block_methods import Surroundings
from compress.calibration.observe import batches
from compress.calibration.skeleton import Skeleton
from compress.recipe import Assignment, StageAssignment, within
from compress.report import SiteRow

Listen = Callable[[int, int, str, float], None]


class Stream:
    """Hidden states of some windows on the way through the blocks."""

    def __init__(self, skeleton: Skeleton, ids: Tensor, tokens: int) -> None:
        self.skeleton, self.ids = skeleton, ids
        self.cuts = [slice(c.start, c.stop) for c in batches(ids.shape[0], ids.shape[1], tokens)]
        self.hidden = [skeleton.embed(ids[cut]).cpu() for cut in self.cuts]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the batches (samples, length, width)."""
        return [tuple(batch.shape) for batch in self.hidden]

    def read(self, batch: int) -> Tensor:
        """Return one batch (samples, length, width) on the CPU."""
        return self.hidden[batch]

    def outputs(self, block: int) -> Iterator[Tensor]:
        """What a filled block makes of them."""
        for batch in self.hidden:
            yield self.skeleton.forward(block, batch.to(self.skeleton.device))

    def advance(self, block: int) -> None:
        """Replace them by the block's outputs."""
        self.hidden = [output.cpu() for output in self.outputs(block)]

    def branch(self) -> Stream:
        """The same states, to go another way."""
        other = object.__new__(Stream)
        other.__dict__.update(self.__dict__, hidden=list(self.hidden))
        return other

    def logs(self) -> Iterator[Tensor]:
        """Log probabilities (length - 1, vocabulary) of each window; needs `outer`."""
        for cut, batch in zip(self.cuts, self.hidden, strict=True):
            for ids, hidden in zip(self.ids[cut], batch, strict=True):
                logits = self.skeleton.logits(ids[None], hidden[None].to(self.skeleton.device))
                yield logits[0, :-1].float().log_softmax(-1)


@dataclass
class Before:
    """What is done to every block before it is calibrated, and the calibration on its way through the original's blocks."""

    stages: Sequence[StageAssignment]
    untouched: Stream
    seed: int


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL of log probabilities (positions, vocabulary), nats."""
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error."""
    kl = torch.tensor(values, dtype=torch.float64)
    return float(kl.mean()), float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else None


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
            block_methods.transform(around, within(before.stages, block))
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
