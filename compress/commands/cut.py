"""`compress cut`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compress.commands._options import Device, Json, Model, NoReload, Output, Quiet, Revision, TextFlags
from compress.commands._shared import progress
from compress.errors import RecipeError


def cut(
    model: Model,
    output: Output,
    *,
    heads: Annotated[float, typer.Option(help="Share of the heads to cut, as many of each KV group.")] = 0.0,
    kv_groups: Annotated[float, typer.Option("--kv-groups", help="Share of the KV groups to cut, with all their heads.")] = 0.0,
    channels: Annotated[float, typer.Option(help="Share of the channels between the layers of an MLP to cut.")] = 0.0,
    blocks: Annotated[int, typer.Option(min=0, help="Number of blocks to cut.")] = 0,
    experts: Annotated[float, typer.Option(help="Share of the experts of every block to cut, by what they give.")] = 0.0,
    uneven: Annotated[
        bool, typer.Option("--uneven", help="Let blocks keep different numbers; the result needs `import compress` to load.")
    ] = False,
    score: Annotated[str, typer.Option(help="fisher, taylor, lora, mixed (from gradients), wanda or magnitude.")] = "fisher",
    rounds: Annotated[
        int, typer.Option(min=1, help="Let heads and channels go bit by bit, the others scored anew after each round.")
    ] = 1,
    repair: Annotated[bool, typer.Option("--repair/--no-repair", help="Least squares on what reads the rest.")] = True,
    text: TextFlags,
    json_: Json = False,
    device: Device = "auto",
    no_reload: NoReload = False,
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """Take heads, channels, experts or whole blocks out of a model; the result is a plain checkpoint with another config.

    compress cut MODEL -o OUT --channels 0.25 --data text.jsonl

    It goes on after an interruption.
    """
    from typing import Any, cast, get_args

    from compress.recipe.reading import parse_data
    from compress.screen.checkpoints import show_cut
    from compress.structured_pruning import cut as cutting
    from compress.structured_pruning.importance import Score
    from compress.structured_pruning.sizes import Wish

    if score not in get_args(Score):
        raise RecipeError(f"--score {score}: expected one of {', '.join(get_args(Score))}")
    wish = Wish(heads, kv_groups, channels, blocks, experts, cast(Any, score), repair, uneven, rounds)
    values = text.options().values()
    if "name" not in values:
        raise RecipeError("--data: missing; give a text to find out what is needed least: a file, a preset or a dataset's name")
    with progress(quiet or json_) as shown:
        made = cutting.cut(model, output, wish, parse_data(values), device, shown, not no_reload, revision)
    print(json.dumps(made, indent=2)) if json_ else show_cut(str(output), made)
