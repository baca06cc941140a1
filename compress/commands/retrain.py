"""`compress retrain`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from compress.commands._options import Device, JobFolder, Json, KeepJob, Model, NoReload, Output, Quiet, TextFlags
from compress.commands._shared import progress


def retrain(
    model: Model,
    output: Output,
    *,
    original: Annotated[str | None, typer.Option(help="The model it was made from; if not given, the one it names.")] = None,
    method: Annotated[str, typer.Option(help="retrain/perp or another of `compress methods`.")] = "retrain/perp",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text that a step looks at.")] = 8,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="Of the method: weights=lora, rate=1e-3. May be repeated.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of both models' predictions.")] = 1.0,
    labels: Annotated[float, typer.Option(min=0, help="How much the text counts beside the original's predictions.")] = 0.0,
    text: TextFlags,
    json_: Json = False,
    device: Device = "auto",
    job: JobFolder = None,
    keep_job: KeepJob = False,
    no_reload: NoReload = False,
    quiet: Quiet = False,
) -> None:
    """Train a compressed model to predict what the original does: norms, scales and what stays of pruned weights.

    compress retrain OUT --original MODEL -o BETTER --data text.jsonl

    Both models are in memory as a whole. It goes on after an interruption; what was pruned stays pruned.
    """
    from compress import api
    from compress.recipe.reading import change
    from compress.screen.results import show_outcome

    stage: dict[str, Any] = {
        "method": method if "/" in method else f"retrain/{method}",
        "steps": steps,
        "batch": batch,
        "temperature": temperature,
        "labels": labels,
        **change({}, [f"options.{option}" for option in options or ()]),
    }
    run = api.RunOptions(device=device, job=job, keep_job=keep_job, reload=not no_reload)
    with progress(quiet or json_) as shown:
        outcome = api.retrain(model, output, original=original, stage=stage, data=text.options(), options=run, progress=shown)
    print(json.dumps(outcome.plain(), indent=2)) if json_ else show_outcome(outcome)
