"""Evaluation one block at a time: any checkpoint that fits on the disk, in the memory of its largest block."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.architecture.inventory import take_inventory
from compress.blockwise.stream import Stream, slices
from compress.blockwise.walk import Tell, quiet, walk
from compress.checkpoint.source import Source
from compress.model.complete import complete
from compress.model.detect import find_family
from compress.model.streamed import StreamedModel


def open_streamed(source: Source, dtype: torch.dtype, device: torch.device) -> StreamedModel:
    """Return the streamed model of a checkpoint, dense or compressed."""
    return complete(StreamedModel(source, take_inventory(source, find_family(source)), dtype, device))


def last_hidden(source: Source, ids: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[StreamedModel, Tensor]:
    """Run ids (samples, length) through all blocks at once; return the streamed model and the last block's output (samples,
    length, width) on the CPU.
    """
    streamed = open_streamed(source, dtype, device)
    return streamed, through_all_blocks(streamed, ids, ids.numel()).states.read(0)


def through_all_blocks(streamed: StreamedModel, ids: Tensor, tokens: int, tell: Tell = quiet) -> Stream:
    """Send ids (samples, length) through all blocks, at most `tokens` at a time; return them after the last block."""
    with streamed.embeddings_and_head():
        stream = Stream.begin(streamed, ids, slices(ids, tokens), "evaluation")
    walk(streamed, [stream], range(len(streamed.blocks)), tell=tell)
    return stream


def token_losses(streamed: StreamedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """Negative log likelihood in nats of each next token, (samples * (length - 1),) float32."""
    with streamed.embeddings_and_head():
        logits = streamed.logits(ids, hidden.to(streamed.device)).float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="none"
    ).cpu()
