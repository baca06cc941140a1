"""The native container: how a site's parts become named tensors, and the table in config.json that tells how to read them.

A site `S` owns the tensors of its parts: those of the base are `S.codes`, `S.scale`, ..., those of any other role `S.<role>_...`.
`quantization_config` is `{quant_method, format_version, specs, sites, guard}`: distinct descriptions once, and for each the sites
that have it, with runs of numbers folded: `model.layers.{0-31}.mlp.experts.{0-2,5}.up_proj`. `guard` names a tensor of the
original that is stored empty: a loader that does not know the format meets a tensor of the wrong shape and fails, instead of
filling the model with random weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import registry
from compress.checkpoint import Source, check_finite
from compress.container import DTYPE_NAMES, MAX_NAME, Entry, bytes_of, read_header, read_tensor, save
from compress.errors import FormatError, RecipeError
from compress.weight import CompressedWeight

METHOD = "compress"
FORMAT_VERSION = 1
# The weight file that config.json names: there is none, so a loader that does not know the format stops and says this name. Ours
# takes the entry out before files are looked for.
IMPORT_FIRST = "import-compress-first.safetensors"
FILE_KEY = "transformers_weights"
Spec = dict[str, Any]
_MAX_SITES = 500_000  # what a table may unfold to, so that a hostile one cannot fill the memory
_MAX_AXIS = 2**31 - 1
_DIGITS = 7  # of the longest number that is folded
_ROLES = ("base", "keep", "outliers", "low_rank")  # of the parts of a weight, in the order they are stored
_RUN = re.compile(rf"([0-9]{{1,{_DIGITS}}})(?:-([0-9]{{1,{_DIGITS}}}))?")


def _prefix(role: str) -> str:
    return "" if role == "base" else f"{role}_"


def _format_of(part: Any) -> Any:
    for name in registry.names("formats"):
        form = registry.lookup("formats", name)
        if isinstance(part, form.part):
            return form
    raise FormatError(f"{type(part).__name__}: no format stores such a part; known are {', '.join(registry.names('formats'))}")


def pack(weight: CompressedWeight) -> tuple[dict[str, Tensor], Spec]:
    """Return the tensors of a compressed weight, by the name they have within their site, and what is needed to read them."""
    tensors: dict[str, Tensor] = {}
    spec: Spec = {"shape": list(weight.shape)}
    for role, part in weight.parts.items():
        form = _format_of(part)
        under = (weight.keep.mask(),) if role == "base" and weight.keep is not None else ()
        spec[role] = form.describe(part, *under)
        tensors |= {_prefix(role) + name: tensor for name, tensor in form.pack(part, *under).items()}
    return tensors, spec


def digest(weight: CompressedWeight) -> str:
    """SHA-256 of a weight's values before they are packed, which whoever decodes the file can compare: float32, row by row."""
    result = hashlib.sha256(bytes_of(weight.exact().cpu()))
    for factor in weight.low_rank.factors() if weight.low_rank is not None else ():
        result.update(bytes_of(factor.cpu().contiguous()))
    return result.hexdigest()


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _shape(spec: Spec) -> tuple[int, int]:
    shape = spec.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_whole(n, 1, _MAX_AXIS) for n in shape):
        raise FormatError(f"quantization_config: shape is {shape!r:.80}; expected [out, in]")
    return shape[0], shape[1]


def _parts(spec: Spec) -> dict[str, Spec]:
    parts = {role: spec[role] for role in _ROLES if role in spec}
    if "base" not in parts or spec.keys() - {"shape", *_ROLES} or not all(isinstance(part, dict) for part in parts.values()):
        raise FormatError(
            f"quantization_config: a site has the parts {sorted(spec.keys() - {'shape'})!s:.80}; expected base, and of others "
            f"only {', '.join(_ROLES[1:])}. Written by a newer compress?"
        )
    if "keep" in parts and not getattr(_format("base", parts["base"]), "masked", False):
        name = parts["base"].get("format")
        raise FormatError(
            f"quantization_config: a base of the format {name!r:.80} is there with a mask, and it is stored whole. Written by "
            "a newer compress?"
        )
    return parts


def _format(role: str, described: Spec) -> Any:
    name = described.get("format")
    try:
        form = registry.lookup("formats", name if isinstance(name, str) else "")
        if role not in form.roles:
            raise FormatError(f"quantization_config: {role} has the format {name}, which is for {', '.join(form.roles)}")
        return form
    except RecipeError:
        known = ", ".join(registry.names("formats"))
        raise FormatError(
            f"quantization_config: format is {name!r:.80}; known are {known}. Written by a newer compress?"
        ) from None


def short(spec: Spec) -> str:
    """Return how a site is stored, in a few words for a table. Raises FormatError."""
    return " + ".join(str(_format(role, described).short(described)) for role, described in _parts(spec).items())


