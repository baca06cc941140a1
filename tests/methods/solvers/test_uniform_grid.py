"""Grids: ranges against formulas in scalars, searched ranges against brute force, rounding against all grid points."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import times
from torch import Tensor

from compress.methods.method import group_columns, indivisible, read_group_size
from compress.methods.solvers.uniform_grid import Grid, encode, fit
from compress.weights.uniform import Uniform

law = settings(max_examples=times(15, 60), deadline=None, derandomize=True)


def bfloat16(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).item()


def random(rows: int, columns: int, seed: int = 0, tail: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight * torch.exp(tail * torch.randn(rows, columns, generator=generator, dtype=torch.float64)) * 0.05


def decode(weight: Tensor, grid: Grid, group_size: int) -> Tensor:
    size = weight.shape[1] if group_size == -1 else group_size
    codes = encode(weight, grid, group_size)
    part = Uniform(codes, grid.scale, grid.bits, size, grid.zero, offset=grid.offset, bipolar=grid.bipolar)
    return part.dequantize().to(weight.dtype)


def errors(weight: Tensor, grid: Grid, size: int, importance: Tensor | None = None) -> Tensor:
    """The objective of the search, (out, groups)."""
    lost = (weight - decode(weight, grid, size)).square()
    lost = lost if importance is None else lost * importance
    return lost.view(len(weight), -1, size).sum(2)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [8, 32])
def test_minmax_is_the_formula(bits: int, symmetric: bool, size: int) -> None:
    weight = random(5, 32, seed=bits)
    weight[0] = weight[0].abs()  # a group without negative weights keeps its full range
    weight[1] = -weight[1].abs()
    grid = fit(weight, bits, size, symmetric=symmetric, search=False)
    top = 2**bits - 1
    for row, group in itertools.product(range(5), range(32 // size)):
        values = weight[row, group * size : (group + 1) * size].tolist()
        low, high = min([0.0, *values]), max([0.0, *values])
        if symmetric:
            scale = bfloat16(2 * max(-low, high) / top)
            assert grid.zero is None
        else:
            scale = bfloat16((high - low) / top)
            assert grid.zero is not None
            assert grid.zero[row, group].item() == min(max(round(-low / scale), 0), top)
        assert grid.scale[row, group].item() == scale


@pytest.mark.parametrize("bits", range(1, 9))
def test_minmax_of_bipolar_grids_reaches_both_ends(bits: int) -> None:
    weight = random(5, 32, seed=bits)
    grid = fit(weight, bits, 8, symmetric=True, search=False, bipolar=True)
    assert grid.bipolar
    ends = weight.unflatten(1, (4, 8)).abs().amax(2)
    for row, group in itertools.product(range(5), range(4)):
        assert grid.scale[row, group].item() == bfloat16(2 * ends[row, group].item() / (2**bits - 1))
    # Nothing lies more than half a step from a value, but for what the rounding of the scale cuts off the ends.
    step = grid.scale.double().repeat_interleave(8, 1)
    left = (weight - decode(weight, grid, 8)).abs()
    assert (left <= step / 2 + 2.0**-9 * ends.repeat_interleave(8, 1)).all()


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_of_one_sign_are_not_clipped(bits: int, sign: int, search: bool) -> None:
    weight = sign * random(16, 16, seed=1).abs()
    grid = fit(weight, bits, 16, symmetric=True, search=search)
    largest = weight.abs().amax()
    step = grid.scale.double().abs().amax()
    # Half of the range is enough for such a group, but not less: a range of half the size would lose half of the largest.
    assert (weight - decode(weight, grid, 16)).abs().amax() < max(0.51 * step, 0.35 * largest)


@law
@given(
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    search=st.booleans(),
    bipolar=st.booleans(),
    shifted=st.booleans(),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8, 16]),
    seed=st.integers(0, 10**6),
)
def test_codes_are_the_nearest_of_all_grid_points(
    bits: int, symmetric: bool, search: bool, bipolar: bool, shifted: bool, groups: int, size: int, seed: int
) -> None:
    weight = random(3, groups * size, seed, tail=0.5)
    grid = fit(weight, bits, size, symmetric=symmetric, search=search, bipolar=symmetric and bipolar)
    offset = grid.scale.double() * torch.randn(grid.scale.shape, generator=torch.Generator().manual_seed(seed)).double()
    grid = replace(grid, offset=offset.to(torch.bfloat16) if shifted else None)
    codes = torch.arange(2**bits, dtype=torch.float64)
    between = (2**bits - 1) / 2 if bits == 1 or grid.bipolar else 2 ** (bits - 1)
    zero = torch.full_like(grid.scale, between) if grid.zero is None else grid.zero
    points = (codes - zero.double().unsqueeze(2)) * grid.scale.double().unsqueeze(2)  # (out, groups, 2^bits)
    if grid.offset is not None:
        points += grid.offset.double().unsqueeze(2)
    distance = (weight.unflatten(1, (groups, size)).unsqueeze(3) - points.unsqueeze(2)).abs()
    reached = (weight - decode(weight, grid, size)).abs().unflatten(1, (groups, size))
    # A part adds its offset in float32.
    tolerance: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6} if shifted else {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(reached, distance.amin(3), **tolerance)


@law
@given(
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    bipolar=st.booleans(),
    weighted=st.booleans(),
    size=st.sampled_from([4, 16, 48]),
    tail=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 10**6),
)
def test_search_is_never_worse_than_minmax(
    bits: int, symmetric: bool, bipolar: bool, weighted: bool, size: int, tail: float, seed: int
) -> None:
    weight = random(4, 48, seed, tail)
    importance = torch.rand(48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) if weighted else None
    kind: dict[str, bool] = {"symmetric": symmetric, "bipolar": symmetric and bipolar}
    plain = fit(weight, bits, size, search=False, **kind)
    searched = fit(weight, bits, size, search=True, importance=importance, **kind)
    assert (errors(weight, searched, size, importance) <= errors(weight, plain, size, importance) * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("bits", "symmetric", "bipolar"),
    [*itertools.product((1, 2, 3, 4, 6), (True, False), (False,)), *((bits, True, True) for bits in (1, 2, 3, 4))],
)
def test_search_comes_close_to_brute_force(bits: int, symmetric: bool, bipolar: bool) -> None:
    """Against every bfloat16 scale (of both signs, or with every zero point) between a tenth of the covering one and itself."""
    size = 64
    weight = random(12, size, seed=bits)
    importance = torch.rand(size, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.1
    searched = fit(weight, bits, size, symmetric=symmetric, search=True, importance=importance, bipolar=bipolar)
    found = errors(weight, searched, size, importance)
    cover = fit(weight, bits, size, symmetric=symmetric, search=False).scale
    best = torch.full_like(found, torch.inf)
    for factor, sign in itertools.product(torch.linspace(0.1, 1.0, 180).tolist(), (1, -1) if symmetric else (1,)):
        for zero in (None,) if symmetric else range(2**bits):
            zeros = None if zero is None else torch.full_like(cover, zero, dtype=torch.uint8)
            grid = Grid((cover.double() * factor * sign).to(torch.bfloat16), zeros, bits, bipolar=bipolar)
            best = torch.minimum(best, errors(weight, grid, size, importance))
    assert (found / best).mean() < 1.03
    assert (found / best).max() < 1.25


def test_search_uses_a_negative_scale_where_the_upper_end_is_longer() -> None:
    weight = torch.tensor([[-0.9, -0.3, 0.3, 0.6, 1.2], [0.9, 0.3, -0.3, -0.6, -1.2]], dtype=torch.float64)
    grid = fit(weight, 2, 5, symmetric=True, search=True)
    assert grid.scale[0].item() < 0 < grid.scale[1].item()
    assert errors(weight, grid, 5).max() < errors(weight, Grid(grid.scale.abs(), None, 2), 5).max()


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8, -3.0, 1e12])
def test_constant_groups(bits: int, symmetric: bool, search: bool, value: float) -> None:
    for dtype in (torch.float32, torch.float64):
        weight = torch.full((2, 8), value, dtype=dtype)
        grid = fit(weight, bits, 4, symmetric=symmetric, search=search)
        assert torch.isfinite(grid.scale).all()
        assert (grid.scale != 0).all()
        decoded = decode(weight, grid, 4)
        assert torch.isfinite(decoded).all()
        # The ends of the range are kept up to the half step that symmetric ranges cut off, and the rounding of the scale.
        assert (decoded - weight).abs().max() <= max(abs(value) * (0.51 * (symmetric and bits > 1 and not search) + 0.005), 1e-17)


def test_a_group_without_importance_is_still_fitted() -> None:
    weight = random(3, 16)
    importance = torch.cat([torch.zeros(8), torch.ones(8)]).double()
    grid = fit(weight, 4, 8, symmetric=True, search=True, importance=importance)
    assert (weight - decode(weight, grid, 8)).abs().max() <= 0.51 * grid.scale.double().abs().max() + weight.abs().max() * 0.05


def test_rows_do_not_influence_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(33, 64).float()
    whole = fit(weight, 3, 16, symmetric=False, search=True)
    monkeypatch.setattr("compress.methods.solvers.uniform_grid._CHUNK", 5 * 64)
    chunked = fit(weight, 3, 16, symmetric=False, search=True)
    alone = fit(weight[7:8], 3, 16, symmetric=False, search=True)
    assert torch.equal(whole.scale, chunked.scale)
    assert torch.equal(whole.scale[7:8], alone.scale)
    assert whole.zero is not None
    assert chunked.zero is not None
    assert torch.equal(whole.zero, chunked.zero)


def test_indivisible_names_sizes_that_fit() -> None:
    assert indivisible(256, 128) is None
    assert indivisible(257, -1) is None
    message = indivisible(11000, 128)
    assert message == "in=11000 is not a multiple of group_size=128; use 100, 110, 125, or -1 for the whole row"
    assert indivisible(64, 0) is not None


def test_sizes_of_runtimes_are_suggested_first() -> None:
    """Width 576 has 72 and 96 nearer to 128, but kernels take 64 and 32."""
    assert indivisible(576, 128) == "in=576 is not a multiple of group_size=128; use 64, 32, auto, or -1 for the whole row"


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (1536, 128), (576, 64), (96, 32), (32, 32)])
def test_auto_takes_the_largest_size_that_divides(columns: int, size: int) -> None:
    assert indivisible(columns, "auto") is None
    assert group_columns("auto", columns) == size
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    chosen, given = (fit(weight, 4, group, symmetric=True, search=True) for group in ("auto", size))
    assert torch.equal(chosen.scale, given.scale)


def test_auto_where_nothing_divides() -> None:
    expected = (
        "in=40 is not a multiple of any of 128, 64, 32, which group_size=auto tries; use 10, 20, 40, or -1 for the whole row"
    )
    assert indivisible(40, "auto") == expected


@pytest.mark.parametrize("wrong", ["Auto", "-2", -2, True, None, 64.0, ""])
def test_what_is_no_group_size(wrong: object) -> None:
    with pytest.raises(ValueError, match="a number of columns, -1 for the whole row, or auto"):
        read_group_size(wrong)


def test_group_sizes_as_text() -> None:
    assert [read_group_size(text) for text in ("64", "-1", "auto")] == [64, -1, "auto"]
