"""Where torch's 4-bit CPU kernel pays: rows of bfloat16 activations times a 4-bit weight, in three ways.

    python bench/cpu_int4.py [--shapes 4096x4096 1024x4096] [--rows 1 2 4 ... 256] [--group-size 128] [--repeat 15] [--threads 2]

    int4     `compress.kernels.int4_cpu`, from its own layout, which is made once
    decode   `compress.kernels.torch_reference`: the stored weight is decoded, then a dense product; what runs where int4 does not
    dense    a dense bfloat16 weight that was never compressed

Each way goes through several weights in turn, as a model does, so that none stays in the cache. The ways take turns, so that what
else the machine does hits all of them; a time is the best of the repeats, per product. `compress.kernels.int4_cpu.MAX_ROWS` is
the largest number of rows up to which int4 was faster than decode, whatever the shape.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.kernels import int4_cpu, torch_reference
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WEIGHTS = 4  # products in a row, each with a weight of its own


def ways(rows: int, columns: int, group_size: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """Return the products by way: for each weight a function of the activations (tokens, in)."""
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {"int4": [], "decode": [], "dense": []}
    for seed in range(WEIGHTS):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(rows, columns // group_size, generator=generator) * columns**-0.5).bfloat16()
        weight = CompressedWeight(Uniform(codes, scale, 4, group_size))
        tensors, spec = packing.pack(weight)
        prepared, dense = int4_cpu.prepare(spec, tensors), weight.dequantize().bfloat16()
        found["int4"].append(lambda x, spec=spec, prepared=prepared: int4_cpu.matmul(x, spec, prepared))  # type: ignore[misc]
        found["decode"].append(lambda x, spec=spec, tensors=tensors: torch_reference.matmul(x, spec, tensors))  # type: ignore[misc]
        found["dense"].append(lambda x, dense=dense: torch.nn.functional.linear(x, dense))  # type: ignore[misc]
    return found


def milliseconds(products: list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Return the time of one product."""
    start = time.perf_counter()
    for product in products:
        product(x)
    return (time.perf_counter() - start) * 1000 / len(products)


def measure(shape: tuple[int, int], counts: list[int], group_size: int, repeat: int) -> list[dict[str, Any]]:
    """Return one row per number of activation rows: milliseconds by way."""
    found = ways(*shape, group_size)
    table = []
    for count in counts:
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(repeat + 1):
            for name, products in found.items():
                took = milliseconds(products, x)
                if turn:  # the first turn warms up
                    times[name].append(took)
        table.append({"rows": count, **{name: min(values) for name, values in times.items()}})
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "1024x4096"], help="out x in")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--group-size", type=int, default=128, choices=int4_cpu.GROUP_SIZES)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--chunk", type=int, default=torch_reference._CHUNK, help="weights that decode takes at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch_reference._CHUNK = args.chunk
    result: dict[str, Any] = {"threads": args.threads, "torch": torch.__version__, "group_size": args.group_size, "shapes": {}}
    for text in args.shapes:
        out, columns = map(int, text.split("x"))
        table = measure((out, columns), args.rows, args.group_size, args.repeat)
        result["shapes"][text] = table
        print(f"{text}, ms     int4   decode    dense   decode/int4  dense/int4")
        for row in table:
            ratios = f"{row['decode'] / row['int4']:11.1f} {row['dense'] / row['int4']:11.1f}"
            print(f"{row['rows']:8} rows {row['int4']:8.2f} {row['decode']:8.2f} {row['dense']:8.2f} {ratios}", flush=True)
        faster = [row["rows"] for row in table if row["int4"] < row["decode"]]
        print(f"int4 is faster than decode up to {max(faster, default=0)} of the rows tried\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
