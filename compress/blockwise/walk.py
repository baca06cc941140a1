"""The one walk over a model's blocks, one loaded at a time; everything that sends windows through blocks is a visitor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from compress.blockwise.stream import ORIGINAL, Stream
from compress.model.streamed import StreamedModel, Weights

# Takes the number of a filled block and yields weights for it, each with the name of the streams that follow them.
Visit = Callable[[int], Iterable[tuple[str, Weights]]]
Tell = Callable[[int, str, float], None]  # block, step, share done


def nothing(block: int) -> Iterator[tuple[str, Weights]]:
    """A visitor that leaves every block unchanged."""
    return iter(())


def quiet(block: int, step: str, share: float) -> None:
    """Report nothing."""


def walk(
    model: StreamedModel,
    streams: Sequence[Stream],
    blocks: Iterable[int],
    visit: Visit = nothing,
    tell: Tell = quiet,
    step: str = "running",
) -> None:
    """Send streams through blocks, each filled from the source, shown to a visitor, and released.

    Streams that follow the original run through the block before the visitor sees it: `states` are its inputs, `outputs` its
    outputs. Lazy ones run later, before its weights are first replaced. Each time the visitor yields weights, they are set in
    the block and the streams that follow them advance; then the visitor resumes.
    """
    for block in blocks:

        def progress(share: float, block: int = block) -> None:
            tell(block, step, share)

        tell(block, "loading", 0.0)
        model.load(block)
        originals = [stream for stream in streams if stream.follows == ORIGINAL]
        for stream in originals:
            if not stream.lazy:
                stream.peek(model, block, progress)
        for follows, weights in visit(block):
            _advance(originals, model, block, progress)
            originals = []
            model.set_weights(block, weights)
            _advance([stream for stream in streams if stream.follows == follows], model, block, progress)
        _advance(originals, model, block, progress)
        model.release(block)


def _advance(streams: Iterable[Stream], model: StreamedModel, block: int, progress: Callable[[float], None]) -> None:
    for stream in streams:
        stream.advance(model, block, progress)


def catch_up(model: StreamedModel, stream: Stream, block: int, tell: Tell = quiet) -> None:
    """Advance a stream that follows the original from its present position to the input of this block."""
    walk(model, [stream], range(stream.position, block), tell=tell)
