"""Evaluation one block at a time: any checkpoint that fits on the disk, in the memory of its largest block."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.architecture.inventory import claim
from compress.blockwise.stream import Stream, slices
from compress.blockwise.walk import Tell, quiet, walk
from compress.checkpoint.source import Source
from compress.model.detect import find
from compress.model.streamed import Skeleton


def open_skeleton(source: Source, dtype: torch.dtype, device: torch.device) -> Skeleton:
    """Return the skeleton of a checkpoint, dense or compressed."""
    return Skeleton(source, claim(source, find(source)), dtype, device)


def last_hidden(source: Source, ids: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Skeleton, Tensor]:
    """Run ids (samples, length) through all blocks at once; return the skeleton and the last block's output (samples, length,
    width) on the CPU.
    """
    skeleton = open_skeleton(source, dtype, device)
    return skeleton, through_all_blocks(skeleton, ids, ids.numel()).states.read(0)


def through_all_blocks(skeleton: Skeleton, ids: Tensor, tokens: int, tell: Tell = quiet) -> Stream:
    """Send ids (samples, length) through all blocks, at most `tokens` at a time; return them after the last block."""
    with skeleton.outer():
        stream = Stream.begin(skeleton, ids, slices(ids, tokens), "evaluation")
    walk(skeleton, [stream], range(len(skeleton.blocks)), tell=tell)
    return stream


def token_losses(skeleton: Skeleton, ids: Tensor, hidden: Tensor) -> Tensor:
    """Negative log likelihood in nats of each next token, (samples * (length - 1),) float32."""
    with skeleton.outer():
        logits = skeleton.logits(ids, hidden.to(skeleton.device)).float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="none"
    ).cpu()
