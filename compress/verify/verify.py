"""Whether a compressed checkpoint is what was written: checksums, every weight decoded by a second reader, one repeated batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture.config import vocabulary
from compress.blockwise.forward import last_hidden, token_losses
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.recorded_files import recorded_files
from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import Entry, stream_entry
from compress.errors import CheckpointError, VerificationError
from compress.system.device import DTYPES, pick_device
from compress.system.progress import Progress
from compress.system.side_files import read_json_lines, read_object
from compress.verify import exports as exported
from compress.verify import second_reader as independent
from compress.verify.checksums import SHOWN, SUMMARY, changed, refuse
from compress.verify.raw_files import Place, chunks, open_stored

# The recorded losses (nats) come from the same arithmetic; another CPU or a GPU adds up in another order.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


def read_back(folder: Path, digests: Mapping[str, str | None], copied: Iterable[Entry], progress: Progress) -> dict[str, Any]:
    """Decode every weight from disk with the second reader and compare it with the digest of what the method gave; compare
    copied tensors byte by byte with where they come from. Return the counts. Raises VerificationError that names a tensor.
    """
    stored = open_stored(folder)
    unknown: dict[str, str] = {}
    for number, (site, digest) in enumerate(digests.items()):
        progress(1, 1, "reading back", number / len(digests))
        try:
            found = independent.digest(stored, site)
        except independent.UnknownFormatError as error:
            unknown[site] = str(error)
            continue
        if digest is not None and found != digest:
            raise VerificationError(
                f"{folder}: {site} decodes to other values than were compressed. The result is not published; please report this"
            )
    count = 0
    for entry in copied:
        place = stored.tensors.get(entry.name)
        if place is None or (place.dtype, place.shape) != (entry.dtype, entry.shape) or not _equal(entry, place):
            raise VerificationError(
                f"{folder}: {entry.name} is not what {entry.file} has. The result is not published; please report this"
            )
        count += 1
    return {"decoded": len(digests) - len(unknown), "copied": count, "unknown_formats": sorted(set(unknown.values()))[:SHOWN]}


def _equal(entry: Entry, place: Place) -> bool:
    pieces = chunks(place)
    held = b""
    for chunk in stream_entry(entry):
        while len(held) < len(chunk) and (piece := next(pieces, None)) is not None:
            held += piece
        if held[: len(chunk)] != chunk:
            return False
        held = held[len(chunk) :]
    return not held and next(pieces, None) is None


def _recorded(folder: Path) -> tuple[dict[str, str], Tensor, Tensor, str, bool]:
    """Return what was recorded when a checkpoint was written: SHA-256 by file, ids (1, tokens), their losses, the dtype, and
    whether it is a plain one, as `compress cut` writes.
    """
    try:
        summary = read_object(folder / SUMMARY)
        files, check = recorded_files(summary["files"]), summary["check"]
        ids, losses, dtype = torch.tensor([check["ids"]]), torch.tensor(check["losses"]), check["dtype"]
        if dtype not in TOLERANCE or ids.is_floating_point() or losses.shape != (ids.shape[1] - 1,):
            raise ValueError("check is not as compress writes it")
    except (CheckpointError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{folder}/summary.json: cannot be read ({error}); expected a checkpoint that compress wrote"
        ) from error
    return files, ids, losses, dtype, "cut" in (summary.get("identity") or {})


def _decoded(folder: Path, progress: Progress) -> tuple[int, list[str]]:
    """Decode every site with the second reader; return how many, and which differ from what was compressed."""
    recorded: dict[str, str] = {}
    try:
        for row in read_json_lines(folder / "report.jsonl"):
            if isinstance(row.get("sha256"), str):
                recorded[str(row["site"])] = row["sha256"]
        stored = open_stored(folder)
    except KeyError as error:
        return 0, [f"report.jsonl cannot be read (no {error})"]
    except CheckpointError as error:
        return 0, [str(error)]
    problems, count = [], 0
    for number, site in enumerate(sorted(recorded.keys() | stored.sites.keys())):
        progress(1, 1, "decoding", number / max(len(recorded), 1))
        if site not in stored.sites:
            problems.append(f"{site} was compressed, and config.json does not name it")
            continue
        try:
            digest = independent.digest(stored, site)
        except independent.UnknownFormatError:
            continue
        except CheckpointError as error:
            problems.append(str(error))
            continue
        count += 1
        if site in recorded and digest != recorded[site]:
            problems.append(f"{site} decodes to other values than were compressed")
    return count, problems


def recorded_ids(folder: Path) -> Tensor:
    """Return the ids (1, tokens) of the batch that was recorded when a checkpoint was written. Raises CheckpointError."""
    return _recorded(folder)[1]


def verify(folder: Path, device: str, progress: Progress) -> dict[str, Any]:
    """Check a checkpoint, without its source, and return what was compared. Raises CheckpointError, VerificationError."""
    if not (folder / SUMMARY).is_file():
        return exported.verify(folder, progress)
    files, ids, recorded, dtype, plain = _recorded(folder)
    where = pick_device(device)
    problems = changed(folder, files, progress)
    decoded, wrong = (0, []) if plain else _decoded(folder, progress)
    problems += wrong
    refuse(folder, problems)
    source = Source.open(folder) if plain else PackedSource.open_packed(folder)
    progress(1, 1, "one batch", 0.0)
    if not bool(((ids >= 0) & (ids < vocabulary(source))).all()):
        raise CheckpointError(
            f"{folder}/summary.json: names tokens outside the vocabulary; expected a checkpoint that compress wrote"
        )
    streamed, hidden = last_hidden(source, ids, DTYPES[dtype], where)
    losses = token_losses(streamed, ids, hidden)
    difference = float((losses - recorded).abs().mean())
    limit = TOLERANCE[dtype]
    if not difference <= limit:
        raise VerificationError(
            f"{folder}: losses of the recorded batch differ by {difference:.3g} nats in the mean; expected at most {limit}. "
            "Another version of transformers or torch may compute differently; install the ones in summary.json"
        )
    return {
        "folder": str(folder),
        "files": len(files),
        "sites": len(source.table) if isinstance(source, PackedSource) else 0,
        "decoded": decoded,
        "tokens": ids.numel(),
        "mean_difference_nats": difference,
        "limit_nats": limit,
    }
