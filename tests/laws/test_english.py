"""Docstrings and comments say things as English does: the phrases of a list in CONTRIBUTING.md do not occur in the package.

Modules that still have some are in `exceptions.toml`. That list may only shrink.
"""

from __future__ import annotations

import re
import tomllib

import pytest
from package_text import modules, prose
from places import ROOT, TESTS

EXCEPTIONS = tomllib.loads((TESTS / "laws" / "exceptions.toml").read_text(encoding="utf-8"))["translated phrases"]
ROWS = re.findall(r"^\| `([a-z ]+)` \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
PHRASES = [phrase for phrase, _ in ROWS]
PATTERN = re.compile(rf"\b({'|'.join(PHRASES)})\b", flags=re.IGNORECASE)


def translated(module: str, text: str) -> set[str]:
    """The module, where a docstring or a comment has a phrase of the list."""
    return {module for piece in prose(text) if PATTERN.search(piece)}


def test_the_list_has_replacements() -> None:
    assert len(set(PHRASES)) == len(PHRASES) > 10
    assert all(PATTERN.search(words) is None for _, words in ROWS)


def test_prose_is_not_translated() -> None:
    found = {place for module, text in modules().items() for place in translated(module, text)}
    assert sorted(found - set(EXCEPTIONS)) == [], "these modules have phrases that CONTRIBUTING.md replaces"
    assert sorted(set(EXCEPTIONS) - found) == [], "no longer needed: delete them from the list"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"""Read it anew."""', True),
        ('def f():\n    """Which goes\n    along."""', True),
        ("x = 1  # Nobody knows", True),
        ("# what is let\n# go of\nx = 1", True),
        ('x = "anew"\n"""Beware of whoevers."""', False),
        ("# let\nx = 1\n# go of", False),
    ],
)
def test_phrases_are_found(text: str, found: bool) -> None:
    assert translated("a", text) == ({"a"} if found else set())
