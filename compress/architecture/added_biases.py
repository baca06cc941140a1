"""Biases for linears that have none, where the model's config has a place for them: zeros, until a method trains them.

The source is the same but for its config and for tensors that are in none of its files. A family says which setting of
config.json gives which linears a bias, so that the result is a model of its own class, as transformers builds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from compress.architecture.config import number_of_blocks, settings
from compress.architecture.family import Family
from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import Entry, read_header, save
from compress.errors import RecipeError


@dataclass(frozen=True)
class BiasedSource(Source):
    """A source whose linears have biases that are in no file: zeros."""

    added: tuple[str, ...] = ()

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor; a bias that was added is zeros."""
        if name not in self.added:
            return super().tensor(name, index)
        return torch.zeros(self.entries[name].shape, dtype=self.dtype(name))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are there."""
        return sum(entry.nbytes for name, entry in self.entries.items() if name not in self.added)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all tensors as they lie in files."""
        return sum(entry.stored for name, entry in self.entries.items() if name not in self.added)

    @property
    def numel(self) -> int:
        """Number of values in all tensors that are there."""
        return sum(entry.numel for name, entry in self.entries.items() if name not in self.added)


def with_biases(source: Source, family: Family) -> Source:
    """Return a source whose linears all have biases, as far as its config can say so. Raises RecipeError where it cannot."""
    if not family.biases:
        raise RecipeError(
            f"add_biases: the config of {family.model_type or source.model_type} has no place for biases that its linears do not "
            "have; leave it out, biases that are there are trained anyway"
        )
    chosen = [(key, linears) for key, linears in family.biases if not settings(source).get(key)]
    added = {entry.name: entry for entry in _biases(source, family, chosen)}
    if not added:
        return source
    values = {field.name: getattr(source, field.name) for field in fields(Source)}
    config = source.config | dict.fromkeys((key for key, _ in chosen), True)
    return BiasedSource(**{**values, "config": config, "entries": source.entries | added}, added=tuple(added))


def _biases(source: Source, family: Family, chosen: list[tuple[str, tuple[str, ...]]]) -> Iterator[Entry]:
    for block in range(number_of_blocks(source)):
        for linear in (name for _, linears in chosen for name in linears):
            weight = source.entries.get(f"{family.blocks}.{block}.{linear}.weight")
            name = f"{family.blocks}.{block}.{linear}.bias"
            if weight is not None and name not in source.entries:
                rows = weight.shape[0]
                yield Entry(name, weight.dtype, (rows,), 0, rows * weight.nbytes // weight.numel, weight.file)


def filled(source: Source, entries: Mapping[str, Entry], folder: Path) -> dict[str, Entry]:
    """Return the tensors that a run has made, and those biases that it added and left at 0, written into a file of `folder`."""
    left = [name for name in getattr(source, "added", ()) if name not in entries]
    if not left:
        return dict(entries)
    path = folder / "biases.safetensors"
    save(path, {name: source.tensor(name) for name in left})
    return dict(entries) | read_header(path)[0]
