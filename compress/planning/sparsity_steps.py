"""One budget of sparsity, cut up over the weights of a model: the steps of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.planning import budget as plan_budget
from compress.planning import planner
from compress.planning.candidates import candidate
from compress.planning.sensitivity import sites_of
from compress.planning.sparsity import by_magnitude, by_outliers, steps_of
from compress.planning.store import MeasurementFile
from compress.recipe import reading as recipe_reading
from compress.runs import prepare as run_prepare
from compress.system.progress import Progress

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # sparsities that a measured plan may give


def steps(
    model: str,
    values: dict[str, Any],
    distribute: str,
    sparsity: float,
    folder: Path,
    device: str,
    revision: str | None,
    memory_budget: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return steps that give every weight taken by a recipe of one step its own sparsity, `sparsity` in the mean.

    What `measured` measures is kept in `folder`. Raises CompressError.
    """
    plan = run_prepare.prepare(model, recipe_reading.parse(values, "command line"), device, revision)
    sites, step = sites_of(plan), values["steps"][0]
    method, options = step["method"], step["options"]
    others = [site.name for site in plan.inventory.sites if site.name not in {s.name for s in sites}]
    if distribute == "global":
        return steps_of(by_magnitude(plan, sites, sparsity), others, method, options)
    ids = run_prepare.calibration(plan)
    if distribute == "owl":
        return steps_of(by_outliers(plan, sites, ids, sparsity, memory_budget, progress)[0], others, method, options)
    choices = sorted({*GRID, sparsity})
    candidates = [candidate(method, {**options, "sparsity": share}) for share in choices]
    measured, _ = MeasurementFile(plan, ids, candidates, folder).measured(memory_budget, progress)
    # The budget is what the same sparsity everywhere takes: every stored bit, as it was measured.
    bits = sum(row.bits[choices.index(sparsity)] or 0 for row in measured.sites)
    budget = plan_budget.Budget(bpw=bits / sum(site.numel for site in sites))
    planned = planner.make(plan, ids, candidates, budget, folder, progress, memory_budget=memory_budget)
    made = planner.recipe_of(planned, plan, ids)
    return [step.model_dump(mode="json", exclude_unset=True) for step in made.steps]
