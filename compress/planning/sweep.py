"""What a model loses as one setting of a method goes up: the curve of essential sparsity, or of bits.

Every point is compressed from the original's weights, never from another point, as a run would do it, and measured without being
written. Of the curve are read off

    within 1 %   the last setting before which no perplexity is above 1.01 times the original's
    knee         where two straight lines in (setting, log perplexity), found over all cuts by least squares, meet best

Source: essential sparsity (arXiv 2306.03805), whose grid is 0, 0.1, ..., 0.9.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from compress.blockwise.stream import COMPRESSED, ORIGINAL, Stream, slices
from compress.blockwise.trial import compress_in_memory
from compress.errors import RecipeError
from compress.model.divergence import divergence, mean
from compress.model.streamed import StreamedModel
from compress.planning.candidates import Candidate, candidate
from compress.recipe.assignment import Assignment
from compress.report.rows import bits_per_weight
from compress.runs.prepare import RunPlan
from compress.system.progress import Progress

TOLERANCE = 1.01
LEAST_FOR_KNEE = 6  # points
_MOST_POINTS = 200
_RANGE = re.compile(r"(-?[\d.]+):(-?[\d.]+):(-?[\d.]+)")


@dataclass(frozen=True)
class Point:
    """One setting, measured."""

    setting: float | str
    label: str
    sparsity: float  # share of the compressed weights that are gone
    bits_per_weight: float
    perplexity: float
    kl: float  # mean over positions of KL(original || compressed), nats
    kl_standard_error: float | None
    seconds: float


@dataclass(frozen=True)
class Curve:
    """A sweep."""

    model: str
    method: str
    option: str  # what was swept
    perplexity: float  # of the original
    windows: int
    length: int
    points: list[Point]

    @property
    def within(self) -> float | str | None:
        """The last setting from the harmless end that is within 1 % of the original's perplexity; None if not even that is."""
        found: float | str | None = None
        for point in self.points if self.option != "bits" else reversed(self.points):
            if point.perplexity > TOLERANCE * self.perplexity:
                break
            found = point.setting
        return found

    @property
    def knee(self) -> float | None:
        """Where the curve bends; None for few points, or settings that are no numbers."""
        numbers = [p for p in self.points if isinstance(p.setting, float | int)]
        if len(numbers) < LEAST_FOR_KNEE or len(numbers) < len(self.points):
            return None
        return bend([float(p.setting) for p in numbers], [math.log(p.perplexity) for p in numbers])

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "within_1_percent": self.within, "knee": self.knee}


def settings(text: str, whole: bool = False) -> list[float]:
    """Read `start:stop:step`, both ends included, or numbers with commas. Raises RecipeError."""
    found = _RANGE.fullmatch(text)
    try:
        if found is None:
            values = [float(piece) for piece in text.split(",")]
        else:
            start, stop, step = map(float, found.groups())
            if step <= 0 or stop < start or (stop - start) / step > _MOST_POINTS:
                raise ValueError
            values = [round(start + step * k, 10) for k in range(math.floor((stop - start) / step + 1e-9) + 1)]
    except ValueError:
        raise RecipeError(f"{text}: expected a range such as 0:0.9:0.1, or numbers such as 0.3,0.5") from None
    if whole and any(value != int(value) for value in values):
        raise RecipeError(f"{text}: expected whole numbers, as 2:8:1")
    return [int(value) for value in values] if whole else values


def bend(x: Sequence[float], y: Sequence[float]) -> float:
    """Return where two lines meet that fit points left and right of a cut best, over all cuts with two points on either side."""
    best, place = math.inf, x[-1]
    for cut in range(2, len(x) - 1):
        (a, b, left), (c, d, right) = _line(x[:cut], y[:cut]), _line(x[cut:], y[cut:])
        if left + right < best - 1e-15:
            meeting = (c - a) / (b - d) if b != d else x[cut]
            best, place = left + right, min(max(meeting, x[cut - 1]), x[cut])
    return place


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The least-squares line a + b x, and its squared error."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    spread = sum((u - mx) ** 2 for u in x)
    slope = sum((u - mx) * (v - my) for u, v in zip(x, y, strict=True)) / spread if spread else 0.0
    a = my - slope * mx
    return a, slope, sum((v - a - slope * u) ** 2 for u, v in zip(x, y, strict=True))


def variants(method: str, option: str, values: Sequence[float | str], fixed: dict[str, Any]) -> list[Candidate]:
    """The method at each setting of one option. Raises RecipeError."""
    return [candidate(method, {**fixed, option: value}) for value in values]


def sweep(
    plan: RunPlan,
    fit_ids: Tensor,
    ids: Tensor,
    option: str,
    values: Sequence[float | str],
    methods: Sequence[Candidate],
    memory_budget: int,
    progress: Progress,
    done: Callable[[Point], None] = lambda point: None,
) -> Curve:
    """Measure a method at each setting over windows of ids (windows, length); `done` is told each point. Raises CompressError."""
    streamed = StreamedModel(plan.source, plan.inventory, plan.dtype, plan.device)
    needy = any(one.build.needs for one in methods)
    with streamed.embeddings_and_head():
        fit = None
        if needy:
            fit = Stream.begin(streamed, fit_ids, slices(fit_ids, plan.recipe.batch_tokens), "calibration", COMPRESSED)
        start = Stream.begin(streamed, ids, slices(ids, plan.recipe.batch_tokens), "probe")
    original = start.branch(ORIGINAL)
    points: list[Point] = []
    before = math.nan
    blocks = len(streamed.blocks)

    def say(block: int, _: int, step: str, share: float) -> None:
        progress(len(points) * blocks + block, len(methods) * blocks, step, share)

    for value, one in zip(values, methods, strict=True):
        compressed = start.branch(COMPRESSED)
        work = [Assignment(a.site, 0, one.build, None, a.min_tokens) for a in plan.assignments if a.site.block is not None]
        inputs = None if fit is None else fit.branch(COMPRESSED)
        streams = [compressed] if points else [original, compressed]
        rows = compress_in_memory(streamed, work, inputs, streams, memory_budget, say)
        kl, losses, originals = [], [], []
        with streamed.embeddings_and_head():
            for window, p, q in zip(ids, original.logs(streamed), compressed.logs(streamed), strict=True):
                kl.append(divergence(p, q))
                targets = window[1:, None].to(p.device)
                originals.append(float(-p.gather(1, targets).double().mean()))
                losses.append(float(-q.gather(1, targets).double().mean()))
        before = math.exp(sum(originals) / len(originals))
        numel = sum(row.numel for row in rows)
        gone = sum(row.notes.get("sparsity", 0.0) * row.numel for row in rows) / numel
        perplexity, seconds = math.exp(sum(losses) / len(losses)), sum(row.seconds for row in rows)
        points.append(Point(value, one.label, gone, bits_per_weight(rows), perplexity, *mean(kl), seconds))
        done(points[-1])
    return Curve(plan.source.name, methods[0].method, option, before, ids.shape[0], ids.shape[1], points)
