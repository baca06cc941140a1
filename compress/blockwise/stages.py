"""Methods that see a whole block: transforms before it is calibrated, joint compression, and tuning of what was compressed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from compress.blockwise.compress import CompressedSite, site_row
from compress.blockwise.view import BlockRun, MethodView
from compress.errors import CalibrationError
from compress.model.streamed import Weights
from compress.recipe.assignment import Assignment, StageAssignment
from compress.weights.weight import CompressedWeight, relative_error


def transform(around: BlockRun, stages: Sequence[StageAssignment]) -> dict[str, dict[str, Any]]:
    """Rewrite a filled block before it is calibrated; return notes by site."""
    notes: dict[str, dict[str, Any]] = {}
    for stage in stages:
        view = MethodView(around, stage.members, stage.method.path)
        changed = stage.method(view)
        for site, weight in changed.weights.items():
            around.weights[site] = weight
            around.streamed.set_weight(view._sites[site], weight)
        around.replace_others(changed.others)
        around.divide_known(changed.divided, view._sites.values())
        for site in view.sites:
            notes.setdefault(site, {})[stage.method.path] = changed.notes.get(site, changed.notes.get("", {}))
    return notes


def together(around: BlockRun, assignments: Sequence[Assignment]) -> Iterator[tuple[str, CompressedSite]]:
    """Compress the sites of steps whose methods see a block, step by step; the same on every rank."""
    by_step: dict[int, list[Assignment]] = {}
    for assignment in assignments:
        by_step.setdefault(assignment.step, []).append(assignment)
    for members in by_step.values():
        method = members[0].method
        start = time.perf_counter()
        results = method(MethodView(around, members, method.path))
        seconds = (time.perf_counter() - start) / len(members)
        for assignment in members:
            site, result = assignment.site, results[assignment.site.name]
            row = site_row(site, method.path, result.weight, around.weight(site), None, result.notes, seconds=seconds)
            around.streamed.set_weights(around.number, Weights.of([(site.name, result.weight)]))
            yield site.name, (result.weight, row)


def _without_low_rank(weight: CompressedWeight) -> int:
    return weight.stored_bits - (0 if weight.low_rank is None else weight.low_rank.stored_bits)


def tune(around: BlockRun, stages: Sequence[StageAssignment], weights: dict[str, CompressedWeight]) -> dict[str, dict[str, Any]]:
    """Adjust the compressed weights of a block in place, on every rank alike; return notes by site."""
    notes: dict[str, dict[str, Any]] = {}
    for stage in stages:
        members = [a for a in stage.members if a.site.name in weights]
        view = MethodView(around, members, stage.method.path)
        tuned = stage.method(view, {name: weights[name] for name in view.sites})
        errors: dict[str, float] = {}
        for name, weight in tuned.weights.items():
            if _without_low_rank(weight) != _without_low_rank(weights[name]):
                raise RuntimeError(f"{stage.method.path}: changed the size of {name}")
            given = Weights.of([(name, weight)])
            decoded = given.sites[name]
            if not bool(decoded.isfinite().all()):
                raise CalibrationError(f"{name}: is not finite after {stage.method.path}; check the calibration data")
            weights[name] = weight
            around.streamed.set_weights(around.number, given)
            errors[name] = relative_error(view.weight(name), decoded)
        around.replace_others(tuned.others)
        for name in view.sites:
            # The row's own error is the step's; this is the weight's as it is stored, over the weight's square.
            after = {"weight_error": errors[name]} if name in errors else {}
            notes.setdefault(name, {})[stage.method.path] = tuned.notes | after
    return notes
