"""The console, tables, and numbers with their errors, as all commands print them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from compress.errors import printable

_PIPED = 160  # columns where there is no terminal
_NUMBERS = (
    *("count", "largest", "relative", "codes that differ", "bits", "size", "before", "after", "original", "model"),
    *("predicted KL", "measured KL", "weights"),
)


class _Printable(Console):
    """A console on which names from models and recipes cannot move the cursor, colour or hide anything."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console() -> Console:
    """The console of standard output."""
    console = _Printable(highlight=False)
    # A program that reads a pipe expects each row of a table on a line of its own.
    return console if console.is_terminal or "COLUMNS" in os.environ else _Printable(highlight=False, width=_PIPED)


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
