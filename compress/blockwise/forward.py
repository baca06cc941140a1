"""Evaluation one block at a time: any checkpoint that fits on the disk, in the memory of its largest block."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.architecture.inventory import claim
from compress.checkpoint.source import Source
from compress.model.detect import find
from compress.model.streamed import Skeleton


def open_skeleton(source: Source, dtype: torch.dtype, device: torch.device) -> Skeleton:
    """Return the skeleton of a checkpoint, dense or compressed."""
    return Skeleton(source, claim(source, find(source)), dtype, device)


def last_hidden(source: Source, ids: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Skeleton, Tensor]:
    """Run ids (samples, length) through all blocks; return the skeleton and the last block's output (samples, length, width)."""
    skeleton = open_skeleton(source, dtype, device)
    with skeleton.outer():
        hidden = skeleton.embed(ids)
    for block in range(len(skeleton.blocks)):
        skeleton.load(block)
        hidden = skeleton.forward(block, hidden)
        skeleton.release(block)
    return skeleton, hidden


def token_losses(skeleton: Skeleton, ids: Tensor, hidden: Tensor) -> Tensor:
    """Negative log likelihood in nats of each next token, (samples * (length - 1),) float32."""
    with skeleton.outer():
        logits = skeleton.logits(ids, hidden).float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="none"
    ).cpu()
