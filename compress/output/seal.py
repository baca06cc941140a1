"""From parts to a checkpoint: shards in bounded memory, index, config and side files, under the final name only when whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.architecture.family import Site
from compress.architecture.inventory import Claims
from compress.checkpoint import packing, part_file, site_table
from compress.checkpoint.source import INDEX, SINGLE, Source
from compress.checkpoint.tensor_file import Entry, copy_entries, read_header
from compress.errors import CheckpointError, OutputError
from compress.system.files import as_json, copy, fsync_folder, write_json, write_text, writing

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
        specs |= part_file.part_specs(metadata)
        entries |= found
    return {name: specs[name] for name in sorted(specs, key=natural)}, entries


def plan(
    source: Source,
    claims: Claims,
    specs: Mapping[str, packing.Spec],
    parts: Mapping[str, Entry],
    stand_ins: Mapping[str, Entry] | None = None,
) -> tuple[list[Entry], str | None]:
    """Return every tensor of the result in order, and the name of the guard; before a run, `stand_ins` for unknown layouts.

    Each tensor of the source is compressed, copied or dropped by a rule; one that is none of these raises CheckpointError.
    """
    stand_ins = stand_ins or {}
    made: dict[str, list[str]] = {}
    for claimed in claims.sites:
        made.setdefault(claimed.tensor, []).append(claimed.name)
    copied, dropped = set(claims.copied), set(claims.dropped)
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
    guard = _guard([site for site in claims.sites if site.name in specs or site.name in stand_ins])
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


def shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Cut tensors into files of at most `limit` bytes, in order; a tensor above the limit gets a file of its own."""
    result: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if result[-1] and size + entry.nbytes > limit:
            result.append([])
            size = 0
        result[-1].append(entry)
        size += entry.nbytes
    return result


def named(cut: list[list[Entry]]) -> dict[str, list[Entry]]:
    """Give shards their file names."""
    names = [SINGLE] if len(cut) == 1 else [f"model-{i + 1:05d}-of-{len(cut):05d}.safetensors" for i in range(len(cut))]
    return dict(zip(names, cut, strict=True))


def index(files: Mapping[str, Iterable[Entry]]) -> str:
    """The text of the index over several files."""
    weight_map = {entry.name: name for name, members in files.items() for entry in members}
    sizes = {"total_size": sum(entry.nbytes for members in files.values() for entry in members)}
    return as_json({"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))})


def write_shards(folder: Path, entries: list[Entry], limit: int) -> dict[str, list[Entry]]:
    """Write the tensors into `folder` and return the files with what they hold; several get an index."""
    files = named(shards(entries, limit))
    for name, members in files.items():
        copy_entries(folder / name, members)
    if len(files) > 1:
        write_text(folder / INDEX, index(files))
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
        found: dict[str, Any] = json.loads((out / record).read_text(encoding="utf-8"))
        if found["tool"] == "compress":
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise OutputError(f"{out}: exists and is not {kind} that compress wrote; choose another place, or remove it")


def publish(checkpoint: Path, out: Path) -> None:
    """Give a whole checkpoint its final name, in one step."""
    with writing(out):
        fsync_folder(checkpoint)
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rename(checkpoint, out)
        fsync_folder(out.parent)
