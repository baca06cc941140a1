"""What happens to every tensor of a checkpoint: whether it can be compressed, is copied, or is dropped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from compress.architecture.config import number_of_blocks, tied
from compress.architecture.family import Family, Site
from compress.architecture.names import matches
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import Entry
from compress.errors import CheckpointError


@dataclass
class Inventory:
    """What happens to each tensor of a source: it becomes one or more sites, is copied, or is dropped by a rule."""

    family: Family
    sites: list[Site] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def _shape(source: Source, entry: Entry, transposed: bool, fused: bool) -> tuple[int, int]:
    shape = entry.shape[1:] if fused else entry.shape
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"{source.folder}: {entry.name} has shape {list(entry.shape)}; expected a matrix")
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def _linear_sites(source: Source, family: Family, block: int, names: set[str]) -> list[Site]:
    base = f"{family.blocks}.{block}."
    sites = []
    for group in family.taps:
        for linear in (name for name in group if f"{base}{name}.weight" in names):
            tensor = f"{base}{linear}.weight"
            # A packed weight is decoded to (out, in); linears that were not compressed keep their original layout.
            transposed = family.transposed and not (isinstance(source, PackedSource) and base + linear in source.table)
            shape = _shape(source, source.entries[tensor], transposed, fused=False)
            sites.append(Site(base + linear, shape, block, group[0], linear, tensor, transposed=transposed))
    return sites


def _expert_sites(source: Source, family: Family, block: int, names: set[str]) -> list[Site]:
    layout = family.experts
    if layout is None:
        return []
    base = f"{family.blocks}.{block}.{layout.disk}"
    sites = []
    linears = [(name, "input") for name in layout.inputs] + [(layout.output, "hidden")]
    for linear, side in linears:
        within = dict(layout.tensors).get(linear)
        whole = f"{base}.{linear}" if within is None else f"{family.blocks}.{block}.{within}"
        fused = layout.fused and whole in names  # packed experts are stored singly, even if they were fused before
        turned = fused and layout.turned
        if fused:
            numbers = range(source.entries[whole].shape[0])
        else:
            pattern = re.compile(re.escape(base) + r"\.(0|[1-9][0-9]*)\." + re.escape(linear) + r"\.weight")
            numbers_found = sorted(int(m[1]) for m in map(pattern.fullmatch, names) if m)
            numbers = range(len(numbers_found))
            if numbers_found != list(numbers):
                raise CheckpointError(
                    f"{source.folder}: {base}.*.{linear} has experts {numbers_found[:8]}...; expected 0, 1, 2, ..."
                )
        for expert in numbers:
            name = f"{base}.{expert}.{linear}"
            tensor = whole if fused else f"{name}.weight"
            shape = _shape(source, source.entries[tensor], turned, fused)
            tap = f"{layout.disk}.{expert}.{side}"
            kind = f"{layout.disk}.{linear}"
            sites.append(Site(name, shape, block, tap, kind, tensor, expert, expert if fused else None, turned))
    return sites


def _missing(source: Source, family: Family, block: int, sites: list[Site]) -> None:
    """Raise CheckpointError if a block has only part of a group of linears, or no linear; of alternatives one suffices."""
    kinds = {site.kind for site in sites}
    for group in family.taps:
        had = [name for name in group if name in kinds]
        replaced = {name for names in family.alternatives if kinds.intersection(names) for name in names}
        lacking = [name for name in group if name not in kinds | replaced]
        if had and lacking:
            place = f"{source.folder}: {family.blocks}.{block}"
            raise CheckpointError(
                f"{place} has {', '.join(had)} but not {', '.join(lacking)}; the checkpoint is incomplete, fetch it again"
            )
    if not sites:
        raise CheckpointError(
            f"{source.folder}: {family.blocks}.{block} has no linear; the checkpoint is incomplete, fetch it again"
        )


def take_inventory(source: Source, family: Family, copy: tuple[str, ...] = (), drop: tuple[str, ...] = ()) -> Inventory:
    """Classify every tensor of a source. Raises CheckpointError for a tensor that no rule or two rules claim.

    `copy` and `drop` are a recipe's globs over disk names; they take precedence over the family's.
    """
    inventory = Inventory(family)
    by_block: dict[int, set[str]] = {block: set() for block in range(number_of_blocks(source))}
    pattern = re.compile(re.escape(family.blocks) + r"\.(\d+)\.(.+)")
    for name in source.entries:
        if (match := pattern.fullmatch(name)) and int(match[1]) in by_block:
            by_block[int(match[1])].add(name)
    for block, names in by_block.items():
        sites = _linear_sites(source, family, block, names) + _expert_sites(source, family, block, names)
        _missing(source, family, block, sites)
        inventory.sites += sites
    head = f"{family.head}.weight"
    if head in source.entries and not tied(source, family):
        shape = _shape(source, source.entries[head], transposed=False, fused=False)
        inventory.sites.append(Site(family.head, shape, None, family.head, family.head, head))
    _dispose(source, inventory, copy, drop)
    return inventory


def _dispose(source: Source, inventory: Inventory, copy: tuple[str, ...], drop: tuple[str, ...]) -> None:
    family = inventory.family
    made = {site.tensor for site in inventory.sites}
    blocks = number_of_blocks(source)
    pattern = re.compile(re.escape(family.blocks) + r"\.(\d+)\.(.+)")
    unknown: list[str] = []
    twice: list[str] = []
    for name in source.entries:
        match = pattern.fullmatch(name)
        within = match[2] if match else ""
        rules = [name in made]
        if match and int(match[1]) < blocks:
            rules += [matches(within, family.keep)]
        else:
            # Outside the blocks only the head is compressed. Embeddings, and tensors that the model class does not load, such as
            # prediction heads (blocks beyond the config's count, `mtp.*`) and towers, are copied byte for byte.
            rules += [name not in made and not matches(name, family.drop)]
        rules += [matches(name, family.drop)]
        if matches(name, drop) or matches(name, copy):
            rules = [False, matches(name, copy), matches(name, drop)]
            inventory.sites = [site for site in inventory.sites if site.tensor != name]
        if sum(rules) != 1:
            (twice if any(rules) else unknown).append(name)
        elif rules[1]:
            inventory.copied.append(name)
        elif rules[2]:
            inventory.dropped.append(name)
    if unknown or twice:
        what = "no rule claims" if unknown else "two rules claim"
        names = unknown or twice
        raise CheckpointError(
            f"{source.folder}: {what} {len(names)} tensors, such as {names[0]!r}; every tensor needs one disposition. "
            "Name them in the recipe's `copy:` (byte for byte) or `drop:` list of globs"
        )


def describe(inventory: Inventory) -> dict[str, Any]:
    """Count sites by kind, for tables: {kind: (sites, weights)}."""
    kinds: dict[str, tuple[int, int]] = {}
    for site in inventory.sites:
        count, weights = kinds.get(site.kind, (0, 0))
        kinds[site.kind] = (count + 1, weights + site.numel)
    return kinds
