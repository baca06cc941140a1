"""Where in a block scales can move between tensors: what a family says of all its blocks, found in one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from compress.architecture.family import Scaling, Site
from compress.architecture.inventory import Inventory
from compress.methods.block import Scalable


def resolve(inventory: Inventory, config: Mapping[str, Any], block: int, taken: Collection[str]) -> list[Scalable]:
    """Find every scaling of the family in a block; `taken` are the names of the sites whose weights may change.

    Scales can move only where every reader takes part. Where one does not, the result names the obstacle.
    """
    base = f"{inventory.family.blocks}.{block}."
    sites = {site.name.removeprefix(base): site for site in inventory.sites if site.block == block}
    copied = {name.removeprefix(base) for name in inventory.copied if name.startswith(base)}
    found = []
    for scaling in inventory.family.scalings:
        for single in _singles(scaling, sites):
            place = _Place(inventory, single, sites, copied, base, taken)
            if place.readers:  # a block may lack them: dense ones have no experts
                found.append(place.scalable(config))
    return found


def _singles(scaling: Scaling, sites: Collection[str]) -> list[Scaling]:
    """One scaling per expert, where the producer is one per expert."""
    if "*" not in scaling.producer:
        return [scaling]
    before, _, after = scaling.producer.partition("*")
    numbers = [name[len(before) : len(name) - len(after)] for name in sites if fnmatchcase(name, scaling.producer)]
    return [
        Scaling(f"{before}{n}{after}", tuple(r.replace("*", n) for r in scaling.readers), scaling.rows, scaling.where)
        for n in numbers
    ]


class _Place:
    """One scaling in one block."""

    def __init__(
        self,
        inventory: Inventory,
        scaling: Scaling,
        sites: Mapping[str, Site],
        copied: Collection[str],
        base: str,
        taken: Collection[str],
    ) -> None:
        self.family, self.scaling, self.sites, self.copied, self.base, self.taken = (
            inventory.family,
            scaling,
            sites,
            copied,
            base,
            taken,
        )
        self.linears = [name for name in sites if self._reads(name)]
        self.matrices = [name for name in copied if name.endswith(".weight") and self._reads(name.removesuffix(".weight"))]
        self.readers = self.linears + self.matrices

    def _reads(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.scaling.readers)

    def scalable(self, config: Mapping[str, Any]) -> Scalable:
        """Say what can be scaled here, or why nothing can."""
        name = self.scaling.producer
        norm = name not in self.sites
        producer = self.base + (f"{name}.weight" if norm else name)
        sites = tuple(self.base + reader for reader in self.linears)
        obstacle = self._obstacle(config, norm)
        channels = None
        if obstacle is None and not norm:
            shapes = self.sites[name].shape, self.sites[self.linears[0]].shape
            channels = producing_rows(self.scaling.rows, shapes[0][0], shapes[1][1], config)
            if isinstance(channels, str):
                obstacle = f"{name}: {channels}"
        if obstacle is not None or isinstance(channels, str):
            mine = tuple(site for site in sites if site in self.taken)
            return Scalable(producer, mine, norm, obstacle=obstacle)
        matrices = tuple(sorted(self.base + matrix for matrix in self.matrices))
        bias = f"{name}.bias"
        offset = self.family.norm_offset if norm else 0.0
        return Scalable(producer, sites, norm, offset, self.base + bias if bias in self.copied else None, matrices, channels)

    def _obstacle(self, config: Mapping[str, Any], norm: bool) -> str | None:
        name = self.scaling.producer
        for key, value in self.scaling.where:
            if config.get(key, value) != value:
                return f"{key} is {config[key]!r}, not {value!r}"
        if norm and f"{name}.weight" not in self.copied:
            return f"{name} has no weight"
        for linear in self.linears if norm else [name, *self.linears]:
            if self.base + linear not in self.taken:
                return f"{linear} is not compressed by this recipe, or not matched"
        for matrix in self.matrices:
            # What a recipe's `copy` names stays as it is; transposed matrices among the copied are named by nothing else.
            if not any(fnmatchcase(matrix, pattern) for pattern in self.family.keep):
                return f"{matrix} is copied as it is"
        return None


def producing_rows(layout: str, rows: int, columns: int, config: Mapping[str, Any]) -> Tensor | str | None:
    """Return the row of a producer (rows, in) that each column of its readers (out, columns) comes from, None for the same.

    For layouts that are not what the config says, the result says so.
    """
    if layout == "all":
        return None if rows == columns else f"has {rows} rows for {columns} columns"
    column = torch.arange(columns)
    if layout == "second half":
        return column + columns if rows == 2 * columns else f"has {rows} rows for twice {columns} columns"
    heads = config.get("num_attention_heads", config.get("n_head"))
    if not isinstance(heads, int) or heads < 1 or columns % heads:
        return f"{columns} columns are not those of {heads!r} heads"
    size = columns // heads
    head, inside = column // size, column % size
    if layout == "interleaved":
        width, rest = divmod(rows, heads)
        return head * width + (width - size) + inside if not rest and width >= size else f"{rows} rows for {heads} heads"
    own, rest = divmod(rows - (columns if layout == "stacked" else 0), size)  # heads of values, or of keys and values
    groups, odd = divmod(own, 2) if layout == "stacked" else (own, 0)
    if rest or odd or groups < 1 or heads % groups:
        return f"{rows} rows are not those of {heads} heads of {size}"
    first = columns + groups * size if layout == "stacked" else 0
    return first + head // (heads // groups) * size + inside
