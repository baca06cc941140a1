"""Blocks as methods see them, made of a few tensors: `compress.method.Block` without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.calibration.statistics import Statistics, Stats
from compress.methods.method import Result
from compress.weights.weight import CompressedWeight

Forward = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


class SmallBlock:
    """A block with these weights (out, in), other tensors, batches that enter it, and a function that is its forward pass."""

    first = 0

    def __init__(
        self,
        weights: dict[str, Tensor],
        batches: Sequence[Tensor],
        forward: Forward,
        rows: Callable[[str, Tensor], Tensor],  # site and batch -> what the site reads (tokens, in)
        others: dict[str, Tensor] | None = None,
        stored_as: torch.dtype = torch.bfloat16,
    ) -> None:
        self._weights, self._others, self._forward, self._rows = weights, others or {}, forward, rows
        self._batches, self._stored_as = list(batches), stored_as
        self.sites = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
        self.batches = self.total_batches = len(self._batches)
        self._targets = [self.run(batch, {}) for batch in self._batches]
        self.runs = 0
        self.said: list[float] = []

    def weight(self, site: str) -> Tensor:
        return self._weights[site]

    def others(self) -> dict[str, Tensor]:
        return dict(self._others)

    def stored(self, name: str, value: Tensor) -> Tensor:
        return value.to(self._stored_as).to(value.dtype)

    def observe(self, kinds: Sequence[type[Statistics]]) -> dict[str, Stats]:
        found: dict[str, Stats] = {}
        for site, (_, columns) in self.sites.items():
            found[site] = {kind: kind(columns, torch.device("cpu")) for kind in kinds}
            for batch in self._batches:
                for statistic in found[site].values():
                    statistic.add(self._rows(site, batch))
        return found

    def inputs(self, batch: int) -> Tensor:
        return self._batches[batch]

    def targets(self, batch: int) -> Tensor:
        return self._targets[batch]

    def run(self, hidden: Tensor, weights: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None) -> Tensor:
        self.runs = getattr(self, "runs", 0) + 1
        return self._forward(hidden, {**self._weights, **weights}, {**self._others, **(others or {})})

    def total(self, values: Tensor) -> Tensor:
        return values

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(7)

    def say(self, share: float) -> None:
        self.said.append(share)


def linear_block(weight: Tensor, rows: Tensor, per_batch: int = 50) -> SmallBlock:
    """One linear of this weight (out, in) that reads rows (tokens, in)."""
    batches = [part.unsqueeze(0) for part in rows.split(per_batch)] if len(rows) else []
    return SmallBlock({"w": weight}, batches, lambda hidden, weights, _: hidden @ weights["w"].T, lambda _, batch: batch[0])


def mixing_block(seed: int = 0, width: int = 32, inner: int = 64, batches: int = 4, tokens: int = 64) -> SmallBlock:
    """A normed residual block of two linears with a bias, whose inputs are correlated and differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {"up": normal(inner, width) * width**-0.5, "down": normal(width, inner) * inner**-0.5}
    others = {"norm.weight": 1 + 0.2 * normal(width), "down.bias": 0.1 * normal(width)}
    others = {name: value.bfloat16().float() for name, value in others.items()}
    mix = (torch.eye(width) + 0.4 * normal(width, width)) * normal(width).exp()

    def up(hidden: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        return hidden / hidden.square().mean(-1, keepdim=True).add(1e-6).sqrt() * others["norm.weight"]

    def forward(hidden: Tensor, weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
        middle = torch.nn.functional.silu(up(hidden, others) @ weights["up"].T)
        return hidden + middle @ weights["down"].T + others["down.bias"]

    def rows(site: str, batch: Tensor) -> Tensor:
        read = up(batch, others)
        return (read if site == "up" else torch.nn.functional.silu(read @ weights["up"].T)).flatten(0, 1)

    return SmallBlock(weights, [normal(2, tokens // 2, width) @ mix for _ in range(batches)], forward, rows, others)


def call(method: Any, weight: Tensor, rows: Tensor, stats: Stats) -> Result:
    """Compress weight (out, in) with a method of either scope, given its inputs (tokens, in) and statistics of them."""
    if method.scope == "site":
        result: Result = method(weight, stats)
        return result
    found: Result = method(linear_block(weight, rows))["w"]
    return found


def dequantized(weights: Mapping[str, CompressedWeight]) -> dict[str, Tensor]:
    return {name: weight.dequantize() for name, weight in weights.items()}
