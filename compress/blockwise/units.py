"""One block: which taps are observed, which rank compresses which sites, and with which statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.calibration.cache import BlockCache
from compress.calibration.observe import Tap, observe, passes
from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.errors import CalibrationError
from compress.model.streamed import StreamedModel
from compress.recipe.assignment import Assignment
from compress.system import distributed


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
        """Work up to a constant factor: factoring the Hessian and sweeping the rows."""
        rows = sum(int(a.site.shape[0]) for a in self.assignments)
        return float(self.columns**2 * (self.columns + rows))

    @property
    def pool(self) -> str | None:
        """Name of the tap that pools all experts of the block, or None if no site can need it."""
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


def taps(streamed: StreamedModel, work: Sequence[Unit]) -> list[Tap]:
    """Return the taps to observe, pooled ones first, because every expert may need them."""
    pooled: dict[str, list[Unit]] = {}
    for unit in work:
        if unit.pool is not None:
            pooled.setdefault(unit.pool, []).append(unit)
    result = []
    for name, members in pooled.items():
        modules = tuple(streamed.linear(unit.assignments[0].site) for unit in members)
        result.append(Tap(name, modules, members[0].columns, (Hessian,), tuple(unit.tap for unit in members)))
    for unit in work:
        if unit.kinds:
            result.append(Tap(unit.tap, (streamed.linear(unit.assignments[0].site),), unit.columns, unit.kinds))
    return result


def _check_finite(streamed: StreamedModel, work: Sequence[Unit], collected: Mapping[str, Stats]) -> None:
    """Raise CalibrationError for the first tap whose inputs overflowed."""
    sites = {unit.tap: unit.assignments[0].site for unit in work}
    for tap, stats in collected.items():
        if tap in sites and not all(bool(t.isfinite().all()) for s in stats.values() for t in s.tensors()):
            name = str(streamed.dtype).removeprefix("torch.")
            advice = "float32 has the widest range" if name == "float32" else "--dtype float32 has a wider range"
            raise CalibrationError(
                f"{sites[tap].name}: its inputs are not finite: what the model computes before it overflows in {name}. {advice}; "
                "or use a method that needs no text, such as quant/rtn"
            )


def _reduce(collected: dict[str, Stats], owners: dict[str, int]) -> None:
    """Sum statistics over ranks: each tap's at its owner, pooled ones on all ranks."""
    for tap, stats in collected.items():
        for each in stats.values():
            distributed.reduce_to(each.tensors(), owners.get(tap))
    counts = distributed.gather({tap: [s.tokens for s in stats.values()] for tap, stats in collected.items()})
    for tap, stats in collected.items():
        for index, each in enumerate(stats.values()):
            each.tokens = sum(count[tap][index] for count in counts)


def _from_known(group: Sequence[Tap], known: dict[str, Stats]) -> dict[str, Stats] | None:
    """Take the statistics of taps out of those that are known; a pooled tap's are the sum of its members'. None if one is not."""
    if any(kind not in known.get(name, {}) for tap in group for kind in tap.kinds for name in tap.pooled or (tap.name,)):
        return None
    found: dict[str, Stats] = {}
    for tap in group:
        if tap.pooled:
            total = Hessian(tap.columns, statistic(known[tap.pooled[0]], Hessian).total.device)
            for name in tap.pooled:
                total.merge(statistic(known[name], Hessian))
            found[tap.name] = {Hessian: total}
        else:
            found[tap.name] = known.pop(tap.name)
    return found


def observed(
    streamed: StreamedModel,
    assignments: Sequence[Assignment],
    run: Callable[[], None],
    budget: int,
    progress: Callable[[str, float], None],
    cache: BlockCache | None = None,
    known: dict[str, Stats] | None = None,
) -> Iterator[tuple[Unit, Stats, Stats]]:
    """Yield this rank's units of one filled block, each with its statistics and those pooled over experts.

    `run` sends the calibration data through the block, once per pass; the statistics of a pass fit in `budget` bytes. It is not
    called where all that is needed is `known`, over all ranks and by tap, of which nothing is left in the end.
    """
    work = units(assignments)
    owner = dict(zip([u.tap for u in work], distributed.assign([u.cost for u in work], distributed.world()), strict=True))
    watched = taps(streamed, work)
    pooled: dict[str, Stats] = {}
    left = {unit.tap: unit for unit in work}
    schedule = passes(watched, budget) or [[]]
    for number, group in enumerate(schedule):
        progress("calibrating", number / len(schedule))
        collected = _from_known(group, known or {})
        if collected is None:
            kept = cache.read(group) if cache is not None and group else None
            collected = kept if kept is not None else observe(group, run, streamed.device) if group else {}
            _check_finite(streamed, work, collected)
            _reduce(collected, owner)
            if cache is not None and group and kept is None:
                cache.write(group, collected)
        pooled |= {tap: stats for tap, stats in collected.items() if tap not in owner}
        ready = [tap for tap in collected if tap in owner] if number + 1 < len(schedule) else list(left)
        for index, tap in enumerate(ready):
            unit = left.pop(tap)
            if owner[tap] == distributed.rank():
                progress("compressing", index / len(ready))
                yield unit, collected.pop(tap, {}), pooled.get(unit.pool or "", {})


def choose(assignment: Assignment, stats: Stats, pooled: Stats) -> tuple[Any, Stats, str | None]:
    """Return method, statistics and note for a site: the step's own, or a fallback if the site saw too few tokens."""
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
