"""SliM, slowly: columns eliminated from the explicit inverse Hessian, from the equations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from options import function_of
from problems import damped, problem
from torch import Tensor

from compress.methods.solvers.uniform_grid import fit
from compress.weights.mixed import Mixed

slim = function_of("quant/slim")


def part(result: Any) -> Mixed:
    base = result.weight.base
    assert isinstance(base, Mixed)
    return base


def widths(result: Any) -> list[int]:
    found: list[int] = part(result).widths.tolist()
    return found


def in_turn(hessian: Tensor, order: str) -> Tensor:
    """The column processed at each step."""
    if order == "groups":
        return torch.arange(len(hessian))
    return torch.sort(hessian.diagonal(), descending=True, stable=True).indices


def remaining(full: Tensor, turn: Tensor) -> list[Tensor]:
    """For each step, the inverse of H over the columns that are still to be rounded."""
    return [torch.linalg.inv(full[turn[k:]][:, turn[k:]]) for k in torch.arange(len(turn)).tolist()]


def price(full: Tensor, turn: Tensor) -> Tensor:
    """What a unit error of each column costs once all later columns have moved (in,)."""
    cost = torch.empty(len(turn), dtype=torch.float64)
    for k, inverse in enumerate(remaining(full, turn)):
        cost[turn[k]] = 1 / inverse[0, 0]
    return cost


def rounded(value: float, scale: float, zero: float, bits: int) -> float:
    """The code nearest to a number."""
    code = math.floor(value / scale) + 1 if zero == 0.5 else round(value / scale) + zero
    return min(max(code, 0), 2**bits - 1)


def grid_of(block: Tensor, bits: int, symmetric: bool, range_: str, cost: Tensor, emphasis: float) -> tuple[Tensor, Tensor]:
    """Scale and zero (out,) of one group (out, group size)."""
    symmetric = symmetric or bits == 1
    grid = fit(block, bits, -1, symmetric=symmetric, search=range_ == "mse", importance=cost)
    middle = 0.5 if bits == 1 else 2.0 ** (bits - 1)
    zero = torch.full((len(block),), middle, dtype=torch.float64) if grid.zero is None else grid.zero[:, 0].double()
    scale = grid.scale[:, 0].double()
    if range_ == "salience":
        salient = block.square() * cost
        limit = salient.mean() + 2 * salient.std(correction=0)
        for row in torch.arange(len(block)).tolist():
            start = float((2 * block[row].abs().mean()).to(torch.bfloat16)) if bits == 1 else float(scale[row])
            least = math.inf
            for step in [0, *range(1, 51), *range(-1, -51, -1)]:
                tried = float(torch.tensor(start * (1 + 0.1 * step / 50)).double().to(torch.bfloat16))
                error = 0.0
                for column in torch.arange(block.shape[1]).tolist():
                    value = float(block[row, column])
                    point = (rounded(value, tried, float(zero[row]), bits) - float(zero[row])) * tried
                    error += (emphasis if salient[row, column] > limit else 1.0) * abs(value - point) ** 2.4
                if error < least * (1 - 1e-12):
                    least, scale[row] = error, tried
    return scale, zero


def on_grid(block: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest points of one group."""
    result = torch.empty_like(block)
    for row, column in itertools.product(range(block.shape[0]), range(block.shape[1])):
        s, z = float(scale[row]), float(zero[row])
        result[row, column] = (rounded(float(block[row, column]), s, z, bits) - z) * s
    return result


