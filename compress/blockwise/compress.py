"""Compression of the sites of one block, each by its own method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.architecture.family import Site
from compress.blockwise.units import Unit, choose, observed
from compress.calibration.cache import BlockCache
from compress.calibration.statistics import Hessian, Stats
from compress.errors import CalibrationError
from compress.methods.method import Result
from compress.model.streamed import StreamedModel
from compress.recipe.assignment import Assignment
from compress.report.rows import SiteRow
from compress.system import memory
from compress.weights.weight import CompressedWeight, relative_error

CompressedSite = tuple[CompressedWeight, SiteRow]


def compress_block(
    streamed: StreamedModel,
    assignments: Sequence[Assignment],
    run: Callable[[], None],
    budget: int,
    progress: Callable[[str, float], None],
    read: Callable[[Site], Tensor] | None = None,
    cache: BlockCache | None = None,
    known: dict[str, Stats] | None = None,
) -> Iterator[tuple[str, CompressedSite]]:
    """Compress this rank's sites of one filled block, and yield each with its report row; see `observed`.

    `read` returns the weight (out, in) of a site in float32; None reads the source's.
    """
    read = read or (lambda site: streamed.weight(site).to(streamed.device).float())
    for unit, stats, pooled in observed(streamed, assignments, run, budget, progress, cache, known):
        memory.give_back()  # holes left by calibration or the last weight, before new allocations add more
        yield from _compress_unit(read, unit, stats, pooled)


def _compress_unit(
    read: Callable[[Site], Tensor], unit: Unit, stats: Stats, pooled: Stats
) -> Iterator[tuple[str, CompressedSite]]:
    """Compress the sites of one tap; sites of one step share a call if the method treats rows independently."""
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
    """Return the report row of a compressed weight (out, in). Raises CalibrationError if it is not finite."""
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
