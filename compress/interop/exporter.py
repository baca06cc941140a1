"""A checkpoint in another layout: site by site in bounded memory, all else byte for byte, its name only when it is whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from compress import registry
from compress._version import __version__
from compress.architecture.family import Family
from compress.architecture.names import parameter_name
from compress.checkpoint import packing
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import DTYPES, read_tensor
from compress.errors import FormatError, OutputError, RecipeError
from compress.interop import readme as export_card
from compress.interop.foreign import open_any
from compress.interop.layout import MARKER, RECORD, SHARD, Exporting, Layout
from compress.model.detect import find_family
from compress.model.disk_names import DiskNames
from compress.model.meta import build_model
from compress.output import seal
from compress.report.redaction import base_model
from compress.system.files import empty_folder, locked, remove_folder, write_json, write_text, writing
from compress.system.progress import Progress
from compress.weights.table import Table


def formats() -> list[str]:
    """Names of the layouts that can be written, as the command line has them."""
    return sorted(name.replace("_", "-") for name in registry.names("export"))


def lookup(name: str) -> Layout[Any]:
    """Return the layout of a name. Raises RecipeError."""
    try:
        found: Layout[Any] = registry.lookup("export", name.replace("-", "_"))
    except RecipeError:
        raise RecipeError(f"--format {name}: no such format; known are {', '.join(formats())}") from None
    return found


def open_packed(model: str) -> PackedSource:
    """Open a compressed checkpoint, ours or another tool's. Raises CheckpointError."""
    source = open_any(model)
    if not isinstance(source, PackedSource):
        method = (source.config.get("quantization_config") or {}).get("quant_method")
        found = f"compressed by {method!r}, which compress does not read" if method else "dense"
        raise FormatError(f"{source.folder}: is {found}; give a compressed checkpoint, such as the OUT of `compress quantize`")
    return source


def refusals(source: PackedSource, form: Layout[Any], scale: str | None) -> dict[str, str]:
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
        layouts = [other for other in map(lookup, formats()) if other.name != name and not refusals(source, other, None)]
        others = [other.name for other in layouts if not (other.own or other.plain)]
        # Plain numbers hold every weight, and are proposed where no other layout fits.
        others = others or [other.name for other in layouts if other.plain]
        instead = f"export to {' or '.join(others)}" if others else "keep the native format"
        more = f" ({len(refused)} of {len(source.table)} sites do not fit)" if len(refused) > 1 else ""
        raise FormatError(
            f"{site}: {reason}; {form.name} holds {form.holds}{more}. What to do: {instead}, or compress with options that fit"
        )
    family = find_family(source)
    if not form.own:
        _names_fit(source, family, form, source.table)
    schemes = {site: form.scheme(spec, scale) for site, spec in source.table.items()}
    form.check(source, schemes)
    head = parameter_name(family, family.head)
    dense = _dense(source)
    try:
        table = form.config(schemes, dense, head)
    except FormatError as error:
        raise FormatError(f"{source.folder}: {error}") from error
    return Exporting(source, form, scale, schemes, form.model_config(source.config, table))


def check_model(source: Source, family: Family, name: str, sites: Iterable[str]) -> None:
    """Check that a layout has a place for a model, before its `sites` are compressed. Raises FormatError, OutputError."""
    form = lookup(name)
    if not form.own:
        _names_fit(source, family, form, sites)
    form.check_model(source)


def _names_fit(source: Source, family: Family, form: Layout[Any], sites: Iterable[str]) -> None:
    """Other tools know weights by the names of the model, (out, in), experts one by one. Raises FormatError."""
    if family.transposed:
        raise FormatError(
            f"{source.folder}: {source.model_type} stores weights (in, out), which {form.name} readers take for another shape; "
            "keep the native format"
        )
    if family.experts is not None and family.experts.fused and any(f".{family.experts.disk}." in s for s in sites):
        raise FormatError(
            f"{source.folder}: experts of {source.model_type} are one tensor in the original, and {form.name} has no place for "
            "them; leave the experts out of the recipe, or keep the native format"
        )


def _scale(source: PackedSource, form: Layout[Any]) -> str | None:
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


def _dense(source: PackedSource) -> list[str]:
    """Names of modules with a matrix that stays as it is, those of the model and on disk: readers must not expect codes."""
    found: set[str] = set()
    names = DiskNames(build_model(source.config, str(source.folder), torch.bfloat16))
    for name, entry in source.entries.items():
        site, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(entry.shape) == 2 and site not in source.table:
            found |= {site, names.parameter(name).removesuffix(".weight")}
    return sorted(found, key=seal.natural)


def export(work: Exporting, out: Path, progress: Progress, limit: int = SHARD) -> dict[str, Any]:
    """Write a checkpoint in another layout; return what was written. Raises CheckpointError, OutputError, VerificationError."""
    identity = {"format": work.form.name, "source": work.source.fingerprint()}
    if (before := finished(out)) is not None:
        if before.get("identity") == identity:
            _remove_leftover(out)
            return _shown(before) | {"resumed": True}
        raise OutputError(f"{out}: is another export; choose another place, or remove it")
    with _building(out) as folder:
        blocks = 1 + max(_block(site) for site in work.schemes)

        def step(site: str, what: str) -> None:
            if site:
                progress(_block(site), blocks, what, 0.0)

        summary = _summary(work, identity, work.form.write(work, folder, step, limit))
        write_text(folder / "README.md", export_card.text(work.source, summary, out.name, work.form))
        write_json(folder / RECORD, summary)
        work.source.check_unchanged()
        seal.publish(folder, out)
    return _shown(summary)


def _shown(summary: dict[str, Any]) -> dict[str, Any]:
    """The record of an export without the digests of all weights."""
    return {key: value for key, value in summary.items() if key != "values"}


def _block(site: str) -> int:
    """The number of the block that a site is in, for progress."""
    return next((int(piece) for piece in site.split(".") if piece.isdecimal()), 0)


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
        "scale_dtypes": sorted({work.form.scale_of(scheme) for scheme in work.schemes.values()}),
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


def _place(out: Path) -> Path:
    """The folder of an export that is being written: its marker, which is locked, and the checkpoint."""
    return out.with_name(out.name + ".exporting")


def _remove_leftover(out: Path) -> None:
    """Remove the folder of an export that was killed after its result had got its name."""
    place = _place(out)
    if place.is_dir() and ((place / MARKER).exists() or not any(place.iterdir())):
        with writing(place), suppress(BlockingIOError), locked(place / MARKER):
            remove_folder(place, MARKER)


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """Yield an empty folder within one next to `out`, which is removed in the end.

    What an interrupted export left there is removed first. The marker is the first to come and the last to go, so that it is
    known for what it is whenever it is killed.
    """
    place = _place(out)
    with writing(place):
        if place.exists() and not (place / MARKER).exists() and any(place.iterdir()):
            raise OutputError(f"{place}: exists and is not an unfinished export; remove it, or choose another place")
        place.mkdir(parents=True, exist_ok=True)
        try:
            marker = locked(place / MARKER)
        except BlockingIOError:
            raise OutputError(f"{place}: another export is at work here; wait for it, or choose another place") from None
    with marker:
        folder = place / "checkpoint"
        try:
            with writing(place):
                empty_folder(place, MARKER)
                folder.mkdir()
            yield folder
        except Exception:
            remove_folder(place, MARKER)
            raise
        with writing(place):
            remove_folder(place, MARKER)
