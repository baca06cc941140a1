"""GPTQ against a slow reference that eliminates columns from the explicit inverse Hessian, and what must hold of its results.

The reference (optimal brain quantization in a given order) shares nothing with the solver but `_grid.fit`, which
`test_grid.py` checks by itself.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import bits_known, function_of
from problems import damped, loss, problem
from pydantic import ValidationError
from thorough import times
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.errors import CalibrationError
from compress.methods.quant.gptq import METHOD, Order
from compress.methods.solvers.error_feedback import ColumnRounding, GridLayout, factorise
from compress.methods.solvers.uniform_grid import Grid, fit
from compress.weights.uniform import Uniform, middle

gptq = function_of("quant/gptq")
rtn = function_of("quant/rtn")

ORDERS: tuple[Order, ...] = ("static", "none", "desc_act")
law = settings(max_examples=times(10, 40), deadline=None, derandomize=True)


# ---------------------------------------------------------------------------------------------------- the slow reference


def nearest(value: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes of one column (out,)."""
    code = torch.round(value / scale) + zero if float(zero[0]) % 1 == 0 else torch.floor(value / scale) + 1
    return torch.clamp(code, 0, 2**bits - 1)


def reference(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    range: str,
    order: str,
    damp: float = 0.01,
    refinements: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes (out, in), scale and zero (out, groups), and the group of each column (in,), one column at a time."""
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    full = damped(hessian, damp)
    place = torch.arange(columns) if order == "none" else torch.sort(hessian.diagonal(), descending=True, stable=True).indices
    # What an error in a column costs once all later columns have been moved: one over its entry of the remaining inverse.
    left = [torch.linalg.inv(full[place[j:]][:, place[j:]]) for j in torch.arange(columns).tolist()]
    importance = torch.stack([1 / inverse[0, 0] for inverse in left])
    of_step = place // size if order == "static" else torch.arange(columns) // size
    scale = torch.empty(len(weight), columns // size, dtype=torch.float64)
    zero = torch.full_like(scale, middle(bits))

    def assign(group: int, part: Tensor, weights: Tensor) -> None:
        grid = fit(part, bits, -1, symmetric=symmetric, search=range == "mse", importance=weights)
        scale[:, group] = grid.scale[:, 0].double()
        if grid.zero is not None:
            zero[:, group] = grid.zero[:, 0].double()

    if order == "static":
        natural = importance[torch.argsort(place)]
        for g in torch.arange(columns // size).tolist():
            assign(g, weight[:, g * size : (g + 1) * size], natural[g * size : (g + 1) * size])
    current, codes, rounded = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for j, column in enumerate(place.tolist()):
        g = int(of_step[j])
        if order != "static" and j % size == 0:
            assign(g, current[:, place[j : j + size]], importance[j : j + size])
        codes[:, column] = nearest(current[:, column], scale[:, g], zero[:, g], bits)
        rounded[:, column] = (codes[:, column] - zero[:, g]) * scale[:, g]
        error = (current[:, column] - rounded[:, column]) / left[j][0, 0]
        current[:, place[j:]] -= torch.outer(error, left[j][0])
    group = torch.empty(columns, dtype=torch.int64)
    group[place] = of_step
    for _ in torch.arange(refinements).tolist():
        descend(weight, full, codes, scale, zero, group, place if order == "desc_act" else torch.arange(columns), bits)
    return codes, scale, zero, group


def descend(
    weight: Tensor, full: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor, place: Tensor, bits: int
) -> None:
    """One pass of coordinate descent on tr(D H D^T), every step from the whole of D."""

    def delta() -> Tensor:
        return weight - (codes - zero[:, group]) * scale[:, group]

    for g in dict.fromkeys(group[place].tolist()):
        inside = group == g
        step = (codes - zero[:, group]) * inside
        change = (step @ full * delta()).sum(1) / (step @ full * step).sum(1)
        scale[:, g] = (scale[:, g] + change.nan_to_num()).to(torch.bfloat16).double()
        for column in [c for c in place.tolist() if inside[c]]:
            others = delta()
            others[:, column] = 0
            wanted = weight[:, column] + others @ full[:, column] / full[column, column]
            codes[:, column] = nearest(wanted, scale[:, g], zero[:, g], bits)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_reference_code_for_code(bits: int, symmetric: bool, order: Order) -> None:
    weight, hessian = problem(seed=bits)
    for group_size, range_, refinements in itertools.product((8, 16, -1), ("minmax", "mse"), (0, 2)):
        options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "range": range_}
        options |= {"order": order, "refinements": refinements}
        codes, scale, zero, group = reference(weight, hessian, **options)
        base = gptq(weight, hessian, **options, block=7).weight.base
        assert torch.equal(base.codes.double(), codes), options
        assert torch.equal(base.scale.double(), scale), options
        assert (base.zero is None) == symmetric
        if base.zero is not None:
            assert torch.equal(base.zero.double(), zero)
        assert (base.group is None) == (order != "desc_act")
        if base.group is not None:
            assert torch.equal(base.group.long(), group)
        torch.testing.assert_close(base.dequantize().double(), (codes - zero[:, group]) * scale[:, group], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_block_does_not_change_the_codes(order: Order, symmetric: bool) -> None:
    weight, hessian = problem(rows=16, columns=144)
    options: dict[str, Any] = {"bits": 3, "group_size": 24, "symmetric": symmetric, "order": order}
    first = gptq(weight, hessian, **options, block=144).weight.base
    for block in (1, 7, 32, 128, 1000):
        base = gptq(weight, hessian, **options, block=block).weight.base
        assert torch.equal(base.codes, first.codes)
        assert torch.equal(base.scale, first.scale)


@law
@given(descending=st.booleans(), bits=st.integers(1, 8), damp=st.sampled_from([0.001, 0.01, 1.0]), seed=st.integers(0, 10**6))
def test_errors_of_the_sweep_add_up_to_the_damped_loss(descending: bool, bits: int, damp: float, seed: int) -> None:
    """sum_k r_k^2 |c_k - Q_k|^2 == tr((W - Q) H (W - Q)^T): what each column cost when it was rounded is all that it costs."""
    weight, hessian = problem(seed=seed)
    factor = factorise(hessian, damp, descending=descending)
    target = weight.T[factor.order]
    delta, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)
    levels = GridLayout.of(fit(weight, bits, 8, symmetric=True, search=True), torch.float64)
    ColumnRounding(target, delta, codes, factor.feedback, levels, factor.order // 8, 5).run(0, 32)
    rounded = weight.T[factor.order] - delta
    swept = (factor.pivots.square().unsqueeze(1) * (target - rounded).square()).sum()
    whole = loss(weight.T[factor.order].T, rounded.T, damped(hessian, damp)[factor.order][:, factor.order])
    assert math.isclose(float(swept), whole, rel_tol=1e-10)
    torch.testing.assert_close(factor.hessian, damped(hessian, damp))


@law
@given(bits=st.integers(1, 8), symmetric=st.booleans(), group_size=st.sampled_from([4, 16, -1]), seed=st.integers(0, 10**6))
def test_refinement_lowers_the_damped_loss(bits: int, symmetric: bool, group_size: int, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    full = damped(hessian, 0.01)
    losses = [
        loss(
            weight,
            gptq(weight, hessian, bits=bits, group_size=group_size, symmetric=symmetric, refinements=n).weight.dequantize(),
            full,
        )
        for n in (0, 1, 2, 5)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))


def test_identity_hessian_is_rounding_to_nearest() -> None:
    weight, _ = problem(rows=20)
    for symmetric, order in itertools.product((True, False), ORDERS):
        base = gptq(
            weight, torch.eye(32).double(), bits=3, group_size=8, symmetric=symmetric, order=order, refinements=0
        ).weight.base
        plain = rtn(weight, bits=3, group_size=8, symmetric=symmetric).weight.base
        assert torch.equal(base.codes, plain.codes)
        assert torch.equal(base.scale, plain.scale)


@pytest.mark.parametrize("order", ORDERS)
def test_scaling_the_hessian_changes_nothing(order: Order) -> None:
    weight, hessian = problem(rows=20)
    hessian[:, 3] = hessian[3] = 0
    options: dict[str, Any] = {"bits": 3, "group_size": 8, "order": order}
    first = gptq(weight, hessian, **options).weight.base
    for factor in (1e-12, 1e-3, 7.0, 1e9):
        assert torch.equal(gptq(weight, hessian * factor, **options).weight.base.codes, first.codes)
    single = gptq(weight.float(), hessian.float() * 2.0**-70, **options).weight.base
    assert torch.equal(single.codes, gptq(weight.float(), hessian.float(), **options).weight.base.codes)


def test_permuting_input_columns_permutes_the_codes() -> None:
    """With one group per row; columns are refined in natural order, which a permutation changes."""
    weight, hessian = problem(rows=20)
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    for order in (ORDERS[0], ORDERS[2]):
        first = gptq(weight, hessian, bits=3, group_size=-1, order=order, refinements=0).weight.base
        other = gptq(
            weight[:, shuffle], hessian[shuffle][:, shuffle], bits=3, group_size=-1, order=order, refinements=0
        ).weight.base
        assert torch.equal(other.codes, first.codes[:, shuffle])
        assert torch.equal(other.scale, first.scale)


def test_single_precision_gives_almost_the_same_codes() -> None:
    weight, hessian = problem(rows=64, columns=128, tokens=600)
    exact = gptq(weight, hessian, group_size=32).weight.base
    single = gptq(weight.float(), hessian.float(), group_size=32)
    # A code that flips at a tie moves the targets of later columns: a few per mille differ, the loss does not.
    assert (exact.codes == single.weight.base.codes).double().mean() > 0.98
    assert math.isclose(
        loss(weight, single.weight.dequantize(), hessian), loss(weight, exact.dequantize(), hessian), rel_tol=0.01
    )


def test_stacked_weights_come_out_like_each_alone() -> None:
    first, hessian = problem(rows=20)
    second = problem(rows=7, seed=1)[0] * 3
    for order in ORDERS:
        stacked = gptq(torch.cat([first, second]), hessian, bits=3, group_size=8, order=order).weight.base.codes
        alone = [gptq(weight, hessian, bits=3, group_size=8, order=order).weight.base.codes for weight in (first, second)]
        assert torch.equal(stacked, torch.cat(alone))


def test_given_tensors_are_left_alone() -> None:
    weight, hessian = problem()
    copies = weight.clone(), hessian.clone()
    precision = torch.get_float32_matmul_precision()
    for order in ORDERS:
        gptq(weight, hessian, group_size=8, order=order)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])
    assert torch.get_float32_matmul_precision() == precision


# ---------------------------------------------------------------------------------------------------- bad Hessians


def test_columns_that_no_token_touched_are_rounded_plainly() -> None:
    weight, hessian = problem(rows=20)
    dead = torch.tensor([0, 5, 31])
    hessian[dead] = 0
    hessian[:, dead] = 0
    for order in ORDERS:
        result = gptq(weight, hessian, bits=4, group_size=8, order=order)
        assert result.notes == {"damp": 0.01, "dead_columns": 3}
        base = result.weight.base
        scale = base.scale.double()[:, base.group.long() if base.group is not None else torch.arange(32) // 8]
        wanted = torch.clamp(torch.round(weight / scale), -8, 7) + 8
        assert torch.equal(base.codes[:, dead].double(), wanted[:, dead])
    # The others come out as if the dead columns were not there.
    live = torch.tensor([c for c in range(32) if c not in dead.tolist()])
    alone = gptq(weight[:, live], hessian[live][:, live], group_size=-1, range="minmax", refinements=0).weight.base
    both = gptq(weight.clone().index_fill_(1, dead, 0.0), hessian, group_size=-1, range="minmax", refinements=0).weight.base
    assert torch.equal(alone.codes, both.codes[:, live])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_tokens_is_rounding_to_nearest(order: Order, symmetric: bool) -> None:
    weight = problem()[0].float()
    result = gptq(weight, torch.zeros(32, 32), group_size=8, order=order, symmetric=symmetric)
    plain = rtn(weight, group_size=8, symmetric=symmetric).weight
    assert torch.equal(result.weight.dequantize(), plain.dequantize())
    assert result.notes == {"damp": 0.01, "dead_columns": 32, "fallback": "rtn: no token was seen"}


def test_damping_rises_until_the_hessian_can_be_factored() -> None:
    weight, _ = problem(columns=32)
    inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = inputs.T @ inputs  # rank 4
    assert gptq(weight, singular, group_size=8).notes == {"damp": 0.01, "dead_columns": 0}
    raised = gptq(weight, singular, group_size=8, damp=0.0)
    assert raised.notes["damp"] == pytest.approx(1e-4)
    assert raised.notes["fallback"] == "damp raised to 0.0001"
    direct = gptq(weight, singular, group_size=8, damp=raised.notes["damp"])
    assert torch.equal(raised.weight.base.codes, direct.weight.base.codes)
    # A matrix whose lowest eigenvalue is -0.05 times the mean diagonal.
    hessian = problem()[1]
    lowest = torch.linalg.eigvalsh(hessian)[0] + 0.05 * hessian.diagonal().mean()
    indefinite = hessian - lowest * torch.eye(32)
    factor = factorise(indefinite, 0.01, descending=True)
    assert factor.damp == pytest.approx(0.1)
    assert factor.fallback == "damp raised to 0.1"
    torch.testing.assert_close(factor.hessian, factorise(indefinite, factor.damp, descending=True).hessian)


def test_a_hessian_that_cannot_be_factored_gives_rounding_to_nearest() -> None:
    weight, hessian = problem()
    broken = hessian.clone()
    broken[0, 1] = broken[1, 0] = 100 * hessian.diagonal().sum()
    result = gptq(weight, broken, group_size=8)
    assert torch.equal(result.weight.base.codes, rtn(weight, group_size=8).weight.base.codes)
    assert result.notes["fallback"] == "rtn: the Hessian is not positive definite with damp 10"
    assert result.notes["damp"] == pytest.approx(10.0)
    assert json.loads(json.dumps(result.notes)) == result.notes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    weight, hessian = problem()
    hessian[2, 3] = value
    with pytest.raises(CalibrationError, match="not finite"):
        gptq(weight, hessian, group_size=8)


# ---------------------------------------------------------------------------------------------------- better than what


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_part_of_the_method_lowers_the_loss(order: Order, symmetric: bool, bits: int) -> None:
    """In the mean over layers: rounding, then compensation, then searched ranges, then refinement."""
    stages: list[dict[str, Any]] = [{"range": "minmax", "refinements": 0}, {"refinements": 0}, {"refinements": 2}]
    ratios = torch.zeros(3)
    for seed in range(6):
        weight, hessian = problem(rows=24, columns=64, seed=seed)
        plain = loss(
            weight, rtn(weight, bits=bits, group_size=16, symmetric=symmetric, range="minmax").weight.dequantize(), hessian
        )
        for i, stage in enumerate(stages):
            result = gptq(weight, hessian, bits=bits, group_size=16, symmetric=symmetric, order=order, **stage)
            ratios[i] += math.log(loss(weight, result.weight.dequantize(), hessian) / plain) / 6
    means = ratios.exp().tolist()
    assert means[0] < 1
    assert means[1] < 0.75 * means[0]
    assert means[2] < 0.98 * means[1]


def test_order_static_beats_natural_order() -> None:
    gain = []
    for seed in range(8):
        weight, hessian = problem(rows=24, columns=64, seed=seed)
        found = [gptq(weight, hessian, bits=3, group_size=16, order=order).weight.dequantize() for order in ORDERS[:2]]
        gain.append(math.log(loss(weight, found[0], hessian) / loss(weight, found[1], hessian)))
    assert sum(gain) < 0


# ---------------------------------------------------------------------------------------------------- options


def test_options_and_notes() -> None:
    assert METHOD().model_dump() == {
        "bits": 4,
        "group_size": "auto",
        "symmetric": True,
        "range": "mse",
        "order": "static",
        "damp": 0.01,
        "refinements": 2,
    }
    refused: list[dict[str, Any]] = [
        {"bits": 9},
        {"group_size": -2},
        {"order": "random"},
        {"damp": -0.1},
        {"refinements": -1},
        {"nonsense": 1},
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
    assert torch.equal(base.codes, gptq(weight, statistic.matrix(), bits=3, group_size=32).weight.base.codes)


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"group_size": -1}, {"bits": 3, "group_size": 1, "order": "desc_act"}]
)
def test_stored_bits_are_known_beforehand(options: dict[str, Any]) -> None:
    weight, hessian = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), torch.eye(512)
    result = gptq(weight, hessian, **{"group_size": 128} | options)
    assert bits_known(METHOD(**options), (4, 512)) == result.weight.stored_bits


@pytest.mark.parametrize(("columns", "size", "dtype"), [(512, 2, torch.uint8), (514, 2, torch.int16), (32770, 2, torch.int16)])
def test_group_numbers_take_the_smallest_type(columns: int, size: int, dtype: torch.dtype) -> None:
    # The last one would need a Hessian of 8 GiB: its type is read off the bits that are announced.
    if columns > 1024:
        grouped, contiguous = METHOD(group_size=size, order="desc_act"), METHOD(group_size=size)
        assert bits_known(grouped, (1, columns)) == bits_known(contiguous, (1, columns)) + 8 * dtype.itemsize * columns
        return
    base = gptq(torch.ones(1, columns), torch.eye(columns), group_size=size, order="desc_act", refinements=0).weight.base
    assert base.group is not None
    assert base.group.dtype == dtype
    assert base.group.max() == columns // size - 1


def test_part_is_what_the_formats_expect() -> None:
    weight, hessian = problem()
    for order, symmetric in itertools.product(ORDERS, (True, False)):
        base = gptq(weight, hessian, bits=2, group_size=8, order=order, symmetric=symmetric).weight.base
        assert isinstance(base, Uniform)
        assert base.codes.is_contiguous()
        assert base.scale.is_contiguous()
        assert base.codes.dtype == torch.uint8
        assert base.scale.dtype == torch.bfloat16
        assert base.zero is None or (base.zero.dtype == torch.uint8 and base.zero.is_contiguous())
        assert int(base.codes.max()) < 4


def test_grids_survive_the_working_layout() -> None:
    grid = Grid(torch.randn(3, 2).to(torch.bfloat16), torch.randint(0, 8, (3, 2), dtype=torch.uint8), 3)
    back = GridLayout.of(grid, torch.float32).grid(3)
    assert torch.equal(back.scale, grid.scale)
    assert back.zero is not None
    assert grid.zero is not None
    assert torch.equal(back.zero, grid.zero)
