"""What reaches the linears of a block: one accumulator per tap and kind of statistic, in as many passes as the memory takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.statistics import Statistics, Stats


@dataclass(frozen=True)
class Tap:
    """A tensor that linears read, and what is to be known of its rows."""

    name: str
    modules: tuple[nn.Module, ...]  # those whose input is watched: one for a tap, all experts' for a pooled one
    columns: int
    kinds: tuple[type[Statistics], ...]

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


def batches(count: int, length: int, tokens: int) -> Iterator[range]:
    """Cut `count` samples of `length` tokens into batches of at most `tokens` tokens; the same however many ranks there are."""
    size = max(1, tokens // length)
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
