"""One block: which of its taps are watched, who compresses what, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress import distributed, memory
from compress.calibration.families import Site
from compress.calibration.observe import Tap, observe, passes
from compress.calibration.skeleton import Skeleton
from compress.calibration.statistics import Hessian, Statistics, Stats
from compress.errors import CalibrationError
from compress.method import Result
from compress.recipe import Assignment
from compress.report import SiteRow
from compress.weight import CompressedWeight, relative_error

Done = tuple[CompressedWeight, SiteRow]


@dataclass(frozen=True)
class Cache:
    """Where the statistics of some taps of a block are read from (None: they are not there) and kept."""

    holds: Callable[[list[Tap]], bool]
    read: Callable[[list[Tap]], dict[str, Stats] | None]
    write: Callable[[list[Tap], dict[str, Stats]], None]


@dataclass(frozen=True)
class Unit:
    """The sites of a block that read one tap: what one rank compresses with one set of statistics."""

    tap: str
    assignments: tuple[Assignment, ...]

    @property
    def kinds(self) -> tuple[type[Statistics], ...]:
        """The statistics that its methods need."""
        options = [o for a in self.assignments for o in (a.method, a.fallback) if o is not None]
        return tuple(dict.fromkeys(kind for o in options for kind in o.needs))

    @property
    def columns(self) -> int:
        """Input features."""
        return int(self.assignments[0].site.shape[1])

    @property
    def cost(self) -> float:
        """Work, up to a factor: factoring the Hessian and sweeping the rows."""
        rows = sum(int(a.site.shape[0]) for a in self.assignments)
        return float(self.columns**2 * (self.columns + rows))

    @property
    def pool(self) -> str | None:
        """Name of the tap that pools all experts of the block, when a site may need it."""
        site = self.assignments[0].site
        wanted = any(a.fallback is None and a.min_tokens > 0 for a in self.assignments)
        return (
            self.tap.replace(f".{site.expert}.", ".*.") if site.expert is not None and wanted and Hessian in self.kinds else None
        )


def units(assignments: Sequence[Assignment]) -> list[Unit]:
    """Group the assignments of one block by tap, in order."""
    by_tap: dict[str, list[Assignment]] = {}
    for assignment in assignments:
        by_tap.setdefault(assignment.site.tap, []).append(assignment)
    return [Unit(tap, tuple(members)) for tap, members in by_tap.items()]


def taps(skeleton: Skeleton, work: Sequence[Unit]) -> list[Tap]:
    """The taps to watch, pooled ones first, because every expert may need them."""
    pooled: dict[str, list[Unit]] = {}
    for unit in work:
        if unit.pool is not None:
            pooled.setdefault(unit.pool, []).append(unit)
    result = []
    for name, members in pooled.items():
        modules = tuple(skeleton.linear(unit.assignments[0].site) for unit in members)
        result.append(Tap(name, modules, members[0].columns, (Hessian,), tuple(unit.tap for unit in members)))
    for unit in work:
        if unit.kinds:
            result.append(Tap(unit.tap, (skeleton.linear(unit.assignments[0].site),), unit.columns, unit.kinds))
    return result


def _reduce(collected: dict[str, Stats], owners: dict[str, int]) -> None:
    """Add up the ranks' statistics: each tap's at its owner, pooled ones everywhere."""
    for tap, stats in collected.items():
        for statistic in stats.values():
            distributed.reduce_to(statistic.tensors(), owners.get(tap))
    counts = distributed.gather({tap: [s.tokens for s in stats.values()] for tap, stats in collected.items()})
    for tap, stats in collected.items():
        for index, statistic in enumerate(stats.values()):
            statistic.tokens = sum(count[tap][index] for count in counts)


def observed(
    skeleton: Skeleton,
    assignments: Sequence[Assignment],
    run: Callable[[], None],
    budget: int,
    listen: Callable[[str, float], None],
    cache: Cache | None = None,
) -> Iterator[tuple[Unit, Stats, Stats]]:
    """Yield the units of one filled block that are this rank's, each with its statistics and those pooled over experts.

    `run` sends the calibration through the block; it is called once per pass, and each pass's statistics fit `budget` bytes.
    """
    work = units(assignments)
    owner = dict(zip([u.tap for u in work], distributed.assign([u.cost for u in work], distributed.world()), strict=True))
    watched = taps(skeleton, work)
    pooled: dict[str, Stats] = {}
    left = {unit.tap: unit for unit in work}
    schedule = passes(watched, budget) or [[]]
    for number, group in enumerate(schedule):
        listen("calibrating", number / len(schedule))
        kept = cache.read(group) if cache is not None and group else None
        collected = kept if kept is not None else observe(group, run, skeleton.device) if group else {}
        _reduce(collected, owner)
        if cache is not None and group and kept is None:
            cache.write(group, collected)
        pooled |= {tap: stats for tap, stats in collected.items() if tap not in owner}
        ready = [tap for tap in collected if tap in owner] if number + 1 < len(schedule) else list(left)
        for index, tap in enumerate(ready):
            unit = left.pop(tap)
            if owner[tap] == distributed.rank():
                listen("compressing", index / len(ready))
                yield unit, collected.pop(tap, {}), pooled.get(unit.pool or "", {})


def compress_block(
    skeleton: Skeleton,
    assignments: Sequence[Assignment],
    run: Callable[[], None],
    budget: int,
    listen: Callable[[str, float], None],
    read: Callable[[Site], Tensor] | None = None,
    cache: Cache | None = None,
) -> Iterator[tuple[str, Done]]:
    """Compress the sites of one filled block that are this rank's, and yield each with its report row; see `observed`.

    `read` gives the weight (out, in) of a site in float32: the source's if None.
    """
    read = read or (lambda site: skeleton.weight(site).to(skeleton.device).float())
    for unit, stats, pooled in observed(skeleton, assignments, run, budget, listen, cache):
        memory.give_back()  # holes that the calibration or the last weight has left, before others are torn beside them
        yield from _compress_unit(read, unit, stats, pooled)


def choose(assignment: Assignment, stats: Stats, pooled: Stats) -> tuple[Any, Stats, str | None]:
    """The method and statistics for a site: the step's own, or the fallback where too few tokens were seen."""
    tokens = min((s.tokens for s in stats.values()), default=None)
    if tokens is None or tokens >= assignment.min_tokens:
        return assignment.method, stats, None
    few = f"{tokens} of {assignment.min_tokens} tokens"
    if assignment.fallback is not None:
        return assignment.fallback, stats, f"{assignment.fallback.path}: {few}"
    own, shared = stats.get(Hessian), pooled.get(Hessian)
    if isinstance(own, Hessian) and isinstance(shared, Hessian) and shared.tokens > 0:
        shrunk: Stats = {**stats, Hessian: own.shrunk(shared, float(assignment.site.shape[1]))}
        return assignment.method, shrunk, f"shrunk Hessian: {few}"
    return assignment.method, stats, None


