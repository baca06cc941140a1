"""`compress bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._shared import progress
from compress.errors import RecipeError
from compress.options import Device, Json, Quiet


def bench_command(
    model: Annotated[str | None, typer.Argument(help="Compressed checkpoint: one weight of each kind, and generation.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Random weights instead: OUTxIN, several with commas.")] = None,
    bits: Annotated[str, typer.Option(help="Of random weights: widths 1 to 8 with commas.")] = "4",
    group_size: Annotated[int, typer.Option(help="Of random weights; -1: one group per row.")] = 128,
    zero: Annotated[bool, typer.Option("--zero", help="Random weights have zero points.")] = False,
    tokens: Annotated[str, typer.Option(help="Rows of activations, with commas.")] = "1,4,16,64,256",
    original: Annotated[str | None, typer.Option(help="The model it was made from; if not given, the one it names.")] = None,
    generate: Annotated[bool, typer.Option("--generate/--no-generate", help="Also time generation of the model.")] = True,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of activations: bfloat16, float16 or float32.")] = "bfloat16",
    activation_bits: Annotated[int, typer.Option(help="8: activations are rounded to integers where kernels can.")] = 16,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time products with compressed weights.

    Against a dense weight and against what the machine can do; of a model also tokens per second, against its original.
    """
    from compress.evaluate import bench as benchmark
    from compress.files import write_json
    from compress.prepare import DTYPES, pick_device
    from compress.screen.results import show_bench

    if (model is None) == (shapes is None):
        raise RecipeError("compress bench: expected a model, or --shapes OUTxIN")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if activation_bits not in (8, 16):
        raise RecipeError(f"--activation-bits {activation_bits}: expected 8 or 16")
    counts, widths = _numbers("--tokens", tokens, 1, 1 << 20), _numbers("--bits", bits, 1, 8)
    if shapes is not None:
        sizes = benchmark.parse_shapes(shapes)
        weights = [benchmark.random_uniform(shape, width, group_size, zero) for shape in sizes for width in widths]
    else:
        assert model is not None
        weights = benchmark.of_model(model)
    with progress(quiet or json_) as listen:
        timed = model if generate else None
        result = benchmark.bench(weights, counts, pick_device(device), DTYPES[dtype], timed, original, activation_bits, listen)
    if output is not None:
        write_json(output, result.plain())
    print(json.dumps(result.plain(), indent=2)) if json_ else show_bench(result)


def _numbers(option: str, text: str, low: int, high: int) -> list[int]:
    """Read 1,4,16. Raises RecipeError."""
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() and low <= int(piece) <= high for piece in pieces):
        raise RecipeError(f"{option} {text}: expected numbers from {low} to {high} with commas between them")
    return [int(piece) for piece in pieces]
