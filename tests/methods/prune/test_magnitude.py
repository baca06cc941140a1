"""Magnitude pruning against a slow selection, with ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import hessian_of, inputs, observed, relative, slowly_selected, weights

from compress.methods.prune.magnitude import METHOD, magnitude
from compress.methods.solvers.mask_selection import Target, Within, select
from compress.methods.solvers.uniform_grid import Grid, encode, fit


@pytest.mark.parametrize("within", ["row", "matrix"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.7, 0.95])
def test_equals_the_reference_mask_for_mask(sparsity: float, group: int, within: Within) -> None:
    for seed in range(3):
        weight = weights(13, 48, seed).double()
        found = magnitude(weight, Target(sparsity, None, group, within))
        assert torch.equal(found, slowly_selected(weight.abs(), sparsity, group, within))


@pytest.mark.parametrize("within", ["row", "matrix"])
def test_ties_are_broken_by_index(within: Within) -> None:
    """In bfloat16 thousands of weights are equal; as many go as were asked for, the last ones first."""
    weight = (weights(13, 48) * 100).round().bfloat16()
    assert len(weight.unique()) < 40
    assert torch.equal(magnitude(weight, Target(0.5, within=within)), slowly_selected(weight.abs().double(), 0.5, 1, within))
    same = torch.full((3, 8), -0.25)
    assert magnitude(same, Target(0.5)).tolist() == [[True] * 4 + [False] * 4] * 3
    assert magnitude(same, Target(0.5, within="matrix")).flatten().tolist() == [True] * 12 + [False] * 12
    assert magnitude(same, Target(0.5, (2, 4))).tolist() == [[True, True, False, False] * 2] * 3


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (5, 8), (8, 16)])
def test_patterns_keep_the_largest_of_every_group(kept: int, of: int) -> None:
    weight = weights(9, 48)
    keep = magnitude(weight, Target(1 - kept / of, (kept, of)))
    for row in range(9):
        for start in range(0, 48, of):
            group = weight[row, start : start + of].abs()
            assert set(keep[row, start : start + of].nonzero().flatten().tolist()) == set(group.topk(kept).indices.tolist())


def test_runs_with_scores_whose_squares_vanish() -> None:
    score = torch.tensor([[1e-30, 0, 3e-30, 0, 2e-30, 0, 0, 0]])
    assert select(score, Target(0.5, None, 2)).tolist() == [[False, False, True, True, True, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_values_are_the_weights_in_the_type_they_had(dtype: torch.dtype) -> None:
    weight = weights(12, 64).to(dtype)
    compressed = METHOD(sparsity=0.6)(weight.float(), {}).weight
    assert compressed.base.values.dtype == dtype
    keep = compressed.keep.mask()
    assert torch.equal(compressed.dequantize(), torch.where(keep, weight.float(), 0.0))
    assert compressed.sparsity == 1 - float(keep.double().mean())


def test_a_kept_weight_that_underflows_stays_in_the_mask() -> None:
    weight = torch.full((1, 8), 1e-9)
    compressed = METHOD(sparsity=0.5, dtype="float16")(weight, {}).weight
    assert not compressed.dequantize().any()
    assert int(compressed.keep.mask().sum()) == 4


def test_update_lowers_the_error_of_the_same_mask() -> None:
    for target in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        weight, rows = weights(24, 96), inputs(600, 96)
        plain, moved = METHOD(**target, dtype="float32"), METHOD(**target, dtype="float32", update=True)
        assert plain.needs == ()
        first = plain(weight, {}).weight
        second = moved(weight, observed(rows, moved.needs)).weight
        assert torch.equal(first.keep.mask(), second.keep.mask())
        hessian = hessian_of(rows)
        assert relative(weight, second.dequantize(), hessian) < 0.6 * relative(weight, first.dequantize(), hessian)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_without_data_is_rounding_what_is_kept_to_nearest(symmetric: bool) -> None:
    weight = weights(12, 64)
    options: dict[str, Any] = {"sparsity": 0.5, "bits": 4, "group_size": 16, "symmetric": symmetric}
    compressed = METHOD(**options)(weight, {}).weight
    keep, base = compressed.keep.mask(), compressed.base
    nearest = encode(weight, Grid(base.scale, base.zero, 4), 16)
    assert torch.equal(base.codes, nearest.masked_fill(~keep, 0))
    kept = (weight * keep).view(12, 4, 16)
    grid = fit(kept.flatten(1), 4, 16, symmetric=symmetric, search=True)
    assert torch.equal(base.scale, torch.where(keep.view(12, 4, 16).any(2), grid.scale, 1.0)), "what is pruned stretches no grid"
    assert torch.equal(keep, magnitude(weight, Target(0.5, within="matrix")))
