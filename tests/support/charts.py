"""Reports and plans without charts: matplotlib takes more than half of the time of a run, or a plan, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.planning import plots
from compress.report import svg

BLANK = "<svg></svg>"


def _blank(shown: Any, path: Path) -> None:
    path.write_text(BLANK)


def leave_out(setattr: Any = setattr) -> None:
    """Let charts be blank; with `setattr` of a MonkeyPatch, until it is undone."""
    setattr(svg, "panel", lambda shown: BLANK)
    setattr(svg, "heat_map", lambda shown: svg.Drawing(BLANK, {}))
    setattr(plots, "plot", _blank)
    setattr(plots, "curve", _blank)
