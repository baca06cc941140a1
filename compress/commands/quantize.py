"""`compress quantize` and `compress run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.commands._options import (
    Bpw,
    CacheFolder,
    ChatTemplate,
    DataName,
    Device,
    DryRun,
    Dtype,
    Evaluate,
    Formats,
    JobFolder,
    Json,
    KeepJob,
    Length,
    MaxKl,
    Memory,
    Model,
    NoReload,
    Offload,
    Output,
    Quiet,
    Revision,
    Samples,
    Seed,
    Settings,
    Size,
    Target,
    TensorParallel,
    Watch,
)
from compress.commands._shared import (
    Delivery,
    Running,
    data_values,
    made_recipe,
    method_lines,
    parse_room,
    progress,
    run_recipe,
    watched,
)
from compress.errors import RecipeError

if TYPE_CHECKING:
    from compress.planning.budget import Budget
    from compress.recipe.schema import Recipe


def quantize(
    model: Model,
    output: Output,
    method: Annotated[
        str | None, typer.Option(help="As `compress methods` lists it, gptq for short; after transforms: awq+gptq.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per code, 1 to 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input columns that share a scale; -1 for the whole row.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Grid without or with zero points.")] = None,
    bpw: Bpw = None,
    size: Size = None,
    max_kl: MaxKl = None,
    data: DataName = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    chat_template: ChatTemplate = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe to start from: a file, or a name from `compress recipes`.")] = None,
    settings: Settings = None,
    watch: Watch = None,
    cache: CacheFolder = None,
    dry_run: DryRun = False,
    json_: Json = False,
    device: Device = "auto",
    dtype: Dtype = None,
    offload: Offload = False,
    memory: Memory = "4GB",
    job: JobFolder = None,
    keep_job: KeepJob = False,
    no_reload: NoReload = False,
    revision: Revision = None,
    evaluate: Evaluate = None,
    format_: Formats = None,
    target: Target = None,
    tensor_parallel: TensorParallel = 1,
    quiet: Quiet = False,
) -> None:
    """Quantize a model.

    compress quantize MODEL -o OUT --bits 4 --data text.jsonl

    With a budget instead of --bits, `compress plan` and `compress run` in one go:
    compress quantize MODEL -o OUT --bpw 2.75 --data text.jsonl
    """
    delivery = Delivery.of(target, tensor_parallel, format_)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    given = {key: value for key, value in options.items() if value is not None}
    values = data_values(data, samples, length, seed, chat_template)
    if any(budget is not None for budget in (bpw, size, max_kl)):
        from compress.planning import budget as plan_budget

        if given or recipe is not None:
            flag = "--recipe" if recipe is not None else "--" + next(iter(given)).replace("_", "-")
            raise RecipeError(f"{flag}: not with a budget, which chooses the recipe; leave one of them out")
        budget = plan_budget.Budget.of(bpw, size, max_kl)
        siblings = target in ("vllm", "sglang")  # they load q, k, v, and gate, up, as one matrix
        silent = quiet or json_
        made = _planned(model, values, budget, output.parent, method, settings, device, dtype, memory, revision, silent, siblings)
    else:
        made = made_recipe(recipe, method, given, values, dtype, settings)
    how = Running(device, revision, memory, offload, job, keep_job, no_reload, cache, evaluate, delivery, dry_run, json_, quiet)
    run_recipe(model, output, watched(made, watch), how)


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe: a file, or a name from `compress recipes`.")],
    model: Model,
    output: Output,
    data: DataName = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    chat_template: ChatTemplate = None,
    settings: Settings = None,
    watch: Watch = None,
    cache: CacheFolder = None,
    dry_run: DryRun = False,
    json_: Json = False,
    device: Device = "auto",
    dtype: Dtype = None,
    offload: Offload = False,
    memory: Memory = "4GB",
    job: JobFolder = None,
    keep_job: KeepJob = False,
    no_reload: NoReload = False,
    revision: Revision = None,
    evaluate: Evaluate = None,
    format_: Formats = None,
    target: Target = None,
    tensor_parallel: TensorParallel = 1,
    quiet: Quiet = False,
) -> None:
    """Run any recipe.

    compress run gptq-3bit MODEL -o OUT --data text.jsonl
    """
    delivery = Delivery.of(target, tensor_parallel, format_)
    made = made_recipe(recipe, None, {}, data_values(data, samples, length, seed, chat_template), dtype, settings)
    how = Running(device, revision, memory, offload, job, keep_job, no_reload, cache, evaluate, delivery, dry_run, json_, quiet)
    run_recipe(model, output, watched(made, watch), how)


def _planned(
    model: str,
    data: dict[str, Any],
    budget: Budget,
    folder: Path,
    method: str | None,
    settings: list[str] | None,
    device: str,
    dtype: str | None,
    memory: str,
    revision: str | None,
    silent: bool,
    uniform_siblings: bool,
) -> Recipe:
    """Plan for `quantize`; settings change the recipe that was planned."""
    from compress.planning import planner
    from compress.recipe import reading as recipe_reading
    from compress.screen.plans import show_planned

    transforms, methods = method_lines([method] if method else None)
    with progress(silent) as listen:
        made = planner.command(
            model, data, budget, folder, listen, dtype, device, revision, parse_room(memory), methods=methods,
            siblings=uniform_siblings, transforms=transforms,
        )  # fmt: skip
    if not silent:
        show_planned(made.planned.plain())
    values = made.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return recipe_reading.parse(recipe_reading.change(values, settings or []), "plan")
