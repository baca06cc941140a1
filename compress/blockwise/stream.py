"""Hidden states of some windows on their way through the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from compress.calibration.observe import batches
from compress.model.streamed import Skeleton


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
