"""What commands share: options to a recipe, and a recipe to a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CalibrationError, RecipeError

if TYPE_CHECKING:
    from compress.checkpoint.packed_source import PackedSource
    from compress.recipe.data import Data
    from compress.recipe.schema import Recipe
    from compress.run.prepare import Plan


@dataclass(frozen=True)
class Delivery:
    """Who the result is for: a runtime that has to load it, and layouts that it is exported to."""

    target: str | None = None
    tensor_parallel: int = 1
    formats: tuple[str, ...] = ()

    @classmethod
    def of(cls, target: str | None, tensor_parallel: int, formats: list[str] | None) -> Delivery:
        """Check names before anything is read. Raises RecipeError."""
        if target is not None:
            from compress.interop import targets

            targets.find(target)
        elif tensor_parallel != 1:
            raise RecipeError("--tensor-parallel: says nothing without --target; add --target vllm, or leave it out")
        if formats:
            from compress.interop import exporter as exporting

            for name in formats:
                exporting.lookup(name)
        return cls(target, tensor_parallel, tuple(dict.fromkeys(formats or ())))

    def places(self, output: Path) -> dict[str, Path]:
        """Where each export goes: beside the checkpoint."""
        return {name: output.with_name(f"{output.name}-{name}") for name in self.formats}


def data_values(
    name: str | None, samples: int | None, length: int | None, seed: int | None, chat_template: bool | None
) -> dict[str, Any]:
    values = {"name": name, "samples": samples, "length": length, "seed": seed, "chat_template": chat_template}
    return {key: value for key, value in values.items() if value is not None}


def method_line(method: str, kind: str = "quant") -> tuple[list[str], str]:
    """Read a method such as awq+gptq: transforms in order, and what is done after them: rtn, or alps, if nothing is said."""
    from compress import registry

    transforms = registry.names("transform")
    paths = [m if "/" in m else f"transform/{m}" if m in transforms else f"{kind}/{m}" for m in method.split("+")]
    if paths[-1].startswith("transform/"):
        paths.append({"quant": "quant/rtn", "prune": "prune/alps"}[kind])
    if wrong := [path for path in paths[:-1] if not path.startswith("transform/")]:
        raise RecipeError(f"--method {method}: {wrong[0]} cannot go before another method; transforms can, such as awq+gptq")
    return paths[:-1], paths[-1]


def method_lines(methods: Sequence[str] | None, candidates: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Read what is planned with: the transforms, which all methods share, and the methods; the best for most if none is named."""
    methods = methods or ([] if candidates else ["drift+gptq"])
    lines = [method_line(method) for method in methods]
    for (transforms, _), method in zip(lines, methods, strict=True):
        if transforms != lines[0][0]:
            raise RecipeError(f"--method {method}: a plan has the same transforms for all its methods; {methods[0]} has others")
    return (lines[0][0] if lines else []), [path for _, path in lines]


def made_recipe(
    name: str | None,
    method: str | None,
    options: dict[str, Any],
    data: dict[str, Any],
    dtype: str | None,
    settings: list[str] | None,
) -> Recipe:
    """Make the recipe that the command line describes: a given one with changes, or one step over all linears in blocks."""
    from compress import registry
    from compress.recipe import reading as recipe_reading

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
        values = recipe_reading.read(name)
    before = values.get("data") or {}
    if data and isinstance(before, dict):
        # A name of its own replaces the recipe's data; other settings change it.
        values["data"] = data if "name" in data else {**before, **data}
    if dtype is not None:
        values["dtype"] = dtype
    return recipe_reading.parse(recipe_reading.change(values, settings or []), name or "command line")


def watched(recipe: Recipe, windows: int | None) -> Recipe:
    """A recipe with the running check over so many windows, without it for 0; as it is for None."""
    from compress.recipe.schema import Watch

    if windows is None:
        return recipe
    if windows < 0:
        raise RecipeError(f"--watch {windows}: expected a number of windows, 0 for none")
    if windows == 0:
        return recipe.model_copy(update={"watch": None})
    limit = {} if recipe.watch is None else {"limit": recipe.watch.limit}
    return recipe.model_copy(update={"watch": Watch(windows=windows, **limit)})


def parse_room(memory: str) -> int:
    from compress.recipe.schema import parse_size

    try:
        return parse_size(memory)
    except ValueError as error:
        raise RecipeError(f"--memory: {error}") from error


@dataclass(frozen=True)
class Running:
    """How a run is done and what is said of it: nothing here decides what comes out."""

    device: str = "auto"
    revision: str | None = None
    memory: str = "4GB"
    offload: bool = False
    job: Path | None = None
    keep_job: bool = False
    no_reload: bool = False
    cache: Path | None = None
    evaluate: str | None = None
    delivery: Delivery = Delivery()
    dry_run: bool = False
    json: bool = False
    quiet: bool = False

    @property
    def silent(self) -> bool:
        """Whether no progress is shown."""
        return self.quiet or self.json


