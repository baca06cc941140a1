"""What a checkpoint may say to others: of a path on the machine that made it only the last name is kept."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from compress.errors import CheckpointError
from compress.recipe.data import SUFFIXES
from compress.system.side_files import read_text

LOCAL = ".local.json"  # where a checkpoint notes, for this machine alone, what it was made from
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Where the Hub's client keeps a model.
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]+)[/\\]?$")
_PATHS = ("/", "~", "./", "../", ".\\", "..\\", "\\\\", "file:")
# An absolute path in the middle of a text.
_WITHIN = re.compile(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+-]+){2,}[/\\]?")
LONGEST_CARD = 1 << 20  # bytes of a model card
_CARD_KEYS = ("license", "license_name", "license_link", "language")


def is_path(text: str) -> bool:
    """Whether a text looks like a path of a machine."""
    return text.startswith(_PATHS) or re.match(r"[A-Za-z]:[\\/]", text) is not None


def is_hub_id(text: str) -> bool:
    """Whether a text can be the name of a repository."""
    return not is_path(text) and _HUB_ID.fullmatch(text) is not None


def last(text: str) -> str:
    """The last name of a path, split at both kinds of slash."""
    return PureWindowsPath(text).name or "model"


def data_name(name: str) -> str:
    """A preset or a Hub id as it is, a file without its folders."""
    return last(name) if is_path(name) or PureWindowsPath(name).suffix.lower() in SUFFIXES else name


def cleaned(value: Any) -> Any:
    """Plain values with every absolute path cut to its last name, within longer texts too."""
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if not isinstance(value, str):
        return value
    whole = is_path(value) and "\n" not in value
    return last(value) if whole else _WITHIN.sub(lambda found: last(found[0]), value)


def cleaned_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values with nothing left out but the folders of local files."""
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        values = {**values, "data": {**data, "name": data_name(data["name"])}}
    result: dict[str, Any] = cleaned(values)
    return result


def base_model(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return a model's name and revision as they may be shown: a Hub id, which came with a revision or lies in the Hub's
    cache, or the last name of a folder, even where its path looks like an id."""
    if found := _CACHED.search(name):
        return f"{found[1]}/{found[2]}", found[3]
    if revision and is_hub_id(name):
        return name, revision
    return last(name), None


def card_of(folder: Path) -> dict[str, Any]:
    """Return licence and languages from the front matter of a model's card, {} where there is none."""
    try:
        text = read_text(folder / "README.md", LONGEST_CARD)
        found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, flags=re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (CheckpointError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: values[key] for key in _CARD_KEYS if values.get(key)} if isinstance(values, dict) else {}
