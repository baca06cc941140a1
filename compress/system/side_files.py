"""Files next to weights, of untrusted origin: opened, measured and parsed within limits, whatever lies there.

A pipe is not waited for, a file of any size does not fill the memory, nested JSON does not exhaust the stack, and a link is only
followed within the folder, or to where the Hub's client keeps what a snapshot consists of.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from compress.errors import CheckpointError

MAX_BYTES = 64 << 20  # of a text or JSON file; the largest tokenizers have 35 MB
MAX_VALUES = 4_000_000  # in a JSON file, as counted by commas and brackets
MAX_DEPTH = 64  # of nested objects and lists
MAX_LINE = 8 << 20  # bytes of a line of JSON
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def lies_within(path: Path, folder: Path) -> bool:
    """Whether a file, its links followed, is below a folder, or among the files of a model in a cache of the Hub's client."""
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return cached or target.is_relative_to(root)


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading, if it is one. Raises CheckpointError, OSError; never waits."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is not a file, such as a pipe or a folder; put a file there, or fetch it again")
    return os.fdopen(descriptor, "rb")


def read_side_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a file of at most `limit` bytes that lies in its folder. Raises CheckpointError."""
    if os.path.islink(path) and not lies_within(path, path.parent):
        raise CheckpointError(
            f"{path}: is a link to {os.path.realpath(path)}, outside of the folder; put a copy in its place if it belongs there"
        )
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = stream.read(size + 1) if size <= limit else b""  # as much as is there: a reader makes room for what is asked
    except FileNotFoundError:
        raise CheckpointError(f"{path}: cannot be read (it is not there); fetch it again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check the path and the permissions") from error
    if max(size, len(raw)) > limit:
        raise CheckpointError(f"{path}: has {max(size, len(raw)):,} bytes; expected at most {limit:,}. Fetch it again")
    return raw


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Return a text in UTF-8, read as `read_side_file` does. Raises CheckpointError."""
    try:
        return read_side_file(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read (not UTF-8 at byte {error.start}); fetch it again") from error


def parse_json(raw: bytes, place: str) -> Any:
    """Parse JSON of bounded depth and number of values whose texts can be written again. Raises CheckpointError."""
    if (count := sum(map(raw.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise CheckpointError(f"{place}: holds up to {count:,} values; expected at most {MAX_VALUES:,}. Fetch it again")
    try:
        value = json.loads(raw.decode("utf-8"))
        if _SURROGATE.search(raw):  # half of a pair alone, which no file can hold as text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: cannot be read ({error}); expected JSON. Fetch it again") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        lists = [item for item in level if isinstance(item, (dict, list))]
        if not lists:
            return value
        level = [inner for item in lists for inner in (item.values() if isinstance(item, dict) else item)]
    raise CheckpointError(f"{place}: is nested more than {MAX_DEPTH} deep; fetch it again")


def read_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """Return the value of a JSON file, read within the limits of this module. Raises CheckpointError."""
    return parse_json(read_side_file(path, limit), str(path))


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object that a JSON file holds, read within the limits of this module. Raises CheckpointError."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}; expected an object. Fetch the file again")
    return value


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one in each line, at most `MAX_LINE` bytes of it in memory. Raises CheckpointError."""
    if os.path.islink(path) and not lies_within(path, path.parent):
        raise CheckpointError(f"{path}: is a link to a place outside of the folder; put a copy there if it belongs there")
    try:
        with open_regular(path) as stream:
            number = 0
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise CheckpointError(f"{path}:{number}: is longer than {MAX_LINE:,} bytes; fetch the file again")
                value = parse_json(line, f"{path}:{number}")
                if not isinstance(value, dict):
                    raise CheckpointError(f"{path}:{number}: holds a {type(value).__name__}; expected an object. Fetch it again")
                yield value
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check the path and the permissions") from error
