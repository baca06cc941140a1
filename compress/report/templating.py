"""Templates that escape every text they print: names of sites, recipes and models come from untrusted files."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress.system.files import duration, human_bytes


class _Markdown(str):
    """Text that is Markdown already and needs no escape."""


def _fenced(text: str, language: str = "") -> _Markdown:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return _Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _escaped(value: Any) -> str:
    """Any text escaped for Markdown, on one line."""
    if isinstance(value, _Markdown):
        return value
    text = re.sub(r"\s+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("`", "&#96;")
    return re.sub(r"([\\*_{}\[\]|~$])", r"\\\1", text)


def plain(text: str) -> str:
    """Mark a text of this package as Markdown that needs no escape."""
    return _Markdown(text)


def _code(value: Any) -> _Markdown:
    """Any text as inline code, in a table or not."""
    text = re.sub(r"\s+", " ", str(value)).replace("`", "'").replace("|", "¦")
    return _Markdown(f"`{text}`")


@cache
def environment(markdown: bool) -> Environment:
    """The templates' environment, which escapes the values they print for Markdown or for HTML; templates are compiled once."""
    # Jinja has no escaping for Markdown: `finalize` sees every value that a template prints.
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