def reference(weight: Tensor, hessian: Tensor, **o: Any) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
    """Return codes (out, in), scale and zero (out, groups), widths, and the group of each column (in,)."""
    columns, size = weight.shape[1], o["group_size"]
    groups = columns // size
    place = torch.arange(columns)
    if o["grouping"] == "salience":
        cost = price(damped(hessian), in_turn(hessian, o["order"]))
        place = torch.sort(weight.square().sum(0) * cost, descending=True, stable=True).indices
        weight, hessian = weight[:, place], hessian[place][:, place]
    full, turn = damped(hessian), in_turn(hessian, o["order"])
    cost = price(full, turn)
    spans = [slice(g * size, (g + 1) * size) for g in torch.arange(groups).tolist()]

    def fitted(block: Tensor, g: int, bits: int) -> tuple[Tensor, Tensor]:
        return grid_of(block, bits, o["symmetric"], o["range"], cost[spans[g]], o["salience_weight"])

    def error(chosen: list[int]) -> Tensor:
        """What plain rounding of the original weight to these widths leaves."""
        done = [on_grid(weight[:, spans[g]], *fitted(weight[:, spans[g]], g, b), b) for g, b in enumerate(chosen)]
        return weight - torch.cat(done, 1)

    if o["allocation"] == "free":
        low, high = max(1, math.floor(o["bits"]) - o["spread"]), min(8, math.ceil(o["bits"]) + o["spread"])
        lost = {b: (error([b] * groups).square().sum(0) * cost).view(groups, size).sum(1) for b in range(low, high + 1)}
        total = math.floor(o["bits"] * groups)
        some = [c for c in itertools.product(range(low, high + 1), repeat=groups) if sum(c) == total]
        chosen = list(min(some, key=lambda c: sum(float(lost[b][g]) for g, b in enumerate(c))))
    else:
        bits = o["bits"]
        salient = [float((weight[:, s].square() * cost[s]).sum()) for s in spans]
        by_salience = sorted(range(groups), key=lambda g: salient[g])
        candidates = []
        for i in range(groups // 2):
            candidate = [bits] * groups
            for g in by_salience[:i]:
                candidate[g] -= 1
            for g in by_salience[groups - i :]:
                candidate[g] += 1
            candidates.append(candidate)
        candidates = candidates if 1 < bits < 8 else []
        chosen = min(
            candidates or [[bits] * groups], key=lambda c: float(((error(c) @ full) * error(c)).sum()) if candidates else 0.0
        )

    scale = torch.empty(len(weight), groups, dtype=torch.float64)
    zero = torch.empty_like(scale)
    for g, span in enumerate(spans):
        scale[:, g], zero[:, g] = fitted(weight[:, span], g, chosen[g])
    left = remaining(full, turn)
    current, codes = weight.clone(), torch.empty_like(weight)
    for k, column in enumerate(turn.tolist()):
        g = column // size
        if o["order"] == "groups" and column % size == 0:
            scale[:, g], zero[:, g] = fitted(current[:, spans[g]], g, chosen[g])
        for row in torch.arange(len(weight)).tolist():
            codes[row, column] = rounded(float(current[row, column]), float(scale[row, g]), float(zero[row, g]), chosen[g])
        miss = (current[:, column] - (codes[:, column] - zero[:, g]) * scale[:, g]) / left[k][0, 0]
        current[:, turn[k:]] -= torch.outer(miss, left[k][0])
    of_column = torch.arange(columns) // size
    for _ in range(o["refinements"]):
        descend(weight, full, codes, scale, zero, chosen, of_column)
    back = torch.argsort(place)
    return codes[:, back], scale, zero, chosen, of_column[back]


def descend(
    weight: Tensor, full: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, chosen: list[int], of_column: Tensor
) -> None:
    """One pass of coordinate descent on tr(D H D^T), every step from the whole of D."""

    def delta() -> Tensor:
        return weight - (codes - zero[:, of_column]) * scale[:, of_column]

    for g, bits in enumerate(chosen):
        inside = of_column == g
        step = (codes - zero[:, of_column]) * inside
        change = (step @ full * delta()).sum(1) / (step @ full * step).sum(1)
        scale[:, g] = (scale[:, g] + change.nan_to_num()).to(torch.bfloat16).double()
        for column in inside.nonzero()[:, 0].tolist():
            others = delta()
            others[:, column] = 0
            wanted = weight[:, column] + others @ full[:, column] / full[column, column]
            for row in torch.arange(len(weight)).tolist():
                codes[row, column] = rounded(float(wanted[row]), float(scale[row, g]), float(zero[row, g]), bits)


def check(seed: int, rows: int = 6, columns: int = 32, **options: Any) -> list[int]:
    weight, hessian = problem(rows, columns, seed=seed)
    values: dict[str, Any] = {
        "bits": 2,
        "group_size": 8,
        "symmetric": True,
        "allocation": "free",
        "spread": 1,
        "grouping": "salience",
        "range": "mse",
        "salience_weight": 1.0,
        "order": "groups",
        "refinements": 0,
    } | options
    codes, scale, zero, chosen, of_column = reference(weight, hessian, **values)
    base = part(slim(weight, hessian, **values, block=7))
    assert base.widths.tolist() == chosen, values
    assert torch.equal(base.scale.double(), scale), values
    assert torch.equal(base.codes.double(), codes), values
    assert (base.group is None) == (values["grouping"] == "neighbours")
    if base.group is not None:
        assert torch.equal(base.group.long(), of_column)
    assert (base.zero is None) == values["symmetric"]
    if base.zero is not None:
        assert torch.equal(base.zero.double(), zero * (base.widths > 1))
    torch.testing.assert_close(base.dequantize().double(), (codes - zero[:, of_column]) * scale[:, of_column], rtol=0, atol=0)
    return chosen
