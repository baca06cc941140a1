"""`compress plan --dry-run`: which budgets are possible, from headers alone, and what the best-known runs would take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.planning.planner import PlanRequest
from compress.recipe.schema import parse_size
from compress.runs import estimate
from compress.runs import prepare as run_prepare
from compress.runs.sizes import sizes


def feasibility(request: PlanRequest) -> dict[str, Any]:
    """Return the bytes of the model with each candidate for all weights that it fits, and whether the budget can be met.

    Raises CheckpointError, RecipeError.
    """
    plan, budget = request.prepared(headers=True), request.budget
    found = request.candidates_for(plan)
    samples, length = run_prepare.calibration_shape(plan)
    rows: list[dict[str, Any]] = []
    for one in found:
        members = [replace(a, method=one.build) for a in plan.assignments if one.build.check(a.site.shape) is None]
        given = replace(plan, assignments=members)
        size = sizes(plan.source, plan.inventory, members, parse_size(plan.recipe.max_shard_size))
        copied = sum(
            a.site.numel * plan.source.entries[a.site.tensor].nbytes // plan.source.entries[a.site.tensor].numel for a in members
        )
        weights = sum(a.site.numel for a in members)
        taken = size.tensors - (plan.source.nbytes - copied)
        rows.append(
            {
                "candidate": one.label,
                "weights": weights,
                "bits_per_weight": taken * 8 / max(weights, 1),
                "bytes": size.tensors,
                "files": size.total,
                "exact": size.exact,
                "least": size.least,
                "most": size.most,
                "memory": estimate.estimate(given, samples, length, request.memory_budget, offload=False).memory,
            }
        )
    rows.sort(key=lambda row: row["bytes"])
    smallest, largest = rows[0], rows[-1]
    possible = None
    if budget.size is not None:
        possible = budget.size >= smallest["bytes"]
    elif budget.bpw is not None:
        possible = budget.bpw >= min(row["bits_per_weight"] for row in rows)
    return {
        "model": plan.source.name,
        "bytes_before": plan.source.nbytes,
        "candidates": rows,
        "smallest": smallest["bytes"],
        "largest": largest["bytes"],
        "possible": possible,
        "calibration": {"samples": samples, "length": length},
    }
