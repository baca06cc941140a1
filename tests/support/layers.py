"""Layers as pruning meets them: correlated inputs of which some channels are loud."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.calibration.statistics import Statistics
from compress.prune._select import Within


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
