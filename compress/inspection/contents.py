"""What a checkpoint holds, dense or compressed, from its headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress.architecture.inventory import Inventory, take_inventory
from compress.architecture.known import INFERRED
from compress.checkpoint import packing
from compress.checkpoint.packed_source import PackedSource
from compress.errors import FamilyError
from compress.interop.foreign import open_any
from compress.model.detect import find_family


@dataclass(frozen=True)
class Kind:
    """All weights of one name within a block, and how they are stored."""

    name: str
    count: int
    shapes: list[tuple[int, int]]
    weights: int
    bytes: int
    stored: str  # BF16, or bits and group size
    blocks: list[int]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return self.bytes * 8 / self.weights


@dataclass(frozen=True)
class Contents:
    """A checkpoint at a glance."""

    folder: str
    model_type: str
    blocks: int
    compressed: bool
    weights: int
    bytes: int
    kinds: list[Kind]
    other_tensors: int
    other_bytes: int
    by_block: list[tuple[str, int, int]]  # block, weights, bytes
    notice: str | None = None  # why its weights are not told apart

    def plain(self) -> dict[str, Any]:
        """The contents as JSON values."""
        return asdict(self)


def _how(source: Any, name: str, tensor: str) -> str:
    if isinstance(source, PackedSource) and name in source.table:
        return packing.short(source.table[name])
    return str(source.entries[tensor].dtype)


def _bytes(source: Any, name: str, tensor: str, numel: int) -> int:
    if isinstance(source, PackedSource) and name in source.table:
        return sum(entry.nbytes for entry in source.entries_of(name))
    entry = source.entries[tensor]
    return int(entry.nbytes * numel // max(entry.numel, 1))


def contents(model: str) -> Contents:
    """Read the headers of a checkpoint and add up. Raises CheckpointError."""
    source = open_any(model)
    notice: str | None = None
    try:
        inventory = take_inventory(source, find_family(source))
    except FamilyError as error:  # what is there can be listed all the same
        inventory = Inventory(INFERRED, copied=list(source.entries))
        notice = error.message
    groups: dict[tuple[str, str], list[Any]] = {}
    blocks: dict[str, tuple[int, int]] = {}
    seen = 0
    for site in inventory.sites:
        size = _bytes(source, site.name, site.tensor, site.numel)
        groups.setdefault((site.kind, _how(source, site.name, site.tensor)), []).append((site, size))
        label = "head" if site.block is None else str(site.block)
        weights, total = blocks.get(label, (0, 0))
        blocks[label] = (weights + site.numel, total + size)
        seen += size
    kinds = [
        Kind(
            kind,
            len(members),
            sorted({site.shape for site, _ in members}),
            sum(site.numel for site, _ in members),
            sum(size for _, size in members),
            stored,
            sorted({site.block for site, _ in members if site.block is not None}),
        )
        for (kind, stored), members in groups.items()
    ]
    return Contents(
        str(source.folder),
        source.model_type,
        len([b for b in blocks if b != "head"]),
        isinstance(source, PackedSource),
        source.numel,
        source.stored_nbytes,
        kinds,
        len(inventory.copied),
        source.stored_nbytes - seen,
        [(label, weights, size) for label, (weights, size) in blocks.items()],
        notice,
    )
