"""Pruned weights of every kind that kernels read, small enough for a CPU, and what a product with them must be."""

from __future__ import annotations

import torch
from examples.bitmask import bitmask
from examples.dense import dense
from examples.pattern import pattern
from kernel_parts import exact, uniform
from torch import Tensor

from compress.kernels import _packets
from compress.kernels._packets import Packets
from compress.weights.dense import Dense
from compress.weights.mask import Bitmask, Pattern
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight


def values(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Dense:
    """Random values; a few are as large and as small as the type holds exactly in sums of float32."""
    return dense(rows, columns, dtype, seed)


def mask(kind: str, rows: int, columns: int, seed: int = 0) -> Bitmask | Pattern:
    """2:4, 1:2, 3:4, single weights or runs by their size; `none` and `all` keep nothing or all, `rows` only every third row."""
    if ":" in kind:
        kept, of = map(int, kind.split(":"))
        return pattern(rows, columns // of, kept, of, seed)
    size = int(kind.split()[1]) if kind.startswith("runs") else 1
    made = bitmask(rows, columns // size, size, 0.5, seed).kept
    if kind.endswith("none"):
        made = torch.zeros_like(made)
    elif kind.endswith("all"):
        made = torch.ones_like(made)
    elif kind.endswith("rows"):
        made = made & (torch.arange(rows) % 3 == 0).unsqueeze(1)
    return Bitmask(made, size)


def pruned(base: Dense | Uniform, keep: Bitmask | Pattern) -> CompressedWeight:
    return CompressedWeight.pruned(base, keep)


def kinds(rows: int = 40, columns: int = 256) -> dict[str, CompressedWeight]:
    """Masks of every layout over values and codes of every width and record."""
    found = {}
    masks = {"2:4": 64, "single": 32, "runs 16": 16, "1:2": 32, "3:4": 16, "runs 32": 32, "single none": 64, "runs 16 none": 32}
    masks |= {"single all": 64, "runs 16 all": 16, "single rows": 16, "runs 8": 64, "runs 16 rows": 64}
    for kind in masks:
        found[f"values, {kind}"] = pruned(values(rows, columns), mask(kind, rows, columns))
    for bits in range(1, 9):
        for kind in ("2:4", "single", "runs 16"):
            part = uniform(rows, columns, bits, masks[kind], zero=bits % 2 == 1 and bits > 1, seed=bits)
            found[f"{bits} bits, {kind}"] = pruned(part, mask(kind, rows, columns, bits))
    for kind, size in masks.items():
        found[f"4 bits and zeros, {kind}"] = pruned(uniform(rows, columns, 4, size, zero=True), mask(kind, rows, columns))
    for kind in ("2:4", "single", "runs 16"):
        found[f"3 bits and offsets, {kind}"] = pruned(uniform(rows, columns, 3, 32, offset=True), mask(kind, rows, columns))
        found[f"4 bits a row, {kind}"] = pruned(uniform(rows, columns, 4, columns, zero=True), mask(kind, rows, columns))
        found[f"4 bits scattered, {kind}"] = pruned(uniform(rows, columns, 4, 64, scattered=True), mask(kind, rows, columns))
        found[f"3 bits bipolar, {kind}"] = pruned(uniform(rows, columns, 3, 128, bipolar=True), mask(kind, rows, columns))
    return found


def packets_of(weight: CompressedWeight) -> Packets:
    assert isinstance(weight.base, Dense | Uniform)
    assert isinstance(weight.keep, Bitmask | Pattern)
    return _packets.prepare(weight.base, weight.keep)


def close(y: Tensor, x: Tensor, weight: CompressedWeight, more: Tensor | float = 0.0, rounded_weight: bool = False) -> None:
    """Compare entry by entry with the exact product: one rounding of the result, and sums in float32 of codes and shifts."""
    decoded, base = weight.dequantize(), weight.base
    expected = exact(x, decoded) + more
    size = decoded.abs()
    if isinstance(base, Uniform):
        group = base.group.long() if base.group is not None else torch.arange(base.shape[1]) // base.group_size
        offset = 0 if base.offset is None else base.offset.float()
        size = (256 * base.scale.float().abs() + abs(offset))[:, group]
    largest = exact(x.abs(), size)
    eps = torch.finfo(y.dtype).eps
    assert y.shape == expected.shape
    wrong = (y.double() - expected).abs() - 0.501 * eps * expected.abs() - 2.0**-20 * largest
    if rounded_weight:
        wrong -= eps / 2 * exact(x.abs(), decoded.abs())
    assert bool((wrong <= 0).all()), wrong.max()
