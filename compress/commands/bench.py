"""`compress bench`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import Device, Json, Quiet
from compress.commands._shared import progress
from compress.errors import RecipeError


def bench_command(
    model: Annotated[str | None, typer.Argument(help="Compressed checkpoint: one weight of each kind, and generation.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Random weights instead: OUTxIN, several with commas.")] = None,
    bits: Annotated[str, typer.Option(help="Of random weights: widths 1 to 8 with commas; 16 under a mask: values.")] = "4",
    group_size: Annotated[int, typer.Option(help="Of random weights; -1: one group per row.")] = 128,
    zero: Annotated[bool, typer.Option("--zero", help="Random weights have zero points.")] = False,
    pattern: Annotated[str | None, typer.Option(help="Random weights are pruned: N:M, as 2:4.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Random weights are pruned: share that is gone.")] = None,
    run: Annotated[int, typer.Option(help="Neighbouring columns that go together, with --sparsity.")] = 1,
    tokens: Annotated[str, typer.Option(help="Rows of activations, with commas.")] = "1,4,16,64,256",
    original: Annotated[str | None, typer.Option(help="The model it was made from; if not given, the one it names.")] = None,
    generate: Annotated[bool, typer.Option("--generate/--no-generate", help="Also time generation of the model.")] = True,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of activations: bfloat16, float16 or float32.")] = "bfloat16",
    activation_bits: Annotated[
        str, typer.Option(help="Several with commas. 8: rounded to integers where kernels can; 2 to 8: also from bits, on a GPU.")
    ] = "16",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time products with compressed weights.

    Against a dense weight and against what the machine can do; of a model also tokens per second, against its original.
    """
    from compress.evaluation import bench as benchmark
    from compress.screen.results import show_bench
    from compress.system.device import DTYPES, pick_device
    from compress.system.files import write_json

    if (model is None) == (shapes is None):
        raise RecipeError("compress bench: expected a model, or --shapes OUTxIN")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    where = pick_device(device)
    counts, widths = _numbers("--tokens", tokens, 1, 1 << 20), _numbers("--bits", bits, 1, 16)
    rounded = _numbers("--activation-bits", activation_bits, 2, 16)
    if wrong := [n for n in rounded if n not in ((8, 16) if where.type == "cpu" else (*range(2, 9), 16))]:
        raise RecipeError(f"--activation-bits {wrong[0]}: expected 8 or 16, or on a GPU 2 to 8 and 16")
    masked = pattern is not None or sparsity is not None
    if (pattern is not None and sparsity is not None) or (masked and shapes is None) or not 0 <= (sparsity or 0) < 1:
        raise RecipeError("--pattern and --sparsity: expected one of them, a sparsity from 0 to below 1, with --shapes")
    if wrong := [n for n in widths if n > 8 and not (n == 16 and masked)]:
        raise RecipeError(f"--bits {wrong[0]}: expected numbers from 1 to 8, or 16 with --pattern or --sparsity")
    if shapes is not None:
        sizes = [(shape, width) for shape in benchmark.parse_shapes(shapes) for width in widths]
        values = DTYPES[dtype]
        bases = [
            benchmark.random_values(s, values) if n == 16 else benchmark.random_uniform(s, n, group_size, zero) for s, n in sizes
        ]
        weights = [benchmark.weight_of(base, pattern, sparsity, run) for base in bases]
    else:
        assert model is not None
        weights = benchmark.of_model(model)
    with progress(quiet or json_) as shown:
        timed = model if generate else None
        result = benchmark.bench(weights, counts, where, DTYPES[dtype], timed, original, rounded, shown)
    found = {"command": shlex.join(["compress", *sys.argv[1:]]), **result.plain()}
    if output is not None:
        write_json(output, found)
    print(json.dumps(found, indent=2)) if json_ else show_bench(result)


def _numbers(option: str, text: str, low: int, high: int) -> list[int]:
    """Read 1,4,16. Raises RecipeError."""
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() and low <= int(piece) <= high for piece in pieces):
        raise RecipeError(f"{option} {text}: expected numbers from {low} to {high} with commas between them")
    return [int(piece) for piece in pieces]
