"""GQSA: groups by the saliency of the optimal brain surgeon, and what is stored of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layers import hessian_of, inputs, observed, relative, weights
from options import bits_known
from roundtrip import assert_round_trip
from runs import compress as run
from runs import ids_file, steps

from compress.calibration.statistics import Hessian
from compress.checkpoint.packed_source import PackedSource
from compress.methods.prune.gqsa import METHOD, gqsa, saliency
from compress.methods.prune.magnitude import METHOD as Magnitude
from compress.methods.solvers.mask_selection import Target
from compress.methods.solvers.masked_least_squares import DAMP, Normal

Tiny = Callable[..., Path]


def test_masks_are_those_of_a_reference() -> None:
    """Row by row: groups of the least sum of w^2 / [H^-1]_jj, H with 1 % of its mean diagonal added, in float64."""
    weight, rows = weights(7, 32), inputs(400, 32)
    hessian = hessian_of(rows)
    inverse = torch.linalg.inv(hessian + DAMP * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)).diagonal()
    keep = torch.ones(7, 32, dtype=torch.bool)
    for i in range(7):
        costs = [sum(float(weight[i, j]) ** 2 / float(inverse[j]) for j in range(4 * g, 4 * g + 4)) for g in range(8)]
        for g in sorted(range(8), key=lambda g: costs[g])[:4]:
            keep[i, 4 * g : 4 * g + 4] = False
    normal = Normal.of(hessian.float(), DAMP)
    assert torch.equal(gqsa(weight, normal, Target(0.5, None, 4)), keep)
    found = saliency(weight, normal).double().square()
    expected = weight.double().square() / inverse
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "group_size", "zero", "bits"), [(16, 16, False, 2.5625), (16, 16, True, 2.6875), (8, 8, False, 3.125)]
)
def test_bits_are_those_of_the_equation(size: int, group_size: int, zero: bool, bits: float) -> None:
    """Half of 4 + 16 / g bits, or with zero points 4 + 20 / g, and a bit for each group."""
    made = METHOD(group=size, bits=4, group_size=group_size, symmetric=not zero)
    weight = weights(32, 256)
    result = made(weight, observed(inputs(600, 256), made.needs)).weight
    assert result.bits_per_weight == pytest.approx(bits)
    assert bits_known(made, (32, 256)) == result.stored_bits


def test_it_loses_less_than_groups_by_magnitude() -> None:
    for seed in range(3):
        weight, rows = weights(32, 128, seed), inputs(1000, 128, seed)
        hessian = hessian_of(rows)
        lost = []
        for kind in (Magnitude(group=16, bits=4, group_size=16, within="row"), METHOD(bits=4, group_size=16)):
            lost.append(relative(weight, kind(weight, observed(rows, (Hessian,))).weight.dequantize(), hessian))
        assert lost[1] < lost[0]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_it_goes_through_files(family: str, tiny: Tiny, tmp_path: Path) -> None:
    data = ids_file(tmp_path / "ids.npy")
    assert_round_trip(tiny(family), tmp_path, data, steps("prune/gqsa", bits=4, group_size=16))


def test_both_stages_of_training_lower_the_loss_and_keep_masks(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    step = steps("prune/gqsa", bits=3, group=8, group_size=8)
    tuning = [{"method": "retrain/bqpo", "options": {"epochs": 2}}]
    last = [{"method": "retrain/perp", "options": {"weights": "none"}, "steps": 8, "batch": 3}]
    summary = run(tiny("llama"), tmp_path / "out", ids, step, tuning=tuning, retraining=last, reload=True)
    run(tiny("llama"), tmp_path / "plain", ids, step)
    source, plain = (PackedSource.open_packed(tmp_path / name) for name in ("out", "plain"))
    first = min(source.table)
    assert torch.equal(source.compressed(first).keep.mask(), plain.compressed(first).keep.mask())
    for row in summary.rows:
        weight = source.compressed(row.site)
        assert not weight.dequantize()[~weight.keep.mask()].any()
        assert row.notes["retrain/bqpo"]["loss"] < row.notes["retrain/bqpo"]["loss_before"]
        notes = row.notes["retrain/perp of the whole model"]
        assert notes["held_out"] <= notes["held_out_before"]


def test_a_pattern_has_no_groups() -> None:
    assert METHOD(pattern="2:4").group == 1
    assert METHOD().group == 16
