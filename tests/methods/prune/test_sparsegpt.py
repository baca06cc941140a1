"""SparseGPT against elimination on explicit inverses, one column and one run after another, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from layers import hessian_of, inputs, observed, relative, weights
from options import function_of
from torch import Tensor

from compress.methods.prune import sparsegpt as module
from compress.methods.prune.sparsegpt import METHOD
from compress.methods.solvers.mask_selection import Target
from compress.methods.solvers.uniform_grid import fit

sparsegpt = function_of("prune/sparsegpt")
rtn = function_of("quant/rtn")


def lowest(scores: list[tuple[float, int, int]], count: int) -> list[tuple[int, int]]:
    """The places of the lowest scores, of equal ones the last."""
    return [(r, c) for _, r, c in sorted(scores, key=lambda s: (s[0], -s[1], -s[2]))[:count]]


def reference(
    weight: Tensor, hessian: Tensor, target: Target, block: int, bits: int | None = None, size: int = 0, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """Mask and values: each column is removed from the problem by the inverse of what is left of the Hessian."""
    rows, columns = weight.shape
    whole = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(columns, dtype=torch.float64)
    left = [torch.linalg.inv(whole[k:, k:]) for k in range(columns)]
    current, keep, values = weight.clone(), torch.ones(rows, columns, dtype=torch.bool), torch.zeros_like(weight)
    pivot = [1 / float(inverse[0, 0]) for inverse in left]
    run, gone = target.pattern[1] if target.pattern else block, 0
    scale, zero = torch.ones(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)

    def scored(span: range) -> list[tuple[float, int, int]]:
        return [(float(current[r, c]) ** 2 * pivot[c], r, c) for r in range(rows) for c in span]

    def choose(scores: list[tuple[float, int, int]], due: int) -> list[tuple[int, int]]:
        if target.pattern is None and target.within == "matrix":
            return lowest(scores, due)
        return [p for row in range(rows) for p in lowest([s for s in scores if s[1] == row], due)]

    for k in range(columns):
        if k % run == 0:
            stop = min(k + run, columns)
            per = rows if target.pattern is None and target.within == "matrix" else 1
            share = target.sparsity * stop * per
            whole = round(share) if target.within == "matrix" else math.floor(share + 1e-6)
            due = run - target.pattern[0] if target.pattern else whole - gone
            gone += 0 if target.pattern else due
            for r, c in choose(scored(range(k, stop)), due):
                keep[r, c] = False
        if bits is not None and k % size == 0:
            kept = keep[:, k : k + size].clone()
            if size > run:  # runs to come: what would go now
                kept[:] = True
                per_run = [range(g, g + run) for g in range(k, k + size, run)]
                assert target.pattern is not None
                for span in per_run:
                    for r, c in choose(scored(span), run - target.pattern[0]):
                        kept[r, c - k] = False
            importance = torch.tensor(pivot[k : k + size], dtype=torch.float64)
            grid = fit(current[:, k : k + size] * kept, bits, size, symmetric=symmetric, search=True, importance=importance)
            scale = grid.scale[:, 0].double()
            zero = torch.full_like(scale, 2 ** (bits - 1)) if grid.zero is None else grid.zero[:, 0].double()
        value = current[:, k].clone()
        if bits is not None:
            value = ((value / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
        values[:, k] = torch.where(keep[:, k], value, 0.0)
        error = (current[:, k] - values[:, k]) / left[k][0, 0]
        current[:, k:] -= error.unsqueeze(1) * left[k][0]
    return keep, values


TARGETS = [
    Target(0.5, within="matrix"),
    Target(0.7, within="matrix"),
    Target(0.3, within="row"),
    Target(0.5, (2, 4)),
    Target(0.75, (1, 4)),
    Target(0.375, (5, 8)),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("block", [8, 20, 48])
def test_equals_the_reference_mask_for_mask(target: Target, block: int) -> None:
    for seed in range(2):
        weight, hessian = weights(11, 48, seed).double(), hessian_of(inputs(200, 48, seed))
        keep, values, _, _ = sparsegpt(weight, hessian, target, block=block)
        expected, wanted = reference(weight, hessian, target, block)
        assert torch.equal(keep, expected)
        torch.testing.assert_close(values, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inner", [1, 5, 100])
def test_the_result_does_not_depend_on_how_columns_are_solved(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = weights(11, 48).double(), hessian_of(inputs(200, 48))
    keep, values, _, _ = sparsegpt(weight, hessian, Target(0.5, within="matrix"), block=16)
    monkeypatch.setattr(module, "_INNER", inner)
    again, others, _, _ = sparsegpt(weight, hessian, Target(0.5, within="matrix"), block=16)
    assert torch.equal(keep, again)
    torch.testing.assert_close(values, others)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("target", "size"),
    [
        (Target(0.5, within="matrix"), 16),  # as long as a run
        (Target(0.5, within="matrix"), 8),  # shorter
        (Target(0.5, within="row"), 16),
        (Target(0.5, (2, 4)), 16),  # longer
        (Target(0.5, (4, 8)), 48),
    ],
    ids=str,
)
def test_joint_rounding_equals_the_reference(target: Target, size: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFINEMENTS", 0)
    weight, hessian = weights(11, 48).double(), hessian_of(inputs(200, 48))
    keep, values, base, _ = sparsegpt(weight, hessian, target, block=16, bits=4, group_size=size, symmetric=symmetric)
    expected, wanted = reference(weight, hessian, target, 16, 4, size, symmetric)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-9)
    assert base is not None
    torch.testing.assert_close(base.dequantize()[keep].double(), wanted[keep], rtol=1e-6, atol=1e-9)


def test_everything_kept_is_the_weight() -> None:
    weight, hessian = weights(11, 48).double(), hessian_of(inputs(200, 48))
    keep, values, _, _ = sparsegpt(weight, hessian, Target(0.0))
    assert bool(keep.all())
    torch.testing.assert_close(values, weight)


def test_what_no_token_touched_goes_first() -> None:
    rows = inputs(200, 64)
    rows[:, ::4] = 0
    made = METHOD(sparsity=0.5, block=16)
    result = made(weights(12, 64), observed(rows, made.needs))
    assert not result.weight.keep.mask()[:, ::4].any()
    assert result.notes["dead_columns"] == 16


def test_grids_need_no_common_measure_with_runs() -> None:
    """Groups of scales of 96 and runs of 128: runs take the length of groups."""
    weight, rows = weights(8, 192), inputs(400, 192)
    for options in ({"group_size": 96}, {"group_size": 96, "group": 32}, {"group_size": 48, "group": 64}, {"group_size": -1}):
        made = METHOD(sparsity=0.5, bits=4, **options)
        result = made(weight, observed(rows, made.needs)).weight
        assert abs(result.sparsity - 0.5) < 0.01
        assert relative(weight, result.dequantize(), hessian_of(rows)) < 0.2


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_error_is_between_those_of_wanda_and_of_an_update(target: dict[str, Any]) -> None:
    from compress.methods.prune.wanda import METHOD as WANDA

    for seed in range(3):
        weight, rows = weights(48, 96, seed), inputs(800, 96, seed)
        made = [
            WANDA(**target, dtype="float32"),
            METHOD(**target, dtype="float32"),
            METHOD(**target, dtype="float32", update=True),
        ]
        found = [m(weight, observed(rows, m.needs)).weight for m in made]
        wanda, plain, updated = (relative(weight, w.dequantize(), hessian_of(rows)) for w in found)
        assert updated < 0.95 * plain < plain < 0.9 * wanda
        assert torch.equal(found[1].keep.mask(), found[2].keep.mask())
    assert "do not go together" in METHOD(update=True, bits=4).check((8, 128))


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_one_pass_is_better_than_pruning_and_then_rounding(target: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:

    for seed in range(3):
        weight, rows = weights(48, 96, seed), inputs(800, 96, seed)
        made, hessian = METHOD(**target, bits=4, group_size=32), hessian_of(rows)
        joint = relative(weight, made(weight, observed(rows, made.needs)).weight.dequantize(), hessian)
        dense = METHOD(**target, dtype="float32")(weight, observed(rows, made.needs)).weight
        rounded = rtn(dense.dequantize(), bits=4, group_size=32).weight.dequantize().masked_fill(~dense.keep.mask(), 0)
        assert joint < 0.8 * relative(weight, rounded, hessian)
        monkeypatch.setattr(module, "_REFINEMENTS", 0)
        once = relative(weight, made(weight, observed(rows, made.needs)).weight.dequantize(), hessian)
        monkeypatch.undo()
        assert joint < once
