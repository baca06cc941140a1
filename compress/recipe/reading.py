"""From YAML to a recipe and back, with errors that name the place and the nearest known word."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from compress.errors import CheckpointError, RecipeError
from compress.recipe.data import Data
from compress.recipe.schema import Recipe, Retrain, Step
from compress.system.side_files import read_text

LONGEST = 4 << 20  # bytes of a recipe; a plan for 60,000 experts has 2 MB
_SHOWN = 20  # errors of a recipe


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a duplicate key is an error, not a silent overwrite."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, Hashable):
                break  # the loader refuses it
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML raises its own errors, and Python's for a value that does not fit its tag, as in `!!int x`.
_BAD_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def folder() -> Path:
    """The folder of the shipped recipes: in the package, or next to it in a source tree."""
    inside = Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "recipes"


def presets() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def locate(name: str) -> Path:
    """Return the file of a recipe, given its path or the name of a shipped one. Raises RecipeError."""
    path = Path(name)
    if path.is_file():
        return path
    if name in presets():
        return folder() / f"{name}.yaml"
    close = difflib.get_close_matches(name, presets(), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RecipeError(f"{name}: neither a file nor a shipped recipe; shipped are {', '.join(presets())}{hint}")


def read(name: str) -> dict[str, Any]:
    """Read a recipe as plain values, given its path or the name of a shipped one. Raises RecipeError."""
    path = locate(name)
    try:
        value = yaml.load(read_text(path, LONGEST), _UniqueKeys)
    except CheckpointError as error:
        raise RecipeError(error.message) from error
    except _BAD_YAML as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: holds a {type(value).__name__}; expected keys such as data: and steps:")
    return value


def change(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` settings to a recipe's plain values; numbers address list elements. Raises RecipeError."""
    result = copy.deepcopy(values)
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {setting}: expected a path and a value, as in steps.0.options.bits=3")
        try:
            value = yaml.load(text, _UniqueKeys)
        except _BAD_YAML as error:
            raise RecipeError(f"--set {setting}: the value is not YAML ({error})") from error
        place: Any = result
        try:
            for key in keys[:-1]:
                if isinstance(place, dict) and place.get(key) is None:
                    place[key] = {}
                place = place[int(key)] if isinstance(place, list) else place[key]
            target: Any = int(keys[-1]) if isinstance(place, list) else keys[-1]
            place[target] = value
        except (IndexError, TypeError, ValueError) as error:
            raise RecipeError(f"--set {setting}: the recipe has no such place ({error})") from error
    return result


_CHOICES = ("str", "tuple[str, ...]")  # pydantic adds these to a location where either is allowed
_WORDS = {"a valid tuple": "a list", "a valid dictionary": "a mapping", " or instance of Data": "", " or instance of Step": ""}


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    places: dict[str, Any] = {"data": Data, "steps": Step, "retraining": Retrain}
    model: Any = places.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    return [info.alias or name for name, info in model.model_fields.items()]


def explain(error: ValidationError, known: Sequence[str] | None = None, prefix: str = "") -> str:
    """Write pydantic's errors as `place: what is wrong`, one line each, with the nearest key for a misspelt one."""
    lines = []
    for item in error.errors()[:_SHOWN]:
        place = prefix + ".".join(str(p) for p in item["loc"] if p not in _CHOICES or item["type"] == "extra_forbidden")
        place = place.rstrip(".")  # an error of all options together names no key
        message = item["msg"].removeprefix("Value error, ")
        for theirs, ours in _WORDS.items():
            message = message.replace(theirs, ours)
        if item["type"] == "extra_forbidden":
            keys = list(known) if known is not None else _known_keys(item["loc"])
            close = difflib.get_close_matches(str(item["loc"][-1]), keys, n=1)
            message = f"unknown key; did you mean {close[0]}?" if close else f"unknown key; known are {', '.join(keys)}"
        elif item["type"] != "missing" and not isinstance(item["input"], (dict, list)):
            message += f" (got {item['input']!r:.80})"
        lines.append(f"{place}: {message}" if place else message)
    if error.error_count() > _SHOWN:
        lines.append(f"and {error.error_count() - _SHOWN} more")
    return "\n".join(lines)


def parse(values: dict[str, Any], name: str = "recipe") -> Recipe:
    """Validate plain values. Raises a RecipeError that names each wrong place."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{name}:\n{explain(error)}") from error


def parse_data(values: dict[str, Any]) -> Data:
    """Validate the values of a `data:` section. Raises RecipeError."""
    try:
        return Data.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, list(Data.model_fields), "data.")) from error


def load(name: str, settings: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path or shipped name, with `a.b=c` settings applied. Raises RecipeError."""
    return parse(change(read(name), settings), name)


def dump(recipe: Recipe) -> str:
    """Write a recipe as YAML that loads to the same recipe, all defaults spelt out."""
    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True)


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values."""
    values: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    return values
