"""`compress sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands._options import DataFlags, Model, PlanningFlags
from compress.commands._shared import progress
from compress.errors import RecipeError


def sweep_command(
    model: Model,
    *,
    method: Annotated[str, typer.Option(help="Any method that compresses one weight at a time: magnitude, alps, gptq, ...")],
    sparsity: Annotated[str | None, typer.Option(help="Sweep: START:STOP:STEP, or numbers with commas; or one number.")] = None,
    bits: Annotated[str | None, typer.Option(help="The same, of bits per code: 2:8:1.")] = None,
    pattern: Annotated[str | None, typer.Option(help="The same, of patterns: 3:4,2:4,1:4.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="An option of the method: group_size=64. Repeat.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the curve, JSON; the plot goes beside it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the plot, .svg .png or .pdf.")] = None,
    evaluate: Annotated[
        str | None, typer.Option("--evaluate", help="Text to measure on; if not given, windows of --data that are kept aside.")
    ] = None,
    text: DataFlags,
    flags: PlanningFlags,
) -> None:
    """Measure a method over a range of settings, in one go and without writing a checkpoint.

    compress sweep MODEL --method magnitude --sparsity 0:0.9:0.1 --data text.jsonl

    Bits of a quantizer, kept in a file with a plot beside it:
    compress sweep MODEL --method gptq --bits 2:8:1 --data text.jsonl -o curve.json
    """
    from compress.architecture.config import context_length, vocabulary
    from compress.calibration.data import load_ids
    from compress.planning import planner, plots
    from compress.planning import sweep as sweeps
    from compress.planning.sensitivity import sites_of, split
    from compress.recipe.build import memory_budget
    from compress.recipe.reading import parse_data
    from compress.runs import prepare as run_prepare
    from compress.screen.results import show_curve
    from compress.system.files import write_json

    option, values, fixed = _settings(sparsity, bits, pattern, settings or [])
    methods = sweeps.variants(_path(method), option, values, fixed)
    plan = planner.prepared(model, text.options().values(), flags.dtype, flags.device, flags.revision)
    for one in methods:
        for site in sites_of(plan):
            if problem := one.build.check(site.shape):
                raise RecipeError(f"{one.label}: {site.name}: {problem}")
    ids = run_prepare.calibration(plan)
    fit, probes = split(ids)
    if evaluate is not None:
        held_out, source = parse_data({"name": evaluate}), plan.source
        fit, probes = ids, load_ids(held_out, source.folder, vocabulary(source), context_length(source), fewer=True)
    with progress(flags.quiet or flags.json_) as shown:
        curve = sweeps.sweep(plan, fit, probes, option, values, methods, memory_budget(flags.memory), shown)
    if output is not None:
        write_json(output, curve.plain())
    drawn = plot or (output.with_suffix(".svg") if output is not None else None)
    if drawn is not None:
        plots.curve(curve, drawn)
    found = {**curve.plain(), "plot": drawn and str(drawn)}
    print(json.dumps(found, indent=2)) if flags.json_ else show_curve(found)


def _path(method: str) -> str:
    """A method by its whole name, or by its own where only one kind has it."""
    from compress import registry

    if "/" in method:
        return method
    kinds = [kind for kind in ("quant", "prune") if method in registry.names(kind)]
    return f"{kinds[0] if kinds else 'quant'}/{method}"


def _settings(
    sparsity: str | None, bits: str | None, pattern: str | None, more: list[str]
) -> tuple[str, list[float | str], dict[str, Any]]:
    """What is swept, its values, and options that stay. Raises RecipeError."""
    from compress.planning.sweep import settings
    from compress.recipe import reading as recipe_reading

    given: dict[str, list[float | str]] = {}
    if sparsity is not None:
        given["sparsity"] = [*settings(sparsity)]
    if bits is not None:
        given["bits"] = [*settings(bits, whole=True)]
    if pattern is not None:
        given["pattern"] = [*pattern.split(",")]
    many = [name for name, values in given.items() if len(values) > 1]
    if len(many) != 1:
        what = " and ".join(f"--{name}" for name in many) if many else "nothing"
        raise RecipeError(f"{what} to sweep: give several values of one of --sparsity, --bits and --pattern, as --bits 2:8:1")
    fixed: dict[str, Any] = {name: values[0] for name, values in given.items() if name != many[0]}
    changed: dict[str, Any] = recipe_reading.change({"options": fixed}, [f"options.{setting}" for setting in more])["options"]
    return many[0], given[many[0]], changed
