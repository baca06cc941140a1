"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress._version import __version__
from compress.errors import CalibrationError, CompressError, RecipeError
from compress.options import (
    Bpw,
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
    MaxKl,
    Memory,
    Model,
    Offload,
    Output,
    Quiet,
    Revision,
    Samples,
    Seed,
    Settings,
    Size,
)

if TYPE_CHECKING:
    from compress.planning import Budget
    from compress.prepare import Plan
    from compress.recipe import Recipe
    from compress.recipe_data import Data

EXIT_CODES = """Exit codes: 0 done; 1 a bug; 2 wrong command line or recipe; 3 a checkpoint that cannot be read;
4 calibration data; 5 the job folder holds another job; 6 the result cannot be written; 7 verification failed; 8 a kernel;
130 interrupted."""

app = typer.Typer(
    name="compress",
    help="Make a language model smaller and keep it good.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; errors of the user's end in one message and an exit code of their own."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        code = app(standalone_mode=False)
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # what typer says about the command line
            error.show()
            raise SystemExit(2) from None
        raise
    if code == 130:  # what typer makes of Ctrl-C, depending on its version
        print("interrupted; run the same command again to go on", file=sys.stderr)
    if isinstance(code, int) and code:
        raise SystemExit(code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
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
    dry_run: DryRun = False,
    json_: Json = False,
    device: Device = "auto",
    dtype: Dtype = None,
    offload: Offload = False,
    memory: Memory = "4GB",
    job: JobFolder = None,
    keep_job: KeepJob = False,
    revision: Revision = None,
    evaluate: Evaluate = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a model.

    compress quantize MODEL -o OUT --bits 4 --data text.jsonl

    With a budget instead of --bits, `compress plan` and `compress run` in one go:
    compress quantize MODEL -o OUT --bpw 2.75 --data text.jsonl
    """
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    given = {key: value for key, value in options.items() if value is not None}
    values = _data(data, samples, length, seed, chat_template)
    if any(budget is not None for budget in (bpw, size, max_kl)):
        from compress import planning

        if given or recipe is not None:
            flag = "--recipe" if recipe is not None else "--" + next(iter(given)).replace("_", "-")
            raise RecipeError(f"{flag}: not with a budget, which chooses the recipe; leave one of them out")
        budget = planning.Budget.of(bpw, size, max_kl)
        made = _planned(model, values, budget, output.parent, method, settings, device, dtype, memory, revision, quiet or json_)
    else:
        made = _recipe(recipe, method, given, values, dtype, settings)
    _run(model, output, made, dry_run, json_, device, offload, memory, job, keep_job, revision, evaluate, quiet)


@app.command()
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
    dry_run: DryRun = False,
    json_: Json = False,
    device: Device = "auto",
    dtype: Dtype = None,
    offload: Offload = False,
    memory: Memory = "4GB",
    job: JobFolder = None,
    keep_job: KeepJob = False,
    revision: Revision = None,
    evaluate: Evaluate = None,
    quiet: Quiet = False,
) -> None:
    """Run any recipe.

    compress run gptq-3bit MODEL -o OUT --data text.jsonl
    """
    made = _recipe(recipe, None, {}, _data(data, samples, length, seed, chat_template), dtype, settings)
    _run(model, output, made, dry_run, json_, device, offload, memory, job, keep_job, revision, evaluate, quiet)


@app.command("plan")
def plan_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write, a .yaml file.")],
    bpw: Bpw = None,
    size: Size = None,
    max_kl: MaxKl = None,
    planner: Annotated[str, typer.Option(help="milp: the best there is; lim, zd: whole layers by a score; uniform.")] = "milp",
    method: Annotated[list[str] | None, typer.Option(help="Of the default candidates, 2 to 8 bits; may be repeated.")] = None,
    candidates: Annotated[
        list[str] | None, typer.Option(help="METHOD:bits=2,group_size=64, or a YAML file with a list. May be repeated.")
    ] = None,
    uniform_siblings: Annotated[
        bool, typer.Option("--uniform-siblings", help="Linears that read one tensor (q, k, v; gate, up) get the same.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Also measure the plan; always done for --max-kl.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Bits by layer and the front, .svg .png or .pdf; beside the recipe if not given.")
    ] = None,
    data: DataName = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    chat_template: ChatTemplate = None,
    json_: Json = False,
    device: Device = "auto",
    dtype: Dtype = None,
    memory: Memory = "4GB",
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """Find the best bits for every weight within a budget, and write them as a recipe.

    compress plan MODEL --bpw 3.0 -o recipe.yaml --data text.jsonl
    """
    from compress import planning, plots, screen

    budget = planning.Budget.of(bpw, size, max_kl)
    values = _data(data, samples, length, seed, chat_template)
    with _progress(quiet or json_) as listen:
        made = planning.command(
            model, values, budget, output.parent, listen, dtype, device, revision, _room(memory), planner, method or [],
            candidates or [], uniform_siblings, check,
        )  # fmt: skip
    planning.write(made.recipe, output)
    drawn = plot or (output.with_suffix(".svg") if plots.available() else None)
    if drawn is not None:
        plots.plot(made.planned, drawn)
    found = {"recipe": str(output), "plot": drawn and str(drawn), **made.planned.plain()}
    print(json.dumps(found, indent=2)) if json_ else screen.show_planned(found)


@app.command()
def inspect(model: Model, json_: Json = False) -> None:
    """Show what a checkpoint holds."""
    from compress import screen
    from compress.inspection import contents

    found = contents(model)
    print(json.dumps(found.plain(), indent=2)) if json_ else screen.show_contents(found)


@app.command("eval")
def evaluate_command(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Text to measure on: .txt .jsonl .parquet .npy, a preset or a Hub id.")],
    original: Annotated[str | None, typer.Option(help="The model it was made from; if not given, the one it names.")] = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Load the model and measure tokens per second.")] = True,
    save: Annotated[bool, typer.Option("--save", help="Put the result into the checkpoint's report and model card.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on a text.

    Perplexity, and against the original KL divergence and top-1 agreement; tokens per second of generation.
    """
    from compress import screen
    from compress.evaluate import quality as evaluation
    from compress.prepare import DTYPES
    from compress.recipe import parse_data

    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    values = _data(data, samples, length, seed, None)
    with _progress(quiet or json_) as listen:
        result = evaluation.evaluate(model, original, parse_data(values), device, dtype, speed, listen)
    if save:
        evaluation.save(Path(model), result)
    print(json.dumps(result.plain(), indent=2)) if json_ else screen.show_quality(result)


@app.command()
def verify(model: Model, device: Device = "cpu", json_: Json = False, quiet: Quiet = False) -> None:
    """Check that a checkpoint is intact.

    Checksums, every tensor decoded, one batch against the result that was recorded when it was written.
    """
    from compress import screen
    from compress.evaluate.verify import verify as check

    with _progress(quiet or json_) as listen:
        found = check(Path(model), device, listen)
    print(json.dumps(found, indent=2)) if json_ else screen.show_verified(found)


@app.command()
def methods(json_: Json = False) -> None:
    """List methods and their options."""
    from compress import screen

    found = screen.describe_methods()
    print(json.dumps(found, indent=2)) if json_ else screen.show_methods(found)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None, json_: Json = False) -> None:
    """List the shipped recipes, or print one."""
    from compress import recipe as recipe_module

    if name is not None:
        values = recipe_module.read(name)
        print(json.dumps(values, indent=2)) if json_ else print(recipe_module.locate(name).read_text(encoding="utf-8"), end="")
        return
    found = {preset: recipe_module.read(preset).get("description", "") for preset in recipe_module.presets()}
    print(json.dumps(found, indent=2)) if json_ else [print(f"{preset:20} {text}") for preset, text in found.items()]


def _data(
    name: str | None, samples: int | None, length: int | None, seed: int | None, chat_template: bool | None
) -> dict[str, Any]:
    values = {"name": name, "samples": samples, "length": length, "seed": seed, "chat_template": chat_template}
    return {key: value for key, value in values.items() if value is not None}


def _line(method: str) -> tuple[list[str], str]:
    """Read a method such as awq+gptq: transforms in order, and what rounds after them, to nearest if nothing is said."""
    from compress import registry

    transforms = registry.names("transform")
    paths = [m if "/" in m else f"transform/{m}" if m in transforms else f"quant/{m}" for m in method.split("+")]
    if paths[-1].startswith("transform/"):
        paths.append("quant/rtn")
    if wrong := [path for path in paths[:-1] if not path.startswith("transform/")]:
        raise RecipeError(f"--method {method}: {wrong[0]} cannot go before another method; transforms can, such as awq+gptq")
    return paths[:-1], paths[-1]


def _recipe(
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
        stages, path = _line(method or "quant/gptq")
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
) -> Recipe:
    """Plan for `quantize`; settings change the recipe that was planned."""
    from compress import planning, screen
    from compress import recipe as recipe_module

    with _progress(silent) as listen:
        methods = [method] if method else []
        made = planning.command(model, data, budget, folder, listen, dtype, device, revision, _room(memory), methods=methods)
    if not silent:
        screen.show_planned(made.planned.plain())
    values = made.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return recipe_module.parse(recipe_module.change(values, settings or []), "plan")


def _room(memory: str) -> int:
    from compress.recipe import parse_size

    try:
        return parse_size(memory)
    except ValueError as error:
        raise RecipeError(f"--memory: {error}") from error


def _run(
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
) -> None:
    from compress import distributed, estimate, prepare, screen
    from compress import run as runs
    from compress.evaluate import quality as evaluation
    from compress.pipeline import Settings as RunSettings
    from compress.recipe import parse_data

    room = _room(memory)
    plan = prepare.prepare(model, recipe, device, revision)
    ids = prepare.calibration(plan)
    measured = None if evaluate is None else parse_data({"name": evaluate})
    if measured is not None:
        _check_text(measured, plan)
    expected = estimate.estimate(plan, ids.shape[0], ids.shape[1], room, offload)
    if dry_run:
        found = screen.describe_plan(plan, expected, (ids.shape[0], ids.shape[1]))
        print(json.dumps(found, indent=2)) if json_ else screen.show_plan(found)
        return
    leader = distributed.leads()
    with _progress(quiet or json_ or not leader) as listen:
        summary = runs.run(plan, ids, output, RunSettings(offload=offload, memory=room), listen, expected, job, keep_job)
    result = None
    if measured is not None and leader:
        folder = str(plan.source.folder)
        with _progress(quiet or json_) as listen:
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
def _progress(quiet: bool) -> Iterator[Any]:
    from compress import screen

    with screen.progress(quiet) as listen:
        yield listen
