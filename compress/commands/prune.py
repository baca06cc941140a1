"""`compress prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.commands._options import (
    CacheFolder,
    ChatTemplate,
    DataName,
    Device,
    DryRun,
    Dtype,
    Evaluate,
    JobFolder,
    Json,
    KeepJob,
    Length,
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
    Watch,
)
from compress.commands._shared import Delivery, Running, data_values, method_line, parse_room, progress, run_recipe, watched
from compress.errors import RecipeError

if TYPE_CHECKING:
    from compress.recipe.schema import Recipe

STEP_TOKENS = 2048  # that pass through a block at a time where it is trained: as many steps as the text has pieces of this size
_DISTRIBUTIONS = ("uniform", "global", "owl", "measured")


def prune(
    model: Model,
    output: Output,
    sparsity: Annotated[float | None, typer.Option(help="Share of the weights to remove; 0.5 if nothing is said.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Instead, N:M as 2:4: N kept of every M neighbouring columns.")] = None,
    group: Annotated[int | None, typer.Option(help="Neighbouring columns that go or stay together.")] = None,
    within: Annotated[str | None, typer.Option(help="What competes: the weights of a row, or of a matrix.")] = None,
    method: Annotated[
        str, typer.Option(help="alps, sparsegpt, wanda, ria, magnitude: see `compress methods`; after transforms: permute+alps.")
    ] = "alps",
    distribute: Annotated[
        str,
        typer.Option(help="uniform; owl: by outliers of blocks; global: by magnitude; measured: by what each weight costs."),
    ] = "uniform",
    scope: Annotated[
        list[str] | None, typer.Option(help="Weights to prune, as globs; all linears in blocks if not given.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Also quantize what is kept, in the same pass, 2 to 8 bits.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input columns that share a scale; -1 for the whole row.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Grid without or with zero points.")] = None,
    retrain: Annotated[
        str | None, typer.Option(help="Then train every block on what the original's gives: perp, or ast, which moves masks too.")
    ] = None,
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
    quiet: Quiet = False,
) -> None:
    """Prune a model, and quantize it in the same pass with --bits.

    compress prune MODEL -o OUT --sparsity 0.6 --data text.jsonl

    Two of every four weights, in 4 bits:
    compress prune MODEL -o OUT --pattern 2:4 --bits 4 --data text.jsonl

    Channels put in an order first that keeps more of what matters:
    compress prune MODEL -o OUT --pattern 2:4 --method permute+alps --data text.jsonl

    What was lost learned back by norms and thin factors, which are merged:
    compress prune MODEL -o OUT --sparsity 0.6 --retrain perp --data text.jsonl
    """
    options = {
        "sparsity": sparsity,
        "pattern": pattern,
        "group": group,
        "within": within,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
    }
    given = {key: value for key, value in options.items() if value is not None}
    if bits is None and (wrong := [key for key in ("group_size", "symmetric") if key in given]):
        raise RecipeError(f"--{wrong[0].replace('_', '-')}: means something only with --bits; add --bits 4, or leave it out")
    if distribute not in _DISTRIBUTIONS:
        raise RecipeError(f"--distribute {distribute}: expected one of {', '.join(_DISTRIBUTIONS)}")
    transforms, path = method_line(method, "prune")
    values: dict[str, Any] = {"data": data_values(data, samples, length, seed, chat_template) or {"name": "c4"}}
    if transforms:
        values["transforms"] = [{"method": transform} for transform in transforms]
    if dtype is not None:
        values["dtype"] = dtype
    if retrain is not None:
        values |= {"batch_tokens": STEP_TOKENS, "tuning": [_training(retrain)]}
    made = _recipe(
        model,
        values,
        path,
        given,
        scope or ["*.*"],
        distribute,
        settings,
        output.parent,
        device,
        revision,
        memory,
        quiet or json_,
    )
    # No other layout has masks; `compress export --format dense` writes what was kept as plain numbers.
    how = Running(device, revision, memory, offload, job, keep_job, no_reload, cache, evaluate, Delivery(), dry_run, json_, quiet)
    run_recipe(model, output, watched(made, watch), how)


def _training(method: str) -> dict[str, Any]:
    """Return the stage of a recipe that trains what was pruned. Raises RecipeError."""
    from compress import registry

    known = registry.names("retrain")
    name = method.removeprefix("retrain/")
    if name not in known:
        raise RecipeError(f"--retrain {method}: expected one of {', '.join(known)}")
    return {"method": f"retrain/{name}"}


def _recipe(
    model: str,
    values: dict[str, Any],
    path: str,
    options: dict[str, Any],
    scope: list[str],
    distribute: str,
    settings: list[str] | None,
    folder: Path,
    device: str,
    revision: str | None,
    memory: str,
    silent: bool,
) -> Recipe:
    """Make the recipe that the command line describes, with a sparsity of its own for every weight where that is asked for."""
    from compress import registry
    from compress.recipe import reading as recipe_reading

    build = registry.method(path)
    if not path.startswith("prune/"):
        known = ", ".join(registry.names("prune"))
        raise RecipeError(f"--method {path}: removes nothing; methods that prune are {known}")
    match = scope[0] if len(scope) == 1 else scope
    uniform = {**values, "steps": [{"match": match, "method": path, "options": options}]}
    if unknown := [key for key in options if key not in build.model_fields]:
        raise RecipeError(f"--{unknown[0]}: {path} has no such option; it has {', '.join(build.model_fields)}")
    if distribute == "uniform":
        return recipe_reading.parse(recipe_reading.change(uniform, settings or []), "command line")
    if "pattern" in options:
        raise RecipeError(f"--distribute {distribute}: a pattern has one sparsity; leave one of the two out")
    share = options.pop("sparsity", 0.5)
    from compress.planning import sparsity_steps as shares

    with progress(silent) as listen:
        steps = shares.steps(model, uniform, distribute, share, folder, device, revision, parse_room(memory), listen)
    return recipe_reading.parse(recipe_reading.change({**values, "steps": steps}, settings or []), "command line")
