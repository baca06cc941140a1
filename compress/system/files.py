"""Files that survive a crash: a file is complete under its name, or not there at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
    errno.ENOTEMPTY: "something else is already there; choose another place",
    errno.EISDIR: "a folder is there; choose another place",
    errno.ELOOP: "a link is there; remove it, or choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EFBIG: "the file grows larger than the system allows; lower max_shard_size or raise the limit",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the operating system while `path` is written into an OutputError with advice."""
    try:
        yield
    except OSError as error:
        # numpy says nothing but how many bytes it could not write.
        code = errno.ENOSPC if error.errno is None and "requested and" in str(error) else error.errno
        advice = _ADVICE.get(code or 0, f"{error.strerror or error}; look at that place, then run the same command again")
        free = ""
        existing = next((p for p in (path, *path.parents) if os.path.exists(p)), None)
        if existing is not None and code == errno.ENOSPC:
            free = f" ({shutil.disk_usage(existing).free:,} bytes free)"
        raise OutputError(f"{path}: cannot be written: {advice}{free}") from error


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A name next to `path` for this process, on a file system that several machines may share."""
    machine = zlib.crc32(platform.node().encode())
    return path.with_name(f"{path.name}.tmp-{machine:08x}-{os.getpid()}")


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left under temporary names of `path`."""
    mine = _temporary(path)
    stem, _, _ = mine.name.rpartition("-")
    pattern = re.compile(re.escape(stem) + r"-(\d{1,10})")
    with os.scandir(path.parent) as found:
        numbers = [(entry.path, int(number[1])) for entry in found if (number := pattern.fullmatch(entry.name))]
    for name, process in numbers:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            Path(name).unlink(missing_ok=True)
        except PermissionError:
            pass  # somebody else's process, which is alive


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; if the block succeeds, the file there is made durable and renamed to `path`."""
    temporary = _temporary(path)
    with writing(path):
        _remove_leftovers(path)
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


def locked(path: Path) -> IO[bytes]:
    """Create or open a lock file, which must be no link, and lock it until it is closed. Raises BlockingIOError, OSError."""
    stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), "rb+", 0)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        stream.close()
        raise
    return stream


def empty_folder(folder: Path, leave: str) -> None:
    """Remove all that a folder holds but one file by name; links are removed, and what they point to stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != leave:
            path.unlink()


def remove_folder(folder: Path, marker: str) -> None:
    """Remove a folder, its marker last, so that what a kill leaves of it is still known for what it is."""
    empty_folder(folder, marker)
    (folder / marker).unlink(missing_ok=True)
    folder.rmdir()


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