def _compress_unit(read: Callable[[Site], Tensor], unit: Unit, stats: Stats, pooled: Stats) -> Iterator[tuple[str, Done]]:
    """Compress the sites of one tap: those of one step in one call where the method treats rows independently."""
    by_step: dict[int, list[Assignment]] = {}
    for position, assignment in enumerate(unit.assignments):
        joined = assignment.method.rows_independent and (assignment.fallback is None or assignment.fallback.rows_independent)
        by_step.setdefault(assignment.step if joined else -1 - position, []).append(assignment)
    tokens = min((s.tokens for s in stats.values()), default=None)
    for members in by_step.values():
        method, chosen, fallback = choose(members[0], stats, pooled)
        weights = [read(a.site) for a in members]
        start = time.perf_counter()
        result: Result = method(torch.cat(weights), chosen)
        seconds = time.perf_counter() - start
        hessian = chosen.get(Hessian)
        matrix = hessian.matrix() if isinstance(hessian, Hessian) and hessian.tokens else None
        first = 0
        for assignment, weight in zip(members, weights, strict=True):
            site = assignment.site
            compressed = result.weight.rows(first, first + site.shape[0])
            first += site.shape[0]
            row = site_row(site, method.path, compressed, weight, matrix, result.notes, fallback, tokens, seconds)
            yield site.name, (compressed, row)


def site_row(
    site: Site,
    path: str,
    compressed: CompressedWeight,
    weight: Tensor,
    hessian: Tensor | None,
    notes: dict[str, Any],
    fallback: str | None = None,
    tokens: int | None = None,
    seconds: float = 0.0,
) -> SiteRow:
    """Describe what became of a weight (out, in). Raises CalibrationError where it is not finite."""
    decoded = _finite(compressed, site.name)
    if (sparsity := compressed.sparsity) is not None:
        notes = {**notes, "sparsity": sparsity}
    return SiteRow(
        site.name,
        site.block,
        site.kind,
        site.shape,
        path,
        compressed.bits_per_weight,
        compressed.stored_bits,
        relative_error(weight, decoded, hessian),
        site.expert,
        tokens,
        "; ".join(text for text in (fallback, notes.get("fallback")) if text) or None,
        seconds,
        {k: v for k, v in notes.items() if k != "fallback"},
    )


def _finite(compressed: CompressedWeight, name: str) -> Tensor:
    decoded = compressed.dequantize()
    if not bool(decoded.isfinite().all()):
        raise CalibrationError(
            f"{name}: the compressed weight is not finite; check the calibration data, or use quant/rtn for it"
        )
    return decoded