def layout(spec: Spec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a site, by the name within the site. Raises FormatError."""
    result: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for role, described in _parts(spec).items():
        form = _format(role, described)
        result |= {_prefix(role) + name: value for name, value in form.layout(described, _shape(spec)).items()}
    return result


def unpack(spec: Spec, tensors: Mapping[str, Tensor]) -> CompressedWeight:
    """Return the compressed weight that was packed, equal bit for bit. Raises FormatError."""
    parts: dict[str, Any] = {}
    for role, form, described, under in _in_turn(spec, parts):
        parts[role] = form.unpack(described, _shape(spec), _tensors_of(role, tensors), *under)
    return CompressedWeight(**parts)


def _in_turn(spec: Spec, parts: Mapping[str, Any]) -> Iterator[tuple[str, Any, Spec, tuple[Tensor, ...]]]:
    """Yield role, format and description of each part, the mask first: the base is read with the one in `parts` by then."""
    described = _parts(spec)
    for role in sorted(described, key=lambda role: role != "keep"):
        under = (parts["keep"].mask(),) if role == "base" and "keep" in described else ()
        yield role, _format(role, described[role]), described[role], under


def _tensors_of(role: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part, by the name they have within it."""
    others = tuple(_prefix(other) for other in _ROLES if other not in ("base", role))
    prefix = _prefix(role)
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix) and not n.startswith(others)}


def unpack_rows(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], start: int, stop: int) -> CompressedWeight:
    """Return the rows start..stop of a packed weight; `start` must be a multiple of 32, where every row begins on a word."""
    rows, columns = _shape(dict(spec))
    if (start, stop) == (0, rows):
        return unpack(dict(spec), tensors)
    parts: dict[str, Any] = {}
    for role, form, described, under in _in_turn(dict(spec), parts):
        fewer, cut = form.cut_rows(described, (rows, columns), _tensors_of(role, tensors), start, stop, *under)
        parts[role] = form.unpack(fewer, (stop - start, columns), cut, *under)
    return CompressedWeight(**parts)


def _fold(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def write_part(
    path: Path, tensors: dict[str, Tensor], specs: dict[str, Spec], others: Mapping[str, Tensor] | None = None
) -> None:
    """Write the packed tensors of some sites, with their descriptions, and tensors that replace the source's, into one file."""
    others = dict(others or {})
    names = json.dumps(sorted(others), separators=(",", ":"))
    save(path, tensors | others, {"sites": json.dumps(specs, separators=(",", ":")), "others": names})


def part_others(path: Path) -> dict[str, Entry]:
    """Return the tensors of a part that replace those of the source, by disk name."""
    entries, metadata = read_header(path)
    return {name: entries[name] for name in json.loads(metadata.get("others", "[]"))}


def part_specs(metadata: Mapping[str, str]) -> dict[str, Spec]:
    """Return the descriptions that `write_part` put into a file's metadata."""
    try:
        specs = json.loads(metadata["sites"])
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"a part has no description of its sites ({error}); remove the job folder and run again") from error
    if not isinstance(specs, dict) or not all(isinstance(spec, dict) for spec in specs.values()):
        raise FormatError("a part describes its sites by something else than objects; remove the job folder and run again")
    return specs


def read_part(path: Path) -> Iterator[tuple[str, CompressedWeight]]:
    """Yield the sites of a part, each with its compressed weight."""
    entries, metadata = read_header(path)
    for site, spec in part_specs(metadata).items():
        names = {leaf: f"{site}.{leaf}" for leaf in layout(spec)}
        if missing := [name for name in names.values() if name not in entries]:
            raise FormatError(f"{path}: no tensor {missing[0]!r}; remove the job folder and run again")
        yield site, unpack(spec, {leaf: read_tensor(entries[name]) for leaf, name in names.items()})


def _is_number(piece: str) -> bool:
    return len(piece) <= _DIGITS and piece.isascii() and piece.isdecimal() and str(int(piece)) == piece


def fold(names: Iterable[str]) -> list[str]:
    """Fold runs of numbers in dotted names into patterns whose unfolding gives the names back, each once. Raises FormatError."""
    shapes: dict[tuple[str | None, ...], set[tuple[int, ...]]] = {}
    for name in names:
        if "{" in name or "}" in name:
            raise FormatError(f"{name}: a name with braces cannot be written into quantization_config; rename the tensor")
        pieces = name.split(".")
        numbers = tuple(int(p) for p in pieces if _is_number(p))
        shapes.setdefault(tuple(None if _is_number(p) else p for p in pieces), set()).add(numbers)
    patterns = []
    for shape, tuples in shapes.items():
        for ranges in _products(tuples):
            fill = iter(ranges)
            patterns.append(".".join("{" + next(fill) + "}" if p is None else p for p in shape))
    return patterns


