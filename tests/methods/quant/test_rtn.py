"""Rounding to nearest: the method against its grid, and its options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from options import bits_known, function_of
from pydantic import ValidationError

from compress.methods.quant.rtn import METHOD
from compress.methods.solvers.uniform_grid import Range, encode, fit

rtn = function_of("quant/rtn")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_codes_and_grid_are_those_of_the_fit(bits: int, symmetric: bool, group_size: int) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(bits))
    ranges: tuple[Range, ...] = ("minmax", "mse")
    for range_ in ranges:
        base = rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric, range=range_).weight.base
        grid = fit(weight, bits, group_size, symmetric=symmetric, search=range_ == "mse")
        assert torch.equal(base.codes, encode(weight, grid, group_size))
        assert torch.equal(base.scale, grid.scale)
        assert base.group_size == (48 if group_size == -1 else group_size)
        assert base.codes.dtype == torch.uint8
        assert base.scale.dtype == torch.bfloat16
        assert (base.zero is None) == symmetric
        assert int(base.codes.max()) < 2**bits


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_falls_with_bits_and_with_smaller_groups(symmetric: bool) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))

    def error(bits: int, group_size: int) -> float:
        decoded = rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric).weight.dequantize()
        return float((weight - decoded).square().mean())

    by_bits = [error(bits, 32) for bits in range(1 if symmetric else 2, 9)]
    # A bit is a factor of 4 on a uniform input and somewhat less on the tails of a Gaussian.
    assert all(fine < 0.5 * coarse for coarse, fine in itertools.pairwise(by_bits))
    by_group = [error(4, size) for size in (-1, 64, 16, 4)]
    assert by_group == sorted(by_group, reverse=True)


def test_weights_of_other_dtypes_round_like_their_values() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(rtn(weight, group_size=16).weight.base.codes, rtn(weight.float(), group_size=16).weight.base.codes)


def test_options() -> None:
    assert METHOD().model_dump() == {"bits": 4, "group_size": "auto", "symmetric": True, "range": "mse"}
    refused: list[dict[str, Any]] = [{"bits": 0}, {"bits": 9}, {"group_size": -2}, {"range": "max"}, {"nonsense": 1}]
    for wrong in refused:
        with pytest.raises(ValidationError):
            METHOD(**wrong)
    assert METHOD(group_size=48).check((8, 96)) is None
    assert "group_size=40" in (METHOD(group_size=40).check((8, 96)) or "")


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"group_size": -1}, {"bits": 3, "group_size": 64}])
def test_stored_bits_are_known_beforehand(options: dict[str, Any]) -> None:
    method = METHOD(**options)
    weight = torch.randn(12, 256, generator=torch.Generator().manual_seed(0))
    assert bits_known(method, (12, 256)) == method(weight, {}).weight.stored_bits
