"""The console, tables, and numbers with their errors, as all commands print them."""

from __future__ import annotations

import os

from rich import box
from rich.console import Console
from rich.table import Table

_PIPED = 160  # columns where there is no terminal
_NUMBERS = (
    *("count", "largest", "relative", "codes that differ", "bits", "size", "before", "after", "original", "model"),
    *("predicted KL", "measured KL", "weights"),
)


def console() -> Console:
    """The console of standard output."""
    console = Console(highlight=False)
    # A program that reads a pipe expects each row of a table on a line of its own.
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_PIPED)


def table_of(title: str, *columns: str) -> Table:
    """A table without boxes: only the last column may wrap, numbers stand on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=name not in ("method", "stored"), justify="right" if name in _NUMBERS else "left")
    return table


def with_error(value: tuple[float, float | None] | None) -> str:
    """A KL divergence with its standard error, if that is known; empty for None."""
    if value is None:
        return ""
    return f"{value[0]:.5f}" + ("" if value[1] is None else f" ± {value[1]:.5f}")


def interval_text(interval: tuple[float, float] | None, form: str) -> str:
    """A 95 % interval as text that follows its value; empty for None."""
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
