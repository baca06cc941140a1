"""Where in a block channels can change places without a change of its function: what a family says, found in one block.

Between a producer's rows and its reader's columns is nothing that mixes channels: attention on values, which keeps the channels
of a head apart, and what an MLP does with each of its channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.architecture.channels import channel_rows
from compress.architecture.family import Channels, Scaling, Site
from compress.architecture.inventory import Inventory
from compress.blockwise.scalable import producing_rows
from compress.methods.block import Permutable


def resolve(inventory: Inventory, config: Mapping[str, Any], block: int, taken: Collection[str]) -> list[Permutable]:
    """Find every linear of a block whose inputs can change places; `taken` are the names of sites whose weights may change."""
    sites = {site.name: site for site in inventory.sites if site.block == block}
    base = f"{inventory.family.blocks}.{block}."
    found = []
    for scaling in inventory.family.scalings:
        producer, reader = sites.get(base + scaling.producer), sites.get(base + scaling.readers[0])
        if scaling.rows in ("values", "stacked", "interleaved") and producer is not None and reader is not None:
            found.append(_blocked(reader, [producer], taken) or _values(inventory, scaling, producer, reader, config))
    for channels in inventory.family.channels:
        for reader in (site for site in sites.values() if site.kind == channels.output):
            producers = [s for s in sites.values() if s.kind in channels.inputs and s.expert == reader.expert]
            found.append(_blocked(reader, producers, taken) or _between(inventory, channels, producers, reader))
    return found


def _blocked(reader: Site, producers: list[Site], taken: Collection[str]) -> Permutable | None:
    """What stands in the way where a weight may not change."""
    for site in (reader, *producers):
        if site.name not in taken:
            return Permutable(reader.name, obstacle=f"{site.name} is not compressed by this recipe, or not matched")
    return None


def _values(inventory: Inventory, scaling: Scaling, producer: Site, reader: Site, config: Mapping[str, Any]) -> Permutable:
    """Values and what reads them: an order within every head, the same for all heads that share a KV group."""
    rows = producing_rows(scaling.rows, producer.shape[0], reader.shape[1], config)
    if not isinstance(rows, Tensor):
        return Permutable(reader.name, obstacle=f"{producer.name}: {rows}")
    heads = int(config.get("num_attention_heads") or config["n_head"])
    by_head = rows.view(heads, -1)
    groups = len(by_head[:, 0].unique())
    columns = torch.arange(reader.shape[1]).view(groups, heads // groups, -1)
    places = by_head.view(groups, heads // groups, -1)[:, :1]
    return Permutable(reader.name, columns, {producer.name: places}, _biases(inventory, {producer.name: places}, [producer]))


def _between(inventory: Inventory, channels: Channels, producers: list[Site], reader: Site) -> Permutable:
    """The channels of an MLP or of an expert: one order for all of them."""
    count = reader.shape[1]
    places = channel_rows(channels.rows, count).unsqueeze(0)
    for producer in producers:
        if producer.shape[0] != places.numel():
            return Permutable(reader.name, obstacle=f"{producer.name} has {producer.shape[0]} rows for {count} columns")
    rows = {producer.name: places for producer in producers}
    return Permutable(reader.name, torch.arange(count).view(1, 1, -1), rows, _biases(inventory, rows, producers))


def _biases(inventory: Inventory, rows: Mapping[str, Tensor], producers: list[Site]) -> dict[str, Tensor]:
    """The biases of producers by disk name, with the places of channels in each; those of experts may be in one tensor."""
    found = {}
    for producer in producers:
        own = f"{producer.name}.bias"
        if own in inventory.copied:
            found[own] = rows[producer.name]
        if producer.expert is not None and inventory.family.experts is not None:
            joined = f"{inventory.family.blocks}.{producer.block}.{producer.kind}_bias"
            if joined in inventory.copied:
                found[joined] = rows[producer.name] + producer.expert * producer.shape[0]
    return found
