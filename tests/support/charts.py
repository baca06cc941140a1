"""Reports without charts: matplotlib takes more than half of the time of a run on a tiny model."""

from __future__ import annotations

from typing import Any

from compress.report import svg

BLANK = "<svg></svg>"


def leave_out(setattr: Any = setattr) -> None:
    """Let reports have blank charts; with `setattr` of a MonkeyPatch, until it is undone."""
    setattr(svg, "panel", lambda shown: BLANK)
    setattr(svg, "heat_map", lambda shown: svg.Drawing(BLANK, {}))
