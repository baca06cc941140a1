"""What the loop of `weight_only` costs in instructions, compiled for an architecture that need not be here.

    python bench/instructions.py [--architecture sm_90] [--bandwidth 4.3e12] [--clock 1.755e9] [--processors 132]

For each width and number of tokens: registers, instructions of the shortest way round the loop per 2048 weights and warp
(groups of 128, symmetric, bfloat16), and how many there is time for while a GPU of that bandwidth (bytes per second), clock (Hz)
and number of multiprocessors streams those weights and their scales, at 4 instructions per clock. The quotient bounds the share
of the bandwidth that the loop can reach; it is a bound by one of several limits, and no measurement. The defaults are an H200.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import nvrtc  # noqa: E402

from compress.kernels import weight_only  # noqa: E402

WEIGHTS, PER_CLOCK = 2048, 4


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--bandwidth", type=float, default=4.3e12)
    parser.add_argument("--clock", type=float, default=1.755e9)
    parser.add_argument("--processors", type=int, default=132)
    options = parser.parse_args()
    print("| bits | tokens | registers | instructions | time for | share of the bandwidth at most |")
    print("|---|---|---|---|---|---|")
    for bits in (1, 2, 3, 4, 5, 6, 8):
        stored = bits + 16 / 128
        room = WEIGHTS * stored / 8 / (options.bandwidth / options.processors / options.clock) * PER_CLOCK
        for tokens in weight_only.TOKENS:
            tiles = weight_only.pieces(tokens)[0]
            kernel = weight_only.instance("wqmm", torch.bfloat16, bits, "SYMMETRIC", False, tokens)
            compiled = nvrtc.compile_for(kernel, options.architecture)
            products = 2 * 4 * tiles * tokens // 8  # row-blocks, steps, eights of tokens
            count = len(nvrtc.shortest_round(compiled, "HMMA", products)) / tiles
            print(f"| {bits} | {tokens} | {compiled.registers} | {count:.0f} | {room:.0f} | {min(1, room / count):.0%} |")


if __name__ == "__main__":
    main()
