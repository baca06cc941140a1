"""The model card (README.md) and the report (report.html) of a compressed checkpoint, made from the files beside its weights.

Names of sites, recipes and models come from files that anybody may have written: every text is escaped. The folder may be
published, so of a path on the machine that made it only the last name is shown.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress import charts
from compress.files import human_bytes, write_text
from compress.recipe_data import PRESETS, SUFFIXES
from compress.report import SiteRow, bits_per_weight, read_rows

CARD = "README.md"
REPORT = "report.html"
SHOWN = 200  # sites in the report's table
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CACHED = re.compile(
    r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]+)[/\\]?$"
)  # where the Hub's client keeps a model


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
    """The model that was compressed, as it may be shown."""

    name: str  # a Hub id, or the last name of a local folder
    hub: str | None
    revision: str | None

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Calibration:
    """The calibration data, as it may be shown."""

    name: str
    hub: str | None  # of the dataset
    samples: int
    length: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """What a folder tells about itself, read and made fit to show."""

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
        summary = _json(folder / "summary.json")
        rows = read_rows(folder / "report.jsonl")
        recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
        measured = folder / "evaluation.json"
        return cls(
            summary,
            rows,
            yaml.safe_dump(_public(yaml.safe_load(recipe)), sort_keys=False, allow_unicode=True, width=100),
            _json(folder / "config.json"),
            _json(measured) if measured.is_file() else None,
            _base(summary.get("base_model"), summary.get("base_revision")),
            _calibration(summary["identity"], rows),
        )

    @property
    def widths(self) -> list[int]:
        """The widths of the codes, in bits, most used first."""
        table = self.config.get("quantization_config") or {}
        specs = [spec.get("base", {}).get("bits") for spec in table.get("specs", [])]
        used = Counter(specs[number] for number in table.get("sites", {}).values() if 0 <= number < len(specs))
        found = sorted(bits for bits in used if isinstance(bits, int))
        return found or [round(self.summary["bits_per_compressed_weight"])]

    @property
    def headline(self) -> str:
        """How the weights are stored, in a few words."""
        methods = sorted({row.method.rsplit("/", 1)[-1].upper() for row in self.rows})
        bits = " and ".join(map(str, self.widths)) if len(self.widths) < 3 else f"{self.widths[0]} to {self.widths[-1]}"
        return f"{' + '.join(methods)}, {bits} bits" if methods else f"{bits} bits"

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the compressed weights alone."""
        return sum(row.stored_bits for row in self.rows) // 8

    @property
    def blocks(self) -> int:
        """Number of blocks with compressed weights."""
        return len({row.block for row in self.rows} - {None})


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _is_path(text: str) -> bool:
    local = (
        text.startswith(("/", "~", "./", "../", ".\\", "..\\", "\\\\", "file:")) or re.match(r"[A-Za-z]:[\\/]", text) is not None
    )
    return local or (PureWindowsPath(text).suffix.lower() in SUFFIXES and "\n" not in text)


def _last(text: str) -> str:
    return PureWindowsPath(text).name or "model"  # splits at both kinds of slash


