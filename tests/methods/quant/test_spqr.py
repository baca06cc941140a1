"""SpQR against a slow reference with loops over rows and groups, what must hold of its results, and the reference's bugs.

The reference eliminates columns from the explicit inverse Hessian and evaluates every candidate grid by the whole quadratic form.
It shares nothing with the method but `_grid.fit`, which `test_grid.py` checks by itself.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.checkpoint import packing
from compress.errors import CalibrationError
from compress.methods.quant.gptq import gptq
from compress.methods.quant.spqr import METHOD, spqr
from compress.methods.solvers.outliers import Order, Solver, likely_outliers
from compress.methods.solvers.two_level_grid import Moments, TwoLevelGrid
from compress.methods.solvers.uniform_grid import fit
from compress.weights.sparse import Sparse, column_dtype
from compress.weights.two_level import TILE, TwoLevel, tiles
from compress.weights.weight import CompressedWeight

ORDERS: tuple[Order, ...] = ("grouped", "none", "desc_act")
law = settings(max_examples=40, deadline=None, derandomize=True)


def problem(rows: int = 20, columns: int = 32, tokens: int = 200, seed: int = 0, far: int = 6) -> tuple[Tensor, Tensor]:
    """A weight with a few large entries, and the second moment of correlated inputs whose channels differ in size; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = torch.eye(columns, dtype=torch.float64) + 0.4 * normal(columns, columns)
    inputs = normal(tokens, columns) @ mix * normal(columns).mul(0.5).exp()
    weight = normal(rows, columns) * 0.05
    weight.view(-1)[torch.randperm(rows * columns, generator=generator)[:far]] *= 6
    return weight, inputs.T @ inputs / tokens


