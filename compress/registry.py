"""The folder is the registry: a file `quant/foo.py` is the method `quant/foo`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from compress.errors import RecipeError

_METHODS = ("quant", "prune", "transform", "tune", "retrain")
PACKAGES = {
    **{kind: f"methods.{kind}" for kind in _METHODS},
    "formats": "formats",
    "plan": "planning.planners",
    "export": "interop.layouts",
    "families": "architecture.families",
    "kernels": "kernels",
}
KINDS = tuple(PACKAGES)
_EXPORTS = {  # kinds that are no methods
    "formats": "FORMAT",
    "plan": "PLANNER",
    "export": "EXPORT",
    "families": "FAMILIES",
    "kernels": "KERNEL",
}
_WORDS = {"formats": "format", "plan": "planner", "export": "export", "families": "maker of models", "kernels": "kernel"}


def names(kind: str) -> list[str]:
    """List what one kind offers, without loading it; files that start with an underscore are private."""
    package = importlib.import_module(f"compress.{PACKAGES[kind]}")  # a docstring and nothing else
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def methods(kinds: Sequence[str] = KINDS) -> list[str]:
    """List every method of some kinds as a recipe writes it: `kind/name`."""
    return [f"{kind}/{name}" for kind in kinds if kind not in _EXPORTS for name in names(kind)]


def lookup(kind: str, name: str) -> Any:
    """Import a file of a kind and return its METHOD, FORMAT, PLANNER, EXPORT, FAMILIES or KERNEL.

    Raises RecipeError with known names.
    """
    if kind not in KINDS or name not in names(kind):
        known = names(kind) if kind in KINDS else []
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {kind}/{close[0]}?" if close else ""
        choices = ", ".join(f"{kind}/{n}" for n in known) or ", ".join(methods())
        raise RecipeError(f"{kind}/{name}: no such {_WORDS.get(kind, 'method')}; known are {choices}{hint}")
    return getattr(_module(kind, name), _EXPORTS.get(kind, "METHOD"))


def offered(kind: str) -> list[Any]:
    """Import all files of one kind and return what they offer; in `kernels`, some files offer nothing to choose from."""
    modules = [_module(kind, name) for name in names(kind)]
    word = _EXPORTS.get(kind, "METHOD")
    return [getattr(module, word) for module in modules if hasattr(module, word)]


def _module(kind: str, name: str) -> ModuleType:
    return importlib.import_module(f"compress.{PACKAGES[kind]}.{name}")


def method(path: str) -> Any:
    """Return the options class of a method written as `kind/name`."""
    kind, _, name = path.partition("/")
    if kind in _EXPORTS or not name:
        close = difflib.get_close_matches(path, methods(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise RecipeError(f"{path}: a method is written as kind/name; known are {', '.join(methods())}{hint}")
    return lookup(kind, name)
