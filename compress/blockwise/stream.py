"""Windows on their way through the blocks of a model, and which weights they go through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compress.blockwise.hidden_states import HiddenStates
from compress.calibration.observe import batches
from compress.model.streamed import StreamedModel
from compress.system import distributed

ORIGINAL, COMPRESSED = "original", "compressed"


def slices(ids: Tensor, tokens: int) -> list[slice]:
    """Cut windows (samples, length) into batches of at most `tokens` tokens."""
    return [slice(cut.start, cut.stop) for cut in batches(ids.shape[0], ids.shape[1], tokens)]


@dataclass
class Stream:
    """Windows of token ids (samples, length), as hidden states before the block at `position`."""

    name: str  # of its files in a job: calibration, original, held-out, check
    follows: str  # "original", or the name of the weights that a visitor of `walk` puts in the original's place
    ids: Tensor
    cuts: Sequence[slice]  # this process's batches
    states: HiddenStates
    position: int = 0
    outputs: HiddenStates | None = None  # of that block, while what enters it is still needed
    lazy: bool = False  # passes a block after the visitor has seen it, not before; for originals that are looked at on the way
    stop: int | None = None  # the block that it does not go through, because nothing after it needs the states

    @classmethod
    def begin(
        cls,
        model: StreamedModel,
        ids: Tensor,
        cuts: Sequence[slice],
        name: str,
        follows: str = ORIGINAL,
        folder: Path | None = None,
        lazy: bool = False,
    ) -> Stream:
        """Run the embeddings, which `embeddings_and_head` has filled; in memory, or in a file in `folder`.

        Every batch size is seen, so that blocks know their masks and positions.
        """
        if not cuts:  # more ranks than batches
            return cls(name, follows, ids, cuts, HiddenStates([], ids.shape[1], 0, model.dtype, None), lazy=lazy)
        first = model.embed(ids[cuts[0]])
        states = HiddenStates([len(ids[cut]) for cut in cuts], first.shape[1], first.shape[2], first.dtype, folder)
        stream = cls(name, follows, ids, cuts, states, lazy=lazy)
        rest = (model.embed(ids[cut]) if number else first for number, cut in enumerate(cuts))
        states.update(rest, stream._file("embedded"))
        return stream

    def _file(self, where: str) -> str:
        return f"{where}.{self.name}.{distributed.rank()}of{distributed.world()}.bin"

    def _after(self, block: int) -> str:
        return self._file(f"after-{block:05d}")

    def forward(self, model: StreamedModel, block: int, progress: Callable[[float], None] | None = None) -> Iterator[Tensor]:
        """Yield the outputs (samples, length, width) of a filled block, batch by batch, on the model's device."""
        for batch in range(len(self.cuts)):
            if progress is not None and len(self.cuts) > 1:
                progress(batch / len(self.cuts))
            yield model.forward(block, self.states.read(batch).to(model.device))

    def send(self, model: StreamedModel, block: int, progress: Callable[[float], None] | None = None) -> None:
        """Run a filled block for the hooks on its modules alone."""
        for _ in self.forward(model, block, progress):
            pass

    def peek(self, model: StreamedModel, block: int, progress: Callable[[float], None] | None = None) -> None:
        """Run a filled block and keep both its inputs and its outputs, until `advance`."""
        if not self._stops(block):
            self.outputs = self.states.after(self.forward(model, block, progress), self._after(block))

    def advance(self, model: StreamedModel, block: int, progress: Callable[[float], None] | None = None) -> None:
        """Let the outputs of a filled block take the place of its inputs."""
        if self._stops(block):
            return
        if self.outputs is not None:
            self.states, self.outputs = self.outputs, None
        else:
            self.states.update(self.forward(model, block, progress), self._after(block))
        self.position = block + 1

    def _stops(self, block: int) -> bool:
        return self.stop is not None and block >= self.stop

    def branch(self, follows: str) -> Stream:
        """Return the same states, in memory, to go through other weights."""
        return Stream(follows, follows, self.ids, self.cuts, self.states.copy(), self.position)

    def save(self, folder: Path, block: int) -> dict[str, str]:
        """Write the states after a block into a file that `restore` reads, if they are not on disk; return name and SHA-256."""
        name = self._after(block)
        return {name: self.states.save(folder / name)}

    def saved(self, folder: Path, block: int, digests: Mapping[str, str]) -> bool:
        """Whether `restore` will find the states after a block as they were written, given the SHA-256 of each file."""
        name = self._after(block)
        return name in digests and self.states.fits(folder / name, digests[name])

    def restore(self, folder: Path, block: int, digests: Mapping[str, str]) -> None:
        """Take the states after a block from the file that `save` wrote."""
        name = self._after(block)
        self.states.restore(folder / name, digests[name])
        self.position = block + 1

    def logs(self, model: StreamedModel) -> Iterator[Tensor]:
        """Yield the log probabilities (length - 1, vocabulary) of each window's next tokens; needs `embeddings_and_head`."""
        for number, cut in enumerate(self.cuts):
            for ids, hidden in zip(self.ids[cut], self.states.read(number), strict=True):
                logits = model.logits(ids[None], hidden[None].to(model.device))
                yield logits[0, :-1].float().log_softmax(-1)
