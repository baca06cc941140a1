"""SpQR, slowly: loops over rows and groups in float64, from the equations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from options import function_of
from torch import Tensor

from compress.methods.solvers.outliers import Order
from compress.methods.solvers.uniform_grid import fit
from compress.weights.sparse import Sparse
from compress.weights.two_level import TILE, TwoLevel
from compress.weights.weight import CompressedWeight

spqr = function_of("quant/spqr")

ORDERS: tuple[Order, ...] = ("grouped", "none", "desc_act")


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


def outlier_count(weight: CompressedWeight) -> int:
    assert weight.outliers is None or isinstance(weight.outliers, Sparse)
    return 0 if weight.outliers is None else weight.outliers.columns.shape[0]


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
