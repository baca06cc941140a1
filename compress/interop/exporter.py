"""A checkpoint in another layout: site by site in bounded memory, all else byte for byte, its name only when it is whole."""

from __future__ import annotations

import fcntl
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import registry
from compress._version import __version__
from compress.architecture.family import Family
from compress.architecture.known import family_of
from compress.architecture.names import parameter_name
from compress.checkpoint import packing, site_table
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import INDEX, SINGLE, Source
from compress.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, Entry, read_tensor, write_stream
from compress.errors import FormatError, OutputError, RecipeError, VerificationError
from compress.interop import gguf_file
from compress.interop import readme as export_card
from compress.interop.foreign import open_any
from compress.output import seal
from compress.report.redaction import base_model
from compress.system.files import fsync_folder, sha256, write_json, write_text, writing
from compress.weights.table import Table
from compress.weights.weight import CompressedWeight

RECORD = "export.json"
SHARD = 5 * 10**9  # bytes of a file
_MARKER = ".compress-export"
_LEFT = ("evaluation.json", "quantize_config.json", RECORD)  # side files that speak of another checkpoint
Listen = Callable[[int, int, str, float], None]


@dataclass(frozen=True)
class Unit:
    """What is written together: the tensors of a site, or one that is copied."""

    entries: list[Entry]  # as they will be
    site: str = ""
    source: Entry | None = None  # where a copied tensor lies


@dataclass(frozen=True)
class Exporting:
    """What an export will do: everything that is known before weights are read."""

    source: PackedSource
    form: Any  # of compress/export
    scale: str | None  # dtype of all scales, where the layout has one for all
    schemes: dict[str, Any] = field(default_factory=dict)  # by site
    config: dict[str, Any] = field(default_factory=dict)  # config.json


def formats() -> list[str]:
    """Names of the layouts that can be written, as the command line has them."""
    return sorted(name.replace("_", "-") for name in registry.names("export"))


def lookup(name: str) -> Any:
    """Return the layout of a name. Raises RecipeError."""
    try:
        return registry.lookup("export", name.replace("-", "_"))
    except RecipeError:
        raise RecipeError(f"--format {name}: no such format; known are {', '.join(formats())}") from None


def open_packed(model: str) -> PackedSource:
    """Open a compressed checkpoint, ours or another tool's. Raises CheckpointError."""
    source = open_any(model)
    if not isinstance(source, PackedSource):
        method = (source.config.get("quantization_config") or {}).get("quant_method")
        found = f"compressed by {method!r}, which compress does not read" if method else "dense"
        raise FormatError(f"{source.folder}: is {found}; give a compressed checkpoint, such as the OUT of `compress quantize`")
    return source


def refusals(source: PackedSource, form: Any, scale: str | None) -> dict[str, str]:
    """Return why a layout cannot hold sites of a checkpoint, by site, as far as their descriptions tell."""
    found, reasons = {}, {}
    for site, spec in source.table.items():
        key = id(spec)  # sites of one description share the object
        if key not in reasons:
            try:
                form.scheme(spec, scale)
                reasons[key] = ""
            except FormatError as error:
                reasons[key] = str(error)
        if reasons[key]:
            found[site] = reasons[key]
    return found


