"""The model card (README.md) and the report (report.html) of a compressed checkpoint, made from the files beside its weights.

Names of sites, recipes and models come from files that anybody may have written, so every text is escaped.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress import charts, facts, front, notices, treemap
from compress._version import __version__
from compress.facts import Checkpoint
from compress.files import duration, human_bytes, write_text

CARD = "README.md"
REPORT = "report.html"
SHOWN = 200  # sites in the report's table


def front_matter(c: Checkpoint) -> dict[str, Any]:
    """What the Hub reads of a card."""
    values: dict[str, Any] = {}
    if c.base.hub is not None:
        pruned = bool(c.rows) and all(row.method.startswith("prune/") for row in c.rows)
        values = {"base_model": c.base.hub, "base_model_relation": "pruned" if pruned else "quantized"}
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    values |= c.summary.get("card", {})
    if c.calibration is not None and c.calibration.hub is not None:
        values["datasets"] = [c.calibration.hub]
    kinds = [*(["pruned"] if c.sparsity is not None else []), *(["quantized"] if c.widths or c.sparsity is None else [])]
    values["tags"] = ["compress", *kinds, *(f"{bits}-bit" for bits in c.widths)]
    return values


class _Markdown(str):
    """Text that is Markdown already and needs no escape."""


def _fenced(text: str, language: str = "") -> _Markdown:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return _Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _escaped(value: Any) -> str:
    """Any text as Markdown that shows it, on one line."""
    if isinstance(value, _Markdown):
        return value
    text = re.sub(r"\s+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("`", "&#96;")
    return re.sub(r"([\\*_{}\[\]|~$])", r"\\\1", text)


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
    environment.filters |= {"bytes": human_bytes, "duration": duration, "code": _code, "fenced": _fenced}
    return environment


def write(folder: Path) -> None:
    """Write or refresh README.md and report.html of a checkpoint from the files in its folder."""
    c = Checkpoint.read(folder)
    values = {
        "c": c,
        "figures": facts.figures(c),
        "notices": notices.notices(c),
        "kinds": facts.kinds(c.rows),
        "fallbacks": notices.fallbacks(c.rows),
        "versions": facts.versions(c),
        "commands": facts.commands(c),
    }
    matter = yaml.safe_dump(front_matter(c), sort_keys=False, allow_unicode=True)
    body = _environment(markdown=True).get_template("card.md.jinja").render(values)
    drawn = {
        "bars": charts.bars(c.summary["bytes_before"], c.summary["bytes_after"], c.compressed_bytes),
        "panels": charts.error_panels(c.rows),
        "maps": [
            chart
            for chart in (charts.bits_map(c.rows), charts.outlier_map(c.rows), charts.expert_map(c.rows))
            if chart is not None
        ],
        "boxes": treemap.treemap(facts.parts_of(c, folder)),
        "predicted": facts.predicted(c),
        "worst": facts.worst_first(c.rows)[:SHOWN],
    }
    page = _environment(markdown=False).get_template("report.html.jinja").render(values | drawn)
    write_text(folder / CARD, f"---\n{matter}---\n\n{body}")
    write_text(folder / REPORT, page)


def write_comparison(entries: list[front.Entry], path: Path) -> None:
    """Write the page of several checkpoints."""
    template = _environment(markdown=False).get_template("compare.html.jinja")
    values = {"entries": entries, "notices": front.notices(entries), "chart": front.chart(entries), "version": __version__}
    write_text(path, template.render(values))
