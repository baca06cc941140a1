"""Examples of what `formats/input` stores, and golden bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from compress.weights.activation import DATATYPES, Activation
from compress.weights.input_transform import Diagonal, Hadamard, InputTransform, Kronecker
from compress.weights.site_input import SiteInput

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def transform(kind: str, columns: int, size: int, dtype: torch.dtype, seed: int = 0) -> InputTransform:
    """A random one; `size` is the block of a Hadamard matrix, or that of the left matrix of a Kronecker product."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        return Hadamard.random(columns, size, generator)
    if kind == "diagonal":
        return Diagonal((torch.rand(columns, generator=generator) + 0.5).to(dtype))
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (size, columns // size)
    )
    return Kronecker(left.to(dtype), right.to(dtype))


def activation(
    columns: int, datatype: str, per: str, group_size: int | None, symmetric: bool, static: bool, seed: int = 0
) -> Activation:
    """Rounding with random static scales."""
    generator = torch.Generator().manual_seed(seed)
    count = columns // group_size if group_size else 1
    scale = torch.rand(count, generator=generator) / 8 + 0.01 if static else None
    bits = 8 if datatype == "e4m3" else int(datatype[3:])
    codes = torch.randint(0, 1 << bits, (count,), generator=generator, dtype=torch.uint8)
    return Activation(columns, datatype, per, group_size, symmetric, scale, codes if static and not symmetric else None)


def activations(columns: int, group_size: int) -> Iterator[Activation]:
    """One of every kind."""
    for datatype in DATATYPES:
        for symmetric in (True, False) if datatype != "e4m3" else (True,):
            yield activation(columns, datatype, "token", None, symmetric, False)
            for static in (False, True):
                yield activation(columns, datatype, "tensor", None, symmetric, static)
                yield activation(columns, datatype, "group", group_size, symmetric, static)


KINDS = ("hadamard", "diagonal", "kronecker")


@st.composite
def drawn(draw: st.DrawFn) -> SiteInput:
    block = 1 << draw(st.integers(0, 5))
    columns, seed = block * draw(st.integers(1, 6)), draw(st.integers(0, 999))
    which = draw(st.sampled_from(["transform", "activation", "both"]))
    first = second = None
    if which != "activation":
        first = transform(draw(st.sampled_from(KINDS)), columns, block, draw(st.sampled_from(DTYPES)), seed)
    if which != "transform":
        second = draw(st.sampled_from(list(activations(columns, block))))
    return SiteInput(columns, first, second)


def fixed() -> Iterator[SiteInput]:
    for columns, size in ((1, 1), (24, 8), (96, 32), (256, 128)):
        rounding = list(activations(columns, size))
        for number, kind in enumerate(KINDS):
            for dtype in DTYPES if kind != "hadamard" else DTYPES[:1]:
                yield SiteInput(columns, transform(kind, columns, size, dtype))
                yield SiteInput(columns, transform(kind, columns, size, dtype), rounding[number])
        for one in rounding:
            yield SiteInput(columns, activation=one)


_SIGNS = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0] * 5).bool()  # 40 columns: a word and a quarter

# A part, and the bytes of each of its tensors as hexadecimal digits.
GOLDEN: list[tuple[SiteInput, dict[str, str]]] = [
    (SiteInput(40, Hadamard(_SIGNS, 8)), {"signs": "5959595959000000"}),
    (SiteInput(3, Diagonal(torch.tensor([1.0, -0.5, 3.0]).bfloat16())), {"factors": "803f00bf4040"}),
    (
        SiteInput(2, Kronecker(torch.tensor([[2.0]]).half(), torch.tensor([[1.0, -0.5], [3.0, 0.0]]).half())),
        {"left": "0040", "right": "003c00b800420000"},
    ),
    (SiteInput(3, activation=Activation(3, "int8")), {}),
    (
        SiteInput(
            4,
            Hadamard(torch.tensor([False, True, False, False]), 4),
            Activation(4, "int4", "group", 2, False, torch.tensor([0.5, 3.0]), torch.tensor([7, 15], dtype=torch.uint8)),
        ),
        {"signs": "02000000", "scale": "0000003f00004040", "zero": "070f"},
    ),
    (
        SiteInput(4, activation=Activation(4, "e4m3", "tensor", scale=torch.tensor([0.25]))),
        {"scale": "0000803e"},
    ),
]
