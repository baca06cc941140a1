"""Files of a checkpoint: how tensors are cut into several, and what these are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from compress.checkpoint.source import SINGLE
from compress.checkpoint.tensor_file import Entry
from compress.system.files import as_json

Item = TypeVar("Item")


def cut_into_files(items: Iterable[Item], limit: int, nbytes: Callable[[Item], int]) -> dict[str, list[Item]]:
    """Cut items into files of at most `limit` bytes, in order, and return them by file name.

    An item, such as a tensor or the tensors of one site, stays whole; one above the limit gets a file of its own.
    """
    result: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if result[-1] and size + nbytes(item) > limit:
            result.append([])
            size = 0
        result[-1].append(item)
        size += nbytes(item)
    return dict(zip(shard_names(len(result)), result, strict=True))


def shard_names(count: int) -> list[str]:
    """Return the names that transformers gives to so many files of one checkpoint."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def index(files: Mapping[str, Iterable[Entry]]) -> str:
    """Return the text of the index over several files."""
    weight_map = {entry.name: name for name, members in files.items() for entry in members}
    sizes = {"total_size": sum(entry.nbytes for members in files.values() for entry in members)}
    return as_json({"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))})
