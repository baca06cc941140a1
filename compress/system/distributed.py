"""Ranks: trivial in one process, torch.distributed under torchrun (NCCL on GPUs, gloo otherwise)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_TIMEOUT = timedelta(hours=12)  # waiting for another rank's longest piece of work; a rank that dies takes its group with it


def rank() -> int:
    """This process's number."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def leads() -> bool:
    """Whether this is rank 0, also before the group is joined."""
    return int(os.environ.get("RANK", "0")) == 0


def world() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def ranks() -> range:
    """All ranks."""
    return range(world())


def start(device: torch.device) -> torch.device:
    """Join the group that torchrun announces in the environment, if any; return the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch.distributed.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    return device


def stop() -> None:
    """Leave the group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        torch.distributed.barrier()


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Give each piece of work a rank: largest first, to the rank with the least; every rank computes the same table."""
    load = [0.0] * ranks
    owners = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(ranks), key=lambda r: (load[r], r))
        owners[piece] = owner
        load[owner] += costs[piece]
    return owners


def share(pieces: Sequence[T]) -> list[T]:
    """This rank's contiguous part of a list, as even as can be; parts in order of rank make up the whole."""
    size, extra = divmod(len(pieces), world())
    start_at = rank() * size + min(rank(), extra)
    return list(pieces[start_at : start_at + size + (rank() < extra)])


def reduce_to(tensors: Sequence[Tensor], owner: int | None) -> None:
    """Sum tensors over ranks in place: into the owner's (others' are not meaningful afterwards), or for None into everyone's."""
    if world() > 1:
        for tensor in tensors:
            if owner is None:
                torch.distributed.all_reduce(tensor)
            else:
                torch.distributed.reduce(tensor, dst=owner)


def gather(value: Any) -> list[Any]:
    """Return every rank's small Python value, in order of rank, on every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    torch.distributed.all_gather_object(values, value)
    return values
