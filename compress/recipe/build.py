"""Recipes from a few options, as the command line and the Python API have them, in place of YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress import registry
from compress.errors import RecipeError
from compress.recipe import reading
from compress.recipe.data import BUILTIN
from compress.recipe.data_options import DataOptions
from compress.recipe.schema import Recipe, Watch, parse_size

PLACE = "command line"  # where such a recipe comes from, in messages
# Methods by how long they may take: to nearest without data; compensated on scaled channels; blocks trained.
EFFORTS = {"fast": "quant/rtn", "normal": "equalize+gptq", "best": "equalize+signround"}
DEFAULT = EFFORTS["normal"]  # where none is named: as good as gptq, and far better where activations have outliers
EVERY_BLOCK = "*.*"  # names of linears in blocks have a dot; the head's has none and stays as it is


def method_line(method: str, kind: str = "quant") -> tuple[list[str], str]:
    """Read a method such as awq+gptq: transforms in order, and what is done after them: rtn, or alps, if nothing is said."""
    transforms = registry.names("transform")
    paths = [m if "/" in m else f"transform/{m}" if m in transforms else f"{kind}/{m}" for m in method.split("+")]
    if paths[-1].startswith("transform/"):
        paths.append({"quant": "quant/rtn", "prune": "prune/alps"}[kind])
    if wrong := [path for path in paths[:-1] if not path.startswith("transform/")]:
        raise RecipeError(f"--method {method}: {wrong[0]} cannot go before another method; transforms can, such as awq+gptq")
    return paths[:-1], paths[-1]


def method_lines(methods: Sequence[str], candidates: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Read what is planned with: the transforms, which all methods share, and the methods; the best for most if none is named."""
    methods = methods or ([] if candidates else [DEFAULT])
    lines = [method_line(method) for method in methods]
    for (transforms, _), method in zip(lines, methods, strict=True):
        if transforms != lines[0][0]:
            raise RecipeError(f"--method {method}: a plan has the same transforms for all its methods; {methods[0]} has others")
    return (lines[0][0] if lines else []), [path for _, path in lines]


def method_of(method: str | None, effort: str | None) -> str:
    """The method that is named, or that of an effort. Raises RecipeError for both, and for an effort that is not known."""
    if effort is None:
        return method or DEFAULT
    if method is not None:
        raise RecipeError(f"--effort {effort}: chooses the method, and --method names one; leave one of them out")
    if effort not in EFFORTS:
        raise RecipeError(f"--effort {effort}: expected one of {', '.join(EFFORTS)}")
    return EFFORTS[effort]


def one_step(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe of one step over all linears in blocks, after transforms. Raises RecipeError."""
    transforms, path = method_line(method)
    known = registry.method(path).model_fields
    if unknown := [key for key in options if key not in known]:
        raise RecipeError(f"--{unknown[0].replace('_', '-')}: {path} has no such option; it has {', '.join(known)}")
    step = {"match": EVERY_BLOCK, "method": path, "options": dict(options)}
    values: dict[str, Any] = {"data": {"name": BUILTIN}, "steps": [step]}
    if transforms:
        values["transforms"] = [{"method": transform} for transform in transforms]
    return values


def with_changes(
    values: Mapping[str, Any], data: DataOptions, dtype: str | None, changes: Sequence[str], place: str = PLACE
) -> Recipe:
    """Make a recipe of values read from YAML, with other data, another dtype and changes such as steps.0.options.bits=3.

    `place` is where the values come from, for messages. Raises RecipeError.
    """
    changed, given, before = dict(values), data.values(), values.get("data") or {}
    if given and isinstance(before, dict):
        # A name of its own replaces the recipe's data; other settings change it.
        changed["data"] = given if "name" in given else {**before, **given}
    if dtype is not None:
        changed["dtype"] = dtype
    return reading.parse(reading.change(changed, changes), place)


def watched(recipe: Recipe, windows: int | None) -> Recipe:
    """A recipe with the running check over so many windows, without it for 0; as it is for None."""
    if windows is None:
        return recipe
    if windows < 0:
        raise RecipeError(f"--watch {windows}: expected a number of windows, 0 for none")
    if windows == 0:
        return recipe.model_copy(update={"watch": None})
    limit = {} if recipe.watch is None else {"limit": recipe.watch.limit}
    return recipe.model_copy(update={"watch": Watch(windows=windows, **limit)})


def memory_budget(memory: str) -> int:
    """Read the memory for statistics, as 4GB, in bytes. Raises RecipeError."""
    try:
        return parse_size(memory)
    except ValueError as error:
        raise RecipeError(f"--memory: {error}") from error
