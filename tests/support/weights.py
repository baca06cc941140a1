"""Compressed weights with random values, of every kind that a format stores."""

from __future__ import annotations

import torch

from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight


def random_weight(
    rows: int, columns: int, bits: int = 4, group_size: int = 32, zero: bool = False, desc_act: bool = False, seed: int = 0
) -> CompressedWeight:
    """Return a weight (out, in) with random codes and scales; `desc_act` scatters the columns of a group."""
    generator = torch.Generator().manual_seed(seed)
    size = columns if group_size == -1 else group_size
    groups = columns // size
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.randn(rows, groups, generator=generator) * columns**-0.5 / (1 << bits)).bfloat16()
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8) if zero else None
    group = (torch.arange(columns) // size)[torch.randperm(columns, generator=generator)].to(torch.uint8) if desc_act else None
    return CompressedWeight(Uniform(codes, scale, bits, size, zeros, group))
