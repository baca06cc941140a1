"""How much each weight gives up of one budget of sparsity: by a common threshold, or by the outliers of its block.

global    one threshold over the magnitudes of all weights (essential sparsity, arXiv 2306.03805). What is above `MOST` of a
          matrix stays, and the others make up for it. Magnitudes are counted by their bits: of floats without a sign these are in
          the order of the values, so that the threshold is exact in the upper 16 bits; within the last bin all matrices give up
          the same share.
owl       D_b, the share of |W| sqrt(mean x^2) of a block that is above `OUTLIERS` times its mean; the more outliers, the denser
          (Yin et al., arXiv 2310.05175): density_b = 1 - s + r_b - mean r, r_b = 2 SPREAD (D_b - min D) / (max D - min D). The
          mean is over weights, so that the whole has the sparsity that was asked for, also where it is cut off at `MOST`.

What comes out is a sparsity per site, which a recipe holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.architecture.family import Site
from compress.blockwise.stream import Stream, slices
from compress.blockwise.units import choose, observed
from compress.blockwise.walk import walk
from compress.calibration.statistics import MeanSquare, Statistics, statistic
from compress.model.streamed import StreamedModel, Weights
from compress.planning.steps import fold
from compress.recipe.assignment import Assignment
from compress.runs.prepare import RunPlan
from compress.system.progress import Progress

MOST = 0.95  # of a matrix, that is given up
OUTLIERS = 5.0
SPREAD = 0.08
_DIGITS = 6  # of a sparsity by block


def by_magnitude(plan: RunPlan, sites: Sequence[Site], sparsity: float) -> dict[str, float]:
    """Return the sparsity of each site under one threshold over the magnitudes of all."""
    streamed = StreamedModel(plan.source, plan.inventory, plan.dtype, torch.device("cpu"))
    counts = {site.name: _histogram(streamed.weight(site)) for site in sites}
    limit = {site.name: int(MOST * site.numel) for site in sites}
    total = torch.stack(list(counts.values())).sum(0).cumsum(0)
    due = min(round(sparsity * sum(site.numel for site in sites)), sum(limit.values()))
    taken: dict[str, int] = {}
    while True:  # a matrix at its limit leaves its share to the others
        left = due - sum(taken.values())
        last = int(torch.searchsorted(total, left))
        open_ = [name for name in counts if name not in taken]
        below = {name: int(counts[name][:last].sum()) for name in open_}
        share = _shared(
            left - sum(below.values()), {name: int(counts[name][last]) for name in open_} if last < len(total) else {}
        )
        found = {name: below[name] + share.get(name, 0) for name in open_}
        full = [name for name in open_ if found[name] > limit[name]]
        if not full:
            taken |= found
            break
        taken |= {name: limit[name] for name in full}
        rest = [counts[name] for name in counts if name not in taken]
        if not rest:
            break
        total = torch.stack(rest).sum(0).cumsum(0)
    return {site.name: taken[site.name] / site.numel for site in sites}


def _histogram(weight: Tensor) -> Tensor:
    """Count a weight's magnitudes by the upper 16 bits of their float32."""
    bits = weight.float().abs().contiguous().view(torch.int32) >> 16
    return torch.bincount(bits.flatten().long(), minlength=1 << 15)


def _shared(count: int, among: Mapping[str, int]) -> dict[str, int]:
    """Cut a count into whole parts in proportion to others, the remainder by their order."""
    total = sum(among.values())
    parts, before = {}, 0
    for name, size in among.items():
        after = before + size
        parts[name] = count * after // total - count * before // total if total else 0
        before = after
    return parts


@dataclass(frozen=True)
class _Observed:
    """Stands for the method of an assignment where only inputs are looked at."""

    needs: tuple[type[Statistics], ...] = (MeanSquare,)
    rows_independent: ClassVar[bool] = True


def by_outliers(
    plan: RunPlan, sites: Sequence[Site], ids: Tensor, sparsity: float, memory_budget: int, progress: Progress
) -> tuple[dict[str, float], list[float]]:
    """Return the sparsity of each site by the outliers of its block, and the share of outliers of every block."""
    streamed = StreamedModel(plan.source, plan.inventory, plan.dtype, plan.device)
    with streamed.embeddings_and_head():
        stream = Stream.begin(streamed, ids, slices(ids, plan.recipe.batch_tokens), "calibration", lazy=True)
    shares: dict[int, float] = {}

    def tell(block: int, step: str, share: float) -> None:
        progress(block, len(streamed.blocks), step, share)

    def score(block: int) -> Iterator[tuple[str, Weights]]:
        mine = [site for site in sites if site.block == block]
        if mine:
            shares[block] = outlier_share(_scores(streamed, block, mine, stream, memory_budget, partial(tell, block)))
        return iter(())

    walk(streamed, [stream], range(len(streamed.blocks)), score, tell)
    found = spread(shares, {b: sum(site.numel for site in sites if site.block == b) for b in shares}, sparsity)
    return {site.name: found[site.block] for site in sites if site.block is not None}, list(shares.values())


def _scores(
    streamed: StreamedModel,
    block: int,
    sites: Sequence[Site],
    stream: Stream,
    memory_budget: int,
    say: Callable[[str, float], None],
) -> list[Tensor]:
    """Run a filled block and return the scores of its weights; the stream keeps what comes out."""
    scores = []
    work = [Assignment(site, 0, _Observed(), None, 0) for site in sites]
    for unit, stats, pooled in observed(streamed, work, lambda: stream.peek(streamed, block), memory_budget, say):
        _, chosen, _ = choose(unit.assignments[0], stats, pooled)
        spread = statistic(chosen, MeanSquare).mean().cpu().sqrt()
        scores += [streamed.weight(a.site).float().abs() * spread for a in unit.assignments]
    return scores


def outlier_share(scores: Sequence[Tensor]) -> float:
    """Return the share of all scores that are more than `OUTLIERS` times their mean."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / count
    return sum(int((score > OUTLIERS * mean).sum()) for score in scores) / count


def spread(shares: Mapping[int, float], sizes: Mapping[int, int], sparsity: float) -> dict[int, float]:
    """Return the sparsity of each block, given its share of outliers and its number of weights; the mean is as asked."""
    low, high = min(shares.values()), max(shares.values())
    unit = 2 * SPREAD / (high - low) if high > low else 0.0
    offset = {b: -unit * (share - low) for b, share in shares.items()}
    total = sum(sizes.values())
    lower, upper = -1.0, 1.0 + 2 * SPREAD
    for _ in range(60):  # cut off at both ends, the mean is still a rising function of what is added to all
        middle = (lower + upper) / 2
        mean = sum(sizes[b] * min(max(middle + offset[b], 0.0), MOST) for b in shares) / total
        lower, upper = (middle, upper) if mean < sparsity else (lower, middle)
    return {b: round(min(max((lower + upper) / 2 + offset[b], 0.0), MOST), _DIGITS) for b in shares}


def steps_of(
    sparsities: Mapping[str, float], others: Sequence[str], method: str, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the steps of a recipe that gives each site its sparsity; `others` are sites that no step may take."""
    values = sorted(set(sparsities.values()))
    choices = {name: values.index(value) for name, value in sparsities.items()}
    return [
        {
            "match": patterns[0] if len(patterns) == 1 else patterns,
            "method": method,
            "options": {**options, "sparsity": values[c]},
        }
        for c, patterns in fold(choices, others)
    ]
