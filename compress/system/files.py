"""Files that survive a crash: a file is complete under its name, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import OutputError

CHUNK = 16 << 20  # bytes moved at a time, so that copying needs little memory

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another place, then run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; choose another place",
    errno.EPERM: "not permitted; choose another place",
    errno.ENOTDIR: "a folder was expected where a file is; choose another place",
    errno.EEXIST: "something else is already there; choose another place",
    errno.EFBIG: "the file grows larger than the system allows; lower max_shard_size or raise the limit",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the operating system while `path` is written into an OutputError with advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        free = ""
        existing = next((p for p in (path, *path.parents) if p.exists()), None)
        if existing is not None and error.errno == errno.ENOSPC:
            free = f" ({shutil.disk_usage(existing).free:,} bytes free)"
        raise OutputError(f"{path}: cannot be written: {_ADVICE[error.errno]}{free}") from error


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; if the block succeeds, the file there is made durable and renamed to `path`."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with writing(path):
        try:
            yield temporary
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, durably and atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_json(value: Any) -> str:
    """Return `value` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, durably and atomically."""
    write_text(path, as_json(value))


def copy(source: Path, target: Path) -> None:
    """Copy a file byte for byte, durably and atomically."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def human_bytes(count: float) -> str:
    """Format a number of bytes for people: 11.50 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Format a time for people: 12.3 min."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
