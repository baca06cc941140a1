"""Products from bit planes against products of integers, over all widths and kinds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.kernels._bit_serial import Kind, bipolar_product, planes, popcount, product, values
from compress.weights.uniform import Uniform

KINDS: tuple[Kind, ...] = ("unsigned", "signed", "bipolar")
BITS = range(1, 9)


def codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def integer(code: int, bits: int, kind: Kind) -> int:
    """What a code stands for, from its bits."""
    digits = [code >> i & 1 for i in range(bits)]
    if kind == "bipolar":
        return sum((2 * digit - 1) * 2**i for i, digit in enumerate(digits))
    top = -digits[-1] if kind == "signed" else digits[-1]
    return sum(digit * 2**i for i, digit in enumerate(digits[:-1])) + top * 2 ** (bits - 1)


def integers(of: Tensor, bits: int, kind: Kind) -> list[list[int]]:
    return [[integer(code, bits, kind) for code in row] for row in of.tolist()]


def direct(x: list[list[int]], w: list[list[int]]) -> list[list[int]]:
    return [[sum(a * b for a, b in zip(row, other, strict=True)) for other in w] for row in x]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_bits(bits: int, kind: Kind) -> None:
    every = torch.arange(1 << bits).to(torch.uint8)
    assert values(every, bits, kind).tolist() == [integer(code, bits, kind) for code in every.tolist()]


def test_bipolar_values_are_the_odd_numbers() -> None:
    for bits in BITS:
        every = torch.arange(1 << bits).to(torch.uint8)
        assert values(every, bits, "bipolar").tolist() == list(range(1 - 2**bits, 2**bits, 2))
        # A step of the part is two of these.
        part = Uniform(every.view(1, -1), torch.ones(1, 1).to(torch.bfloat16), bits, 1 << bits, bipolar=True)
        assert (2 * part.dequantize()).tolist() == [values(every, bits, "bipolar").tolist()]


def test_popcount() -> None:
    some = [0, 1, -1, 2**31 - 1, -(2**31), 0x12345678, -0x12345678, *(1 << i for i in range(31))]
    found = popcount(torch.tensor(some, dtype=torch.int32)).tolist()
    assert found == [(word & 0xFFFFFFFF).bit_count() for word in some]


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 95])
def test_planes_are_the_bits_in_place(columns: int) -> None:
    for bits in (1, 3, 8):
        of = codes(3, columns, bits=bits)
        cut = planes(of, bits)
        assert cut.dtype == torch.int32
        assert cut.shape == (bits, 3, -(-columns // 32))
        for i, row, word in itertools.product(range(bits), range(3), range(cut.shape[2])):
            some = of[row, 32 * word : 32 * word + 32].tolist()
            assert int(cut[i, row, word]) & 0xFFFFFFFF == sum((code >> i & 1) << k for k, code in enumerate(some))


@pytest.mark.parametrize("x_bits", BITS)
@pytest.mark.parametrize("w_bits", BITS)
def test_products_are_those_of_the_integers(x_bits: int, w_bits: int) -> None:
    for columns in (1, 33, 64):
        x, w = codes(3, columns, bits=x_bits), codes(4, columns, bits=w_bits, seed=1)
        x_planes, w_planes = planes(x, x_bits), planes(w, w_bits)
        for x_kind, w_kind in itertools.product(KINDS, KINDS):
            wanted = direct(integers(x, x_bits, x_kind), integers(w, w_bits, w_kind))
            assert product(x_planes, w_planes, columns, x_kind, w_kind).tolist() == wanted, (columns, x_kind, w_kind)
        both = direct(integers(x, x_bits, "bipolar"), integers(w, w_bits, "bipolar"))
        assert bipolar_product(x_planes, w_planes, columns).tolist() == both


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_products_are_exact(kind: Kind) -> None:
    columns = 16384
    for x_code, w_code in itertools.product((0, 127, 128, 255), repeat=2):
        x, w = torch.full((1, columns), x_code, dtype=torch.uint8), torch.full((1, columns), w_code, dtype=torch.uint8)
        wanted = columns * integer(x_code, 8, kind) * integer(w_code, 8, "bipolar")
        assert product(planes(x, 8), planes(w, 8), columns, kind, "bipolar").item() == wanted
        if kind == "bipolar":
            assert bipolar_product(planes(x, 8), planes(w, 8), columns).item() == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_groups_with_scales_give_the_product_with_the_decoded_part(kind: Kind, bits: int) -> None:
    """y = sum over groups of scale_x * scale_w / 2 * integers: what a kernel has to make of it for a bipolar part."""
    rows, groups, size, tokens, x_bits = 5, 3, 40, 4, 6
    generator = torch.Generator().manual_seed(bits)
    scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)
    part = Uniform(codes(rows, groups * size, bits=bits), scale, bits, size, bipolar=True)
    x, x_scale = codes(tokens, groups * size, bits=x_bits, seed=3), torch.rand(tokens, 1, generator=generator).double()

    def by_group(of: Tensor) -> Tensor:
        """(rows, in) -> (groups, rows, group size)"""
        return of.unflatten(1, (groups, size)).transpose(0, 1)

    whole = product(planes(by_group(x), x_bits), planes(by_group(part.codes), bits), size, kind, "bipolar")
    y = (whole * scale.double().T.unsqueeze(1) / 2).sum(0) * x_scale
    torch.testing.assert_close(y, values(x, x_bits, kind) * x_scale @ part.dequantize().double().T, rtol=1e-12, atol=1e-12)