def prepare(model: str | PackedSource, name: str) -> Exporting:
    """Check that a checkpoint can be written in a layout, from its headers and scales. Raises CheckpointError, RecipeError."""
    source = model if isinstance(model, PackedSource) else open_packed(model)
    form = lookup(name)
    scale = _scale(source, form)
    if refused := refusals(source, form, scale):
        site, reason = next(iter(refused.items()))
        others = [o for o in formats() if o not in (name, "native", "dense") and not refusals(source, lookup(o), None)]
        if not others and not refusals(source, lookup("dense"), None):
            others = ["dense"]  # plain numbers hold every weight, and are for whom nothing else will do
        instead = (
            f"{'export to ' + ' or '.join(others) if others else 'keep the native format'}, or compress with options that fit"
        )
        more = f" ({len(refused)} of {len(source.table)} sites do not fit)" if len(refused) > 1 else ""
        raise FormatError(f"{site}: {reason}; {form.name} holds {form.holds}{more}. What to do: {instead}")
    family = family_of(source.model_type)
    if form.name != "native":
        _names_fit(source, family, form)
    schemes = {site: form.scheme(spec, scale) for site, spec in source.table.items()}
    if form.name == "gguf":
        gguf_file.plan(source, schemes)
        gguf_file.library()
    head = parameter_name(family, family.head)
    dense = _dense(source, family)
    try:
        table = form.config(schemes, dense, head)
    except FormatError as error:
        raise FormatError(f"{source.folder}: {error}") from error
    plain = {key: value for key, value in source.config.items() if key != "quantization_config"}
    described = {"quantization_config": table} if table else {}
    config = site_table.config_with(source.config, table) if form.name == "native" else plain | described
    return Exporting(source, form, scale, schemes, config)


def _names_fit(source: PackedSource, family: Family, form: Any) -> None:
    """Other tools know weights by the names of the model, (out, in), experts one by one. Raises FormatError."""
    if family.transposed:
        raise FormatError(
            f"{source.folder}: {source.model_type} stores weights (in, out), which {form.name} readers take for another shape; "
            "keep the native format"
        )
    if family.experts is not None and family.experts.fused and any(f".{family.experts.disk}." in s for s in source.table):
        raise FormatError(
            f"{source.folder}: experts of {source.model_type} are one tensor in the original, and {form.name} has no place for "
            "them; leave the experts out of the recipe, or keep the native format"
        )


def _scale(source: PackedSource, form: Any) -> str | None:
    """Choose the first dtype of a layout's scales that holds all of them exactly; the last where none does: refused later."""
    choices: tuple[str, ...] = form.scales
    for choice in choices[:-1]:
        if all(_holds(source, site, choice) for site in source.table):
            return choice
    return choices[-1] if choices else None


def _holds(source: PackedSource, site: str, dtype: str) -> bool:
    """Whether a type of floats holds all scales of a site; half of a scale, which some grids get, is refused when written."""
    base = source.table[site]["base"]
    kind = DTYPES[dtype]
    if base["format"] == "table":
        part = source.compressed(site).base
        return isinstance(part, Table) and bool((part.scales().to(kind).double() == part.scales().double()).all())
    if base["format"] != "bitpack" or base.get("scale", "BF16") == dtype:
        return True
    scales = [read_tensor(entry) for entry in source.entries_of(site) if entry.name.endswith(("scale", "scales"))]
    return all(bool((scale.to(kind).double() == scale.double()).all()) for scale in scales)


def _dense(source: PackedSource, family: Family) -> list[str]:
    """Names of modules with a matrix that stays as it is, those of the model and on disk: readers must not expect codes."""
    found: set[str] = set()
    for name, entry in source.entries.items():
        site, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(entry.shape) == 2 and site not in source.table:
            found |= {site, parameter_name(family, site)}
    return sorted(found, key=seal.natural)


def units(work: Exporting) -> list[Unit]:
    """Return all that will be written, in order."""
    source, form = work.source, work.form
    result = []
    guard = (work.config.get("quantization_config") or {}).get("guard")
    for name in sorted(source.entries, key=seal.natural):
        site = name.removesuffix(".weight")
        if name.endswith(".weight") and site in source.table:
            planned = []
            for leaf, (dtype, shape) in form.layout(work.schemes[site]).items():
                planned.append(_planned(f"{site}.{leaf}", DTYPE_NAMES[dtype], shape, source.folder))
            result.append(Unit(planned, site))
        else:
            entry = source.entries[name]
            result.append(Unit([_planned(name, entry.dtype, entry.shape, source.folder)], source=entry))
    if guard is not None:
        empty = Entry(guard, "BF16", (0,), 0, 0, source.folder)
        result.append(Unit([empty], source=empty))
    return result


def _planned(name: str, dtype: str, shape: tuple[int, ...], folder: Path) -> Entry:
    return Entry(name, dtype, shape, 0, math.prod(shape) * DTYPES[dtype].itemsize, folder)