def loss(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    delta = weight.double() - decoded.double()
    return float(((delta @ hessian.double()) * delta).sum())


def outlier_count(weight: CompressedWeight) -> int:
    assert weight.outliers is None or isinstance(weight.outliers, Sparse)
    return 0 if weight.outliers is None else weight.outliers.columns.shape[0]


# ---------------------------------------------------------------------------------------------------- the slow reference


def bfloat16(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16).double()


class Tile:
    """The grid of up to 16 rows in one group, by its definition."""

    def __init__(self, scale: Tensor, zero: Tensor, bits: int, scale_bits: int, zero_bits: int) -> None:
        """Cover first-level scales and zeros (rows,)."""
        self.bits, self.scale_bits, self.zero_bits = bits, scale_bits, zero_bits
        self.unit = 2 ** (7 + scale_bits)
        self.last_scale, self.last_zero = 2**scale_bits - 1, 2**zero_bits - 1
        self.limit = min(255, self.unit // self.last_scale)
        self.top = float(bfloat16(scale.max()))
        self.step = min(round((1 - float(scale.min()) / self.top) * self.unit / self.last_scale), self.limit)
        self.step = max(self.step, 0)
        self.scale_code = [self._scale_code(float(s)) for s in scale]
        fine = [float(z) * 2 ** (8 - bits) for z in zero]
        self.offset = min(max(round(min(fine)), 0), 255)
        self.zero_step = min(max(round((max(fine) - self.offset) * 2**zero_bits / self.last_zero), 0), 255)
        self.zero_code = [self._zero_code(y) for y in fine]

    def _scale_code(self, scale: float) -> int:
        below = (1 - scale / self.top) * self.unit
        return min(max(round(below / self.step), 0), self.last_scale) if self.step else 0

    def _zero_code(self, fine: float) -> int:
        above = (fine - self.offset) * 2**self.zero_bits
        return min(max(round(above / self.zero_step), 0), self.last_zero) if self.zero_step else 0

    def scale(self, code: int, top: float | None = None, step: int | None = None) -> float:
        top, step = self.top if top is None else top, self.step if step is None else step
        return top * (1 - code * step / self.unit)

    def zero(self, code: int, offset: int | None = None, step: int | None = None) -> float:
        offset, step = self.offset if offset is None else offset, self.zero_step if step is None else step
        return (offset + code * step / 2**self.zero_bits) * 2.0 ** (self.bits - 8)

    @property
    def scales(self) -> list[float]:
        return [self.scale(code) for code in self.scale_code]

    @property
    def zeros(self) -> list[float]:
        return [self.zero(code) for code in self.zero_code]

    def state(self) -> tuple[Any, ...]:
        return self.top, self.step, self.offset, self.zero_step, list(self.scale_code), list(self.zero_code)

    def restore(self, state: tuple[Any, ...]) -> None:
        self.top, self.step, self.offset, self.zero_step = state[:4]
        self.scale_code, self.zero_code = list(state[4]), list(state[5])

    def improve(self, codes: Tensor, free: Tensor, metric: Tensor, beside: Tensor, pull: Tensor) -> None:
        """Three steps of descent on d M d + 2 <d, pull>, d = beside - free (code - zero) scale, over rows (rows, size)."""
        rows = range(len(codes))

        def error(r: int, scale: float, zero: float) -> float:
            d = beside[r] - free[r] * (codes[r] - zero) * scale
            return float(d @ metric @ d + 2 * d @ pull[r])

        def whole(scales: list[float], zeros: list[float]) -> float:
            return sum(error(r, scales[r], zeros[r]) for r in rows)

        def forms(directions: list[Tensor]) -> tuple[list[float], list[float]]:
            """Curvature, and slope at 0, along one direction per row."""
            curve = [float(u @ metric @ u) for u in directions]
            return curve, [float(u @ metric @ beside[r] + u @ pull[r]) for r, u in enumerate(directions)]

        # Scales: s = top - top step / unit n.
        zeros = self.zeros
        curve, slope = forms([free[r] * (codes[r] - zeros[r]) for r in rows])
        wanted = float(self.step)
        if line := least_squares(self.scale_code, curve, slope):
            wanted = -line[1] / line[0] * self.unit
        best, kept = whole(self.scales, zeros), (self.top, self.step)
        for step in (self.step, math.floor(wanted), math.ceil(wanted)):
            step = min(max(step, 0), self.limit)
            shape = [1 - n * step / self.unit for n in self.scale_code]
            down = sum(a * c * c for a, c in zip(curve, shape, strict=True))
            up = sum(b * c for b, c in zip(slope, shape, strict=True))
            if down <= 0 or up <= 0:
                continue
            top = float(bfloat16(torch.tensor(up / down, dtype=torch.float64)))
            found = whole([self.scale(n, top, step) for n in self.scale_code], zeros)
            if found < best:
                best, kept = found, (top, step)
        self.top, self.step = kept

        # Zeros, in 2^(bits - 8): y = offset + step / 2^zero_bits n. The value moves by s 2^(bits - 8) per unit.
        scales, grain = self.scales, 2.0 ** (self.bits - 8)
        curve, _ = forms([-free[r] * scales[r] * grain for r in rows])
        slope = []
        for r in rows:
            u = -free[r] * scales[r] * grain
            at_zero = beside[r] - free[r] * codes[r] * scales[r]
            slope.append(float(u @ metric @ at_zero + u @ pull[r]))
        wanted = float(self.zero_step)
        if line := least_squares(self.zero_code, curve, slope):
            wanted = line[1] * 2**self.zero_bits
        best, second = whole(scales, self.zeros), (self.offset, self.zero_step)
        for step in (self.zero_step, math.floor(wanted), math.ceil(wanted)):
            step = min(max(step, 0), 255)
            rest = sum(b - a * n * step / 2**self.zero_bits for a, b, n in zip(curve, slope, self.zero_code, strict=True))
            offset = min(max(round(rest / sum(curve)) if sum(curve) > 0 else 0, 0), 255)
            found = whole(scales, [self.zero(n, offset, step) for n in self.zero_code])
            if found < best:
                best, second = found, (offset, step)
        self.offset, self.zero_step = second

        # Codes: every pair.
        for r in rows:
            least = error(r, self.scale(self.scale_code[r]), self.zero(self.zero_code[r]))
            for pair in itertools.product(range(self.last_scale + 1), range(self.last_zero + 1)):
                found = error(r, self.scale(pair[0]), self.zero(pair[1]))
                if found < least * (1 - 1e-13) - 1e-300:
                    least, (self.scale_code[r], self.zero_code[r]) = found, pair


def least_squares(codes: list[int], curve: list[float], slope: list[float]) -> tuple[float, float] | None:
    """The line c + m n through the points (n, slope / curve) with weights `curve`; None where codes hardly differ."""
    n, a = torch.tensor(codes, dtype=torch.float64), torch.tensor(curve, dtype=torch.float64)
    mean_square, mean = float((a * n * n).sum()), float((a * n).sum())
    whole = float(a.sum())
    if not whole * mean_square - mean**2 > 1e-5 * whole * mean_square:
        return None
    # Centred normal equations.
    centre = mean / whole
    b = torch.tensor(slope, dtype=torch.float64)
    m = float((b * (n - centre)).sum() / (a * (n - centre) ** 2).sum())
    return float(b.sum()) / whole - m * centre, m


def leave_one_out(weight: list[float], cost: list[float], bits: int, limit: float) -> list[bool]:
    """By its definition: a min-max fit without each weight in turn."""
    top = 2**bits - 1

    def errors(values: list[float]) -> list[float]:
        low, high = min([*values, 0.0]), max([*values, 0.0])
        scale = (high - low) / top or 1.0
        zero = -low / scale
        codes = [min(max(round(w / scale + zero), 0), top) for w in weight]
        return [c * ((q - zero) * scale - w) ** 2 for q, w, c in zip(codes, weight, cost, strict=True)]

    whole = sum(errors(weight))
    result = []
    for i in range(len(weight)):
        left = errors(weight[:i] + weight[i + 1 :])
        result.append(whole - sum(e for k, e in enumerate(left) if k != i) > limit)
    return result


def in_order(diagonal: list[float], size: int, order: str) -> list[int]:
    columns = range(len(diagonal))
    if order == "none":
        return list(columns)
    if order == "desc_act":
        return sorted(columns, key=lambda c: -diagonal[c])
    means = {g: sum(diagonal[g * size : (g + 1) * size]) / size for g in range(len(diagonal) // size)}
    return [
        c
        for g in sorted(means, key=lambda g: -means[g])
        for c in sorted(columns[g * size : (g + 1) * size], key=lambda c: -diagonal[c])
    ]


def reference(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    scale_bits: int,
    zero_bits: int,
    outlier_threshold: float | None,
    order: str,
    refinements: int,
    damp: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, outlier mask and decoded weight (out, in)."""
    rows, columns = weight.shape
    size, top = group_size, 2**bits - 1
    place = in_order(hessian.diagonal().tolist(), size, order)
    w = weight[:, place]
    full = hessian[place][:, place].clone()
    live = full.diagonal() > 0
    full /= full.diagonal()[live].mean()
    full += torch.diag((~live).double() + damp)
    left = [torch.linalg.inv(full[j:, j:]) for j in range(columns)]
    cost = torch.stack([1 / inverse[0, 0] for inverse in left])
    power = torch.stack([cost[j] * w[:, j].square().mean() for j in range(columns) if live[j]]).mean()
    limit = math.inf if outlier_threshold is None else outlier_threshold * float(power)
    current, codes, grids = w.clone(), torch.zeros_like(w), {}
    residual, outlier = torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bool)

    for a in range(0, columns, size):
        b, wanted = a + size, current[:, a : a + size].clone()
        metric = torch.linalg.inv(left[a][:size, :size])  # of errors in the group when all later columns make up for them
        likely = torch.tensor([leave_one_out(x.tolist(), cost[a:b].tolist(), bits, limit) for x in wanted]) & live[a:b]
        kept = wanted.clone()
        for r in range(rows):
            others = wanted[r][~likely[r]]
            kept[r][likely[r]] = others.mean() if len(others) else 0.0
        first = fit(kept, bits, -1, symmetric=False, search=True, importance=cost[a:b])
        assert first.zero is not None
        for t in range(0, rows, TILE):
            part = slice(t, min(t + TILE, rows))
            tile = Tile(first.scale[part, 0].double(), first.zero[part, 0].double(), bits, scale_bits, zero_bits)
            x, free = wanted[part], (~likely[part]).double()
            count, nothing = len(x), torch.zeros_like(x)

            def encode(x: Tensor, tile: Tile) -> Tensor:
                s, z = torch.tensor(tile.scales).unsqueeze(1), torch.tensor(tile.zeros).unsqueeze(1)
                return torch.clamp(torch.round(x / s + z), 0, top)

            for _ in range(3):
                tile.improve(encode(x, tile), free, torch.diag(cost[a:b]), x * free, nothing)

            def swept(tile: Tile, part: slice, a: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                """Codes, residuals, outliers and rounded values of one tile, columns eliminated one by one."""
                x = current[part].clone()
                q, rest, out, value = (torch.zeros(len(x), size, dtype=torch.float64) for _ in range(4))
                s, z = torch.tensor(tile.scales), torch.tensor(tile.zeros)
                for j in range(a, a + size):
                    k = j - a
                    q[:, k] = torch.clamp(torch.round(x[:, j] / s + z), 0, top)
                    value[:, k] = (q[:, k] - z) * s
                    if live[j]:
                        out[:, k] = (cost[j] * (x[:, j] - value[:, k]) ** 2 > limit).double()
                    rest[:, k] = bfloat16(x[:, j] - value[:, k]) * out[:, k]
                    value[:, k] += rest[:, k]
                    x[:, j:] -= torch.outer((x[:, j] - value[:, k]) / left[j][0, 0], left[j][0])
                return q, rest, out, value

            def price(value: Tensor, out: Tensor, x: Tensor, metric: Tensor) -> float:
                d = x - value
                return float((d @ metric * d).sum()) + (limit * float(out.sum()) if math.isfinite(limit) else 0.0)

            made = swept(tile, part, a)
            best, state, paid = made, tile.state(), price(made[3], made[2], x, metric)
            for _ in range(2):
                q, _, out, value = made
                tile.improve(q, 1 - out, metric, torch.where(out > 0, x - value, x), nothing)
                made = swept(tile, part, a)
                if price(made[3], made[2], x, metric) < paid:
                    best, state, paid = made, tile.state(), price(made[3], made[2], x, metric)
            tile.restore(state)
            assert count == len(best[0])
            codes[part, a:b], residual[part, a:b], outlier[part, a:b] = best[0], best[1], best[2] > 0
            grids[a, t] = tile
            if b < columns:
                d = x - best[3]
                current[part, b:] += d @ full[a:b, b:] @ torch.linalg.inv(full[b:, b:])

    def decoded() -> Tensor:
        result = torch.zeros_like(w)
        for (a, t), tile in grids.items():
            part, span = slice(t, min(t + TILE, rows)), slice(a, a + size)
            s, z = torch.tensor(tile.scales).unsqueeze(1), torch.tensor(tile.zeros).unsqueeze(1)
            result[part, span] = (codes[part, span] - z) * s + residual[part, span]
        return result

    for _ in range(refinements):
        for (a, t), tile in grids.items():
            part, span = slice(t, min(t + TILE, rows)), slice(a, a + size)
            free = (~outlier[part, span]).double()
            delta = (w - decoded())[part]
            s, z = torch.tensor(tile.scales).unsqueeze(1), torch.tensor(tile.zeros).unsqueeze(1)
            outside = delta.clone()
            outside[:, span] = 0
            beside = delta[:, span] + free * (codes[part, span] - z) * s
            held = decoded()[part, span] * (1 - free)  # outliers stay where they are while the grid moves below them
            tile.improve(codes[part, span], free, full[span, span], beside, outside @ full[:, span])
            s, z = torch.tensor(tile.scales).unsqueeze(1), torch.tensor(tile.zeros).unsqueeze(1)
            residual[part, span] = (held - (codes[part, span] - z) * s) * (1 - free)
            for j in range(a, a + size):
                others = (w - decoded())[part]
                others[:, j] = 0
                goal = w[part, j] + others @ full[:, j] / full[j, j]
                codes[part, j] = torch.clamp(torch.round(goal / s[:, 0] + z[:, 0]), 0, top)
                residual[part, j] = bfloat16(goal - (codes[part, j] - z[:, 0]) * s[:, 0]) * outlier[part, j]
    back = [place.index(c) for c in range(columns)]
    return codes[:, back], (outlier & (residual != 0))[:, back], decoded()[:, back]


def mask(weight: CompressedWeight) -> Tensor:
    if weight.outliers is None:
        return torch.zeros(weight.shape, dtype=torch.bool)
    return weight.outliers.dequantize() != 0


def assert_equals_the_reference(weight: Tensor, hessian: Tensor, **options: Any) -> CompressedWeight:
    made = spqr(weight, hessian, **options).weight
    codes, outliers, decoded = reference(weight, hessian, **options)
    assert isinstance(made.base, TwoLevel)
    assert torch.equal(made.base.codes.double(), codes)
    assert torch.equal(mask(made), outliers)
    # Products are rounded to float32, and so is the sum with an outlier.
    torch.testing.assert_close(made.dequantize().double(), decoded, rtol=3e-7, atol=1e-9)
    return made


COMMON: dict[str, Any] = {"group_size": 8, "scale_bits": 3, "zero_bits": 2, "outlier_threshold": 0.5, "refinements": 0}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_equals_the_reference_code_for_code(bits: int, order: Order) -> None:
    weight, hessian = problem(seed=bits)
    options = {**COMMON, "bits": bits, "order": order, "outlier_threshold": 0.5 if bits < 4 else 0.05 if bits == 4 else 1e-4}
    made = assert_equals_the_reference(weight, hessian, **options)
    assert 0 < outlier_count(made) < 200


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_refinement_equals_the_reference_code_for_code(order: Order, threshold: float | None) -> None:
    weight, hessian = problem(seed=3)
    options = {**COMMON, "bits": 3, "order": order, "outlier_threshold": threshold, "refinements": 2}
    assert_equals_the_reference(weight, hessian, **options)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_any_number_of_rows(rows: int) -> None:
    weight, hessian = problem(rows=rows, columns=16, seed=rows)
    options = {**COMMON, "bits": 3, "order": "grouped", "refinements": 1}
    made = assert_equals_the_reference(weight, hessian, **options)
    assert isinstance(made.base, TwoLevel)
    assert made.base.scale_top.shape == (tiles(rows), 2) == (math.ceil(rows / 16), 2)


@law
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 16),
    bits=st.integers(1, 8),
    limit=st.sampled_from([1e-7, 1e-4, 0.01, 0.3]),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_leaving_out_the_ends_of_the_range_says_it_of_all(
    rows: int, size: int, bits: int, limit: float, ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    weight[0] *= 5
    if ties:
        weight = weight.mul(2).round()
        weight[-1] = 1.0
    cost = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    found = likely_outliers(weight, cost, bits, limit)
    assert found.tolist() == [leave_one_out(row.tolist(), cost.tolist(), bits, limit) for row in weight]


# ---------------------------------------------------------------------------------------------------- two levels


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


# ---------------------------------------------------------------------------------------------------- outliers


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


# ---------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(("shape", "order", "more"), [((64, 256), "grouped", 0.4), ((40, 320), "desc_act", 1.5)])
def test_a_number_of_bits_is_met_and_never_exceeded(shape: tuple[int, int], order: Order, more: float) -> None:
    weight, hessian = problem(*shape, tokens=400, far=100)
    weight, hessian = weight.float(), hessian.float()
    grid = METHOD(order=order).predicted_bits(shape, 0.0)
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
    grid = METHOD().predicted_bits((64, 64), 0.0)
    for more in (0.0, 0.4, 32 * 65 / 4096 + 20 / 4096):
        made = METHOD(target_bits=grid + more)
        result = spqr(weight, hessian, target_bits=grid + more)
        assert result.weight.outliers is None
        assert result.notes["threshold"] is None
        assert made.stored_bits((64, 64)) == result.weight.stored_bits
    one = METHOD(target_bits=grid + (32 * 65 + 24) / 4096)
    assert one.room((64, 64)) == 1
    assert one.stored_bits((64, 64)) is None
    assert outlier_count(spqr(weight, hessian, target_bits=one.target_bits).weight) <= 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(20, 64), (33, 512)])
def test_stored_bits_are_predicted(shape: tuple[int, int], order: Order) -> None:
    weight, hessian = problem(*shape)
    for options in ({}, {"bits": 2, "scale_bits": 5, "zero_bits": 3, "group_size": 32}, {"group_size": -1}):
        made = METHOD(order=order, **options)
        assert made.stored_bits(shape) is None
        result = spqr(weight, hessian, order=order, refinements=0, **options)
        share = outlier_count(result.weight) / weight.numel()
        assert share > 0
        assert made.predicted_bits(shape, share) == pytest.approx(result.weight.bits_per_weight, rel=1e-12)
        without = METHOD(order=order, outlier_threshold=None, **options)
        exact = spqr(weight, hessian, order=order, refinements=0, outlier_threshold=None, **options).weight.stored_bits
        assert without.stored_bits(shape) == exact


# ---------------------------------------------------------------------------------------------------- better than what


def damped(hessian: Tensor) -> Tensor:
    hessian = hessian / hessian.diagonal().mean()
    return hessian + 0.01 * torch.eye(len(hessian), dtype=hessian.dtype)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_refinement_lowers_the_damped_loss(threshold: float | None) -> None:
    for seed, bits in itertools.product(range(4), (2, 3)):
        weight, hessian = problem(seed=seed)
        options: dict[str, Any] = {"bits": bits, "group_size": 8, "outlier_threshold": threshold}
        found = [spqr(weight, hessian, refinements=n, **options).weight for n in (0, 1, 2, 5)]
        losses = [loss(weight, made.dequantize(), damped(hessian)) for made in found]
        # An outlier is rounded to bfloat16 again whenever the grid below it moves.
        assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(losses))
        assert losses[-1] < losses[0]


def test_the_group_aware_order_beats_the_natural_one() -> None:
    means = dict.fromkeys(ORDERS[:2], 0.0)
    for seed in range(8):
        weight, hessian = problem(rows=32, columns=128, tokens=600, seed=seed)
        for order in means:
            made = spqr(weight, hessian, bits=3, order=order, outlier_threshold=None, refinements=1).weight
            means[order] += math.log(loss(weight, made.dequantize(), hessian))
    assert means["grouped"] < means["none"] - 8 * 0.05


def test_it_beats_gptq_in_fewer_bits_where_a_few_weights_are_far_out() -> None:
    ratio = 0.0
    for seed in range(2):
        weight, hessian = problem(rows=64, columns=256, tokens=1000, seed=seed, far=80)
        plain = gptq(weight, hessian, bits=3, group_size=16, symmetric=False).weight
        made = spqr(weight, hessian, target_bits=4.18, refinements=2).weight
        assert made.stored_bits < plain.stored_bits
        ratio += math.log(loss(weight, made.dequantize(), hessian) / loss(weight, plain.dequantize(), hessian)) / 2
    assert ratio < math.log(0.9)


# ---------------------------------------------------------------------------------------------------- bad Hessians


def test_no_tokens_counts_every_weight_alike() -> None:
    weight = problem()[0].float()
    result = spqr(weight, torch.zeros(32, 32), group_size=8, outlier_threshold=0.3)
    assert result.notes["fallback"] == "rtn: no token was seen"
    assert result.notes["dead_columns"] == 32
    assert outlier_count(result.weight) > 0
    same = spqr(weight, torch.eye(32), group_size=8, outlier_threshold=0.3, order="none", refinements=0, damp=0.0)
    assert torch.equal(result.weight.dequantize(), same.weight.dequantize())


def test_a_hessian_that_cannot_be_factored_counts_every_weight_alike() -> None:
    weight, hessian = problem()
    hessian[0, 1] = hessian[1, 0] = 100 * hessian.diagonal().sum()
    result = spqr(weight, hessian, group_size=8)
    assert result.notes["fallback"] == "rtn: the Hessian is not positive definite with damp 10"
    assert json.loads(json.dumps(result.notes)) == result.notes
    raised = spqr(weight, torch.ones(32, 32).double(), group_size=8, damp=0.0)
    assert raised.notes["fallback"] == "damp raised to 0.0001"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    weight, hessian = problem()
    hessian[2, 3] = value
    with pytest.raises(CalibrationError, match="not finite"):
        spqr(weight, hessian, group_size=8)


@pytest.mark.parametrize("order", ORDERS)
def test_scaling_the_hessian_or_the_weight_by_a_power_of_two_changes_no_code(order: Order) -> None:
    weight, hessian = problem()
    options: dict[str, Any] = {"group_size": 8, "order": order, "outlier_threshold": 0.3}
    first = spqr(weight, hessian, **options).weight.dequantize()
    for factor in (2.0**-40, 2.0**-3, 2.0**30):
        assert torch.equal(spqr(weight, hessian * factor, **options).weight.dequantize(), first)
    for factor in (2.0**-12, 2.0**20):
        assert torch.equal(spqr(weight * factor, hessian, **options).weight.dequantize(), first * factor)


def test_single_precision_gives_almost_the_same_codes() -> None:
    weight, hessian = problem(rows=64, columns=128, tokens=600)
    exact, single = spqr(weight, hessian).weight, spqr(weight.float(), hessian.float()).weight
    assert isinstance(exact.base, TwoLevel)
    assert isinstance(single.base, TwoLevel)
    assert (exact.base.codes == single.base.codes).double().mean() > 0.9
    assert math.isclose(loss(weight, single.dequantize(), hessian), loss(weight, exact.dequantize(), hessian), rel_tol=0.02)


def test_given_tensors_are_left_alone_and_precision_too() -> None:
    weight, hessian = problem()
    copies, precision = (weight.clone(), hessian.clone()), torch.get_float32_matmul_precision()
    for order in ORDERS:
        spqr(weight, hessian, group_size=8, order=order, target_bits=8)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])
    assert torch.get_float32_matmul_precision() == precision


# ---------------------------------------------------------------------------------------------------- options


def test_options() -> None:
    assert METHOD().model_dump() == {
        "bits": 3,
        "group_size": 16,
        "scale_bits": 4,
        "zero_bits": 2,
        "outlier_threshold": 1.0,
        "target_bits": None,
        "order": "grouped",
        "damp": 0.01,
        "refinements": 4,
    }
    refused: list[dict[str, Any]] = [
        {"bits": 0},
        {"bits": 9},
        {"group_size": -2},
        {"scale_bits": 1},
        {"zero_bits": 9},
        {"outlier_threshold": 0},
        {"outlier_threshold": math.inf},
        {"target_bits": 0},
        {"target_bits": 33},
        {"order": "static"},
        {"damp": -0.1},
        {"refinements": -1},
        {"nonsense": 1},
    ]
    for wrong in refused:
        with pytest.raises(ValidationError):
            METHOD(**wrong)
    assert METHOD.needs == (Hessian,)
    assert not METHOD.rows_independent
    assert METHOD().check((8, 96)) is None
    assert "group_size=40" in (METHOD(group_size=40).check((8, 96)) or "")
    complaint = METHOD(target_bits=3.4).check((256, 256))
    assert complaint is not None
    assert "target_bits=3.4 is less than the 3.5312 of the grid alone" in complaint
    assert METHOD(target_bits=3.5313).check((256, 256)) is None


def test_the_method_is_the_function_on_the_mean_hessian() -> None:
    weight = torch.randn(18, 64, generator=torch.Generator().manual_seed(0))
    statistic = Hessian(64, torch.device("cpu"))
    statistic.add(torch.randn(100, 64, generator=torch.Generator().manual_seed(1)))
    options: dict[str, Any] = {"bits": 2, "group_size": 32, "scale_bits": 5, "zero_bits": 3, "refinements": 1, "damp": 0.1}
    for more in ({"outlier_threshold": 0.2, "order": "desc_act"}, {"target_bits": 4.0}):
        made = METHOD(**options, **more)(weight, {Hessian: statistic}).weight
        assert torch.equal(made.dequantize(), spqr(weight, statistic.matrix(), **options, **more).weight.dequantize())


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_returned_is_what_is_stored(order: Order) -> None:
    weight, hessian = problem(rows=50, columns=64)
    made = spqr(weight, hessian, order=order, outlier_threshold=0.3).weight
    tensors, spec = packing.pack(made)
    assert set(tensors) >= {"codes", "scale_code", "outliers_pointers", "outliers_columns", "outliers_values"}
    back = packing.unpack(json.loads(json.dumps(spec)), tensors)
    assert torch.equal(back.dequantize(), made.dequantize())
    assert isinstance(back.outliers, Sparse)
    for start, stop in ((0, 50), (32, 50), (0, 32), (32, 33)):
        assert torch.equal(packing.unpack_rows(spec, tensors, start, stop).dequantize(), made.dequantize()[start:stop])
        assert torch.equal(made.rows(start, stop).dequantize(), made.dequantize()[start:stop])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_is_reloaded_as_it_was_stored(family: str, tiny: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    from runs import compress as run
    from runs import steps
    from tiny import VOCABULARY
    from transformers import AutoModelForCausalLM

    from compress.checkpoint.packed_source import PackedSource

    options = {"group_size": 16, "outlier_threshold": 0.1, "refinements": 1}
    summary = run(tiny(family), tmp_path / "out", ids, steps("quant/spqr", **options))
    source = PackedSource.open_packed(tmp_path / "out")
    weights = {site: source.compressed(site) for site in source.table}
    assert any(weight.outliers is not None for weight in weights.values())
    stored = sum(entry.nbytes for entry in source.packed.values()) * 8
    assert stored == sum(weight.stored_bits for weight in weights.values())
    numbers = sum(weight.shape[0] * weight.shape[1] for weight in weights.values())
    assert summary.values["bits_per_compressed_weight"] == pytest.approx(stored / numbers)

    probe = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))

    def logits(folder: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            result: Tensor = model(probe, use_cache=False).logits
        again = folder.parent / f"{folder.name}-again"
        if not again.exists() and not folder.name.endswith("again"):
            model.save_pretrained(again)
        return result

    first = logits(tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out-again"), first)
