"""`compress compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import Json


def compare(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoints that compress wrote, measured with --evaluate or eval --save.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="An .html page to write.")] = None,
    json_: Json = False,
) -> None:
    """Compare checkpoints: divergence against size, and which of them no other beats in both.

    compress compare A B C -o page.html
    """
    from compress.report import card
    from compress.report import comparison as front
    from compress.screen.results import show_comparison

    found = front.entries(checkpoints)
    if output is not None:
        card.write_comparison(found, output)
    values = {"checkpoints": [e.plain() for e in found], "notices": front.notices(found), "page": output and str(output)}
    print(json.dumps(values, indent=2)) if json_ else show_comparison(values)
