"""The Python API: what the commands do, as functions that return what they found and print nothing.

    import compress

    outcome = compress.quantize("MODEL", out="OUT", bits=4, data="text.jsonl")

Arguments mean what the options of the same name mean on the command line. `data` is the name of a text, or `DataOptions` with how
much of it is drawn; `options` says how a run is done. `progress` is called with the number of the block in work, the number of
blocks, what is being done, and the share of it that is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint.packed_source import PackedSource
from compress.errors import RecipeError
from compress.evaluation import quality as evaluation
from compress.evaluation.quality import Quality
from compress.planning.budget import Budget
from compress.planning.planner import PlanRequest, PlanResult, allocate
from compress.planning.pruning import PruningOptions, Surveying, make_pruning_recipe
from compress.recipe import build, reading
from compress.recipe.data_options import DataOptions
from compress.recipe.schema import Recipe
from compress.runs import prepare as run_prepare
from compress.runs import run as runs
from compress.runs.prepared import DEFAULTS, Outcome, RunOptions, path_or_none, prepare_run
from compress.system.device import DTYPES
from compress.system.progress import Progress

__all__ = [
    "Budget",
    "DataOptions",
    "Outcome",
    "PlanResult",
    "PruningOptions",
    "Quality",
    "RunOptions",
    "evaluate",
    "plan",
    "prune",
    "quantize",
    "retrain",
    "run",
]

Text = str | Path | DataOptions | None
Changes = Sequence[str]  # to a recipe, such as steps.0.options.bits=3


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: str | Path,
    out: str | Path,
    *,
    data: Text = None,
    dtype: str | None = None,
    changes: Changes = (),
    watch: int | None = None,
    options: RunOptions = DEFAULTS,
    progress: Progress | None = None,
) -> Outcome:
    """Run a recipe: a file, the name of one that is shipped, the values of one, or one that was made. Raises CompressError."""
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, data=data, dtype=dtype, changes=changes)
    elif data is not None or dtype is not None or changes:
        raise RecipeError("recipe: is made already; make it with other data, dtype or changes, or give its file or values")
    prepared = prepare_run(build.watched(recipe, watch), model, out, options)
    listen = progress or _ignore
    summary = prepared.compress(listen)
    quality = prepared.measure(listen)
    exported = prepared.export(listen)
    exported.raise_failed()
    return prepared.outcome(summary, quality, exported.made)


def read_recipe(
    recipe: str | Path | Mapping[str, Any], *, data: Text = None, dtype: str | None = None, changes: Changes = ()
) -> Recipe:
    """Read a recipe, a file, the name of one that is shipped or its values, and change it. Raises RecipeError."""
    named = isinstance(recipe, str | Path)
    values = reading.read(str(recipe)) if isinstance(recipe, str | Path) else recipe
    return build.with_changes(values, data_options(data), dtype, changes, str(recipe) if named else build.PLACE)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    effort: str | None = None,
    bits: int | None = None,
    group_size: int | str | None = None,
    symmetric: bool | None = None,
    budget: Budget | None = None,
    data: Text = None,
    dtype: str | None = None,
    changes: Changes = (),
    watch: int | None = None,
    options: RunOptions = DEFAULTS,
    progress: Progress | None = None,
) -> Outcome:
    """Quantize all linears in the blocks of a model: by one method, or by a plan within a `budget`.

    Without a method, `effort` chooses it: "fast" (to nearest, without data), "normal" (the default: channels scaled, then GPTQ),
    or "best" (blocks trained).

    A plan chooses `bits`, `group_size` and `symmetric` itself; what it measures is kept next to `out`. Raises CompressError.
    """
    given = given_options(bits=bits, group_size=group_size, symmetric=symmetric)
    if budget is None:
        recipe = quantization_recipe(build.method_of(method, effort), given, data=data, dtype=dtype, changes=changes)
    else:
        if effort is not None:
            raise RecipeError(not_with_budget("effort"))
        if given:
            raise RecipeError(not_with_budget(next(iter(given))))
        planned = plan_before_run(model, out, budget, method, data, dtype, options, progress)
        recipe = changed_plan(planned, changes)
    return run(recipe, model, out, watch=watch, options=options, progress=progress)


def given_options(**options: Any) -> dict[str, Any]:
    """The options of a method that are given."""
    return {key: value for key, value in options.items() if value is not None}


def not_with_budget(option: str) -> str:
    """What is said of an option that a plan chooses."""
    return f"--{option.replace('_', '-')}: not with a budget, which chooses the recipe; leave one of them out"


def quantization_recipe(
    method: str,
    options: Mapping[str, Any],
    *,
    data: Text = None,
    dtype: str | None = None,
    changes: Changes = (),
) -> Recipe:
    """Make a recipe of one step over all linears in blocks, after transforms: awq+gptq, with the method's options.

    Raises RecipeError.
    """
    return build.with_changes(build.one_step(method, options), data_options(data), dtype, changes)


def prune(
    model: str | Path,
    out: str | Path,
    pruning: PruningOptions,
    *,
    data: Text = None,
    dtype: str | None = None,
    changes: Changes = (),
    watch: int | None = None,
    options: RunOptions = DEFAULTS,
    progress: Progress | None = None,
) -> Outcome:
    """Prune a model, and quantize it in the same pass where `pruning` has bits. Raises CompressError."""
    recipe = pruning_recipe(pruning, model, out, data=data, dtype=dtype, changes=changes, options=options, progress=progress)
    return run(recipe, model, out, watch=watch, options=options, progress=progress)


def pruning_recipe(
    pruning: PruningOptions,
    model: str | Path,
    out: str | Path,
    *,
    data: Text = None,
    dtype: str | None = None,
    changes: Changes = (),
    options: RunOptions = DEFAULTS,
    progress: Progress | None = None,
) -> Recipe:
    """Make the recipe of `prune`. What is measured to distribute a sparsity is kept next to `out`. Raises CompressError."""
    survey = Surveying(Path(out).parent, options.device, options.revision, options.memory)
    return make_pruning_recipe(str(model), pruning, data_options(data), dtype, changes, survey, progress or _ignore)


def plan(
    model: str | Path,
    budget: Budget,
    *,
    data: Text = None,
    planner: str = "milp",
    methods: Sequence[str] = (),
    candidates: Sequence[str] = (),
    uniform_siblings: bool = False,
    check: bool = False,
    dtype: str | None = None,
    folder: str | Path = ".",
    options: RunOptions = DEFAULTS,
    progress: Progress | None = None,
) -> PlanResult:
    """Find the best bits for every weight within a budget; the result holds a recipe, and what it was chosen from.

    What is measured is kept in `folder`. Of `options`, device, revision and memory count. Raises CompressError.
    """
    transforms, paths = build.method_lines(methods, candidates)
    request = PlanRequest(
        str(model),
        data_options(data).values(),
        budget,
        paths,
        candidates,
        transforms,
        dtype,
        options.device,
        options.revision,
        build.memory_budget(options.memory),
    )
    return allocate(request, Path(folder), progress or _ignore, planner, uniform_siblings, check)


def plan_before_run(
    model: str | Path,
    out: str | Path,
    budget: Budget,
    method: str | None,
    data: Text,
    dtype: str | None,
    options: RunOptions,
    progress: Progress | None,
) -> PlanResult:
    """Plan for a run that follows: what is measured is kept next to its result, and its target is thought of."""
    siblings = options.delivery().uniform_siblings
    methods = () if method is None else (method,)
    return plan(
        model, budget, data=data, methods=methods, uniform_siblings=siblings, dtype=dtype, folder=Path(out).parent,
        options=options, progress=progress,
    )  # fmt: skip


def changed_plan(planned: PlanResult, changes: Changes) -> Recipe:
    """The recipe of a plan with changes. Raises RecipeError."""
    values = planned.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return build.with_changes(values, DataOptions(), None, changes, "plan")


def retrain(
    model: str | Path,
    out: str | Path,
    *,
    original: str | Path | None = None,
    stage: Mapping[str, Any] | None = None,
    data: Text = None,
    options: RunOptions = DEFAULTS,
    progress: Progress | None = None,
) -> Outcome:
    """Train a compressed checkpoint to predict what its original does.

    `stage` are the values of an entry of `retraining:` in a recipe: method, steps, batch, options, temperature, labels. Without
    `data`, the text that it was calibrated on. Of `options`, device, job, keep_job and reload count. Raises CompressError.
    """
    start = PackedSource.open_packed(Path(model))
    base = original or evaluation.base_of(str(model))
    if base is None:
        raise RecipeError("--original: missing, and the model that OUT names is not on this machine; give its folder or Hub id")
    values = reading.read(str(start.folder / "recipe.yaml"))
    added: dict[str, Any] = {"method": "retrain/perp", **(stage or {})}
    text = data_options(data).values()
    if "name" in text:
        added["data"] = text
    elif text or not values.get("data"):
        raise RecipeError("--data: missing; give the text to train on: a file, a preset or a dataset's name")
    values["retraining"] = [*(values.get("retraining") or []), added]
    planned = run_prepare.prepare(str(base), reading.parse(values, str(start.folder)), options.device)
    last = planned.recipe.retraining[-1]
    ids = run_prepare.calibration(planned, last.data) if last.data is not None else run_prepare.calibration(planned)
    job = path_or_none(options.job)
    done = runs.retrain(planned, ids, start, Path(out), progress or _ignore, job, options.keep_job, options.reload)
    return Outcome(done.out, done.values, done.rows, done.resumed)


def evaluate(
    model: str | Path,
    data: Text,
    *,
    original: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    speed: bool = True,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    save: bool = False,
    progress: Progress | None = None,
) -> Quality:
    """Measure a model on a text, against the model it was made from where that is known or given. Raises CompressError."""
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    text = reading.parse_data(data_options(data).values())
    before = None if original is None else str(original)
    result = evaluation.measure(str(model), before, text, device, dtype, speed, progress or _ignore, tasks, limit)
    if save:
        evaluation.save(Path(model), result)
    return result


def data_options(data: Text) -> DataOptions:
    """A text by its name, or with how much of it is drawn, as options."""
    return data if isinstance(data, DataOptions) else DataOptions(None if data is None else str(data))


def _ignore(block: int, blocks: int, step: str, share: float) -> None:
    """Progress without a callback."""
