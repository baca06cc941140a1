"""`compress export` and `compress convert`: a compressed checkpoint in the layout of another tool, or of ours."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compress.commands._options import Formats, Json, Model, Output, Quiet, Target, TensorParallel
from compress.commands._shared import Delivery, export_to, progress
from compress.errors import RecipeError


def export(
    model: Model,
    output: Output,
    format_: Formats = None,
    target: Target = None,
    tensor_parallel: TensorParallel = 1,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a compressed checkpoint in the layout of another tool, without a change of any value.

    compress export OUT --format gptq -o OUT-gptq

    Several formats get a folder each below the one that is given. What a layout cannot hold exactly is refused before anything
    is written; what was written is read back and compared.
    """
    from compress.screen.checkpoints import show_exports

    if not format_:
        raise RecipeError("--format: missing; expected one of " + ", ".join(_formats()))
    delivery = Delivery.of(target, tensor_parallel, format_)
    names = delivery.formats
    places = {name: output / name for name in names} if len(names) > 1 else {names[0]: output}
    with progress(quiet or json_) as listen:
        made = export_to(model, places, target, tensor_parallel, listen)
    print(json.dumps(made, indent=2)) if json_ else show_exports(made)


def convert(
    source: Model,
    output: Output,
    to: Annotated[str, typer.Option("--to", help="native, gptq, awq, compressed-tensors or dense.")] = "native",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a compressed checkpoint, ours or one of GPTQ, AWQ or compressed-tensors, bit for bit.

    compress convert MODEL-GPTQ -o OUT --to native
    """
    from compress.screen.checkpoints import show_exports

    with progress(quiet or json_) as listen:
        made = export_to(source, {to: output}, None, 1, listen)
    print(json.dumps(made[0], indent=2)) if json_ else show_exports(made)


def _formats() -> list[str]:
    from compress.interop.exporter import formats

    return formats()
