"""Layers as pruning meets them: correlated inputs of which some channels are loud."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.calibration.statistics import Statistics
from compress.methods.solvers.mask_selection import Within


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated rows (tokens, columns) whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    size = torch.exp(0.7 * torch.randn(columns, generator=generator))
    size[torch.randperm(columns, generator=generator)[: max(1, columns // 32)]] *= 8
    return torch.randn(tokens, columns, generator=generator) @ mix * size


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A random weight (out, in)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def any_inputs(rows: Tensor) -> dict[str, Tensor]:
    """Calibration rows (tokens, 64 or more columns) as they are, and all that may come instead."""
    silent = rows.clone()
    silent[:, [0, 7, 40]] = 0
    return {
        "correlated": rows,
        "no token": rows[:0],
        "one token": rows[:1],
        "columns that are always zero": silent,
        "all zero": torch.zeros_like(rows[:50]),
        "constant": torch.ones_like(rows[:50]),
        "huge": rows * 1e12,
        "tiny": rows * 1e-15,
        "one channel far above the others": torch.cat([rows[:, :1] * 1e6, rows[:, 1:]], 1),
    }


def any_weights(weight: Tensor) -> dict[str, Tensor]:
    """A weight (out, in) as it is, and all that may come instead."""
    return {
        "random": weight,
        "zero": torch.zeros_like(weight),
        "constant": torch.full_like(weight, -0.3),
        "one row of zeros": torch.cat([torch.zeros_like(weight[:1]), weight[1:]]),
        "one outlier": torch.cat([torch.full_like(weight[:, :1], 30.0), weight[:, 1:]], 1),
        "positive": weight.abs(),
        "tiny": weight * 1e-30,
    }


def observed(rows: Tensor, needs: Iterable[Any]) -> dict[type[Statistics], Statistics]:
    """What a method needs to know of inputs (tokens, in)."""
    found: dict[type[Statistics], Statistics] = {}
    for need in needs:
        found[need] = need(rows.shape[1], torch.device("cpu"))
        found[need].add(rows)
    return found


def hessian_of(rows: Tensor) -> Tensor:
    """The mean of x x^T (in, in) in float64."""
    return rows.double().T @ rows.double() / len(rows)


def relative(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """E(V) / E(0)."""
    delta, whole = (weight - values).double(), weight.double()
    return float(((delta @ hessian.double()) * delta).sum() / ((whole @ hessian.double()) * whole).sum())


def slowly_selected(score: Tensor, sparsity: float, group: int, within: Within) -> Tensor:
    """One competition after another, sorted in Python: lowest score first, of equal ones the last."""
    rows, columns = score.shape
    keep = torch.ones(rows, columns, dtype=torch.bool)

    def due(count: int) -> int:
        return round(sparsity * count) if within == "matrix" else math.floor(sparsity * count + 1e-6)

    units = [
        (math.sqrt(sum(float(score[r, c + i]) ** 2 for i in range(group))) if group > 1 else float(score[r, c]), r, c)
        for r in range(rows)
        for c in range(0, columns, group)
    ]
    for some in [units] if within == "matrix" else [[u for u in units if u[1] == r] for r in range(rows)]:
        for _, r, c in sorted(some, key=lambda unit: (unit[0], -unit[1], -unit[2]))[: due(len(some))]:
            keep[r, c : c + group] = False
    return keep
