"""Parts of every kind that kernels read, with random numbers, and what a product with them must be."""

from __future__ import annotations

from dataclasses import replace

import torch
from examples.table import table
from examples.two_level import two_level
from torch import Tensor

from compress.weights.table import Table, code_bits
from compress.weights.two_level import TwoLevel
from compress.weights.uniform import Uniform

Part = Uniform | Table | TwoLevel


def uniform(
    rows: int,
    columns: int,
    bits: int,
    size: int,
    *,
    zero: bool = False,
    offset: bool = False,
    bipolar: bool = False,
    scattered: bool = False,
    seed: int = 0,
) -> Uniform:
    """Codes that take every value, the largest and the smallest in whole tiles too; scales of both signs, and some of 0."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // size
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[: rows // 4] = (1 << bits) - 1
    codes[-1, : columns // 2] = 0
    scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)
    scale[rows // 2, 0] = 0
    order = torch.arange(columns) // size
    if scattered:
        order = order[torch.randperm(columns, generator=generator)]
    return Uniform(
        codes,
        scale,
        bits,
        size,
        zero=torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8) if zero else None,
        group=order.to(torch.uint8) if scattered else None,
        offset=torch.randn(rows, groups, generator=generator).to(torch.bfloat16) if offset else None,
        bipolar=bipolar,
    )


def kinds(rows: int = 48, columns: int = 192) -> dict[str, Part]:
    """A part of every kind of record, decoder and width, small enough for a CPU."""
    parts: dict[str, Part] = {}
    for bits in range(1, 9):
        parts[f"{bits} bits"] = uniform(rows, columns, bits, 64, seed=bits)
        parts[f"{bits} bits, zeros"] = uniform(rows, columns, bits, 32, zero=True, seed=bits)
    parts["3 bits, bipolar"] = uniform(rows, columns, 3, 64, bipolar=True)
    parts["3 bits, offsets"] = uniform(rows, columns, 3, 64, offset=True)
    parts["4 bits, zeros and offsets"] = uniform(rows, columns, 4, 16, zero=True, offset=True)
    for name, dtype in (("half", torch.float16), ("single", torch.float32)):  # as other tools store scales
        wide = uniform(rows, columns, 4, 64, zero=name == "half", seed=9)
        generator = torch.Generator().manual_seed(9)
        parts[f"4 bits, {name} scales"] = replace(wide, scale=torch.randn(wide.scale.shape, generator=generator).to(dtype))
    parts["4 bits, scattered"] = uniform(rows, columns, 4, 64, zero=True, scattered=True)
    groups = columns // 64
    for datatype in ("fp3", "fp4", "nf4", "bitmod-fp3", "bitmod-fp4"):
        parts[datatype] = table(rows, groups, 64, datatype, "uint8" if "bitmod" in datatype else "bfloat16")
    # Scales of e8m0 reach over 254 powers of two: here a part of them, as sums of all would be infinite.
    wide = table(rows, columns // 32, 32, "fp4", "e8m0")
    parts["fp4, e8m0"] = Table((wide.codes), (wide.scale % 24 + 115).to(torch.uint8), "fp4", 32)
    parts["fp4, e4m3"] = table(rows, columns // 16, 16, "fp4", "e4m3")
    for bits in (2, 3):
        parts[f"{bits} bits in two levels"] = two_level(rows, columns // 16, 16, bits, 3, 3, seed=bits)
    parts["4 bits in two levels, scattered"] = two_level(rows, columns // 16, 16, 4, 4, 2, torch.uint8)
    return parts


def activations(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random activations; the first row has one that is huge, the second is 0 and the third has a single 1."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if tokens > 3:
        x[0, columns // 3] = 1e4
        x[1] = 0
        x[2] = 0
        x[2, columns - 1] = 1
    return x


def exact(x: Tensor, decoded: Tensor) -> Tensor:
    """x (tokens, in) times a weight (out, in), transposed, in float64."""
    return x.double() @ decoded.double().T


def close(y: Tensor, x: Tensor, part: Part, rounded_weight: bool = False) -> None:
    """Compare entry by entry with the exact product of x (tokens, in) and a part.

    A result is rounded once, to half a unit in its last place, below the normal numbers to half of the smallest number. Sums in
    float32 are off by some 2^-20 of the largest that any codes could make, since codes and zero points are summed apart.
    `rounded_weight`: values, or entries of a table, were rounded to the type of x beforehand, each by up to eps / 2.
    """
    decoded = part.dequantize()
    low, high = (replace(part, codes=torch.full_like(part.codes, code)) for code in (0, last_code(part)))
    expected, largest = exact(x, decoded), exact(x.abs(), low.dequantize().abs() + high.dequantize().abs())
    assert y.shape == expected.shape
    eps = torch.finfo(y.dtype).eps
    smallest = torch.finfo(y.dtype).smallest_normal * eps
    wrong = (y.double() - expected).abs() - 0.501 * (eps * expected.abs() + smallest) - 2.0**-20 * largest
    if rounded_weight:
        wrong -= eps / 2 * exact(x.abs(), decoded.abs())
    assert bool((wrong <= 0).all()), (wrong / largest).max()


def last_code(part: Part) -> int:
    """The largest code."""
    return (1 << code_bits(part.datatype)) - 1 if isinstance(part, Table) else (1 << part.bits) - 1
