"""Wanda and exchanges of weights against slow references."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from layers import hessian_of, inputs, observed, relative, weights
from torch import Tensor

from compress.calibration.statistics import Hessian, MeanSquare
from compress.methods.prune.wanda import METHOD, wanda
from compress.methods.solvers.mask_selection import Target
from compress.methods.solvers.mask_swaps import swapped


def reference(weight: Tensor, rows: Tensor, target: Target) -> Tensor:
    """Row by row: |w_j| times the norm of input j, the lowest go, of equal ones the last."""
    norm = rows.double().square().sum(0).sqrt()
    keep = torch.ones(weight.shape, dtype=torch.bool)
    for r, row in enumerate(weight.double()):
        scores = [float(abs(w) * n) for w, n in zip(row, norm, strict=True)]
        if target.pattern is not None:
            kept, of = target.pattern
            pieces, count = [list(range(g, g + of)) for g in range(0, len(scores), of)], of - kept
        else:
            pieces, count = [list(range(len(scores)))], math.floor(target.sparsity * len(scores) + 1e-6)
        for piece in pieces:
            for j in sorted(piece, key=lambda j: (scores[j], -j))[:count]:
                keep[r, j] = False
    return keep


@pytest.mark.parametrize("target", [Target(0.5), Target(0.7), Target(0.5, (2, 4)), Target(0.75, (1, 4)), Target(0.375, (5, 8))])
def test_equals_the_reference_mask_for_mask(target: Target) -> None:
    for seed in range(3):
        weight, rows = weights(12, 64, seed).double(), inputs(200, 64, seed)
        statistic = MeanSquare(64, torch.device("cpu"))
        statistic.add(rows)
        assert torch.equal(wanda(weight, statistic.mean(), target), reference(weight, rows, target))


def test_needs_only_the_diagonal_unless_values_change() -> None:
    assert METHOD().needs == (MeanSquare,)
    assert METHOD(update=True).needs == METHOD(swaps=3).needs == METHOD(bits=4).needs == (Hessian,)
    weight, rows = weights(12, 64), inputs(200, 64)
    made = METHOD(sparsity=0.5)
    by_either = [made(weight, observed(rows, [kind])).weight.keep.mask() for kind in (Hessian, MeanSquare)]
    assert torch.equal(*by_either)
    assert METHOD(swaps=1, group=4).check((8, 64)) == "swaps exchange single weights; with group=4 leave them out"


def test_inputs_that_are_always_zero_go_first() -> None:
    rows = inputs(200, 64)
    rows[:, ::4] = 0
    keep = METHOD(sparsity=0.5)(weights(12, 64), observed(rows, [MeanSquare])).weight.keep.mask()
    assert not keep[:, ::4].any()


def error(weight: Tensor, keep: Tensor, hessian: Tensor) -> float:
    removed = weight * ~keep
    return float(((removed @ hessian) * removed).sum())


@pytest.mark.parametrize("of", [None, 4])
def test_an_exchange_is_the_best_there_is(of: int | None) -> None:
    """With a shortlist as long as the row, one round makes the exchange that trying all pairs finds."""
    hessian = hessian_of(inputs(300, 16))
    weight = weights(6, 16).double()
    target = Target(0.5) if of is None else Target(0.5, (2, 4))
    keep = wanda(weight, hessian.diagonal(), target)
    found = swapped(weight, keep, hessian, 1, of)
    for r in range(6):
        row = weight[r : r + 1]
        best, least = keep[r : r + 1], error(row, keep[r : r + 1], hessian)
        for u, p in itertools.product(range(16), range(16)):
            if keep[r, u] and not keep[r, p] and (of is None or u // of == p // of):
                tried = keep[r : r + 1].clone()
                tried[0, u], tried[0, p] = False, True
                if (lost := error(row, tried, hessian)) < least * (1 - 1e-6):
                    best, least = tried, lost
        assert torch.equal(found[r : r + 1], best)


@pytest.mark.parametrize("of", [None, 8])
def test_every_round_lowers_the_error_and_keeps_the_quota(of: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, weight = hessian_of(inputs(600, 96)), weights(24, 96).double()
    target = Target(0.5) if of is None else Target(0.5, (4, 8))
    masks = [wanda(weight, hessian.diagonal(), target)]
    masks += [swapped(weight, masks[0], hessian, rounds, of) for rounds in (1, 2, 5, 20)]
    errors = [error(weight, mask, hessian) for mask in masks]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    size = 96 if of is None else of
    assert all(bool((mask.view(24, -1, size).sum(2) == size // 2).all()) for mask in masks)
    monkeypatch.setattr("compress.methods.solvers.mask_swaps._CHUNK", 1)  # a row at a time
    assert torch.equal(swapped(weight, masks[0], hessian, 5, of), masks[3])


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_below_magnitude_and_better_with_every_step(target: dict[str, Any]) -> None:
    for seed in range(3):
        weight, rows = weights(48, 96, seed), inputs(800, 96, seed)
        steps = [{}, {"swaps": 20}, {"update": True}, {"swaps": 20, "update": True}]
        made = [METHOD(**target, **step, dtype="float32") for step in steps]
        errors = [relative(weight, m(weight, observed(rows, m.needs)).weight.dequantize(), hessian_of(rows)) for m in made]
        plain = relative(weight, torch.where(wanda(weight, torch.ones(96), made[0].target), weight, 0.0), hessian_of(rows))
        assert errors[0] < 0.7 * plain
        assert errors[1] < errors[0]
        assert errors[3] < errors[2] < 0.8 * errors[0]
