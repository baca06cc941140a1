"""Templates that escape every text they print: names of sites, recipes and models come from untrusted files."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress.errors import printable
from compress.system.files import duration, human_bytes

# Of HTML; of code; and of what some renderers turn into links, mentions and smileys without being asked.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "`": "&#96;", "://": "&#58;//", "@": "&#64;", "www.": "www&#46;"}
# What makes a heading, a list or a rule of a text that begins a line.
_BEGINS = re.compile(r"^([#+=-])(?=[#=-]*(\s|$))")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s)")


class _Markdown(str):
    """Text that is Markdown already and needs no escape."""


def _fenced(text: str, language: str = "") -> _Markdown:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return _Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def escaped(value: Any) -> str:
    """Any text escaped for Markdown, on one line."""
    if isinstance(value, _Markdown):
        return value
    text = re.sub(r"\s+", " ", printable(str(value)))
    for character, entity in _ENTITIES.items():
        text = text.replace(character, entity)
    text = re.sub(r"([\\*_{}\[\]|~$])", r"\\\1", text)
    return _NUMBERED.sub(r"\1\\\2", _BEGINS.sub(r"\\\1", text))


def plain(text: str) -> str:
    """Mark a text of this package as Markdown that needs no escape."""
    return _Markdown(text)


def _code(value: Any) -> _Markdown:
    """Any text as inline code, in a table or not."""
    text = re.sub(r"\s+", " ", printable(str(value))).replace("`", "'").replace("|", "¦") or " "
    return _Markdown(f"`{text}`")


@cache
def environment(markdown: bool) -> Environment:
    """The templates' environment, which escapes the values they print for Markdown or for HTML; templates are compiled once."""
    # Jinja has no escaping for Markdown: `finalize` sees every value that a template prints.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=not markdown,
        finalize=escaped if markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"bytes": human_bytes, "duration": duration, "code": _code, "fenced": _fenced}
    return environment
