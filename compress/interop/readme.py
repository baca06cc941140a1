"""The README of an export: how it is stored, which runtimes read it, and what the Hub knows about the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint.source import Source
from compress.errors import CheckpointError
from compress.interop.layout import Layout
from compress.report.redaction import LONGEST_CARD
from compress.report.summary import evaluation
from compress.report.templating import environment, plain
from compress.system.side_files import read_text

_KEPT = ("base_model", "base_model_relation", "license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def _matter(folder: Path) -> dict[str, Any]:
    """The front matter of a checkpoint's card: what the Hub knows about a model stays with its weights."""
    try:
        parts = read_text(folder / "README.md", LONGEST_CARD).split("---\n", 2)
        values = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except (CheckpointError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def text(source: Source, summary: dict[str, Any], name: str, form: Layout[Any]) -> str:
    """Return the README of an export, given its record and layout, with the scores of its source if there are any."""
    scores = evaluation(source.folder)
    kept = {key: value for key, value in _matter(source.folder).items() if key in _KEPT}
    matter = yaml.safe_dump({**kept, "tags": ["compress", summary["format"], "quantized"]}, sort_keys=False, allow_unicode=True)
    body = environment(markdown=True).get_template("export.md.jinja")
    shown = body.render(
        name=name,
        model_type=source.model_type,
        s=summary,
        readers=plain(form.readers),
        plain=form.plain,
        e=scores and scores | {"tokens_per_second": None},  # another runtime has its own speed
        whose="source checkpoint",
        left_out=summary.get("left_out", []),
    )
    return f"---\n{matter}---\n\n{shown}"
