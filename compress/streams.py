"""Hidden states on the way through the blocks of a model, beside others that go through compressed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from compress import memory
from compress.block import compress_block
from compress.calibration.observe import batches
from compress.calibration.skeleton import Skeleton
from compress.recipe import Assignment
from compress.report import SiteRow

Listen = Callable[[int, int, str, float], None]


class Stream:
    """Hidden states of some windows on the way through the blocks."""

    def __init__(self, skeleton: Skeleton, ids: Tensor, tokens: int) -> None:
        self.skeleton, self.ids = skeleton, ids
        self.cuts = [slice(c.start, c.stop) for c in batches(ids.shape[0], ids.shape[1], tokens)]
        self.hidden = [skeleton.embed(ids[cut]).cpu() for cut in self.cuts]

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
) -> list[SiteRow]:
    """Send streams through all blocks: one through compressed weights, one, if there is one, through the original's.

    As a run does it, the calibration `fit` goes on through the compressed weights; None for methods that need none. Nothing is
    written. Return the report rows.
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

        decoded = {}
        for name, (weight, row) in compress_block(skeleton, mine, observe, room, say):
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
