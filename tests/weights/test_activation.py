"""Rounding of inputs against a slow reference written from the equations, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from examples.input import activation, activations
from torch import Tensor

from compress.errors import FormatError
from compress.kernels import int8
from compress.weights.activation import DATATYPES, Activation

E4M3 = sorted(
    {sign * value for sign in (1, -1) for value in [m / 512 for m in range(8)]}
    | {s * (8 + m) * 2.0 ** (e - 10) for s in (1, -1) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)}
)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(of: Activation) -> tuple[list[float], int]:
    """The numbers that a code may be, and the largest by which a dynamic scale is found."""
    if of.datatype == "e4m3":
        return E4M3, 448
    half = 1 << of.bits - 1
    return ([float(q) for q in range(-half, half)], half - 1) if of.symmetric else ([], 2 * half - 1)


def slow(of: Activation, values: list[float], scale: float | None, zero: int | None) -> list[float]:
    """Round the numbers that share a scale."""
    codes, top = grid(of)
    if of.symmetric:
        if scale is None:
            scale = max(abs(v) for v in values) / top or 1.0
        # The nearest, of two the one with an even place, which in both grids is the one that rounds half to even.
        return [
            scale * min(codes, key=lambda c: (abs(c - v / scale), codes.index(c) % 2 != codes.index(0.0) % 2)) for v in values
        ]
    if scale is None:
        low, high = min(*values, 0.0), max(*values, 0.0)
        scale = (high - low) / top or 1.0
        zero = min(max(round(-low / scale), 0), top)
    assert zero is not None
    return [scale * (min(max(round(v / scale) + zero, 0), top) - zero) for v in values]


def expected(of: Activation, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).tolist()
    size = of.group_size or of.columns
    if of.per == "tensor" and of.scale is None:
        flat = slow(of, [v for row in rows for v in row], None, None)
        return torch.tensor(flat, dtype=torch.float64).view(x.shape)
    result = []
    for row in rows:
        for group in range(of.columns // size):
            scale = None if of.scale is None else float(of.scale[group])
            zero = None if of.zero is None else int(of.zero[group])
            result += slow(of, row[group * size : (group + 1) * size], scale, zero)
    return torch.tensor(result, dtype=torch.float64).view(x.shape)


@pytest.mark.parametrize(
    "of", list(activations(24, 8)), ids=lambda a: f"{a.datatype}-{a.per}-{a.symmetric}-{a.scale is not None}"
)
def test_every_kind_against_the_reference(of: Activation) -> None:
    x = inputs(3, 2, 24)
    x[0, 0] *= 40
    x[1, 1] = 0
    x[2, 0, 8:16] = x[2, 0, 8:16].abs()
    torch.testing.assert_close(of.quantize(x), expected(of, x), rtol=1e-14, atol=1e-14)
    single = of.quantize(x.float())
    assert single.dtype == torch.float32
    # In float32 a number that lies between two codes may go to either: a step at most, and hardly any.
    assert ((single.double() - of.quantize(x)).abs() > 1e-5).double().mean() < 0.01


def test_halves_go_to_the_even_code() -> None:
    fixed = Activation(5, "int8", "tensor", scale=torch.tensor([2.0]))
    assert fixed.quantize(torch.tensor([[1.0, 3.0, -1.0, 5.0, -3.0]])).tolist() == [[0, 4, 0, 4, -4]]


def test_ends_of_the_grids() -> None:
    x = torch.tensor([[-1000.0, 1000.0]])
    assert Activation(2, "int4", "tensor", scale=torch.ones(1)).quantize(x).tolist() == [[-8, 7]]
    shifted = Activation(2, "int4", "tensor", None, False, torch.ones(1), torch.tensor([3], dtype=torch.uint8))
    assert shifted.quantize(x).tolist() == [[-3, 12]]
    assert Activation(2, "e4m3", "tensor", scale=torch.ones(1)).quantize(x).tolist() == [[-448, 448]]


def test_every_e4m3_number_stays() -> None:
    numbers = torch.tensor([E4M3])
    assert torch.equal(Activation(numbers.shape[1], "e4m3").quantize(numbers), numbers)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_nothing_is_off_by_more_than_half_a_step(datatype: str) -> None:
    x = inputs(50, 64).float()
    of = Activation(64, datatype)
    most = x.abs().amax(1, keepdim=True)
    step = most / 448 * 32 if datatype == "e4m3" else most / ((1 << of.bits - 1) - 1)
    assert bool(((of.quantize(x) - x).abs() <= step / 2 * 1.0001).all())


def test_eight_bits_per_token_are_those_of_the_int8_kernel() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(20, 96).to(dtype)
        assert torch.equal(Activation(96, "int8").quantize(x), int8.rounded(x))


def test_nothing_and_next_to_nothing() -> None:
    for of in activations(8, 4):
        assert of.quantize(torch.zeros(0, 8)).shape == (0, 8)
        if of.scale is None:
            assert torch.equal(of.quantize(torch.zeros(2, 8)), torch.zeros(2, 8))
            assert bool(of.quantize(torch.full((2, 8), 1e-45)).isfinite().all())


def test_tokens_do_not_see_each_other_but_with_one_scale() -> None:
    x = inputs(6, 24).float()
    for of in activations(24, 8):
        alone = torch.cat([of.quantize(row) for row in x.split(1)])
        assert torch.equal(alone, of.quantize(x)) == (of.per != "tensor" or of.scale is not None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datatype": "int9"}, "datatype is 'int9'"),
        ({"datatype": "int8", "per": "row"}, "per is 'row'"),
        ({"datatype": "int8", "per": "group"}, "group_size is None; expected a divisor of in=24"),
        ({"datatype": "int8", "per": "group", "group_size": 7}, "group_size is 7; expected a divisor of in=24"),
        ({"datatype": "int8", "group_size": 8}, "group_size is 8; expected none with a scale per token"),
        ({"datatype": "e4m3", "symmetric": False}, "symmetric is False; expected true of e4m3"),
        ({"datatype": "int8", "scale": torch.ones(1)}, "static is True; expected false with a scale per token"),
        ({"datatype": "int8", "per": "tensor", "scale": torch.ones(2)}, r"scale is torch.float32 \[2\]; expected float32 \[1\]"),
        ({"datatype": "int8", "per": "tensor", "symmetric": False, "scale": torch.ones(1)}, "zero is there or not"),
        ({"datatype": "int8", "zero": torch.zeros(1, dtype=torch.uint8)}, "zero is there or not"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=f"activation: {message}"):
        Activation(24, **settings)


def test_static_scales_are_counted() -> None:
    assert Activation(24, "int8").stored_bits == 0
    assert activation(24, "int4", "group", 8, False, True).stored_bits == 3 * 40
    assert activation(24, "e4m3", "tensor", None, True, True).stored_bits == 32
