"""Where a run goes on: hidden states from the job folder, and the blocks since then run through again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.blockwise.stream import COMPRESSED, Stream
from compress.blockwise.walk import Tell, walk
from compress.model.streamed import StreamedModel, Weights
from compress.output.job import Job
from compress.runs.block import stored_weights
from compress.system import distributed


def replay(model: StreamedModel, streams: Sequence[Stream], job: Job, tell: Tell) -> int:
    """Bring streams to where the journal ends, on all ranks alike; return the next block."""
    start = 0
    for record in reversed(job.records):
        here = bool(record.hidden) and all(stream.saved(job.hidden, record.block, record.hidden) for stream in streams)
        if all(distributed.gather(here)):
            for stream in streams:
                stream.restore(job.hidden, record.block, record.hidden)
            start = record.block + 1
            break

    def stored(block: int) -> Iterator[tuple[str, Weights]]:
        yield COMPRESSED, stored_weights(job.parts, job.records[block].parts, model.dtype)

    walk(model, streams, range(start, min(len(job.records), len(model.blocks))), stored, tell, "replaying")
    return len(job.records)
