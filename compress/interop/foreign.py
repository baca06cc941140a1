"""Checkpoints of any layout, opened so that they read like the original: dense, ours, GPTQ, AWQ, compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import registry
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.packing import METHOD
from compress.checkpoint.source import Source, check_finite
from compress.checkpoint.tensor_file import Entry, read_tensor
from compress.errors import FormatError
from compress.interop import affine_grid as _grid
from compress.weights.weight import CompressedWeight


@dataclass(frozen=True)
class ForeignSource(PackedSource):
    """A checkpoint that another tool has compressed; its sites have native descriptions, so that all that reads ours reads it."""

    form: Any = None  # of compress/export
    quantization: dict[str, Any] = field(default_factory=dict)  # `quantization_config` as it is
    schemes: dict[str, Any] = field(default_factory=dict)  # by site

    @classmethod
    def open_foreign(cls, plain: Source, form: Any, quantization: dict[str, Any]) -> ForeignSource:
        """Make one of an opened checkpoint, given what knows its layout. Raises CheckpointError."""
        headers = {name: (entry.dtype, entry.shape) for name, entry in plain.entries.items()}
        try:
            schemes = form.find(quantization, headers, lambda name: read_tensor(plain.entries[name]))
        except FormatError as error:
            raise FormatError(f"{plain.folder}: {error}") from error
        if not schemes:
            raise FormatError(f"{plain.folder}: config.json says {form.name}, but no tensor is packed so; fetch it again")
        entries = dict(plain.entries)
        packed: dict[str, Entry] = {}
        table = {}
        for site, scheme in schemes.items():
            for leaf in form.layout(scheme):
                if (entry := entries.pop(f"{site}.{leaf}", None)) is not None:
                    packed[f"{site}.{leaf}"] = entry
            if f"{site}.weight" in entries:
                raise FormatError(f"{plain.folder}: {site} is there packed and dense; expected one of them. Fetch it again")
            rows, columns = scheme.shape
            entries[f"{site}.weight"] = Entry(f"{site}.weight", "F32", (rows, columns), 0, rows * columns * 4, plain.folder)
            group = _grid.group_dtype(scheme.groups) if scheme.scattered else None
            table[site] = _grid.description(scheme, group)
        for name in entries:
            site, _, leaf = name.rpartition(".")
            if leaf in form.suffixes:
                raise FormatError(
                    f"{plain.folder}: {name} is left over, as {site} is not whole; the checkpoint is incomplete, fetch it again"
                )
        dense = {key: value for key, value in plain.config.items() if key != "quantization_config"}
        more: dict[str, Any] = {"form": form, "quantization": quantization, "schemes": schemes}
        return cls(plain.folder, plain.name, dense, entries, plain.revision, table=table, packed=packed, **more)

    def compressed(self, site: str) -> CompressedWeight:
        """Read one site. Raises CheckpointError."""
        scheme = self.schemes[site]
        tensors = {}
        for leaf in self.form.leaves(scheme):
            if f"{site}.{leaf}" not in self.packed:
                raise FormatError(f"{self.folder}: {site}.{leaf} is missing; the checkpoint is incomplete, fetch it again")
            entry = self.packed[f"{site}.{leaf}"]
            tensors[leaf] = read_tensor(entry)
            if tensors[leaf].is_floating_point():
                check_finite(tensors[leaf], f"{entry.file}: {site}.{leaf}")
        try:
            weight: CompressedWeight = self.form.read(scheme, tensors, self.quantization)
        except FormatError as error:
            raise FormatError(f"{self.folder}: {site}: {error}") from error
        return weight

    def entries_of(self, site: str) -> list[Entry]:
        """The packed tensors of a site."""
        return [self.packed[name] for leaf in self.form.layout(self.schemes[site]) if (name := f"{site}.{leaf}") in self.packed]


def importer(config: Mapping[str, Any]) -> Any:
    """Return what reads the layout that a `quantization_config` names, or None where nothing does."""
    forms = (registry.lookup("export", name) for name in registry.names("export"))
    return next((form for form in forms if form.name == config.get("quant_method") and hasattr(form, "find")), None)


def open_any(model: str | Path, revision: str | None = None) -> Source:
    """Open a checkpoint: dense, compressed by this package, or by another tool whose layout is known. Raises CheckpointError."""
    source = Source.open(model, revision)
    config = source.config.get("quantization_config")
    if isinstance(config, dict) and config.get("quant_method") == METHOD:
        return PackedSource.open_packed(source.folder)
    if isinstance(config, dict) and (form := importer(config)) is not None:
        return ForeignSource.open_foreign(source, form, config)
    return source
