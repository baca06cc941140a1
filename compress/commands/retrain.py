"""`compress retrain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands._options import (
    DataName,
    Device,
    JobFolder,
    Json,
    KeepJob,
    Length,
    Model,
    NoReload,
    Output,
    Quiet,
    Samples,
    Seed,
)
from compress.commands._shared import data_values, progress
from compress.errors import RecipeError


def retrain(
    model: Model,
    output: Output,
    original: Annotated[str | None, typer.Option(help="The model it was made from; if not given, the one it names.")] = None,
    method: Annotated[str, typer.Option(help="retrain/perp or another of `compress methods`.")] = "retrain/perp",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text that a step looks at.")] = 8,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="Of the method: weights=lora, rate=1e-3. May be repeated.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of both models' predictions.")] = 1.0,
    labels: Annotated[float, typer.Option(min=0, help="How much the text counts beside the original's predictions.")] = 0.0,
    data: DataName = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
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
    from compress.checkpoint.packed_source import PackedSource
    from compress.evaluate.quality import base_of
    from compress.recipe import reading as recipe_reading
    from compress.run import prepare as run_prepare
    from compress.run import run as run_module
    from compress.screen.results import plain_summary, show_summary

    start = PackedSource.open_packed(Path(model))
    base = original or base_of(model)
    if base is None:
        raise RecipeError("--original: missing, and the model that OUT names is not on this machine; give its folder or Hub id")
    given: dict[str, Any] = recipe_reading.change({}, [f"options.{option}" for option in options or []])
    stage = {
        "method": method if "/" in method else f"retrain/{method}",
        "steps": steps,
        "batch": batch,
        "temperature": temperature,
        "labels": labels,
        **given,
    }
    values = recipe_reading.read(str(start.folder / "recipe.yaml"))
    text = data_values(data, samples, length, seed, None)
    if "name" in text:
        stage["data"] = text
    elif text or not values.get("data"):
        raise RecipeError("--data: missing; give the text to train on: a file, a preset or a dataset's name")
    values["retraining"] = [*(values.get("retraining") or []), stage]
    plan = run_prepare.prepare(base, recipe_reading.parse(values, str(start.folder)), device)
    last = plan.recipe.retraining[-1]
    ids = run_prepare.calibration(plan, last.data) if last.data is not None else run_prepare.calibration(plan)
    with progress(quiet or json_) as listen:
        summary = run_module.retrain(plan, ids, start, output, listen, job, keep_job, not no_reload)
    print(json.dumps(plain_summary(summary, None), indent=2)) if json_ else show_summary(summary, None)
