"""Rounding under a mask against a slow reference: errors of pruning and rounding are fed on, refinement knows the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import hessian_of, inputs, relative, weights
from torch import Tensor

from compress.methods.solvers import masked_rounding as _quantize
from compress.methods.solvers.compensated import compensated
from compress.methods.solvers.masked_least_squares import Normal, masked_lsq
from compress.methods.solvers.masked_rounding import quantized
from compress.methods.solvers.uniform_grid import fit


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a Hessian and a mask."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(9, 48, generator=generator) < 0.5
    keep[2, 16:32] = False
    return weights(9, 48, seed).double(), hessian_of(inputs(300, 48, seed)), keep


def swept(weight: Tensor, hessian: Tensor, keep: Tensor, start: Tensor, bits: int, size: int, symmetric: bool) -> Tensor:
    """Values: columns in the order of the Hessian's diagonal, each removed from the problem with its error."""
    columns = weight.shape[1]
    whole = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(columns, dtype=torch.float64)
    order = torch.sort(hessian.diagonal(), descending=True, stable=True).indices.tolist()
    left = [torch.linalg.inv(whole[order[k:]][:, order[k:]]) for k in range(columns)]
    importance = torch.empty(columns, dtype=torch.float64)
    for inverse, column in zip(left, order, strict=True):
        importance[column] = 1 / inverse[0, 0]
    grid = fit(start * keep, bits, size, symmetric=symmetric, search=True, importance=importance)
    scale = grid.scale.double().repeat_interleave(size, 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if grid.zero is None else grid.zero.double().repeat_interleave(size, 1)
    current, values = start.clone(), torch.zeros_like(start)
    for k, c in enumerate(order):
        level = ((current[:, c] / scale[:, c]).round() + zero[:, c]).clamp(0, 2**bits - 1)
        values[:, c] = (level - zero[:, c]) * scale[:, c] * keep[:, c]
        error = (current[:, c] - values[:, c]) / left[k][0, 0]
        current[:, order[k:]] -= error.unsqueeze(1) * left[k][0]
    return values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(4, 16), (3, -1), (2, 48)])
@pytest.mark.parametrize("solved", [True, False])
def test_equals_the_reference(bits: int, size: int, symmetric: bool, solved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quantize, "_REFINEMENTS", 0)
    for seed in range(2):
        weight, hessian, keep = case(seed)
        values = masked_lsq(weight, keep, Normal.of(hessian, 0.01)) if solved else None
        base, notes = quantized(weight, keep, values, hessian, bits, size, symmetric)
        expected = swept(weight, hessian, keep, weight if values is None else values, bits, 48 if size == -1 else size, symmetric)
        torch.testing.assert_close(base.dequantize().double() * keep, expected, rtol=1e-6, atol=1e-9)
        assert notes["damp"] == 0.01


@pytest.mark.parametrize("solved", [True, False])
def test_refinement_leaves_every_code_the_best_given_the_others(solved: bool) -> None:
    """After many passes no single code can be changed for the better: of kept weights, under the error against the weight."""
    weight, hessian, keep = case()
    start = masked_lsq(weight, keep, Normal.of(hessian, 0.01)) if solved else None
    codes, grid, factor = compensated(weight, hessian, 3, 16, symmetric=True, refinements=60, keep=keep, start=start)
    scale = grid.scale.double().repeat_interleave(16, 1)
    values = (codes.double() - 4) * scale * keep

    def cost(values: Tensor) -> Tensor:
        delta = weight - values
        return ((delta @ factor.hessian) * delta).sum(1)

    least = cost(values)
    for column in range(48):
        for step in (-1, 1):
            level = codes[:, column].double() + step
            tried = values.clone()
            tried[:, column] = torch.where(
                keep[:, column] & (level >= 0) & (level <= 7), (level - 4) * scale[:, column], values[:, column]
            )
            assert bool((cost(tried) >= least * (1 - 1e-9)).all())


def test_refinement_and_solved_values_lower_the_error() -> None:
    for seed in range(3):
        weight, hessian, keep = case(seed)
        values = masked_lsq(weight, keep, Normal.of(hessian, 0.01))

        def error(refinements: int, start: Any, weight: Tensor = weight, hessian: Tensor = hessian, keep: Tensor = keep) -> float:
            codes, grid, _ = compensated(weight, hessian, 3, 16, symmetric=True, refinements=refinements, keep=keep, start=start)
            decoded = (codes.double() - 4) * grid.scale.double().repeat_interleave(16, 1) * keep
            return relative(weight, decoded, hessian)

        assert error(2, None) < error(0, None)
        assert error(2, values) < error(0, values)
        assert error(2, values) < error(2, None)