def _public(value: Any) -> Any:
    """Plain values with every local path cut to its last name."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return _last(value) if isinstance(value, str) and _is_path(value) else value


def _base(name: Any, revision: Any) -> Base:
    """A name that came with a revision was fetched from the Hub; a folder has none, even where its path looks like an id."""
    text = str(name or "model")
    if cached := _CACHED.search(text):
        hub = f"{cached[1]}/{cached[2]}"
        return Base(hub, hub, cached[3])
    if revision and not _is_path(text) and _HUB_ID.fullmatch(text):
        return Base(text, text, str(revision))
    return Base(_last(text), None, None)


def _calibration(identity: dict[str, Any], rows: Sequence[SiteRow]) -> Calibration | None:
    data = identity["recipe"].get("data")
    if data is None or all(row.tokens is None for row in rows):
        return None
    name = str(data["name"])
    hub = PRESETS[name].path if name in PRESETS else name if not _is_path(name) and _HUB_ID.fullmatch(name) else None
    return Calibration(str(_public(name)), hub, data["samples"], data["length"], data["seed"], identity["calibration"])


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


def fallbacks(rows: Sequence[SiteRow]) -> list[str]:
    """Say for each kind of fallback how many weights took it and where."""
    groups: dict[str, list[SiteRow]] = {}
    for row in rows:
        if row.fallback is not None:
            groups.setdefault(re.sub(r":\s*\d+ of \d+ tokens", "", row.fallback), []).append(row)
    sentences = []
    for text, members in groups.items():
        experts = len({(row.block, row.expert) for row in members if row.expert is not None})
        where = f", {experts} experts" if experts else ""
        blocks = ", ".join(charts.name_of(block) for block in charts.blocks_of(members)[:12])
        more = " and more" if len(charts.blocks_of(members)) > 12 else ""
        sentences.append(f"{text}: {len(members):,} weights{where} (blocks {blocks}{more})")
    return sentences


def warnings(c: Checkpoint) -> list[str]:
    """What a user should know before using the checkpoint, in sentences."""
    found, s = [], c.summary
    if c.evaluation is None:
        found.append("Quality was not measured. Measure it with the command below before you rely on this checkpoint.")
    elif c.calibration is not None and c.evaluation["ids_sha256"] == c.calibration.sha256:
        found.append("Quality was measured on the calibration data itself, so it looks better than it is on other text.")
    if s["fallbacks"]:
        few = [row.tokens for row in c.rows if row.fallback is not None and row.tokens is not None]
        seen = f" They saw {min(few):,} to {max(few):,} calibration tokens." if few else ""
        found.append(
            f"{s['fallbacks']:,} of {s['sites']:,} weights were not compressed as the recipe asks but by a fallback.{seen}"
        )
    text = c.config.get("text_config") or c.config
    if text.get("tie_word_embeddings") is False and c.rows and all(row.block is not None for row in c.rows):
        size = int(text.get("vocab_size", 0)) * int(text.get("hidden_size", 0))
        how = f" ({charts.compact(size)} weights)" if size else ""
        found.append(
            f"The output head{how} is not tied to the embeddings and was left as it was: no step of the recipe takes it."
        )
    untouched = s["bytes_after"] - c.compressed_bytes
    if c.rows and untouched > 0.2 * s["bytes_after"]:
        share = untouched / s["bytes_after"]
        found.append(
            f"{human_bytes(untouched)} of the file, {share:.0%}, are tensors that were copied as they were, such as embeddings."
        )
    if dead := sum(bool(row.notes.get("dead_columns")) for row in c.rows):
        found.append(
            f"{dead:,} weights have input columns that calibration never reached; these were rounded without knowledge of their use."
        )
    if c.rows:
        errors = [charts.ordered(row.error) for row in c.rows]
        worst, middle = worst_first(c.rows)[0], median(errors)
        times = f", {worst.error / middle:.1f} times the median" if 0 < middle < math.inf and worst.error > middle else ""
        found.append(f"The largest error is that of {worst.site}: {worst.error:.3g}{times}.")
        if bad := sum(error >= 1 for error in errors):
            found.append(f"{bad:,} weights have an error of 1 or more: zeros in their place would be no worse.")
    return found


def worst_first(rows: Sequence[SiteRow]) -> list[SiteRow]:
    """Rows by falling error; one that is not a number counts as the largest."""
    return sorted(rows, key=lambda row: (-charts.ordered(row.error), row.site))


def figures(c: Checkpoint) -> list[Figure]:
    """The key figures."""
    s, e = c.summary, c.evaluation or {}
    result = [
        Figure(
            "Size",
            human_bytes(s["bytes_after"]),
            human_bytes(s["bytes_before"]),
            f"{s['bytes_after'] / max(s['bytes_before'], 1):.1%} of the original",
        ),
        Figure(
            "Bits per weight, compressed weights",
            f"{s['bits_per_compressed_weight']:.3f}",
            "",
            f"{s['sites']:,} weights, scales and all counted",
        ),
        Figure(
            "Bits per weight, whole file",
            f"{s['bits_per_weight']:.3f}",
            f"{s['bytes_before'] * 8 / max(s['weights'], 1):.3f}",
            f"{s['weights']:,} values",
        ),
    ]
    if e:
        before, kl, error = e["perplexity_before"], e["kl"], e["kl_standard_error"]
        change = f"{e['perplexity'] / before - 1:+.2%}" if before else "the original was not measured"
        result.append(Figure("Perplexity", f"{e['perplexity']:.3f}", f"{before:.3f}" if before else "", change))
        if kl is not None:
            result.append(
                Figure("KL divergence", f"{kl:.5f}", "", "nats per token" + (f", ± {error:.5f}" if error is not None else ""))
            )
        if e["agreement"] is not None:
            result.append(Figure("Top-1 agreement", f"{e['agreement']:.2%}", "", "same most likely token"))
        if (speed := e["tokens_per_second"]) is not None:
            was = e["tokens_per_second_before"]
            result.append(Figure("Tokens per second", f"{speed:.1f}", f"{was:.1f}" if was else "", f"batch 1, {e['device']}"))
    else:
        result.append(Figure("Quality", "not measured", "", "see the command below"))
    result.append(Figure("Time", duration(s["seconds"]), "", f"{duration(s['compute_seconds'])} of it in the blocks"))
    result.append(Figure("Fallbacks", f"{s['fallbacks']:,}", "", f"of {s['sites']:,} weights"))
    return result


def duration(seconds: float) -> str:
    """Write a time as people read it: 12.3 min."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def versions(c: Checkpoint) -> list[tuple[str, str]]:
    """What made the checkpoint, and from what."""
    run, s = c.summary["identity"].get("run", {}), c.summary
    table = c.config.get("quantization_config") or {}
    found = [
        ("compress", s["version"]),
        ("torch", run.get("torch")),
        ("format version", table.get("format_version")),
        ("computed on", " in ".join(str(run[key]) for key in ("device", "dtype") if key in run)),
        ("architecture", ", ".join(c.config.get("architectures") or []) or c.config.get("model_type")),
        ("source revision", c.base.revision),
        ("recipe sha256", s["recipe_sha256"]),
    ]
    return [(name, str(value)) for name, value in found if value]


