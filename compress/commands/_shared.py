"""What commands share: options to a recipe, and a recipe to a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CalibrationError, RecipeError

if TYPE_CHECKING:
    from compress.prepare import Plan
    from compress.recipe import Recipe
    from compress.recipe_data import Data


def data_values(
    name: str | None, samples: int | None, length: int | None, seed: int | None, chat_template: bool | None
) -> dict[str, Any]:
    values = {"name": name, "samples": samples, "length": length, "seed": seed, "chat_template": chat_template}
    return {key: value for key, value in values.items() if value is not None}


def method_line(method: str) -> tuple[list[str], str]:
    """Read a method such as awq+gptq: transforms in order, and what rounds after them, to nearest if nothing is said."""
    from compress import registry

    transforms = registry.names("transform")
    paths = [m if "/" in m else f"transform/{m}" if m in transforms else f"quant/{m}" for m in method.split("+")]
    if paths[-1].startswith("transform/"):
        paths.append("quant/rtn")
    if wrong := [path for path in paths[:-1] if not path.startswith("transform/")]:
        raise RecipeError(f"--method {method}: {wrong[0]} cannot go before another method; transforms can, such as awq+gptq")
    return paths[:-1], paths[-1]


def made_recipe(
    name: str | None,
    method: str | None,
    options: dict[str, Any],
    data: dict[str, Any],
    dtype: str | None,
    settings: list[str] | None,
) -> Recipe:
    """Make the recipe that the command line describes: a given one with changes, or one step over all linears in blocks."""
    from compress import recipe as recipe_module
    from compress import registry

    if name is None:
        stages, path = method_line(method or "quant/gptq")
        known = registry.method(path).model_fields
        if unknown := [key for key in options if key not in known]:
            raise RecipeError(f"--{unknown[0].replace('_', '-')}: {path} has no such option; it has {', '.join(known)}")
        # Names of linears in blocks have a dot; the head's has none and stays as it is.
        values: dict[str, Any] = {"data": {"name": "c4"}, "steps": [{"match": "*.*", "method": path, "options": options}]}
        if stages:
            values["transforms"] = [{"method": stage} for stage in stages]
    else:
        if method or options:
            flag = "--method" if method else "--" + next(iter(options)).replace("_", "-")
            raise RecipeError(f"{flag}: not with --recipe; change the recipe with --set, as in --set steps.0.options.bits=3")
        values = recipe_module.read(name)
    before = values.get("data") or {}
    if data and isinstance(before, dict):
        # A name of its own replaces the recipe's data; other settings change it.
        values["data"] = data if "name" in data else {**before, **data}
    if dtype is not None:
        values["dtype"] = dtype
    return recipe_module.parse(recipe_module.change(values, settings or []), name or "command line")


def watched(recipe: Recipe, windows: int | None) -> Recipe:
    """A recipe with the running check over so many windows, without it for 0; as it is for None."""
    from compress.recipe import Watch

    if windows is None:
        return recipe
    if windows < 0:
        raise RecipeError(f"--watch {windows}: expected a number of windows, 0 for none")
    if windows == 0:
        return recipe.model_copy(update={"watch": None})
    limit = {} if recipe.watch is None else {"limit": recipe.watch.limit}
    return recipe.model_copy(update={"watch": Watch(windows=windows, **limit)})


def parse_room(memory: str) -> int:
    from compress.recipe import parse_size

    try:
        return parse_size(memory)
    except ValueError as error:
        raise RecipeError(f"--memory: {error}") from error


def run_recipe(
    model: str,
    output: Path,
    recipe: Recipe,
    dry_run: bool,
    json_: bool,
    device: str,
    offload: bool,
    memory: str,
    job: Path | None,
    keep_job: bool,
    revision: str | None,
    evaluate: str | None,
    quiet: bool,
    no_reload: bool = False,
    cache: Path | None = None,
) -> None:
    import torch

    from compress import distributed, estimate, prepare, screen
    from compress import run as runs
    from compress.evaluate import quality as evaluation
    from compress.pipeline import Settings as RunSettings
    from compress.recipe import parse_data

    room = parse_room(memory)
    plan = prepare.prepare(model, recipe, device, revision, headers=dry_run)
    ids = torch.empty(prepare.calibration_shape(plan), device="meta") if dry_run else prepare.calibration(plan)
    measured = None if evaluate is None else parse_data({"name": evaluate})
    if measured is not None and not plan.source.remote:
        _check_text(measured, plan)
    expected = estimate.estimate(plan, ids.shape[0], ids.shape[1], room, offload)
    expected = estimate.timed(expected, plan, ids.shape[0], ids.shape[1], not no_reload)
    if dry_run:
        found = screen.describe_plan(plan, expected, (ids.shape[0], ids.shape[1]))
        print(json.dumps(found, indent=2)) if json_ else screen.show_plan(found)
        return
    leader = distributed.leads()
    with progress(quiet or json_ or not leader) as listen:
        settings = RunSettings(offload=offload, memory=room, reload=not no_reload, cache=cache)
        summary = runs.run(plan, ids, output, settings, listen, expected, job, keep_job)
    result = None
    if measured is not None and leader:
        folder = str(plan.source.folder)
        with progress(quiet or json_) as listen:
            result = evaluation.evaluate(str(output), folder, measured, device, "float32", True, listen)
        result = replace(result, original=plan.source.name)
        evaluation.save(output, result)
    distributed.stop()
    if leader:
        print(json.dumps(screen.plain_summary(summary, result), indent=2)) if json_ else screen.show_summary(summary, result)


def _check_text(data: Data, plan: Plan) -> None:
    """Read the text of --evaluate before a long run, not after it. Raises CalibrationError."""
    from compress.calibration.data import load_ids
    from compress.calibration.families import context_length, vocabulary

    try:
        load_ids(data, plan.source.folder, vocabulary(plan.source), context_length(plan.source), fewer=True)
    except CalibrationError as error:
        later = "or leave it out, and measure afterwards: compress eval OUT --data TEXT --samples N --length N --save"
        raise CalibrationError(f"--evaluate: {error}; {later}") from error


@contextmanager
def progress(quiet: bool) -> Iterator[Any]:
    from compress import screen

    with screen.progress(quiet) as listen:
        yield listen
