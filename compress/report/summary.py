"""Facts about a compressed checkpoint: the files next to its weights, turned into figures and sentences.

The folder may be published, so only the last name of a local path is kept.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from compress.errors import CheckpointError
from compress.recipe.data import OWN, PRESETS, Data
from compress.report import charts
from compress.report.redaction import base_model, cleaned_recipe, data_name, is_hub_id
from compress.report.rows import SiteRow, bits_per_weight, read_rows
from compress.system.files import duration, human_bytes
from compress.system.side_files import MAX_BYTES, open_regular, parse_json, read_object, read_text

# Keys that every evaluation has, and keys that it may leave out.
_MEASURED = ("data", "perplexity", "windows", "length", "ids_sha256", "dtype", "device")
_OPTIONAL = (
    "original",
    "perplexity_before",
    "kl",
    "kl_standard_error",
    "agreement",
    "perplexity_interval",
    "perplexity_before_interval",
    "perplexity_ratio",
    "perplexity_ratio_interval",
    "kl_interval",
    "agreement_interval",
    "tasks",
    "tokens_per_second",
    "tokens_per_second_before",
    "measured",
)


@dataclass(frozen=True)
class Figure:
    """A key figure of the header."""

    label: str
    value: str
    before: str = ""
    note: str = ""


@dataclass(frozen=True)
class Kind:
    """All compressed weights of one kind."""

    name: str
    count: int
    shapes: str
    method: str
    bits: float
    bytes: int
    error: float  # median
    worst: float


@dataclass(frozen=True)
class Base:
    """The model that was compressed, fit to publish."""

    name: str  # a Hub id, or the last name of a local folder
    hub: str | None
    revision: str | None

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Calibration:
    """The calibration data, fit to publish."""

    name: str
    hub: str | None  # Hub id of the dataset
    samples: int
    length: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a folder's records, made fit to publish."""

    summary: dict[str, Any]
    rows: list[SiteRow]
    recipe: str
    config: dict[str, Any]
    evaluation: dict[str, Any] | None
    base: Base
    calibration: Calibration | None

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read the files that a run and an evaluation left in a folder."""
        summary = read_object(folder / "summary.json")
        rows = read_rows(folder / "report.jsonl")
        return cls(
            summary,
            rows,
            _recipe(read_text(folder / "recipe.yaml")),
            read_object(folder / "config.json"),
            evaluation(folder),
            _base(summary.get("base_model"), summary.get("base_revision")),
            _calibration(summary["identity"], rows),
        )

    def _stored(self, key: str) -> list[int]:
        """The values of a property of the codes in this checkpoint, sorted."""
        table = self.config.get("quantization_config") or {}
        found = {spec.get("base", {}).get(key) for spec in table.get("specs", [])}
        return sorted(value for value in found if isinstance(value, int))

    @property
    def widths(self) -> list[int]:
        """The widths of the codes, in bits."""
        if found := self._stored("bits"):
            return found
        whole = [row for row in self.rows if "sparsity" not in row.notes]  # weights that are only pruned have no codes
        return [round(self.summary["bits_per_compressed_weight"])] if whole else []

    @property
    def sparsity(self) -> float | None:
        """Share of the pruned weights that was removed; None where nothing was pruned."""
        pruned = [row for row in self.rows if "sparsity" in row.notes]
        gone = sum(row.notes["sparsity"] * row.numel for row in pruned)
        return gone / sum(row.numel for row in pruned) if pruned else None

    @property
    def headline(self) -> str:
        """How the weights are stored, in a few words."""
        if not self.rows:
            return "nothing compressed"
        before = sorted({path for row in self.rows for path in row.notes if path.startswith("transform/")})
        methods = [m.rsplit("/", 1)[-1].upper() for m in (*before, *sorted({row.method for row in self.rows}))]
        gone = [] if self.sparsity is None else [f"{self.sparsity:.0%} of the weights removed"]
        widths = []
        if self.widths:
            bits = " and ".join(map(str, self.widths)) if len(self.widths) < 3 else f"{self.widths[0]} to {self.widths[-1]}"
            widths = [f"{bits} bit{'s' if bits != '1' else ''}"]
        sizes = self._stored("group_size")
        groups = [f"groups of {sizes[0]}"] if len(sizes) == 1 else []
        return ", ".join([" + ".join(methods), *gone, *widths, *groups])

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the compressed weights alone."""
        return sum(row.stored_bits for row in self.rows) // 8

    @property
    def blocks(self) -> int:
        """Number of blocks with compressed weights."""
        return len({row.block for row in self.rows} - {None})


def evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation of a checkpoint, fit to publish; None without one, or without one by this package."""
    try:
        values = dict.fromkeys(_OPTIONAL) | read_object(folder / "evaluation.json")
        if any(key not in values for key in _MEASURED):
            return None
        return values | {"data": data_name(str(values["data"]))}
    except (CheckpointError, ValueError, TypeError):
        return None


def _recipe(text: str) -> str:
    """A recipe without the folders of local files."""
    values = cleaned_recipe(yaml.safe_load(text))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _base(name: Any, revision: Any) -> Base:
    """A model with a revision came from the Hub; a local folder has none, even if its path looks like a Hub id."""
    shown, found = base_model(str(name or "model"), str(revision) if revision else None)
    return Base(shown, shown if found else None, found)


def _calibration(identity: dict[str, Any], rows: Sequence[SiteRow]) -> Calibration | None:
    data = identity["recipe"].get("data")
    if data is None or all(row.tokens is None for row in rows):
        return None
    name = str(data["name"])
    shown = data_name(name)
    hub = (
        PRESETS[name].path
        if name in PRESETS
        else name
        if name not in OWN and Data(name=name).suffix is None and is_hub_id(shown)
        else None
    )
    return Calibration(shown, hub, data["samples"], data["length"], data["seed"], identity["calibration"])


def kinds(rows: Sequence[SiteRow]) -> list[Kind]:
    """Sum up the rows by kind."""
    result = []
    for name, blocks in charts.by_kind(rows).items():
        members = [row for group in blocks.values() for row in group]
        shapes = Counter(f"{row.shape[0]} × {row.shape[1]}" for row in members)
        methods = sorted({row.method for row in members})
        errors = [charts.ordered(row.error) for row in members]
        stored = sum(row.stored_bits for row in members) // 8
        bits = bits_per_weight(members)
        result.append(Kind(name, len(members), ", ".join(shapes), ", ".join(methods), bits, stored, median(errors), max(errors)))
    return result


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


@dataclass(frozen=True)
class Predicted:
    """A predicted quantity of a run, and its measured value."""

    name: str
    said: str
    measured: str
    ratio: float | None  # measured over predicted


def predicted(c: Checkpoint) -> list[Predicted]:
    """Predictions made before the run, with measured values; empty for checkpoints of older versions."""
    said = c.summary.get("predicted")
    if not said:
        return []
    s = c.summary

    def row(name: str, before: float | None, after: float, text: Callable[[float], str]) -> list[Predicted]:
        return [] if not before else [Predicted(name, text(before), text(after), after / before)]

    return [
        *row("time, on a machine as busy as in the beginning", said["seconds"], s["seconds"], duration),
        *row("peak memory", said["memory"], s["peak_memory"], human_bytes),
        *row(f"bytes of all tensors{_range(said)}", said["bytes_after"], s["bytes_after"], lambda count: f"{int(count):,}"),
    ]


def _range(said: Mapping[str, Any]) -> str:
    """The predicted range of a size that depends on the values; empty for checkpoints of older versions."""
    least, most = said.get("range_after") or (0, 0)
    return "" if least == most else f", said to be between {least:,} and {most:,}"


def reused(cache: Mapping[str, int]) -> str:
    """How much of the cached statistics a run reused, and how much it made."""
    text = f"{cache['found']:,} passes of the calibration over a block skipped, {cache['made']:,} made and kept"
    if left_out := cache.get("blocks_left_out"):
        text += f"; the calibration was not run through {counted(left_out, 'block')} at all"
    return text


def parts_of(c: Checkpoint, folder: Path) -> list[tuple[str, int, bool, str]]:
    """Label, bytes, whether compressed, and note of everything in the weight files: kinds of weights, and copied tensors."""
    kinds_: dict[str, list[SiteRow]] = {}
    for row in c.rows:
        kinds_.setdefault(row.kind, []).append(row)
    found = [
        (name, sum(row.stored_bits for row in members) // 8, True, f" ({counted(len(members), 'matrix', 'matrices')})")
        for name, members in kinds_.items()
    ]
    sites = {row.site for row in c.rows}
    copied: dict[str, list[int]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        for name, size in _stored(path).items():
            owner = name.rpartition(".")[0]
            if owner not in sites or name.endswith(".bias"):
                copied.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(size)
    if copied:
        found += [(name, sum(sizes), False, f" ({counted(len(sizes), 'tensor')})") for name, sizes in copied.items()]
    else:
        found.append(("everything else", c.summary["bytes_after"] - c.compressed_bytes, False, ""))
    return found


def _stored(path: Path) -> dict[str, int]:
    """Bytes of each tensor in a weight file that this package wrote."""
    with open_regular(path) as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(os.fstat(stream.fileno()).st_size, MAX_BYTES):
            raise CheckpointError(f"{path}: its header claims {length} bytes; fetch the file again")
        header = parse_json(stream.read(length), str(path))
    try:
        return {name: v["data_offsets"][1] - v["data_offsets"][0] for name, v in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); fetch the file again") from error


def worst_first(rows: Sequence[SiteRow]) -> list[SiteRow]:
    """Rows by descending error; NaN counts as the largest."""
    return sorted(rows, key=lambda row: (-charts.ordered(row.error), row.site))


def figures(c: Checkpoint) -> list[Figure]:
    """The key figures."""
    s, e = c.summary, c.evaluation
    before, after, weights = s["bytes_before"], s["bytes_after"], max(s["weights"], 1)
    time = Figure("Time", duration(s["seconds"]), "", f"{duration(s['compute_seconds'])} of it in the blocks")
    return [
        Figure("Size", human_bytes(after), human_bytes(before), f"{after / max(before, 1):.1%} of the original"),
        Figure(
            "Bits per compressed weight",
            f"{s['bits_per_compressed_weight']:.3f}",
            f"{before * 8 / weights:.4g}",
            f"{s['bits_per_weight']:.3f} over the whole file",
        ),
        *(_quality_figures(e) if e is not None else []),
        time,
        Figure("Fallbacks", f"{s['fallbacks']:,}", "", f"of {counted(s['sites'], 'matrix', 'matrices')}"),
    ]


def _quality_figures(e: dict[str, Any]) -> list[Figure]:
    was, speed_was = e["perplexity_before"], e["tokens_per_second_before"]
    change = f"{e['perplexity'] / was - 1:+.2%}" if was else "the original was not measured"
    result = [Figure("Perplexity", f"{e['perplexity']:.3f}", f"{was:.3f}" if was else "", change)]
    if e["kl"] is not None:
        result.append(Figure("KL divergence", f"{e['kl']:.5f}", "", f"{between(e, 'kl', '.5f')}nats per token"))
    if e["agreement"] is not None:
        note = f"{between(e, 'agreement', '.1%')}of positions, same likeliest token"
        result.append(Figure("Top-1 agreement", f"{e['agreement']:.2%}", "", note))
    if e["tokens_per_second"] is not None:
        before = f"{speed_was:.1f}" if speed_was else ""
        result.append(Figure("Tokens per second", f"{e['tokens_per_second']:.1f}", before, f"batch 1, {e['device']}"))
    return result


def between(e: dict[str, Any], key: str, form: str) -> str:
    """The interval of an evaluated value, as text to put before its unit; its standard error in older files."""
    if (ends := e.get(f"{key}_interval")) is not None:
        return f"{ends[0]:{form}} to {ends[1]:{form}}, "
    error = e.get(f"{key}_standard_error")
    return "" if error is None else f"± {error:{form}} "


def versions(c: Checkpoint) -> list[tuple[str, str]]:
    """Versions of the software and of the source that made the checkpoint."""
    run, s = c.summary["identity"].get("run", {}), c.summary
    table = c.config.get("quantization_config") or {}
    found = [
        ("compress", s["version"]),
        ("torch", run.get("torch")),
        ("format version", table.get("format_version")),
        ("computed on", " in ".join(str(run[key]) for key in ("device", "dtype") if key in run)),
        ("architecture", ", ".join(map(str, c.config.get("architectures") or [])) or c.config.get("model_type")),
        ("source revision", c.base.revision),
        ("recipe sha256", s["recipe_sha256"]),
    ]
    return [(name, str(value)) for name, value in found if value]


def commands(c: Checkpoint) -> dict[str, str]:
    """The commands that make, measure and check the checkpoint; `.` is its folder."""
    e, run = c.evaluation, c.summary["identity"].get("run", {})
    make = ["compress run recipe.yaml", shlex.quote(c.base.name), "-o OUT", f"--device {run.get('device', 'auto')}"]
    if c.base.revision:
        make.insert(2, f"--revision {shlex.quote(c.base.revision)}")
    measure = ["compress eval .", "--data TEXT", f"--original {shlex.quote(c.base.name)}", "--save"]
    if e is not None:
        measure = ["compress eval .", f"--data {shlex.quote(e['data'])}", f"--samples {e['windows']} --length {e['length']}"]
        if e["original"] is not None:
            other = _base(e["original"], None)
            measure.append(f"--original {shlex.quote(c.base.name if other.short == c.base.short else other.name)}")
        measure += [f"--dtype {e['dtype']} --device {e['device']}", "--save"]
    return {"make": _lines(make), "measure": _lines(measure), "verify": "compress verify ."}


def _lines(parts: Sequence[str]) -> str:
    """Join the parts of a command, on several lines when it gets long."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > 90:
            lines[-1] += " \\"
            lines.append("    " + part)
        else:
            lines[-1] += " " + part
    return "\n".join(lines)
