"""Differences between two checkpoints, dense or compressed by any tool: weight by weight, one of each in memory at a time."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compress.architecture.family import Site
from compress.architecture.inventory import take_inventory
from compress.checkpoint import packing
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CheckpointError
from compress.interop.foreign import open_any
from compress.model.detect import find_family
from compress.system.progress import Progress
from compress.weights.uniform import Uniform


@dataclass(frozen=True)
class Row:
    """One weight or other tensor of the two checkpoints."""

    name: str
    verdict: str  # same, stored differently, values, shape, only in A, only in B
    first: str = ""  # how it is stored
    second: str = ""
    largest: float | None = None  # largest difference of two values
    relative: float | None = None  # norm of the difference over the norm in A
    codes: float | None = None  # share of codes that differ, where both have codes of the same grid


@dataclass(frozen=True)
class Difference:
    """Two checkpoints compared."""

    first: str
    second: str
    rows: list[Row]
    config: dict[str, tuple[Any, Any]]  # settings that differ, except how weights are stored

    @property
    def same(self) -> bool:
        """Whether both hold the same values; how they are stored may differ."""
        return all(row.verdict in ("same", "stored differently") for row in self.rows)

    def plain(self) -> dict[str, Any]:
        """The difference as JSON values."""
        return {"same": self.same, **asdict(self)}


@dataclass(frozen=True)
class _Side:
    source: Source
    places: dict[str, Site | str]  # by name: a site, or the disk name of another tensor

    @classmethod
    def open(cls, model: str) -> _Side:
        source = open_any(model)
        try:
            inventory = take_inventory(source, find_family(source))
        except CheckpointError:  # unknown architecture or set of tensors: names on disk will do
            return cls(source, {name: name for name in source.entries})
        made = {site.tensor for site in inventory.sites}
        others: dict[str, Site | str] = {name: name for name in source.entries if name not in made}
        return cls(source, others | {f"{site.name}.weight": site for site in inventory.sites})

    def stored(self, name: str) -> str:
        place = self.places[name]
        if isinstance(self.source, PackedSource) and (spec := self.source.table.get(name.removesuffix(".weight"))):
            return packing.short(spec)
        return self.source.entries[place.tensor if isinstance(place, Site) else place].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        place = self.places[name]
        return place.shape if isinstance(place, Site) else self.source.entries[place].shape

    def value(self, name: str) -> Tensor:
        place = self.places[name]
        if isinstance(place, str):
            return self.source.tensor(place)
        tensor = self.source.tensor(place.tensor, place.slice)
        return tensor.T if place.transposed else tensor

    def codes(self, name: str) -> Uniform | None:
        site = name.removesuffix(".weight")
        if not isinstance(self.source, PackedSource) or site not in self.source.table:
            return None
        part = self.source.compressed(site).base
        return part if isinstance(part, Uniform) else None


def difference(first: str, second: str, progress: Progress) -> Difference:
    """Compare two checkpoints. Raises CheckpointError where one of them cannot be read."""
    a, b = _Side.open(first), _Side.open(second)
    names = sorted({*a.places, *b.places}, key=_natural)
    rows = []
    for number, name in enumerate(names):
        progress(number * 20 // len(names), 20, "comparing", 0.0)
        rows.append(_row(name, a, b))
    keys = sorted({*a.source.config, *b.source.config} - {"quantization_config", "transformers_version"})
    settings = {k: (a.source.config.get(k), b.source.config.get(k)) for k in keys}
    config = {key: pair for key, pair in settings.items() if pair[0] != pair[1]}
    return Difference(first, second, rows, config)


def _row(name: str, a: _Side, b: _Side) -> Row:
    if name not in b.places:
        return Row(name, "only in A", a.stored(name))
    if name not in a.places:
        return Row(name, "only in B", "", b.stored(name))
    first, second = a.stored(name), b.stored(name)
    if a.shape(name) != b.shape(name):
        shapes = [" x ".join(map(str, side.shape(name))) for side in (a, b)]
        return Row(name, "shape", f"{first} {shapes[0]}", f"{second} {shapes[1]}")
    x, y = a.value(name).double(), b.value(name).double()
    codes = _codes(a.codes(name), b.codes(name))
    if torch.equal(x, y):
        return Row(name, "same" if first == second else "stored differently", first, second, 0.0, 0.0, codes)
    delta = x - y
    norm = float(x.norm())
    relative = float(delta.norm()) / norm if norm else float("inf")
    return Row(name, "values", first, second, float(delta.abs().max()), relative, codes)


def _codes(a: Uniform | None, b: Uniform | None) -> float | None:
    """Share of codes that differ, where both have codes of the same width."""
    if a is None or b is None or a.bits != b.bits or a.bipolar != b.bipolar:
        return None
    return float((a.codes != b.codes).double().mean())


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def grouped(found: Difference) -> list[dict[str, Any]]:
    """Group rows for a table: the same verdict and storage, and names that differ only in their numbers."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in found.rows:
        kind = re.sub(r"\.\d+(?=\.)", ".*", row.name)
        groups.setdefault((kind, row.verdict, row.first, row.second), []).append(row)
    result = []
    for (kind, verdict, first, second), members in groups.items():
        worst = max(members, key=lambda row: row.relative or 0.0)
        shares = [row.codes for row in members if row.codes is not None]
        result.append(
            {
                "name": kind,
                "count": len(members),
                "verdict": verdict,
                "first": first,
                "second": second,
                "largest": max((row.largest or 0.0 for row in members), default=0.0),
                "relative": worst.relative,
                "worst": worst.name,
                "codes": sum(shares) / len(shares) if shares else None,
            }
        )
    return result
