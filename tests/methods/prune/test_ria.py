"""RIA against its equation."""

from __future__ import annotations

import pytest
import torch
from layers import inputs, observed, weights

from compress.calibration.statistics import MeanSquare
from compress.methods.prune.ria import METHOD
from compress.methods.solvers.mask_scores import relative_importance
from compress.methods.solvers.mask_selection import Target, select


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_equals_the_equation(power: float) -> None:
    weight, rows = weights(12, 64).double(), inputs(200, 64).double()
    norm = rows.square().mean(0).sqrt()
    found = relative_importance(weight, norm.square(), power)
    for i in range(12):
        for j in range(64):
            size = abs(float(weight[i, j]))
            relative = size / float(weight[:, j].abs().sum()) + size / float(weight[i].abs().sum())
            assert float(found[i, j]) == pytest.approx(relative * float(norm[j]) ** power, rel=1e-12)


def test_the_whole_matrix_competes_and_weak_rows_stay() -> None:
    weight, rows = weights(128, 32), inputs(200, 32)
    weight[3] *= 1e-3
    made = METHOD(sparsity=0.6)
    keep = made(weight, observed(rows, made.needs)).weight.keep.mask()
    statistic = observed(rows, [MeanSquare])[MeanSquare]
    assert torch.equal(keep, select(relative_importance(weight, statistic.mean()), Target(0.6, within="matrix")))  # type: ignore[attr-defined]
    assert int(keep.sum()) == 128 * 32 - round(0.6 * 128 * 32)
    assert int(keep[3].sum()) > 4  # by magnitude none would
