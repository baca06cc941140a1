"""`compress bisect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import Device, Json, Length, Quiet, Samples, Seed
from compress.commands._shared import progress
from compress.errors import RecipeError
from compress.recipe.data_options import DataOptions


def bisect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that compress wrote.")],
    original: Annotated[str, typer.Argument(help="The model it was made from.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Text to measure on; a batch of the calibration if not given.")
    ] = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the block and the weight that hurt most.

    compress bisect OUT MODEL --data text.jsonl --samples 8 --length 256

    Halves of the compressed weights are made dense again, one evaluation of the divergence each, some 2 log2 of their number.
    """
    from compress.evaluation.bisect import bisect as search
    from compress.recipe.reading import parse_data
    from compress.screen.results import show_bisection
    from compress.system.device import DTYPES

    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    values = DataOptions(data, samples, length, seed).values()
    if data is None and values:
        raise RecipeError(f"--{next(iter(values))}: means nothing without --data; give a text")
    with progress(quiet or json_) as shown:
        found = search(checkpoint, original, parse_data(values) if data else None, device, dtype, shown)
    print(json.dumps(found.plain(), indent=2)) if json_ else show_bisection(found.plain())
