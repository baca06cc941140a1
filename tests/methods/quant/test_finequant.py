"""FineQuant against a slow reference of its rule, on matrices whose granularity is known, and its options."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import bits_known, function_of
from pydantic import ValidationError
from roundtrip import assert_round_trip
from runs import steps
from thorough import times
from torch import Tensor

from compress.methods.quant.finequant import METHOD, granularity, sizes
from compress.methods.solvers.uniform_grid import encode, fit
from compress.weights.uniform import Uniform

finequant = function_of("quant/finequant")

law = settings(max_examples=times(20, 80), deadline=None, derandomize=True)


def random(rows: int, columns: int, seed: int = 0, tail: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight * torch.exp(tail * torch.randn(rows, columns, generator=generator, dtype=torch.float64)) * 0.05


# ---------------------------------------------------------------------------------------------------- the slow reference


def largest(values: list[float]) -> float:
    return max(abs(value) for value in values)


def reference_size(weight: Tensor, g_min: int, g_max: int, alpha: float, percentile: float) -> int:
    size = weight.shape[1] if g_max == -1 else g_max
    while size % 2 == 0 and size // 2 >= g_min:
        ratios = []
        for row in weight.tolist():
            for start in range(0, len(row), size):
                whole = row[start : start + size]
                for half in (whole[: size // 2], whole[size // 2 :]):
                    ratios.append(largest(whole) / largest(half) if largest(half) else 1.0)
        ratios.sort()
        share = Fraction(str(percentile)) / 100
        found = next(r for i, r in enumerate(ratios) if Fraction(i + 1, len(ratios)) >= share)
        if found <= alpha:
            return size
        size //= 2
    return size


def reference_codes(weight: Tensor, size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, groups) on the half-range symmetric grid that just covers every group."""
    top, codes = 2**bits - 1, torch.empty_like(weight)
    scales = weight.new_empty(len(weight), weight.shape[1] // size)
    for row, g in itertools.product(range(len(weight)), range(scales.shape[1])):
        values = weight[row, g * size : (g + 1) * size].tolist()
        scale = torch.tensor(2 * largest(values) / top, dtype=torch.float64).to(torch.bfloat16).item()
        scales[row, g] = scale
        for j, value in enumerate(values):
            code = round(value / scale) + 2 ** (bits - 1) if bits > 1 else math.floor(value / scale) + 1
            codes[row, g * size + j] = min(max(code, 0), top)
    return codes, scales


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("alpha", [1.0, 1.6, 2.2, 5.0])
def test_equals_the_reference_code_for_code(bits: int, alpha: float) -> None:
    for seed, (g_min, g_max, percentile) in enumerate(((4, -1, 90.0), (8, 32, 99.9), (1, 16, 60.0), (32, -1, 100.0))):
        weight = random(7, 96, seed=10 * bits + seed, tail=0.3)
        options: dict[str, Any] = {"g_min": g_min, "g_max": g_max, "alpha": alpha, "percentile": percentile}
        size = reference_size(weight, **options)
        codes, scales = reference_codes(weight, size, bits)
        result = finequant(weight, bits=bits, range="minmax", **options)
        base = result.weight.base
        assert isinstance(base, Uniform)
        assert base.group_size == size
        assert result.notes == {"group_size": size}
        assert torch.equal(base.scale.double(), scales)
        assert torch.equal(base.codes.double(), codes)
        assert base.zero is None
        searched = finequant(weight, bits=bits, **options).weight.base
        grid = fit(weight, bits, size, symmetric=True, search=True)
        assert isinstance(searched, Uniform)
        assert torch.equal(searched.scale, grid.scale)
        assert torch.equal(searched.codes, encode(weight, grid, size))


@law
@given(
    rows=st.integers(1, 9),
    columns=st.sampled_from([24, 64, 96, 33]),
    g_min=st.integers(1, 40),
    alpha=st.sampled_from([1.0, 1.2, 1.5, 2.0, 3.0]),
    percentile=st.sampled_from([0.1, 50.0, 75.0, 90.0, 99.9, 100.0]),
    tail=st.sampled_from([0.0, 1.0]),
    zeros=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_size_is_that_of_the_rule(
    rows: int, columns: int, g_min: int, alpha: float, percentile: float, tail: float, zeros: bool, seed: int
) -> None:
    weight = random(rows, columns, seed, tail)
    if zeros:
        weight[:, : columns // 2] = 0
        weight[0] = 0
    found = granularity(weight, sizes(columns, g_min, -1), alpha, percentile)
    assert found == reference_size(weight, g_min, -1, alpha, percentile)
    assert columns % found == 0
    assert found >= min(g_min, columns)


# ---------------------------------------------------------------------------------------------------- known granularities


def stepped(confined: int) -> Tensor:
    """Magnitudes that are equal within runs of `confined` columns and 4 times as large from one run to the next and back."""
    run = torch.arange(64) // confined
    return (4.0 ** (run % 2).double()).repeat(8, 1) * torch.where(torch.arange(64) % 3 == 0, -0.1, 0.1)


def test_halving_goes_on_while_ranges_shrink() -> None:
    # Halves of both sizes appear only where a group of two runs is cut: before that all ratios are 1.
    assert granularity(stepped(32), [64, 32, 16, 8], 2.0, 99.9) == 32
    assert granularity(stepped(16), [32, 16, 8], 2.0, 99.9) == 16
    assert granularity(stepped(16), [64, 32, 16, 8], 2.0, 99.9) == 64  # it looks one halving ahead
    assert granularity(stepped(32), [64, 32, 16, 8], 4.0, 99.9) == 64  # by more than alpha, not by as much
    assert granularity(torch.full((4, 64), 0.3), [64, 32], 1.0, 100.0) == 64


def test_one_far_weight_counts_by_the_percentile() -> None:
    weight = torch.full((100, 64), 0.1)
    weight[7, 3] = 5.0
    halvings = [64, 32, 16]
    assert granularity(weight, halvings, 2.0, 100.0) == 16
    assert granularity(weight, halvings, 2.0, 99.5) == 64
    assert granularity(weight, halvings, 2.0, 99.6) == 32  # the first one of 200, and then one of 400
    assert granularity(weight, halvings, 2.0, 50.0) == 64


def test_halves_of_zeros_ask_for_nothing() -> None:
    weight = random(8, 64)
    weight[:, 32:] = 0
    assert granularity(weight, [64, 32], 1.0, 100.0) == 64
    assert granularity(torch.zeros(8, 64), [64, 32], 1.0, 100.0) == 64
    result = finequant(torch.zeros(8, 64), g_min=8)
    assert (result.weight.dequantize() == 0).all()


def test_where_rows_have_far_weights_small_groups_lower_the_error() -> None:
    weight = random(64, 256)
    weight[:, ::64] *= 30

    def error(**options: Any) -> tuple[int, float]:
        result = finequant(weight, bits=4, **options)
        return result.notes["group_size"], float((weight - result.weight.dequantize()).square().mean())

    adapted, coarse = error(), error(g_min=256)
    assert adapted[0] < coarse[0] == 256
    assert adapted[1] < 0.7 * coarse[1]
    assert error(alpha=1e6) == coarse


def test_the_unit_of_the_weights_does_not_count() -> None:
    weight = random(16, 64, tail=0.5)
    for factor in (2.0**-20, 2.0**20):
        assert granularity(weight * factor, [64, 32, 16, 8], 2.0, 99.0) == granularity(weight, [64, 32, 16, 8], 2.0, 99.0)


# ---------------------------------------------------------------------------------------------------- options and the whole


def test_sizes_are_halves_that_divide() -> None:
    assert sizes(4096, 32, -1) == [4096, 2048, 1024, 512, 256, 128, 64, 32]
    assert sizes(11008, 32, -1) == [11008, 5504, 2752, 1376, 688, 344, 172, 86, 43]
    assert sizes(11008, 32, 128) == [128, 64, 32]
    assert sizes(96, 96, -1) == sizes(96, 200, -1) == sizes(96, 49, -1) == [96]
    assert sizes(4, 1, -1) == [4, 2, 1]


def test_options() -> None:
    assert METHOD().model_dump() == {
        "bits": 4,
        "g_min": 32,
        "g_max": -1,
        "alpha": 2.0,
        "percentile": 99.9,
        "range": "mse",
    }
    refused: list[dict[str, Any]] = [
        {"bits": 9},
        {"g_min": 0},
        {"g_max": -2},
        {"g_max": 16},
        {"g_max": 0},
        {"alpha": 0.9},
        {"percentile": 0},
        {"percentile": 101},
        {"group_size": 64},
    ]
    for wrong in refused:
        with pytest.raises(ValidationError):
            METHOD(**wrong)
    with pytest.raises(ValidationError, match="g_max=16 is below g_min=32"):
        METHOD(g_max=16)
    assert not METHOD.rows_independent
    assert METHOD(g_max=48).check((8, 96)) is None
    assert METHOD(g_max=40).check((8, 96)) == "in=96 is not a multiple of g_max=40; use 32, or -1 for the whole row"


def test_stored_bits_are_known_where_there_is_one_size() -> None:
    weight = random(12, 256, tail=1.0)
    assert bits_known(METHOD(), (12, 256)) is None
    assert bits_known(METHOD(g_max=128), (12, 256)) is None
    for options in ({"g_min": 129}, {"g_max": 32}, {"g_min": 256}, {"g_min": 1000}):
        method = METHOD(**options)
        assert bits_known(method, (12, 256)) == method(weight, {}).weight.stored_bits
    assert bits_known(METHOD(), (4, 33)) == METHOD()(random(4, 33), {}).weight.stored_bits
    assert json.loads(json.dumps(METHOD()(weight, {}).notes)) == METHOD()(weight, {}).notes


def test_from_recipe_to_logits(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Also with sizes that differ from matrix to matrix, of which the run cannot tell the bits beforehand."""
    chosen = steps("quant/finequant", bits=3, g_min=4, alpha=1.9, percentile=99.0)
    summary = assert_round_trip(tiny("llama"), tmp_path, None, chosen)
    assert 3.0 < summary["bits_per_compressed_weight"] <= 7.0
    rows = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert len({row["notes"]["group_size"] for row in rows}) > 1
