"""`compress eval`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compress.commands._options import Device, Json, Length, Model, Quiet, Samples, Seed
from compress.commands._shared import progress
from compress.recipe.data_options import DataOptions


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
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Folder or YAML file of tasks as lm-eval reads them, or the name of one of its own. May be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task; all if not given.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Put the result into the checkpoint's report and model card.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on a text.

    Perplexity, and against the original KL divergence and top-1 agreement; tokens per second of generation.
    """
    from compress import api
    from compress.screen.results import show_quality

    with progress(quiet or json_) as shown:
        result = api.evaluate(
            model,
            DataOptions(data, samples, length, seed),
            original=original,
            device=device,
            dtype=dtype,
            speed=speed,
            tasks=tasks or (),
            limit=limit,
            save=save,
            progress=shown,
        )
    print(json.dumps(result.plain(), indent=2)) if json_ else show_quality(result)
