"""`compress plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import BudgetFlags, DataFlags, Model, PlanningFlags
from compress.commands._shared import progress, show_what_fits


def plan_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write, a .yaml file.")],
    *,
    budget: BudgetFlags,
    planner: Annotated[str, typer.Option(help="milp: the best there is; lim, zd: whole layers by a score; uniform.")] = "milp",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Of the default candidates, 2 to 8 bits; after a transform: drift+gptq. May be repeated."),
    ] = None,
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
    text: DataFlags,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read headers alone, print which budgets are possible, and stop.")
    ] = False,
    flags: PlanningFlags,
) -> None:
    """Find the best bits for every weight within a budget, and write them as a recipe.

    compress plan MODEL --bpw 3.0 -o recipe.yaml --data text.jsonl
    """
    from compress import api
    from compress.planning import plots
    from compress.planning.planner import write
    from compress.screen.plans import show_plan

    limit, data = budget.budget(), text.options()
    if dry_run:
        show_what_fits(model, data, limit, method or (), candidates or (), flags)
        return
    options = api.RunOptions(device=flags.device, revision=flags.revision, memory=flags.memory)
    with progress(flags.quiet or flags.json_) as shown:
        made = api.plan(
            model,
            limit,
            data=data,
            planner=planner,
            methods=method or (),
            candidates=candidates or (),
            uniform_siblings=uniform_siblings,
            check=check,
            dtype=flags.dtype,
            folder=output.parent,
            options=options,
            progress=shown,
        )
    write(made.recipe, output)
    drawn = plot or output.with_suffix(".svg")
    plots.plot(made.planned, drawn)
    found = {"recipe": str(output), "plot": str(drawn), **made.planned.plain()}
    print(json.dumps(found, indent=2)) if flags.json_ else show_plan(found)
