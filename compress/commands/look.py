"""`compress inspect`, `verify`, `methods` and `recipes`: what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import Device, Json, Model, Quiet
from compress.commands._shared import progress


def inspect(model: Model, json_: Json = False) -> None:
    """Show what a checkpoint holds."""
    from compress.inspection.contents import contents
    from compress.screen.checkpoints import show_contents

    found = contents(model)
    print(json.dumps(found.plain(), indent=2)) if json_ else show_contents(found)


def verify(model: Model, device: Device = "cpu", json_: Json = False, quiet: Quiet = False) -> None:
    """Check that a checkpoint is intact.

    Checksums, every tensor decoded, one batch against the result that was recorded when it was written.
    """
    from compress.screen.checkpoints import show_verified
    from compress.verify.verify import verify as check

    with progress(quiet or json_) as shown:
        found = check(Path(model), device, shown)
    print(json.dumps(found, indent=2)) if json_ else show_verified(found)


def methods(json_: Json = False) -> None:
    """List methods and their options."""
    from compress.screen.methods import describe_methods, show_methods

    found = describe_methods()
    print(json.dumps(found, indent=2)) if json_ else show_methods(found)


def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None, json_: Json = False) -> None:
    """List the shipped recipes, or print one."""
    from compress.recipe import reading as recipe_reading

    if name is not None:
        values = recipe_reading.read(name)
        print(json.dumps(values, indent=2)) if json_ else print(recipe_reading.locate(name).read_text(encoding="utf-8"), end="")
        return
    found = {preset: recipe_reading.read(preset).get("description", "") for preset in recipe_reading.presets()}
    print(json.dumps(found, indent=2)) if json_ else [print(f"{preset:20} {text}") for preset, text in found.items()]