def run_recipe(model: str, output: Path, recipe: Recipe, how: Running) -> None:
    """Run a recipe, or say what it would do; measure and export the result where that is asked for. Raises CompressError."""
    import torch

    from compress.evaluate import quality
    from compress.recipe.reading import parse_data
    from compress.run import estimate
    from compress.run import prepare as run_prepare
    from compress.run import run as run_module
    from compress.run.pipeline import Settings as RunSettings
    from compress.screen.checkpoints import show_exports
    from compress.screen.plans import describe_plan, show_plan
    from compress.screen.results import plain_summary, show_summary
    from compress.system import distributed

    room, delivery = parse_room(how.memory), how.delivery
    plan = run_prepare.prepare(model, recipe, how.device, how.revision, headers=how.dry_run)
    findings = check_plan(plan, delivery, output)
    ids = torch.empty(run_prepare.calibration_shape(plan), device="meta") if how.dry_run else run_prepare.calibration(plan)
    measured = None if how.evaluate is None else parse_data({"name": how.evaluate})
    if measured is not None and not plan.source.remote:
        _check_text(measured, plan)
    expected = estimate.estimate(plan, ids.shape[0], ids.shape[1], room, how.offload)
    expected = estimate.timed(expected, plan, ids.shape[0], ids.shape[1], not how.no_reload)
    if how.dry_run:
        found = describe_plan(plan, expected, (ids.shape[0], ids.shape[1]))
        found |= {**findings, "warnings": found["warnings"] + findings.get("warnings", [])}
        print(json.dumps(found, indent=2)) if how.json else show_plan(found)
        return
    leader = distributed.leads()
    with progress(how.silent or not leader, expected.seconds) as listen:
        settings = RunSettings(offload=how.offload, memory=room, reload=not how.no_reload, cache=how.cache)
        summary = run_module.run(plan, ids, output, settings, listen, expected, how.job, how.keep_job)
    result = None
    if measured is not None and leader:
        with progress(how.silent) as listen:
            result = quality.evaluate(str(output), str(plan.source.folder), measured, how.device, "float32", True, listen)
        result = replace(result, original=plan.source.name)
        quality.save(output, result)
    distributed.stop()
    if leader:
        with progress(how.silent or not delivery.formats) as listen:
            said, places = findings.get("warnings", []), delivery.places(output)
            made = export_to(str(output), places, delivery.target, delivery.tensor_parallel, listen, said)
        exports = {"exports": made} if made else {}
        if how.json:
            print(json.dumps(plain_summary(summary, result) | exports, indent=2))
        else:
            show_summary(summary, result)
            show_exports(made)


def _check_text(data: Data, plan: Plan) -> None:
    """Read the text of --evaluate before a long run, not after it. Raises CalibrationError."""
    from compress.architecture.config import context_length, vocabulary
    from compress.calibration.data import load_ids

    try:
        load_ids(data, plan.source.folder, vocabulary(plan.source), context_length(plan.source), fewer=True)
    except CalibrationError as error:
        later = "or leave it out, and measure afterwards: compress eval OUT --data TEXT --samples N --length N --save"
        raise CalibrationError(f"--evaluate: {error}; {later}") from error


def check_plan(plan: Plan, delivery: Delivery, output: Path) -> dict[str, Any]:
    """Lint what is planned for whom it is for, before anything is computed; return what is worth a word. Raises RecipeError."""
    from compress.architecture.config import settings
    from compress.interop import exporter as exporting
    from compress.interop import targets
    from compress.screen.checkpoints import show_findings
    from compress.system import distributed

    if delivery.target is None and not delivery.formats:
        return {}
    specs = {}
    for a in plan.assignments:
        spec, other = (made and made.describe(a.site.shape).spec for made in (a.method, a.fallback))
        specs[a.site.name] = None if other and other != spec else spec
    stored = targets.Stored(plan.claims.family, settings(plan.source), plan.claims.sites, specs)
    found = []
    for name, place in delivery.places(output).items():
        found += targets.misfits(stored, name)
        exporting.check_place(place)
    targets.raise_refused(f"--format {' '.join(delivery.formats)}", found)
    if delivery.target is None:
        return {}
    found = targets.lint(delivery.target, stored, delivery.tensor_parallel, delivery.formats)
    targets.raise_refused(f"--target {delivery.target}", found)
    if distributed.leads():
        show_findings(delivery.target, found)
    return {"target": delivery.target, "warnings": [finding.message for finding in found]}


def check_source(source: PackedSource, target: str, tensor_parallel: int, formats: list[str], said: Sequence[str] = ()) -> None:
    """Lint a compressed checkpoint for a runtime; print what was not `said` before. Raises RecipeError with what it refuses."""
    from compress.interop import targets
    from compress.screen.checkpoints import show_findings

    found = targets.lint(target, targets.of_checkpoint(source), tensor_parallel, formats)
    targets.raise_refused(f"--target {target}", found)
    show_findings(target, [finding for finding in found if finding.message not in said])


def export_to(
    model: str, places: dict[str, Path], target: str | None, tensor_parallel: int, listen: Any, said: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Write a compressed checkpoint in some layouts, each to its place. All are checked before the first is written."""
    from compress.interop import exporter as exporting

    if not places:
        return []
    source = exporting.open_packed(model)
    if target is not None:
        check_source(source, target, tensor_parallel, list(places), said)
    works = [(exporting.prepare(source, name), place) for name, place in places.items()]
    return [{"output": str(place), **exporting.export(work, place, listen)} for work, place in works]


@contextmanager
def progress(quiet: bool, predicted: float | None = None) -> Iterator[Any]:
    from compress.screen.progress import show_progress

    with show_progress(quiet, predicted) as listen:
        yield listen
