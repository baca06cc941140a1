"""Masked least squares against exact solutions."""

from __future__ import annotations

import itertools

import pytest
import torch
from layers import hessian_of, inputs, weights
from torch import Tensor

from compress.errors import CalibrationError
from compress.methods.solvers.masked_least_squares import Normal, masked_lsq


def damped(hessian: Tensor, damp: float) -> Tensor:
    seen = hessian.diagonal() > 0
    return hessian / hessian.diagonal()[seen].mean() + damp * torch.eye(len(hessian), dtype=hessian.dtype)


def solved(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """Row by row by the normal equations H_SS v = (H w)_S."""
    values = torch.zeros_like(weight)
    for r in range(len(weight)):
        s = keep[r]
        values[r, s] = torch.linalg.solve(hessian[s][:, s], (hessian @ weight[r])[s])
    return values


def test_equals_the_solution_of_the_normal_equations() -> None:
    weight, hessian = weights(8, 32).double(), hessian_of(inputs(200, 32))
    keep = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[0], keep[1] = True, False
    found = masked_lsq(weight, keep, Normal.of(hessian, 0.01), iterations=60)
    torch.testing.assert_close(found, solved(weight, keep, damped(hessian, 0.01)), rtol=1e-9, atol=1e-11)
    assert not found[~keep].any()
    torch.testing.assert_close(found[0], weight[0])


@pytest.mark.parametrize("start", [False, True])
def test_the_error_falls_with_every_iteration(start: bool) -> None:
    weight, hessian = weights(8, 64).double(), hessian_of(inputs(400, 64))
    keep = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) < 0.4
    whole, begin = damped(hessian, 0.01), torch.randn(8, 64, dtype=torch.float64) * 0.05 if start else None

    def errors(iterations: int) -> Tensor:
        delta = weight - masked_lsq(weight, keep, Normal.of(hessian, 0.01), start=begin, iterations=iterations)
        return ((delta @ whole) * delta).sum(1)

    found = [errors(n) for n in (0, 1, 2, 5, 10, 20, 40)]
    assert all(bool((b <= a * (1 + 1e-12)).all()) for a, b in itertools.pairwise(found))
    delta = weight - solved(weight, keep, whole)
    best = ((delta @ whole) * delta).sum(1)
    torch.testing.assert_close(found[-1], best, rtol=1e-6, atol=0)
    assert float(((found[5] - best) / best).max()) < 0.01  # the default


def test_damping_pulls_towards_the_weight() -> None:
    weight, hessian = weights(8, 32).double(), hessian_of(inputs(10, 32))
    keep = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    found = masked_lsq(weight, keep, Normal.of(hessian, 1e6), iterations=40)
    torch.testing.assert_close(found, weight * keep, rtol=1e-4, atol=1e-6)


def test_columns_that_no_token_touched_keep_their_weights() -> None:
    rows = inputs(200, 32)
    rows[:, [3, 9]] = 0
    weight = weights(8, 32).double()
    normal = Normal.of(hessian_of(rows), 0.01)
    assert normal.dead.nonzero().flatten().tolist() == [3, 9]
    found = masked_lsq(weight, torch.ones(8, 32, dtype=torch.bool).index_fill(1, torch.tensor([5]), False), normal)
    torch.testing.assert_close(found[:, [3, 9]], weight[:, [3, 9]])


def test_what_is_not_finite_is_refused() -> None:
    hessian = torch.eye(4)
    hessian[1, 2] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        Normal.of(hessian, 0.01)
    assert Normal.of(torch.zeros(4, 4), 0.01).blind
