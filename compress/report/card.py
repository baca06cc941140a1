"""The model card (README.md) and the report (report.html) of a compressed checkpoint, made from the files next to its weights.

Names of sites, recipes and models come from untrusted files, so every text is escaped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress._version import __version__
from compress.report import charts, notices, treemap
from compress.report import comparison as front
from compress.report import summary as facts
from compress.report import svg as drawing
from compress.report.summary import Checkpoint
from compress.report.templating import environment
from compress.system.files import write_text

CARD = "README.md"
REPORT = "report.html"
SHOWN = 200  # sites in the report's table


def front_matter(c: Checkpoint) -> dict[str, Any]:
    """The part of a card that the Hub reads."""
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
        "reused": facts.reused(kept) if (kept := c.summary.get("cache")) else None,
    }
    matter = yaml.safe_dump(front_matter(c), sort_keys=False, allow_unicode=True)
    body = environment(markdown=True).get_template("card.md.jinja").render(values)
    maps = [m for m in (charts.bits_map(c.rows), charts.outlier_map(c.rows), charts.expert_map(c.rows)) if m is not None]
    drawn = {
        "bars": charts.bars(c.summary["bytes_before"], c.summary["bytes_after"], c.compressed_bytes),
        "panels": [(panel, drawing.panel(panel)) for panel in charts.error_panels(c.rows)],
        "maps": [(one, drawing.heat_map(one)) for one in maps],
        "boxes": treemap.treemap(facts.parts_of(c, folder)),
        "predicted": facts.predicted(c),
        "worst": facts.worst_first(c.rows)[:SHOWN],
    }
    page = environment(markdown=False).get_template("report.html.jinja").render(values | drawn)
    write_text(folder / CARD, f"---\n{matter}---\n\n{body}")
    write_text(folder / REPORT, page)


def write_comparison(entries: list[front.Entry], path: Path) -> None:
    """Write the page that compares several checkpoints."""
    template = environment(markdown=False).get_template("compare.html.jinja")
    fronts = {"broad": drawing.front(entries), "narrow": drawing.front(entries, 360.0, 340.0)}  # for screens and for phones
    values = {"entries": entries, "notices": front.notices(entries), "fronts": fronts, "version": __version__}
    write_text(path, template.render(values))
