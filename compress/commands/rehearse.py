"""`compress rehearse`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import Device, Dtype, Formats, Json, Model, Quiet, Revision, Settings
from compress.commands._shared import progress


def rehearse(
    model: Model,
    recipe: Annotated[str, typer.Argument(help="A recipe: a file, or a name from `compress recipes`.")] = "gptq-4bit",
    settings: Settings = None,
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
    format_: Formats = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try a recipe on a random copy of two blocks of a model, and say what would fail.

    compress rehearse MODEL gptq-3bit

    The whole of a run in under a minute: calibration, method, packing, reading back, loading with transformers, and
    with --format exports. Of a Hub id only
    config and headers are fetched. Exit code 2 where something would fail.
    """
    from compress.recipe.build import with_changes
    from compress.recipe.data_options import DataOptions
    from compress.recipe.reading import read
    from compress.runs.rehearsal import rehearse as run
    from compress.screen.plans import show_rehearsal

    made = with_changes(read(recipe), DataOptions(), dtype, settings or (), recipe)
    with tempfile.TemporaryDirectory(prefix="compress-rehearsal-") as folder, progress(quiet or json_) as shown:
        found = run(model, made, Path(folder) / "rehearsal", device, shown, revision, format_ or [])
    print(json.dumps(found.plain(), indent=2)) if json_ else show_rehearsal(found.plain())
    if found.problem is not None:
        raise typer.Exit(2)
