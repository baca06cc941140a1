"""Statistics of the inputs of a block's linears: one accumulator per tap and kind, in as many passes as memory requires."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.statistics import Drift, Statistics, Stats


@dataclass(frozen=True)
class Tap:
    """A tensor that linears read, and the statistics to take of its rows."""

    name: str
    modules: tuple[nn.Module, ...]  # modules whose input is observed: one, or all experts' for a pooled tap
    columns: int
    kinds: tuple[type[Statistics], ...]
    pooled: tuple[str, ...] = ()  # names of the taps that a pooled tap sums

    @property
    def nbytes(self) -> int:
        """Bytes of its accumulators."""
        return sum(kind.nbytes(self.columns) for kind in self.kinds)


def passes(taps: Sequence[Tap], budget: int) -> list[list[Tap]]:
    """Split taps, in order, into passes whose accumulators fit `budget` bytes; a tap that alone exceeds it gets its own pass."""
    result: list[list[Tap]] = []
    left = 0
    for tap in taps:
        if not result or tap.nbytes > left:
            result.append([])
            left = budget
        result[-1].append(tap)
        left -= tap.nbytes
    return result


def observe(taps: Iterable[Tap], run: Callable[[], None], device: torch.device) -> dict[str, Stats]:
    """Return the statistics of each tap over everything that `run` sends through the modules."""
    collected: dict[str, Stats] = {}
    handles = []
    for tap in taps:
        stats: Stats = {kind: kind(tap.columns, device) for kind in tap.kinds}
        collected[tap.name] = stats
        handles += [module.register_forward_pre_hook(_adder(stats)) for module in tap.modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return collected


def _adder(stats: Stats) -> Callable[[nn.Module, Any], None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        for statistic in stats.values():
            statistic.add(rows)

    return add


def observe_drift(
    taps: Iterable[Tap], routed: Sequence[nn.Module], run: Callable[[], Iterator[bool]], device: torch.device
) -> dict[str, Drift]:
    """Return how the inputs of each tap differ between two passes of every batch.

    `run` makes the forward passes and yields before each: False before a batch's pass after the compressed blocks, then True
    before its pass in the original model. `routed` modules (hidden, index, weights) send tokens to experts; the second pass
    uses the routes of the first, so that an expert's rows are of the same tokens in both.
    """
    collected = {tap.name: Drift(tap.columns, device) for tap in taps}
    rows: dict[str, Tensor] = {}
    routes: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    second = False

    def pair(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = args[0].flatten(0, -2)
            if second:
                collected[name].add_pair(rows.pop(name), seen)
            else:
                rows[name] = seen

        return hook

    def route(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, index, weights = inspect.signature(module.forward).bind(*args, **named).args
        if not second:
            routes[module] = index, weights
        return (hidden, *routes[module]), {}

    handles = [module.register_forward_pre_hook(pair(tap.name)) for tap in taps for module in tap.modules]
    handles += [module.register_forward_pre_hook(route, with_kwargs=True) for module in routed]
    try:
        for second in run():  # noqa: B007, the hooks read it
            pass
    finally:
        for handle in handles:
            handle.remove()
    return collected


def batches(count: int, length: int, tokens: int) -> Iterator[range]:
    """Cut `count` samples of `length` tokens into batches of at most `tokens` tokens, whatever the number of ranks."""
    size = max(1, tokens // length)
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
