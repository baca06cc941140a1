"""Two-level grids: what improving one does, steps of rows with one scale, tiles with a group far from zero."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import function_of
from spqr_reference import bfloat16
from thorough import times
from torch import Tensor

from compress.methods.solvers.outliers import Solver
from compress.methods.solvers.two_level_grid import Moments, TwoLevelGrid

spqr = function_of("quant/spqr")

law = settings(max_examples=times(10, 40), deadline=None, derandomize=True)


@law
@given(
    bits=st.integers(1, 8),
    scale_bits=st.integers(2, 8),
    zero_bits=st.integers(2, 8),
    rows=st.integers(1, 40),
    correlated=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_improving_a_grid_lowers_the_error_of_its_codes(
    bits: int, scale_bits: int, zero_bits: int, rows: int, correlated: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, size = normal(8, rows) * normal(rows).exp(), 8
    metric = torch.diag(normal(size).exp())
    if correlated:
        mix = normal(size, size)
        metric += mix @ mix.T
    free = (torch.rand(size, rows, generator=generator) < 0.9).double()
    scale = (weight.amax(0) - weight.amin(0)).clamp_min(1e-3).unsqueeze(0) / max(2**bits - 1, 1)
    zero = (-weight.amin(0) / scale).clamp(0, 2**bits - 1)
    grid = TwoLevelGrid.covering(scale, zero, bits, scale_bits, zero_bits)
    codes = (weight / grid.scale() + grid.zero()).round().clamp(0, 2**bits - 1)
    held = weight * (1 - free) * 0.3  # what outliers leave

    def errors() -> Tensor:
        delta = held + free * (weight - (codes - grid.zero()) * grid.scale())
        return (delta * (metric @ delta)).sum()

    moments = Moments.full(codes, free, metric, metric @ (held + free * weight))
    before = errors()
    for step in (grid._improve_scales, grid._improve_zeros, grid._improve_codes):
        step(moments)
        after = errors()
        assert after <= before * (1 + 1e-9)
        before = after
    assert (grid.scale() > 0).all()
    part = grid.part(codes.T.to(torch.uint8), size, None)
    assert torch.equal(part.scale().double().T, grid.scale())
    assert torch.equal(part.zero().double().T, grid.zero())


def test_rows_with_one_scale_code_do_not_say_which_step_is_best() -> None:
    """Any step has a largest scale that gives the same: which one would be decided by rounding."""
    generator = torch.Generator().manual_seed(0)
    for dtype, rows in itertools.product((torch.float32, torch.float64), (1, 9, 16)):
        for _ in range(20):
            weight = torch.randn(8, rows, generator=generator).to(dtype)
            grid = TwoLevelGrid.covering(
                torch.full((1, rows), 0.7, dtype=dtype), torch.full((1, rows), 3.0, dtype=dtype), 3, 3, 3
            )
            grid.scale_code.fill_(5)
            grid.step.fill_(30)
            grid.zero_code.fill_(3)
            grid.zero_step.fill_(40)
            codes = (weight / grid.scale() + grid.zero()).round().clamp(0, 7)
            moments = Moments.diagonal(codes, weight, torch.ones_like(weight))
            grid._improve_scales(moments)
            grid._improve_zeros(moments)
            assert (grid.step == 30).all()
            assert (grid.zero_step == 40).all()


def paper_second_level(values: Tensor, bits: int) -> Tensor:
    """What sixteen scales or zeros become in the reference implementation: min-max, and -1..1 where all are equal."""
    low, high = values.min(), values.max()
    if low == high:
        low, high = low.new_tensor(-1.0), low.new_tensor(1.0)
    step = (high - low) / (2**bits - 1)
    zero = -low / step
    return (torch.clamp(torch.round(values / step + zero), 0, 2**bits - 1) - zero) * step


def test_equal_scales_decode_to_themselves() -> None:
    scale, zero = torch.full((1, 16), 0.01, dtype=torch.float64), torch.full((1, 16), 3.0, dtype=torch.float64)
    assert float(paper_second_level(scale[0], 3)[0]) == pytest.approx(1 / 7)
    for rows, bits in itertools.product((1, 7, 16), range(2, 9)):
        grid = TwoLevelGrid.covering(scale[:, :rows], zero[:, :rows], 3, bits, bits)
        assert torch.equal(grid.scale(), bfloat16(scale[:, :rows]))
        assert torch.equal(grid.zero(), zero[:, :rows])
    # And a weight whose rows are all alike comes back.
    row = torch.linspace(-0.7, 0.7, 16)
    weight = row.repeat(32, 1)
    decoded = spqr(weight, torch.eye(16), bits=4, outlier_threshold=None).weight.dequantize()
    torch.testing.assert_close(decoded, weight, atol=1.4 / 15 * 0.6, rtol=0)
    constant = torch.full((17, 32), -0.3)
    for bits in (1, 2, 3, 8):
        made = spqr(constant, torch.eye(32), bits=bits, outlier_threshold=None).weight.dequantize()
        torch.testing.assert_close(made, constant, rtol=2**-8, atol=0)


def test_a_group_far_from_zero_does_not_spoil_its_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 16, generator=generator, dtype=torch.float64) * 0.1
    weight[::2] += 0.15
    weight[1::2] -= 0.15
    weight[5] = 20 + 0.1 * torch.randn(16, generator=generator, dtype=torch.float64)
    others = [r for r in range(16) if r != 5]

    # Without zero in the range, the zero of row 5 is some hundred steps away, and the others share what 3 bits leave.
    low, high = weight.amin(1), weight.amax(1)
    scale = (high - low) / 7
    zero = paper_second_level(-low / scale, 3)
    codes = torch.clamp(torch.round(weight / scale.unsqueeze(1) + zero.unsqueeze(1)), 0, 7)
    theirs = ((codes - zero.unsqueeze(1)) * scale.unsqueeze(1) - weight)[others].square().mean()

    solver = Solver(weight, torch.eye(16, dtype=torch.float64), 3, 16, 8, 3, "none", 0.01)
    solver.sweep(math.inf)
    assert (solver.grid.zero() >= 0).all()
    assert (solver.grid.zero() <= 7).all()
    ours = (solver.result().dequantize() - weight)[others].square().mean()
    assert ours < 0.1 * theirs
    assert ours < 0.1**2 * 0.0375 * 2
