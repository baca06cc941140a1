"""What each candidate of a plan takes and costs at each site; `measurement.py` measures it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from compress.architecture.family import Site
from compress.blockwise.stream import COMPRESSED, ORIGINAL, Stream, slices
from compress.blockwise.trial import Before, compress_in_memory
from compress.model.divergence import divergence, mean
from compress.model.streamed import StreamedModel
from compress.planning.candidates import Candidate
from compress.recipe.assignment import Assignment, StageAssignment
from compress.runs.prepare import RunPlan
from compress.system.progress import Progress

PROBE_TOKENS = 8192  # of windows that references are measured on
PROBE_SHARE = 8  # at most one window in so many
REFERENCES = 4
REFERENCE_STEP = 0.75  # bits per weight between two references, at least


@dataclass(frozen=True)
class SiteCosts:
    """What each candidate takes and costs at one site; None where it does not fit."""

    site: str
    bits: list[int | None]  # stored
    kl: list[float | None]  # predicted, nats per position


@dataclass(frozen=True)
class Reference:
    """A whole model at one candidate."""

    candidate: int
    predicted: float  # sum over sites
    measured: float  # mean KL over positions, nats
    standard_error: float | None  # over windows


@dataclass(frozen=True)
class Sensitivity:
    """All that planners need to know, as it is stored."""

    sites: list[SiteCosts]
    references: list[Reference]
    lim: list[float]  # per block
    zd: list[float]  # per block
    exact: bool  # whether all sizes are known before weights are read
    seconds: float

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Sensitivity:
        """Read back what `plain` gave."""
        sites = [SiteCosts(**v) for v in values["sites"]]
        return cls(**{**values, "sites": sites, "references": [Reference(**v) for v in values["references"]]})

    def _curve(self) -> list[tuple[float, float]]:
        """Points (sum, total) in logarithms, ascending."""
        points = {r.predicted: r.measured for r in self.references if r.predicted > 0 and r.measured > 0}
        return [(math.log(x), math.log(y)) for x, y in sorted(points.items())]

    def factors(self) -> list[float]:
        """For each candidate, how much more a whole model at it diverges than its sites each alone.

        That of a reference is measured. Others are given the one of their sum, between references in logarithms; the sum of a
        candidate that does not fit every site is taken in proportion to that of a reference over the sites that it fits.
        """
        curve = self._curve()
        if not curve:
            return [1.0] * len(self.sites[0].kl)
        whole = self.references[0]
        result = []
        for c in range(len(self.sites[0].kl)):
            both = [(row.kl[c] or 0.0, row.kl[whole.candidate] or 0.0) for row in self.sites if row.kl[c] is not None]
            mine, theirs = sum(x for x, _ in both), sum(y for _, y in both)
            total = mine * whole.predicted / theirs if theirs > 0 else mine
            result.append(_interpolate(curve, total) / total if total > 0 else 1.0)
        return result


def _interpolate(curve: list[tuple[float, float]], value: float) -> float:
    """The second coordinate at this first one; beyond the ends in proportion."""
    x = min(max(math.log(value), curve[0][0]), curve[-1][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            return value * math.exp(y0 - x0 + (y1 - x1 - y0 + x0) * (x - x0) / (x1 - x0))
    return value * math.exp(curve[-1][1] - curve[-1][0])


def split(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Windows for the statistics, and the last ones, which references are measured on."""
    windows, length = ids.shape
    probes = min(max(windows // PROBE_SHARE, 1), max(PROBE_TOKENS // length, 1))
    return (ids[:-probes], ids[-probes:]) if windows > 1 else (ids, ids)


def sites_of(plan: RunPlan) -> list[Site]:
    """The weights that are planned: linears in blocks."""
    return [a.site for a in plan.assignments if a.site.block is not None]


def references(sites: Sequence[Site], candidates: Sequence[Candidate]) -> list[int]:
    """Choose candidates that fit every site, from the smallest up, some way apart; without known sizes the first ones."""
    numel = sum(site.numel for site in sites)
    whole = [c for c, one in enumerate(candidates) if all(one.build.check(site.shape) is None for site in sites)]
    sizes = {c: [candidates[c].build.describe(site.shape) for site in sites] for c in whole}
    known = sorted((sum(d.most for d in found) / numel, c) for c, found in sizes.items() if all(d.exact for d in found))
    found: list[tuple[float, int]] = []
    for size, c in known:
        if len(found) < REFERENCES and (not found or size - found[-1][0] >= REFERENCE_STEP):
            found.append((size, c))
    return [c for _, c in found] or whole[:REFERENCES]


def check(
    plan: RunPlan, ids: Tensor, methods: Mapping[str, Candidate], memory_budget: int, progress: Progress
) -> tuple[float, float | None]:
    """Measure the KL of a plan (by site name) on the windows that the statistics do not see, and its standard error.

    As a run does it, the calibration goes on through the compressed weights, and transforms come first.
    """
    streamed = StreamedModel(plan.source, plan.inventory, plan.dtype, plan.device)
    fit_ids, probe_ids = split(ids)
    with streamed.embeddings_and_head():
        fit = Stream.begin(streamed, fit_ids, slices(fit_ids, plan.recipe.batch_tokens), "calibration", COMPRESSED)
        original = Stream.begin(streamed, probe_ids, slices(probe_ids, plan.recipe.batch_tokens), "probe")
    planned = original.branch(COMPRESSED)
    steps = {c.label: number for number, c in enumerate(methods.values())}
    work = []
    for a in plan.assignments:
        if a.site.block is not None:
            mine = methods[a.site.name]
            work.append(Assignment(a.site, steps[mine.label], mine.build, None, a.min_tokens))
    before = None
    if plan.transforms:
        planned_as = {a.site.name: a for a in work}
        stages = [StageAssignment(s.method, [planned_as[a.site.name] for a in s.members]) for s in plan.transforms]
        before = Before(stages, fit.branch(ORIGINAL), 0 if plan.recipe.data is None else plan.recipe.data.seed)
    compress_in_memory(streamed, work, fit, [original, planned], memory_budget, progress, before)
    with streamed.embeddings_and_head():
        return mean([divergence(p, q) for p, q in zip(original.logs(streamed), planned.logs(streamed), strict=True)])