def _cut(found: Sequence[Unit], limit: int) -> list[list[Unit]]:
    """Cut units into files of at most `limit` bytes, in order; the tensors of a site stay together."""
    result: list[list[Unit]] = [[]]
    size = 0
    for unit in found:
        nbytes = sum(entry.nbytes for entry in unit.entries)
        if result[-1] and size + nbytes > limit:
            result.append([])
            size = 0
        result[-1].append(unit)
        size += nbytes
    return result


def _values(work: Exporting, members: Iterable[Unit], listen: Callable[[str], None]) -> Iterator[tuple[str, Tensor | Entry]]:
    """Make the tensors of some units one after the other. Raises FormatError where numbers do not fit."""
    for unit in members:
        listen(unit.site)
        if unit.source is not None:
            yield unit.entries[0].name, unit.source
            continue
        try:
            tensors = work.form.tensors(work.schemes[unit.site], work.source.compressed(unit.site))
        except FormatError as error:
            raise FormatError(
                f"{unit.site}: {error}; {work.form.name} holds {work.form.holds}. Export to another format, such as "
                "compressed-tensors, which keeps scales as they are"
            ) from error
        for leaf, tensor in tensors.items():
            yield f"{unit.site}.{leaf}", tensor


def export(work: Exporting, out: Path, listen: Listen, limit: int = SHARD) -> dict[str, Any]:
    """Write a checkpoint in another layout; return what was written. Raises CheckpointError, OutputError, VerificationError."""
    identity = {"format": work.form.name, "source": work.source.fingerprint()}
    if (before := finished(out)) is not None:
        if before.get("identity") == identity:
            return _shown(before) | {"resumed": True}
        raise OutputError(f"{out}: is another export; choose another place, or remove it")
    with _building(out) as folder:
        blocks = 1 + max(_block(site) for site in work.schemes)

        def step(site: str, what: str) -> None:
            if site:
                listen(_block(site), blocks, what, 0.0)

        more = _write_gguf(work, folder, step) if work.form.name == "gguf" else _write_folder(work, folder, limit, step)
        summary = _summary(work, identity, more)
        write_text(folder / "README.md", export_card.text(work.source, summary, out.name))
        write_json(folder / RECORD, summary)
        publish(folder, out)
    return _shown(summary)


def _shown(summary: dict[str, Any]) -> dict[str, Any]:
    """The record of an export without the digests of all weights."""
    return {key: value for key, value in summary.items() if key != "values"}


def _block(site: str) -> int:
    """The number of the block that a site is in, for progress."""
    return next((int(piece) for piece in site.split(".") if piece.isdecimal()), 0)


def _write_folder(work: Exporting, folder: Path, limit: int, step: Callable[[str, str], None]) -> dict[str, Any]:
    """Write safetensors, index, side files, and config.json last; read them back."""
    found = units(work)
    cut = _cut(found, limit)
    names = [SINGLE] if len(cut) == 1 else [f"model-{i + 1:05d}-of-{len(cut):05d}.safetensors" for i in range(len(cut))]
    for name, members in zip(names, cut, strict=True):
        planned = [entry for unit in members for entry in unit.entries]
        write_stream(folder / name, planned, _values(work, members, lambda site: step(site, "exporting")))
    size = sum(entry.nbytes for unit in found for entry in unit.entries)
    if len(cut) > 1:
        places = {e.name: name for name, members in zip(names, cut, strict=True) for unit in members for e in unit.entries}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
    seal.carry(work.source, folder, leave=_LEFT)
    for name, value in work.form.files(work.config.get("quantization_config", {})).items():
        write_json(folder / name, value)
    write_json(folder / "config.json", work.config)
    values = check(work.source, folder, work.form, lambda site: step(site, "reading back"))
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != _MARKER)
    return {"bytes": size, "files": {name: sha256(folder / name) for name in there}, "values": values}


