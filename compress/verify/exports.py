"""Whether an export or a converted checkpoint is what was written: checksums, and every weight decoded once more.

Ours is decoded by the second reader, GGUF by the package of llama.cpp, the others by the reader of their layout; plain
numbers are what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compress.checkpoint.recorded_files import recorded_digests, recorded_files
from compress.errors import CheckpointError
from compress.interop.exporter import lookup
from compress.system.progress import Progress
from compress.system.side_files import read_object
from compress.verify import second_reader as independent
from compress.verify.checksums import EXPORTED, changed, refuse
from compress.verify.raw_files import open_stored


def _recorded(folder: Path) -> tuple[str, dict[str, str], dict[str, str]]:
    """Return the layout, SHA-256 by file, and the digest of every weight's values."""
    if not (folder / EXPORTED).is_file():
        raise CheckpointError(
            f"{folder}: has neither summary.json nor {EXPORTED}, so there is nothing to compare it with; expected a checkpoint "
            "that compress wrote. `compress doctor` examines those of any tool"
        )
    try:
        record = read_object(folder / EXPORTED)
        layout, files, values = record["format"], recorded_files(record["files"]), recorded_digests(record["values"])
        if not isinstance(layout, str) or not values:
            raise ValueError("format or values are not as compress writes them")
    except KeyError as error:
        raise CheckpointError(f"{folder}/{EXPORTED}: has no {error}; written by an older version, export it again") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/{EXPORTED}: cannot be read ({error}); fetch it again") from error
    return layout, files, values


def _decoded(folder: Path, layout: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield name and digest of every compressed weight, given the names that were recorded. Raises CheckpointError."""
    form = lookup(layout)
    if form.own:
        stored = open_stored(folder)
        yield from ((site, independent.digest(stored, site)) for site in stored.sites)
    else:
        yield from form.digests(folder, names)


def verify(folder: Path, progress: Progress) -> dict[str, Any]:
    """Check an export, without its source, and return what was compared. Raises CheckpointError, VerificationError."""
    layout, files, values = _recorded(folder)
    refuse(folder, changed(folder, files, progress))
    found: dict[str, str] = {}
    for name, digest in _decoded(folder, layout, values):
        progress(1, 1, "decoding", len(found) / len(values))
        found[name] = digest
    wrong = [f"{name} decodes to other values than were written" for name in values if found.get(name) != values[name]]
    refuse(folder, wrong)
    return {"folder": str(folder), "format": layout, "files": len(files), "sites": len(values), "decoded": len(found)}
