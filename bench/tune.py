"""How `weight_only` should be launched on this GPU: every plan that fits, timed, beside the one that is chosen.

    python bench/tune.py [--shapes 4096x4096,...] [--bits 4,3,2] [--tokens 1,16,64,128,256,512] [--out tune.json]

Varies how many blocks share the columns of the same rows, the tiles of a piece of columns, the stages of the rings, and the
tokens of a block; weights are rotated over copies that no cache holds, CUDA graphs are replayed, times are medians. Prints one
line per product with the chosen plan, the best one, the way that decodes the weight for torch's product, and their times; --out
has all of them. `weight_only.plan`, `team` and `CROSSOVER` are where a better choice goes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compress.evaluation import bench  # noqa: E402
from compress.kernels import _cuda, _weights, weight_only  # noqa: E402
from compress.kernels._weights import Tiles  # noqa: E402
from compress.kernels.weight_only import Plan  # noqa: E402


@dataclass(frozen=True)
class Timed:
    """A product by one plan."""

    out: int
    columns: int
    bits: int
    count: int  # of tokens
    plan: Plan | None  # None: the weight is decoded for torch's product
    chosen: bool
    microseconds: float


def plans(count: int, tiles: Tiles, device: _cuda.Device) -> Iterator[Plan]:
    """Every plan that fits the device, the chosen one first."""
    shape = weight_only.shape_of(tiles)
    chosen = weight_only.plan(count, tiles, shape, device)
    yield chosen
    seen = {chosen}
    for tokens in weight_only.TOKENS:
        for wide in weight_only.pieces(tokens):
            for stages in (2, 3, 4):
                for resident in (1, 2):
                    for waves in (1, 2, 4):
                        found = weight_only.plan_of(count, tiles, shape, device, tokens, wide, stages, resident, waves)
                        if found is not None and found not in seen:
                            seen.add(found)
                            yield found


def timed(shape: tuple[int, int], bits: int, count: int, device: torch.device) -> Iterator[Timed]:
    """Time one product by every plan."""
    part = bench.random_uniform(shape, bits, 128, False)
    part = replace(part, codes=part.codes.to(device), scale=part.scale.to(device))
    first = _weights.prepare(part)
    copies = [first]
    for _ in range(bench.copies_of(first.codes.nbytes + first.meta.nbytes, device) - 1):
        copies.append(replace(first, codes=first.codes.clone(), meta=first.meta.clone()))
    x = torch.randn(count, shape[1], device=device).to(torch.bfloat16)
    chosen_plan = weight_only.plan
    try:
        for number, found in enumerate(plans(count, first, _cuda.device(device.index or 0))):
            weight_only.plan = partial(_always, found)
            seconds = bench.median([partial(weight_only.matmul_tiles, x, one) for one in copies], device)
            yield Timed(*shape, bits, count, found, number == 0, 1e6 * seconds)
    finally:
        weight_only.plan = chosen_plan
    seconds = bench.median([partial(weight_only.matmul_dense, x, one) for one in copies], device)
    yield Timed(*shape, bits, count, None, False, 1e6 * seconds)


def _always(plan: Plan, *_: object) -> Plan:
    return plan


def described(one: Timed) -> str:
    """A plan and its time in a few words."""
    plan = one.plan
    if plan is None:
        return f"decoded {one.microseconds:.1f} us"
    what = f"{plan.tokens} tokens, {plan.splits} blocks along the columns, pieces of {plan.tiles} tiles, {plan.stages} stages"
    return f"{one.microseconds:.1f} us ({what})"


def main() -> None:
    """Print a line for each product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,4096x14336,14336x4096,28672x8192")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--tokens", default="1,16,64,128,256,512")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch sees none, and plans are for one")
    device, every = torch.device("cuda", torch.cuda.current_device()), []
    for shape in bench.parse_shapes(options.shapes):
        for bits in map(int, options.bits.split(",")):
            for count in map(int, options.tokens.split(",")):
                found = list(timed(shape, bits, count, device))
                every += found
                best = min(found[:-1], key=lambda one: one.microseconds)
                what = f"{shape[0]} x {shape[1]}, {bits} bits, {count} tokens"
                print(f"{what}: chosen {described(found[0])}, best {described(best)}, {described(found[-1])}", flush=True)
                if options.out is not None:
                    name = torch.cuda.get_device_name(device)
                    options.out.write_text(json.dumps({"gpu": name, "rows": [asdict(one) for one in every]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