def _write_gguf(work: Exporting, folder: Path, step: Callable[[str, str], None]) -> dict[str, Any]:
    """Write one GGUF file and read it back."""
    members, left, notes = gguf_file.plan(work.source, work.schemes)
    path = folder / gguf_file.FILE
    with writing(path):
        gguf_file.write(work.source, work.schemes, members, path, lambda site: step(site, "exporting"))
    gguf_file.check(work.source, work.schemes, members, path, lambda site: step(site, "reading back"))
    values = dict(gguf_file.digests(path))
    kinds: dict[str, int] = {}
    for member in members:
        kinds[member.kind] = kinds.get(member.kind, 0) + 1
    size = sum(member.nbytes for member in members)
    files = {path.name: sha256(path)}
    return {"bytes": size, "files": files, "types": kinds, "left_out": left, "notes": notes, "values": values}


def weights_of(folder: Path, form: Any) -> Callable[[str], CompressedWeight]:
    """Return what reads a site of a checkpoint in a layout that transformers reads too. Raises CheckpointError."""
    if form.name != "dense":
        return open_packed(str(folder)).compressed
    entries = Source.open(folder).entries
    return lambda site: form.weight(read_tensor(entries[f"{site}.weight"]))


def check(source: PackedSource, folder: Path, form: Any, step: Callable[[str], None]) -> dict[str, str]:
    """Read every site back with the reader of its layout and compare, value for value. Return the digests of the values, which
    `compress verify` compares. Raises VerificationError.
    """
    read, values = weights_of(folder, form), {}
    for site in source.table:
        step(site)
        weight = read(site)
        values[site] = packing.digest(weight)
        if not torch.equal(weight.dequantize(), source.compressed(site).dequantize()):
            raise VerificationError(
                f"{site}: reads back with other values than it was written from; the result is not published, please report this"
            )
    return values


def _summary(work: Exporting, identity: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    source = work.source
    return {
        "tool": "compress",
        "version": __version__,
        "identity": identity,
        "format": work.form.name,
        "source": base_model(source.name, source.revision)[0],
        "sites": len(work.schemes),
        "stored": stored(source),
        "scale_dtypes": sorted({getattr(s, "scale", None) or s["base"].get("scale", "BF16") for s in work.schemes.values()}),
        "widened": widened(work),
        "bytes_before": source.stored_nbytes,
        "bits_per_weight": more["bytes"] * 8 / source.numel,
        **more,
    }


def stored(source: PackedSource) -> dict[str, int]:
    """How many sites are stored in which way, in a few words each."""
    counts: dict[str, int] = {}
    for spec in source.table.values():
        counts[packing.short(spec)] = counts.get(packing.short(spec), 0) + 1
    return counts


def widened(work: Exporting) -> dict[str, int]:
    """How many sites get wider codes than they have, by both widths; values stay what they are."""
    counts: dict[str, int] = {}
    for site, scheme in work.schemes.items():
        before, after = work.source.table[site]["base"].get("bits"), getattr(scheme, "bits", None)
        if after is not None and before is not None and after > before:
            counts[f"{before} -> {after} bits"] = counts.get(f"{before} -> {after} bits", 0) + 1
    return counts


def finished(out: Path) -> dict[str, Any] | None:
    """Return the record of an export of ours, None when nothing is there. Raises OutputError when something else is."""
    return seal.finished(out, RECORD, "an export")


def check_place(out: Path) -> None:
    """Raise OutputError where an export could not be put, before there is one."""
    finished(out)


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` under a temporary name; what an interrupted export left there is removed first."""
    folder = out.with_name(out.name + ".exporting")
    with writing(folder):
        if folder.exists() and not (folder / _MARKER).exists() and any(folder.iterdir()):
            raise OutputError(f"{folder}: exists and is not an unfinished export; remove it, or choose another place")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _MARKER).open("w") as marker:
            try:
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{folder}: another export is at work here; wait for it, or choose another place") from None
            for path in folder.iterdir():
                if path.name != _MARKER:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            try:
                yield folder
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise


def publish(folder: Path, out: Path) -> None:
    """Give a whole export its final name, in one step."""
    with writing(out):
        (folder / _MARKER).unlink()
        fsync_folder(folder)
    seal.publish(folder, out)
