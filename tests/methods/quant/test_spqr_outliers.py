"""Which weights SpQR keeps as outliers, and the size that comes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from options import bits_known, function_of
from problems import loss
from spqr_reference import COMMON, ORDERS, assert_equals_the_reference, bfloat16, mask, outlier_count, problem

from compress.checkpoint import packing
from compress.methods.quant.spqr import METHOD
from compress.methods.solvers.outliers import Order, Solver, likely_outliers
from compress.weights.sparse import column_dtype
from compress.weights.two_level import TwoLevel

spqr = function_of("quant/spqr")


def test_outliers_are_residuals_of_what_is_stored() -> None:
    """Stored as they are, beside a code for 0, they would be off by what that code decodes to."""
    weight, _ = problem(rows=32, columns=64, far=40)
    made = spqr(weight, torch.eye(64).double(), bits=3, outlier_threshold=0.2, refinements=0).weight
    where = mask(made)
    assert 20 < int(where.sum()) < 200
    assert made.outliers is not None
    assert isinstance(made.base, TwoLevel)
    residual = made.outliers.dequantize().double()
    ours = (made.dequantize().double() - weight).abs()[where]
    assert (ours <= residual.abs()[where] * 2**-8).all()

    zero, scale = (x.repeat_interleave(16, 1).double() for x in (made.base.zero(), made.base.scale()))
    theirs = ((zero.round() - zero) * scale + bfloat16(weight) - weight).abs()[where]
    assert theirs.mean() > 3 * ours.mean()
    assert theirs.max() > 0.1 * scale[where].mean()


def test_the_error_when_a_column_is_rounded_decides_not_the_guess() -> None:
    weight, _ = problem(rows=48, columns=64, far=60)
    hessian = torch.eye(64).double()
    options: dict[str, Any] = {"bits": 3, "order": "none", "refinements": 0, "damp": 0.0}
    made = spqr(weight, hessian, outlier_threshold=0.1, **options).weight
    limit = 0.1 * float(weight.square().mean())
    assert isinstance(made.base, TwoLevel)
    missed = (weight - made.base.dequantize().double()).square()
    where = mask(made)
    assert (missed[~where] <= limit * (1 + 1e-5)).all()
    assert (missed[where] > limit * (1 - 1e-5)).all()
    guess = torch.cat([likely_outliers(part, torch.ones(16), 3, limit) for part in weight.split(16, 1)], 1)
    assert not torch.equal(guess, where)


def test_outliers_leave_nothing_to_compensate() -> None:
    """Beyond one huge weight, columns come out as if it were any other."""
    weight, hessian = problem(rows=16, columns=32, far=0)
    huge = weight.clone()
    huge[3, 0] = 1000.0
    solver = Solver(huge, hessian, 4, 8, 4, 4, "none", 0.01)
    solver.sweep(1e-3 / 1000)  # the huge weight is a part of the mean power
    assert bool(solver.outlier[0, 3])
    assert float(solver.delta[0, 3].abs()) <= 1000 * 2**-9
    others = (huge - solver.result().dequantize().double())[3, 1:].abs().max()
    assert others < 0.1


def test_without_a_threshold_there_are_none_and_with_the_smallest_all_is_kept() -> None:
    weight, hessian = problem()
    nothing = spqr(weight, hessian, group_size=8, outlier_threshold=None)
    assert nothing.weight.outliers is None
    assert nothing.notes == {"damp": 0.01, "dead_columns": 0, "outliers": 0.0}
    counts = []
    for threshold in (1e-12, 0.01, 0.1, 1.0, 1e6):
        result = spqr(weight, hessian, group_size=8, outlier_threshold=threshold)
        counts.append(outlier_count(result.weight))
        assert result.notes["outliers"] == counts[-1] / weight.numel()
        if threshold == 1e-12:
            torch.testing.assert_close(result.weight.dequantize().double(), weight, rtol=0, atol=0.3 * 2**-8)
            assert loss(weight, result.weight.dequantize(), hessian) < 1e-5 * loss(weight, 0 * weight, hessian)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0.9 * weight.numel()
    assert counts[-1] == 0


def test_columns_that_no_token_touched_are_rounded_plainly_and_never_outliers() -> None:
    """Damping comes after they are found; before, the diagonal would never be 0."""
    weight, hessian = problem(columns=32)
    dead = torch.tensor([0, 5, 31])
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[2, dead] = 3.0
    for order in ORDERS:
        result = spqr(weight, hessian, bits=3, group_size=8, order=order, outlier_threshold=0.05)
        assert result.notes["dead_columns"] == 3
        assert not mask(result.weight)[:, dead].any()
        assert outlier_count(result.weight) > 0
        base = result.weight.base
        assert isinstance(base, TwoLevel)
        index = torch.arange(32) // 8 if base.group is None else base.group.long()
        scale, zero = base.scale().double()[:, index], base.zero().double()[:, index]
        plain = torch.clamp(torch.round(weight / scale + zero), 0, 7)
        assert torch.equal(base.codes[:, dead].double(), plain[:, dead])
    # Nor are they left out of the fit of their group as likely ones.
    weight[2:9, dead] = 0.4
    assert_equals_the_reference(weight, hessian, **COMMON, bits=3, order="grouped")


@pytest.mark.parametrize(("shape", "order", "more"), [((64, 256), "grouped", 0.4), ((40, 320), "desc_act", 1.5)])
def test_a_number_of_bits_is_met_and_never_exceeded(shape: tuple[int, int], order: Order, more: float) -> None:
    weight, hessian = problem(*shape, tokens=400, far=100)
    weight, hessian = weight.float(), hessian.float()
    grid = METHOD(order=order).base_bits(shape) / (shape[0] * shape[1])
    each = 8 * column_dtype(shape[1]).itemsize + 16
    target = grid + more
    result = spqr(weight, hessian, order=order, target_bits=target, refinements=1)
    stored = sum(t.nbytes for t in packing.pack(result.weight)[0].values()) * 8
    assert stored == result.weight.stored_bits
    room = METHOD(order=order, target_bits=target).room(shape)
    assert room == int((target - grid - 32 * (shape[0] + 1) / weight.numel()) * weight.numel() / each + 1e-6)
    assert stored <= target * weight.numel()
    assert 0.95 * room <= outlier_count(result.weight) <= room
    again = spqr(weight, hessian, order=order, outlier_threshold=result.notes["threshold"], refinements=1)
    assert torch.equal(again.weight.dequantize(), result.weight.dequantize())


def test_a_number_of_bits_without_room_for_outliers_has_none() -> None:
    weight, hessian = problem(64, 64)
    grid = METHOD().base_bits((64, 64)) / 64**2
    for more in (0.0, 0.4, 32 * 65 / 4096 + 20 / 4096):
        made = METHOD(target_bits=grid + more)
        result = spqr(weight, hessian, target_bits=grid + more)
        assert result.weight.outliers is None
        assert result.notes["threshold"] is None
        assert bits_known(made, (64, 64)) == result.weight.stored_bits
    one = METHOD(target_bits=grid + (32 * 65 + 24) / 4096)
    assert one.room((64, 64)) == 1
    assert bits_known(one, (64, 64)) is None
    assert outlier_count(spqr(weight, hessian, target_bits=one.target_bits).weight) <= 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(20, 64), (33, 512)])
def test_stored_bits_are_predicted(shape: tuple[int, int], order: Order) -> None:
    weight, hessian = problem(*shape)
    for options in ({}, {"bits": 2, "scale_bits": 5, "zero_bits": 3, "group_size": 32}, {"group_size": -1}):
        made = METHOD(order=order, **options)
        assert bits_known(made, shape) is None
        result = spqr(weight, hessian, order=order, refinements=0, **options)
        assert outlier_count(result.weight) > 0
        assert made.bits_with(shape, outlier_count(result.weight)) == result.weight.stored_bits
        without = METHOD(order=order, outlier_threshold=None, **options)
        exact = spqr(weight, hessian, order=order, refinements=0, outlier_threshold=None, **options).weight.stored_bits
        assert bits_known(without, shape) == exact