def commands(c: Checkpoint) -> dict[str, str]:
    """The commands that make, measure and check the checkpoint; `.` is its folder."""
    quote, e, device = shlex.quote, c.evaluation, c.summary["identity"].get("run", {}).get("device", "auto")
    revision = f" --revision {quote(c.base.revision)}" if c.base.revision else ""
    measure = f"compress eval . --data TEXT --original {quote(c.base.name)} --save"
    if e is not None:
        original = f" --original {quote(c.base.name)}" if e["original"] is not None else ""
        shape = f"--samples {e['windows']} --length {e['length']}"
        measure = f"compress eval . --data {quote(str(_public(e['data'])))} {shape}{original} --dtype {e['dtype']} --device {e['device']} --save"
    return {
        "make": f"compress run recipe.yaml {quote(c.base.name)}{revision} -o OUT --device {device}",
        "measure": measure,
        "verify": "compress verify .",
    }


def front_matter(c: Checkpoint) -> dict[str, Any]:
    """What the Hub reads of a card."""
    values: dict[str, Any] = {}
    if c.base.hub is not None:
        values = {"base_model": c.base.hub, "base_model_relation": "quantized"}
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if c.summary.get("license"):
        values["license"] = str(c.summary["license"])
    if c.calibration is not None and c.calibration.hub is not None:
        values["datasets"] = [c.calibration.hub]
    values["tags"] = ["compress", "quantized", *(f"{bits}-bit" for bits in c.widths)]
    return values


def _fenced(text: str, language: str = "") -> _Markdown:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return _Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


class _Markdown(str):
    """Text that is Markdown already and needs no escape."""


def _escaped(value: Any) -> str:
    """Any text as Markdown that shows it, on one line."""
    if isinstance(value, _Markdown):
        return value
    text = re.sub(r"\s+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)


def _code(value: Any) -> _Markdown:
    """Any text as code within a line, in a table or not."""
    text = re.sub(r"\s+", " ", str(value)).replace("`", "'").replace("|", "¦")
    return _Markdown(f"`{text}`")


def _environment(markdown: bool) -> Environment:
    # Markdown has no escaping of its own in Jinja: `finalize` sees every value that a template prints.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=not markdown,
        finalize=_escaped if markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"bytes": human_bytes, "duration": duration, "code": _code, "fenced": _fenced, "public": _public}
    return environment


def write(folder: Path) -> None:
    """Write or refresh README.md and report.html of a checkpoint from the files in its folder."""
    c = Checkpoint.read(folder)
    values = {
        "c": c,
        "figures": figures(c),
        "warnings": warnings(c),
        "kinds": kinds(c.rows),
        "fallbacks": fallbacks(c.rows),
        "versions": versions(c),
        "commands": commands(c),
        "tokens": bool(c.calibration),
    }
    matter = yaml.safe_dump(front_matter(c), sort_keys=False, allow_unicode=True)
    body = _environment(markdown=True).get_template("card.md.jinja").render(values)
    drawn = {
        "bars": charts.bars(c.summary["bytes_before"], c.summary["bytes_after"], c.compressed_bytes),
        "panels": charts.error_panels(c.rows),
        "maps": [chart for chart in (charts.bits_map(c.rows), charts.expert_map(c.rows)) if chart is not None],
        "worst": worst_first(c.rows)[:SHOWN],
    }
    page = _environment(markdown=False).get_template("report.html.jinja").render(values | drawn)
    write_text(folder / CARD, f"---\n{matter}---\n\n{body}")
    write_text(folder / REPORT, page)
