"""`compress diff`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compress.commands._options import Json, Quiet
from compress.commands._shared import progress


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint: dense, ours, GPTQ, AWQ or compressed-tensors.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what differs between two checkpoints, weight by weight.

    Missing weights, shapes, how they are stored, the largest and the relative difference of values, and the share of codes that
    differ. Ends with 0 where all values are the same, however they are stored, and with 9 where they are not.
    """
    from compress.inspection.diff import difference
    from compress.screen.checkpoints import show_difference

    with progress(quiet or json_) as shown:
        found = difference(first, second, shown)
    print(json.dumps(found.plain(), indent=2)) if json_ else show_difference(found)
    if not found.same:
        raise typer.Exit(9)
