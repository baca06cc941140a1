"""`compress plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import (
    Bpw,
    ChatTemplate,
    DataName,
    Device,
    Dtype,
    Json,
    Length,
    MaxKl,
    Memory,
    Model,
    Quiet,
    Revision,
    Samples,
    Seed,
    Size,
)
from compress.commands._shared import data_values, method_lines, parse_room, progress


def plan_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write, a .yaml file.")],
    bpw: Bpw = None,
    size: Size = None,
    max_kl: MaxKl = None,
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
    data: DataName = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    chat_template: ChatTemplate = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read headers alone, print which budgets are possible, and stop.")
    ] = False,
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
    from compress.planning import planner as planning
    from compress.planning import plots
    from compress.planning.budget import Budget
    from compress.screen.plans import show_outlook, show_planned

    budget = Budget.of(bpw, size, max_kl)
    values = data_values(data, samples, length, seed, chat_template)
    transforms, methods = method_lines(method, candidates)
    if dry_run:
        from compress.planning.feasibility import outlook

        room, given = parse_room(memory), (methods, candidates or [], transforms)
        seen = outlook(model, values, budget, dtype, device, revision, *given, room)
        print(json.dumps(seen, indent=2)) if json_ else show_outlook(seen)
        return
    with progress(quiet or json_) as listen:
        made = planning.command(
            model, values, budget, output.parent, listen, dtype, device, revision, parse_room(memory), planner, methods,
            candidates or [], uniform_siblings, check, transforms,
        )  # fmt: skip
    planning.write(made.recipe, output)
    drawn = plot or output.with_suffix(".svg")
    plots.plot(made.planned, drawn)
    found = {"recipe": str(output), "plot": str(drawn), **made.planned.plain()}
    print(json.dumps(found, indent=2)) if json_ else show_planned(found)
