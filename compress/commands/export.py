"""`compress export` and `compress convert`: a compressed checkpoint in the layout of another tool, or of ours."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compress.commands._options import DeliveryFlags, Json, Model, Output, Quiet
from compress.commands._shared import progress
from compress.errors import RecipeError


def export(
    model: Model,
    output: Output,
    *,
    wanted: DeliveryFlags,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a compressed checkpoint in the layout of another tool, without a change of any value.

    compress export OUT --format gptq -o OUT-gptq

    Several formats get a folder each below the one that is given. What a layout cannot hold exactly is refused before anything
    is written; what was written is read back and compared.
    """
    from compress.interop.delivery import Delivery, Exports
    from compress.screen.checkpoints import show_exports, show_findings

    if not wanted.format_:
        raise RecipeError("--format: missing; expected one of " + ", ".join(_formats()))
    delivery = Delivery(wanted.target, wanted.tensor_parallel, tuple(wanted.format_))
    names = delivery.formats
    exports = Exports.of(model, delivery, {name: output / name for name in names} if len(names) > 1 else {names[0]: output})
    if delivery.target is not None:
        show_findings(delivery.target, exports.findings)
    with progress(quiet or json_) as shown:
        made = exports.write(shown)
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
    from compress.interop.delivery import Delivery, Exports
    from compress.screen.checkpoints import show_exports

    with progress(quiet or json_) as shown:
        made = Exports.of(source, Delivery(), {to: output}).write(shown)
    print(json.dumps(made[0], indent=2)) if json_ else show_exports(made)


def _formats() -> list[str]:
    from compress.interop.exporter import formats

    return formats()
