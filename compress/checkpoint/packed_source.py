"""A compressed checkpoint that reads like the original, its weights decoded from packed tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from compress.checkpoint.packing import METHOD, Spec, _shape, layout, rounded_input, unpack
from compress.checkpoint.site_table import ABSENT_FILES, FILE_KEY, read_table
from compress.checkpoint.source import Source, check_finite
from compress.checkpoint.tensor_file import DTYPE_NAMES, Entry, read_tensor
from compress.errors import FormatError
from compress.weights.site_input import SiteInput
from compress.weights.weight import CompressedWeight

MAX_UNSTORED = 1 << 26  # weights that need no bytes of their own, such as those of an expert that was pruned away
MAX_RATIO = 1024  # weights that a byte may stand for: a mask of runs of 128 neighbours


def check_announced(weights: int, nbytes: int, place: str) -> None:
    """Raise FormatError where bytes stand for far more weights than they could describe, before any is decoded."""
    if weights > MAX_UNSTORED + MAX_RATIO * nbytes:
        raise FormatError(
            f"{place}: {nbytes:,} packed bytes stand for {weights:,} weights; expected at most {MAX_RATIO:,} per byte. The "
            "config does not belong to these weights. Fetch both again"
        )


@dataclass(frozen=True)
class PackedSource(Source):
    """A compressed checkpoint that reads like the original: each site's weight is decoded from its packed tensors."""

    table: dict[str, Spec] = field(default_factory=dict)  # description by site
    packed: dict[str, Entry] = field(default_factory=dict)  # the sites' tensors by disk name

    @classmethod
    def open_packed(cls, folder: Path) -> PackedSource:
        """Open a checkpoint in the native format; the headers must hold what the table says. Raises CheckpointError."""
        plain = Source.open(folder)
        config = plain.config.get("quantization_config")
        if not isinstance(config, dict) or config.get("quant_method") != METHOD:
            raise FormatError(
                f"{folder}: config.json has no quantization_config of compress; give a checkpoint that compress wrote"
            )
        table = read_table(config)
        entries = dict(plain.entries)
        guard = entries.pop(config["guard"], None) if config.get("guard") is not None else None
        if guard is not None and guard.nbytes:
            raise FormatError(f"{folder}: {guard.name}, the guard, is not empty; the config does not belong to these weights")
        packed: dict[str, Entry] = {}
        virtual: dict[str, Entry] = {}
        for name, spec in table.items():
            for leaf, (dtype, shape) in layout(spec).items():
                entry = entries.pop(f"{name}.{leaf}", None)
                if entry is None or entry.shape != shape or entry.dtype != DTYPE_NAMES[dtype]:
                    found = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                    raise FormatError(
                        f"{folder}: {name}.{leaf} is {found}; expected {DTYPE_NAMES[dtype]} {list(shape)}. Fetch it again"
                    )
                packed[f"{name}.{leaf}"] = entry
            rows, columns = _shape(spec)
            virtual[f"{name}.weight"] = Entry(f"{name}.weight", "F32", (rows, columns), 0, rows * columns * 4, plain.folder)
        check_announced(sum(entry.numel for entry in virtual.values()), sum(e.nbytes for e in packed.values()), str(folder))
        for name in entries:
            site, _, leaf = name.rpartition(".")
            if site in table and leaf != "bias":
                raise FormatError(
                    f"{folder}: {name} is not described; the config does not belong to these weights. Fetch both again"
                )
        ours = {"quantization_config"} | ({FILE_KEY} if plain.config.get(FILE_KEY) in ABSENT_FILES else set())
        dense = {key: value for key, value in plain.config.items() if key not in ours}
        everything = {**entries, **virtual}
        return cls(plain.folder, plain.name, dense, everything, plain.revision, table=table, packed=packed)

    def compressed(self, site: str) -> CompressedWeight:
        """Read one site's parts. Raises CheckpointError."""
        spec = self.table[site]
        tensors = {leaf: read_tensor(self.packed[f"{site}.{leaf}"]) for leaf in layout(spec)}
        for leaf, tensor in tensors.items():
            if tensor.is_floating_point():
                check_finite(tensor, f"{self.packed[f'{site}.{leaf}'].file}: {site}.{leaf}")
        return unpack(spec, tensors)

    def placed(self) -> Iterable[Entry]:
        """The tensors as they lie in files."""
        return [*(e for n, e in self.entries.items() if n.removesuffix(".weight") not in self.table), *self.packed.values()]

    def entries_of(self, site: str) -> list[Entry]:
        """The packed tensors of a site."""
        return [self.packed[f"{site}.{leaf}"] for leaf in layout(self.table[site])]

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor; a compressed site's weight comes decoded, (out, in) in float32."""
        site = name.removesuffix(".weight")
        return self.compressed(site).dequantize() if site in self.table else super().tensor(name, index)

    def rounded_input(self, name: str) -> SiteInput | None:
        """What rounds the input of the site whose weight has this name, if anything does."""
        site = name.removesuffix(".weight")
        return rounded_input(self.table.get(site, {}), lambda leaf: read_tensor(self.packed[f"{site}.{leaf}"]))

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all tensors as they are on disk."""
        plain = sum(e.nbytes for n, e in self.entries.items() if n.removesuffix(".weight") not in self.table)
        return plain + sum(entry.nbytes for entry in self.packed.values())
