"""The calibration's hidden states between two blocks: this rank's batches, in memory or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compress.checkpoint.tensor_file import bytes_of
from compress.errors import CheckpointError
from compress.system.files import replacing, sha256


class States(Protocol):
    """Batches of hidden states."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Shapes of the batches (samples, length, width)."""

    def read(self, batch: int) -> Tensor:
        """Return one batch (samples, length, width) on the CPU."""


def _write(path: Path, batches: Iterable[Tensor]) -> str:
    """Write batches (samples, length, width), one after the other, and return the SHA-256 of the file."""
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as stream:
        for batch in batches:
            raw = bytes_of(batch)
            stream.write(raw)
            digest.update(raw)
    return digest.hexdigest()


class HiddenStates:
    """Batches of hidden states (samples, length, width) in `dtype`, one after the other in memory or in one file.

    On disk (`folder`) the output of a block is written next to its input, and replaces it once complete.
    """

    def __init__(self, samples: list[int], length: int, width: int, dtype: torch.dtype, folder: Path | None) -> None:
        self.shapes = [(count, length, width) for count in samples]
        self.dtype, self.folder = dtype, folder
        self._inner = length, width
        self._memory: list[Tensor | None] = [None] * len(samples)
        self._file: Path | None = None
        self._digest = ""  # SHA-256 of the file

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return sum(a * b * c for a, b, c in self.shapes) * self.dtype.itemsize

    def _offset(self, batch: int) -> int:
        return sum(a * b * c for a, b, c in self.shapes[:batch]) * self.dtype.itemsize

    def read(self, batch: int) -> Tensor:
        """Return one batch (samples, length, width) on the CPU."""
        kept = self._memory[batch]
        if kept is not None:
            return kept
        if self._file is None:
            raise RuntimeError("hidden states are read before they were written")
        return self._read_file(self._file, batch)

    def _read_file(self, path: Path, batch: int) -> Tensor:
        shape = self.shapes[batch]
        buffer = torch.empty(shape, dtype=self.dtype)
        view = bytes_of(buffer)
        with path.open("rb", buffering=0) as stream:
            stream.seek(self._offset(batch))
            if stream.readinto(view) != view.nbytes:
                raise CheckpointError(f"{path}: ends early; remove the job folder and start again")
        return buffer

    def update(self, outputs: Iterator[Tensor], name: str) -> None:
        """Replace the batches with `outputs`, in order; on disk the new file is `name`, and the old one is left to the caller."""
        if self.folder is None:
            for batch, output in enumerate(outputs):
                self._memory[batch] = output.to("cpu", self.dtype)
            return
        path = self.folder / name
        self._digest = _write(path, (output.to("cpu", self.dtype) for output in outputs))
        self._file = path

    def after(self, outputs: Iterator[Tensor], name: str) -> HiddenStates:
        """Return `outputs` as new states, on disk in a file of their own; these states do not change."""
        result = HiddenStates([count for count, _, _ in self.shapes], *self._inner, self.dtype, self.folder)
        result.update(outputs, name)
        return result

    def copy(self) -> HiddenStates:
        """Return the same states in memory; updating either leaves the other unchanged."""
        result = HiddenStates([count for count, _, _ in self.shapes], *self._inner, self.dtype, None)
        result.put(self.batches())
        return result

    def batches(self) -> list[Tensor]:
        """Return all batches on the CPU."""
        return [self.read(batch) for batch in range(len(self.shapes))]

    def put(self, batches: Sequence[Tensor]) -> None:
        """Hold these batches in memory instead of the present ones."""
        self.shapes = [(batch.shape[0], batch.shape[1], batch.shape[2]) for batch in batches]
        self._memory, self._file = list(batches), None

    def save(self, path: Path) -> str:
        """Write all batches to a file that `restore` reads, unless they are on disk already; return its SHA-256."""
        if self._file is None:
            return _write(path, (self.read(batch) for batch in range(len(self.shapes))))
        return self._digest

    def fits(self, path: Path, digest: str) -> bool:
        """Whether `path` is a file of the same size as these states, with this SHA-256."""
        return path.is_file() and path.stat().st_size == self.nbytes and sha256(path) == digest

    def restore(self, path: Path, digest: str) -> None:
        """Load all batches from a file that `fits`."""
        if self.folder is not None:
            self._file, self._digest = path, digest
        else:
            self._memory = [self._read_file(path, batch) for batch in range(len(self.shapes))]