def _products(tuples: set[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Write a set of number tuples as products of ranges: last axis first, equal tails joined over the axis before."""
    if not next(iter(tuples)):
        return [()]
    tails: dict[int, set[tuple[int, ...]]] = {}
    for head, *tail in tuples:
        tails.setdefault(head, set()).add(tuple(tail))
    heads: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for head, tail_set in sorted(tails.items()):
        heads.setdefault(frozenset(tail_set), []).append(head)
    return [(_fold(group), *product) for tail_key, group in heads.items() for product in _products(set(tail_key))]


def _ranges(text: str) -> list[range]:
    result: list[range] = []
    for run in text.split(","):
        match = _RUN.fullmatch(run)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise FormatError(f"quantization_config: {text!r:.80} is not a list of numbers such as 0-3,5; the config is damaged")
        result.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return result


def unfold(pattern: str, limit: int = _MAX_SITES) -> list[str]:
    """Return the names that a folded pattern stands for, at most `limit`. Raises FormatError."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    ranges = [_ranges(piece) for piece in pieces[1::2]]
    total = 1
    for choice in ranges:  # counted before anything is made, and not beyond what is needed to refuse
        total = min(total * sum(map(len, choice)), limit + 1)
    fixed = pieces[::2]
    longest = sum(map(len, fixed)) + _DIGITS * len(ranges)
    if total > limit or longest > MAX_NAME or not {"{", "}"}.isdisjoint("".join(fixed)):
        raise FormatError(f"quantization_config: {pattern!r:.80} is no pattern, or one for too many sites; the config is damaged")
    numbers = ([str(n) for run in choice for n in run] for choice in ranges)
    return [
        fixed[0] + "".join(number + piece for number, piece in zip(combination, fixed[1:], strict=True))
        for combination in itertools.product(*numbers)
    ]


def write_table(specs: Mapping[str, Spec], guard: str | None) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint, given the description of each of its sites."""
    distinct: list[Spec] = []
    members: list[list[str]] = []
    for name, spec in specs.items():
        if spec not in distinct:
            distinct.append(spec)
            members.append([])
        members[distinct.index(spec)].append(name)
    sites = {pattern: number for number, names in enumerate(members) for pattern in fold(names)}
    return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "guard": guard, "specs": distinct, "sites": sites}


def config_with(config: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a checkpoint in the native format, given that of the original and the table of its sites."""
    return {**config, FILE_KEY: IMPORT_FIRST, "quantization_config": dict(table)}


def _belongs(tensor: str, table: Mapping[str, Spec]) -> bool:
    """Whether a site is made of a tensor of the original: a linear's own weight, or one tensor of all experts."""
    owner, _, leaf = tensor.rpartition(".")
    return (owner in table and leaf == "weight") or f"{owner}.0.{leaf}" in table


def read_table(config: Mapping[str, Any]) -> dict[str, Spec]:
    """Return the description of each compressed site of a `quantization_config`, all of them valid. Raises FormatError."""
    version = config.get("format_version")
    if not _whole(version, 1, FORMAT_VERSION):
        raise FormatError(
            f"quantization_config: format_version is {version!r:.80}; this compress reads up to {FORMAT_VERSION}: upgrade it"
        )
    specs, sites, guard = config.get("specs"), config.get("sites"), config.get("guard")
    if not isinstance(specs, list) or not isinstance(sites, dict) or not all(isinstance(spec, dict) for spec in specs):
        raise FormatError("quantization_config: no specs and sites; the config is damaged, fetch the checkpoint again")
    for spec in specs:
        layout(spec)
    table: dict[str, Spec] = {}
    for pattern, number in sites.items():
        if not isinstance(pattern, str) or not _whole(number, 0, len(specs) - 1):
            raise FormatError(f"quantization_config: {pattern!r:.80} has spec {number!r:.80}; expected 0 to {len(specs) - 1}")
        for name in unfold(pattern, _MAX_SITES - len(table)):
            if name in table:
                raise FormatError(f"quantization_config: {name!r:.80} is described twice; the config is damaged")
            table[name] = specs[number]
    if guard is not None and not (isinstance(guard, str) and _belongs(guard, table)):
        raise FormatError(f"quantization_config: guard is {guard!r:.80}; expected the tensor of a site. The config is damaged")
    return table


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
        for name in entries:
            site, _, leaf = name.rpartition(".")
            if site in table and leaf != "bias":
                raise FormatError(
                    f"{folder}: {name} is not described; the config does not belong to these weights. Fetch both again"
                )
        ours = {"quantization_config"} | ({FILE_KEY} if plain.config.get(FILE_KEY) == IMPORT_FIRST else set())
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

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all tensors as they are on disk."""
        plain = sum(e.nbytes for n, e in self.entries.items() if n.removesuffix(".weight") not in self.table)
        return plain + sum(entry.nbytes for entry in self.packed.values())
