"""Pruned weights with random values, of every kind that is stored."""

from __future__ import annotations

import torch
from examples.bitmask import bitmask
from examples.bitpack import uniform
from examples.dense import dense
from examples.low_rank import low_rank
from examples.pattern import pattern
from examples.sparse import sparse

from compress.weights.mask import Bitmask
from compress.weights.weight import CompressedWeight, Keep, Maskable

COLUMNS = 48
MASKS = ("ragged", "balanced", "runs", "balanced runs", "2:4", "1:4", "5:8", "all", "none")
BASES = ("bf16", "f16", "f32", "4-bit", "3-bit zeros", "2-bit offsets", "5-bit scattered", "8-bit row", "4-bit runs")


def mask(kind: str, rows: int, columns: int = COLUMNS, seed: int = 0) -> Keep:
    """A random mask (out, in) of one kind; `balanced` ones keep as many in every row."""
    generator = torch.Generator().manual_seed(seed)
    if ":" in kind:
        kept, of = map(int, kind.split(":"))
        return pattern(rows, columns // of, kept, of, seed)
    if kind in ("all", "none"):
        return Bitmask(torch.full((rows, columns), kind == "all"))
    size = 8 if "runs" in kind else 1
    if "balanced" not in kind:
        return bitmask(rows, columns // size, size, 0.4, seed)
    rank = torch.rand(rows, columns // size, generator=generator).argsort(1).argsort(1)
    return Bitmask(rank < columns // size // 3, size)


def base(kind: str, rows: int, columns: int = COLUMNS, seed: int = 0) -> Maskable:
    """A random base (out, in) of one kind."""
    types = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    if kind in types:
        return dense(rows, columns, types[kind], seed)
    bits, size = int(kind[0]), columns if kind.endswith("row") else 8 if kind.endswith("runs") else 16
    scattered = torch.uint8 if "scattered" in kind else None
    return uniform(rows, columns // size, size, bits, "zeros" in kind, scattered, seed, offset="offsets" in kind)


def pruned(
    base_kind: str, mask_kind: str, rows: int, columns: int = COLUMNS, seed: int = 0, more: bool = False
) -> CompressedWeight:
    """A pruned weight, with outliers and a low rank where `more`."""
    made = CompressedWeight.pruned(base(base_kind, rows, columns, seed), mask(mask_kind, rows, columns, seed))
    if not more:
        return made
    return CompressedWeight(
        made.base, sparse(rows, columns, 0.05, seed), made.keep, low_rank(rows, columns, 3, torch.bfloat16, seed)
    )
