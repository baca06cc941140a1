"""docs/all-methods.md has a row for every method that is registered, with an equation, and names no other."""

from __future__ import annotations

import re

from places import ROOT

from compress import registry

ROWS = {
    found[1]: [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]
    for line in (ROOT / "docs" / "all-methods.md").read_text(encoding="utf-8").splitlines()
    if (found := re.match(r"\| `(\w+/\w+)` \|", line))
}


def test_every_method_has_its_row() -> None:
    there = {f"{kind}/{name}" for kind in ("quant", "prune", "transform", "tune", "retrain") for name in registry.names(kind)}
    assert set(ROWS) == there


def test_rows_say_what_is_promised() -> None:
    """Problem with symbols, order, defaults, and either a figure or that there is none."""
    for name, cells in ROWS.items():
        assert len(cells) == 4 and all(cells), name
        problem, _, _, measured = cells
        assert re.search(r"[=|<>^]|sum|min", problem), name
        assert re.search(r"\d\.\d+|not measured|results\.md", measured), name
