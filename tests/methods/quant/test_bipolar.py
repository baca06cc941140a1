"""Bipolar integers against a slow reference with the explicit inverse Hessian, and what must hold of the results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import bits_known, function_of
from problems import damped, loss, problem
from pydantic import ValidationError
from roundtrip import assert_round_trip
from runs import steps
from thorough import times
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.errors import CalibrationError
from compress.methods.quant.bipolar import METHOD
from compress.methods.solvers.uniform_grid import Range, encode, fit
from compress.weights.uniform import Uniform

bipolar = function_of("quant/bipolar")

law = settings(max_examples=times(10, 40), deadline=None, derandomize=True)
BITS = range(1, 9)


def part(weight: Tensor, hessian: Tensor, **options: Any) -> Uniform:
    base = bipolar(weight, hessian, **options).weight.base
    assert isinstance(base, Uniform)
    return base


# ---------------------------------------------------------------------------------------------------- the slow reference


def code_of(value: float, scale: float, bits: int) -> int:
    """The code whose value (2c - (2^b - 1)) s / 2 is nearest, by trying all."""
    return min(range(2**bits), key=lambda c: abs((2 * c - (2**bits - 1)) * scale / 2 - value))


def value_of(code: int, scale: float, bits: int) -> float:
    return (2 * code - (2**bits - 1)) * scale / 2


def reference(
    weight: Tensor, hessian: Tensor, *, bits: int, group_size: int, range_: str, refinements: int
) -> tuple[Tensor, Tensor]:
    """Return codes (out, in) and scales (out, groups): columns are eliminated one by one from the inverse of what is left."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    full = damped(hessian)
    place = torch.sort(hessian.diagonal(), descending=True, stable=True).indices
    left = [torch.linalg.inv(full[place[j:]][:, place[j:]]) for j in range(columns)]
    importance = torch.empty(columns, dtype=torch.float64)
    importance[place] = torch.stack([1 / inverse[0, 0] for inverse in left])
    if range_ == "minmax":
        scale = weight.unflatten(1, (-1, size)).abs().amax(2) * 2 / (2**bits - 1)
        scale = scale.to(torch.bfloat16).double()
    else:  # which test_grid.py checks by itself
        scale = fit(weight, bits, size, symmetric=True, search=True, importance=importance, bipolar=True).scale.double()
    codes, current = torch.empty(rows, columns, dtype=torch.int64), weight.clone()
    for j, column in enumerate(place.tolist()):
        for row in range(rows):
            s = float(scale[row, column // size])
            codes[row, column] = code_of(float(current[row, column]), s, bits)
            error = float(current[row, column]) - value_of(int(codes[row, column]), s, bits)
            current[row, place[j:]] -= error / left[j][0, 0] * left[j][0]
    for _ in range(refinements):
        descend(weight, full, codes, scale, bits, size)
    return codes, scale


def descend(weight: Tensor, full: Tensor, codes: Tensor, scale: Tensor, bits: int, size: int) -> None:
    """One pass over groups: the best scale, then each code given all others."""

    def delta() -> Tensor:
        return weight - (2 * codes - (2**bits - 1)) * scale.repeat_interleave(size, 1) / 2

    for g in range(scale.shape[1]):
        inside = torch.arange(weight.shape[1]) // size == g
        step = (codes.double() - (2**bits - 1) / 2) * inside
        change = (step @ full * delta()).sum(1) / (step @ full * step).sum(1)
        scale[:, g] = (scale[:, g] + change).to(torch.bfloat16).double()
        for column in range(g * size, (g + 1) * size):
            others = delta()
            others[:, column] = 0
            wanted = weight[:, column] + others @ full[:, column] / full[column, column]
            for row in range(len(weight)):
                codes[row, column] = code_of(float(wanted[row]), float(scale[row, g]), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("refinements", [0, 2])
def test_equals_the_reference_code_for_code(bits: int, refinements: int) -> None:
    weight, hessian = problem(rows=4, columns=24, seed=bits)
    for group_size, range_ in itertools.product((8, -1), ("minmax", "mse")):
        codes, scale = reference(
            weight, hessian, bits=bits, group_size=group_size, range_=range_, refinements=refinements if bits < 8 else 0
        )
        base = part(
            weight,
            hessian,
            bits=bits,
            group_size=group_size,
            range=range_,
            refinements=refinements if bits < 8 else 0,
            block=7,
        )
        assert torch.equal(base.codes.long(), codes), (group_size, range_)
        assert torch.equal(base.scale.double(), scale)
        assert base.bipolar
        assert base.zero is None
        assert base.offset is None
        wanted = (2 * codes - (2**bits - 1)) * scale.repeat_interleave(base.group_size, 1) / 2
        assert torch.equal(base.dequantize().double(), wanted)


@law
@given(bits=st.integers(1, 8), group_size=st.sampled_from([4, 16, -1]), seed=st.integers(0, 10**6))
def test_refinement_lowers_the_damped_loss(bits: int, group_size: int, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    full = damped(hessian)
    found = [
        loss(weight, part(weight, hessian, bits=bits, group_size=group_size, refinements=n).dequantize(), full) for n in (0, 1, 3)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(found))


def test_identity_hessian_is_rounding_to_nearest() -> None:
    weight = problem(rows=20)[0]
    for bits in BITS:
        base = part(weight, torch.eye(32).double(), bits=bits, group_size=8, refinements=0)
        grid = fit(weight, bits, 8, symmetric=True, search=True, bipolar=True)
        assert torch.equal(base.scale, grid.scale)
        assert torch.equal(base.codes, encode(weight, grid, 8))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_part_of_the_method_lowers_the_loss(bits: int) -> None:
    """In the mean over layers: rounding, then compensation, then searched ranges, then refinement."""
    stages: list[dict[str, Any]] = [{"range": "minmax", "refinements": 0}, {"refinements": 0}, {"refinements": 2}]
    ratios = torch.zeros(3)
    for seed in range(6):
        weight, hessian = problem(rows=24, columns=64, seed=seed)
        plain = loss(weight, part(weight, torch.eye(64).double(), bits=bits, group_size=16, range="minmax").dequantize(), hessian)
        for i, stage in enumerate(stages):
            found = part(weight, hessian, bits=bits, group_size=16, **stage)
            ratios[i] += math.log(loss(weight, found.dequantize(), hessian) / plain) / 6
    means = ratios.exp().tolist()
    assert means[0] < 1
    assert means[1] < 0.9 * means[0]
    assert means[2] < 0.98 * means[1]


def test_the_values_mirror_each_other() -> None:
    weight, hessian = problem(rows=20)
    for bits in BITS:
        base, mirrored = (part(w, hessian, bits=bits, group_size=8, refinements=0) for w in (weight, -weight))
        assert torch.equal(base.scale, mirrored.scale)
        assert torch.equal(base.codes, 2**bits - 1 - mirrored.codes)


def test_one_bit_is_the_sign() -> None:
    weight = problem(rows=20)[0]
    base = part(weight, torch.eye(32).double(), bits=1, group_size=8, refinements=0)
    assert torch.equal(base.codes == 1, weight > 0)


# ---------------------------------------------------------------------------------------------------- bad Hessians and weights


@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_no_tokens_is_rounding_to_nearest(range_: Range) -> None:
    weight = problem()[0].float()
    result = bipolar(weight, torch.zeros(32, 32), bits=3, group_size=8, range=range_)
    grid = fit(weight, 3, 8, symmetric=True, search=range_ == "mse", bipolar=True)
    assert isinstance(result.weight.base, Uniform)
    assert torch.equal(result.weight.base.scale, grid.scale)
    assert torch.equal(result.weight.base.codes, encode(weight, grid, 8))
    assert result.notes == {"damp": 0.01, "dead_columns": 32, "fallback": "rtn: no token was seen"}


def test_columns_that_no_token_touched_are_rounded_plainly() -> None:
    weight, hessian = problem(rows=20)
    dead = torch.tensor([0, 5, 31])
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = bipolar(weight, hessian, bits=4, group_size=8)
    base = result.weight.base
    assert isinstance(base, Uniform)
    assert result.notes == {"damp": 0.01, "dead_columns": 3}
    scale = base.scale.double().repeat_interleave(8, 1)
    wanted = torch.clamp(torch.floor(weight / scale) + 8, 0, 15)
    # A scale that refinement gave a sign turns codes around, which no start of these weights does.
    assert (scale > 0).all()
    assert torch.equal(base.codes[:, dead].double(), wanted[:, dead])


def test_zero_and_constant_weights() -> None:
    hessian = problem()[1].float()
    for value in (0.0, 1e-30, -0.3, 1e10):
        for bits in (1, 4, 8):
            weight = torch.full((3, 32), value)
            decoded = part(weight, hessian, bits=bits, group_size=8).dequantize()
            assert torch.isfinite(decoded).all()
            # The range ends at the one value of a group: errors are those of the scales, and what other groups make up for.
            assert (decoded - weight).abs().max() <= max(2.0**-5 * abs(value), 1e-15)


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    weight, hessian = problem()
    hessian[2, 3] = math.nan
    with pytest.raises(CalibrationError, match="not finite"):
        bipolar(weight, hessian, group_size=8)


def test_given_tensors_are_left_alone() -> None:
    weight, hessian = problem()
    copies = weight.clone(), hessian.clone()
    bipolar(weight, hessian, group_size=8)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


# ---------------------------------------------------------------------------------------------------- options and the whole


def test_options() -> None:
    assert METHOD().model_dump() == {"bits": 4, "group_size": "auto", "range": "mse", "damp": 0.01, "refinements": 2}
    refused: list[dict[str, Any]] = [
        {"bits": 9},
        {"bits": 0},
        {"group_size": -2},
        {"range": "max"},
        {"damp": -0.1},
        {"refinements": -1},
        {"symmetric": False},
    ]
    for wrong in refused:
        with pytest.raises(ValidationError):
            METHOD(**wrong)
    assert METHOD.may_need == (Hessian,)
    assert METHOD(group_size=48).check((8, 96)) is None
    assert "group_size=40" in (METHOD(group_size=40).check((8, 96)) or "")


def test_the_method_is_the_function_on_the_mean_hessian() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    statistic = Hessian(64, torch.device("cpu"))
    statistic.add(torch.randn(100, 64, generator=torch.Generator().manual_seed(1)))
    base = METHOD(bits=3, group_size=32)(weight, {Hessian: statistic}).weight.base
    assert isinstance(base, Uniform)
    assert torch.equal(base.codes, part(weight, statistic.matrix(), bits=3, group_size=32).codes)


@pytest.mark.parametrize("options", [{}, {"group_size": -1}, {"bits": 3, "group_size": 16}])
def test_stored_bits_are_known_beforehand(options: dict[str, Any]) -> None:
    weight, hessian = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), torch.eye(512)
    assert bits_known(METHOD(**options), (4, 512)) == bipolar(weight, hessian, **options).weight.stored_bits


def test_from_recipe_to_logits(tiny: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    summary = assert_round_trip(tiny("llama"), tmp_path, ids, steps("quant/bipolar", bits=3, group_size=16))
    assert summary["bits_per_compressed_weight"] == 4.0
