"""From parts to a checkpoint: shards in bounded memory, index, config and side files, under the final name only when whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.architecture.family import Site
from compress.architecture.inventory import Inventory
from compress.checkpoint import block_file, packing, site_table
from compress.checkpoint.source import INDEX, Source
from compress.checkpoint.tensor_file import Entry, copy_entries, read_header
from compress.errors import CheckpointError, OutputError
from compress.output import shards
from compress.system.files import copy, fsync_folder, write_json, write_text, writing
from compress.system.side_files import read_object

SUMMARY = "summary.json"


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def collect(parts: Iterable[Path]) -> tuple[dict[str, packing.Spec], dict[str, Entry]]:
    """Read the headers of all parts: descriptions by site, and packed tensors by name."""
    specs: dict[str, packing.Spec] = {}
    entries: dict[str, Entry] = {}
    for path in parts:
        found, metadata = read_header(path)
        specs |= block_file.specs_of(metadata)
        entries |= found
    return {name: specs[name] for name in sorted(specs, key=natural)}, entries


def plan(
    source: Source,
    inventory: Inventory,
    specs: Mapping[str, packing.Spec],
    parts: Mapping[str, Entry],
    stand_ins: Mapping[str, Entry] | None = None,
) -> tuple[list[Entry], str | None]:
    """Return every tensor of the result in order, and the name of the guard; before a run, `stand_ins` for unknown layouts.

    Each tensor of the source is compressed, copied or dropped by a rule; one that is none of these raises CheckpointError.
    """
    stand_ins = stand_ins or {}
    made: dict[str, list[str]] = {}
    for claimed in inventory.sites:
        made.setdefault(claimed.tensor, []).append(claimed.name)
    copied, dropped = set(inventory.copied), set(inventory.dropped)
    result: list[Entry] = []
    for name in sorted(source.entries, key=natural):
        sites = made.get(name, [])
        compressed = [site for site in sites if site in specs or site in stand_ins]
        if compressed and len(compressed) < len(sites):
            raise CheckpointError(
                f"{name}: {len(compressed)} of its {len(sites)} experts are compressed; expected all or none, as it is one tensor"
            )
        for site in compressed:
            if site in stand_ins:
                result.append(stand_ins[site])
            else:
                result += [parts[f"{site}.{leaf}"] for leaf in packing.layout(specs[site])]
        if not compressed and (sites or name in copied):
            result.append(_replaced(source.entries[name], parts.get(name)))
        elif not compressed and name not in dropped:
            raise CheckpointError(f"{name}: neither compressed nor copied nor dropped; this is a bug, please report it")
    guard = _guard([site for site in inventory.sites if site.name in specs or site.name in stand_ins])
    if guard is not None:
        result.append(Entry(guard, "BF16", (0,), 0, 0, source.folder))
    return result, guard


def _replaced(original: Entry, other: Entry | None) -> Entry:
    """What stands for a tensor of the source: itself, or what a transform or tuning has made of it."""
    if other is not None and (other.shape, other.dtype) != (original.shape, original.dtype):
        raise CheckpointError(
            f"{original.name}: a part has it as {other.dtype} {list(other.shape)}; expected {original.dtype} "
            f"{list(original.shape)}. This is a bug, please report it"
        )
    return other or original


def _guard(sites: Iterable[Site]) -> str | None:
    """Choose the tensor that is stored empty: a compressed linear's, or where only experts are compressed, an expert's."""
    first = min(sites, key=lambda site: (site.expert is not None, natural(site.name)), default=None)
    return None if first is None else first.tensor


def write_shards(folder: Path, entries: list[Entry], limit: int) -> dict[str, list[Entry]]:
    """Write the tensors into `folder` and return the files with what they hold; several get an index."""
    files = shards.cut_into_files(entries, limit, lambda entry: entry.nbytes)
    for name, members in files.items():
        copy_entries(folder / name, members)
    if len(files) > 1:
        write_text(folder / INDEX, shards.index(files))
    return files


def write_config(folder: Path, config: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    """Write the source's config with the table of compressed sites; last, because a folder without it is not a checkpoint."""
    write_json(folder / "config.json", site_table.config_with(config, table))


def carry(source: Source, folder: Path, leave: Iterable[str] = ()) -> None:
    """Copy the side files of the source byte for byte, but for some by name."""
    for path in source.carried():
        if path.name in leave:
            continue
        target = folder / path.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        copy(path, target)


def finished(out: Path, record: str = SUMMARY, kind: str = "a checkpoint") -> dict[str, Any] | None:
    """Return the record of `kind` that is there, None when nothing is. Raises OutputError when something else is."""
    if not out.exists() and not out.is_symlink():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    try:
        found = read_object(out / record)
        if found.get("tool") == "compress":
            return found
    except CheckpointError:
        pass
    raise OutputError(f"{out}: exists and is not {kind} that compress wrote; choose another place, or remove it")


def publish(checkpoint: Path, out: Path) -> None:
    """Give a whole checkpoint its final name, in one step."""
    with writing(out):
        fsync_folder(checkpoint)
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rename(checkpoint, out)
        fsync_folder(out.parent)
