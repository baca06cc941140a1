"""The checksums that a record of ours has of the files next to it: names within the folder, and SHA-256."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from compress.errors import CheckpointError
from compress.system.files import CHUNK
from compress.system.side_files import lies_within, open_regular

MAX_PATH = 4096  # characters of a file's name with its folders


def recorded_digests(values: Any) -> dict[str, str]:
    """Return names with their SHA-256 as a record of ours has them. Raises ValueError for anything else."""
    if not isinstance(values, dict) or not all(isinstance(digest, str) and len(digest) == 64 for digest in values.values()):
        raise ValueError("its checksums are not as compress writes them")
    return values


def recorded_files(values: Any) -> dict[str, str]:
    """Return the SHA-256 of files by their path within the folder. Raises ValueError where one is elsewhere."""
    for name in (found := recorded_digests(values)):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or len(name) > MAX_PATH:
            raise ValueError(f"it names {name!r:.80}, which is not a file of this folder")
    return found


def sha256_of(folder: Path, name: str) -> str | None:
    """Return the SHA-256 of a file of a folder, None where there is none. Raises CheckpointError if a link leads out."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    if os.path.islink(path) and not lies_within(path, folder):
        raise CheckpointError(f"{path}: is a link to a place outside of the folder; put a copy in its place if it belongs there")
    digest = hashlib.sha256()
    try:
        with open_regular(path) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check the path and the permissions") from error
    return digest.hexdigest()
