"""The state of a command that may be interrupted: one file of tensors and plain values, whole or known to be damaged."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import IO, Any, cast

import torch

from compress.errors import CheckpointError
from compress.system.files import CHUNK, replacing

_DIGEST = hashlib.sha256().digest_size  # bytes at the end of the file: the SHA-256 of all before


class _Digested:
    """A stream that sums what is written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


def save_state(path: Path, values: Any) -> None:
    """Write tensors and plain values, durably and atomically. Raises OutputError."""
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        digested = _Digested(stream)
        try:
            torch.save(values, cast("IO[bytes]", digested))
        except RuntimeError as error:  # of torch's writer, whatever the stream raised
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        stream.write(digested.digest.digest())


def load_state(path: Path, device: torch.device | str, again: str) -> Any:
    """Read what `save_state` wrote, onto a device; `again` is what a message says to do. Raises CheckpointError for damage."""
    try:
        with open(path, "rb") as stream:
            left = path.stat().st_size - _DIGEST
            digest = hashlib.sha256()
            while left > 0 and (data := stream.read(min(CHUNK, left))):
                digest.update(data)
                left -= len(data)
            if left or stream.read() != digest.digest():
                raise CheckpointError(f"{path}: is damaged: its end is not the checksum of the rest; {again}")
            stream.seek(0)
            return torch.load(stream, map_location=device, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__}); {again}") from error
