"""`compress plan`: from a budget to a recipe, with sensitivities that are measured once and kept."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from compress import registry
from compress.architecture.family import Site
from compress.errors import RecipeError
from compress.planning.budget import Budget, Point
from compress.planning.candidates import Candidate, check_candidates, default_candidates, parse_candidates
from compress.planning.choices import Model
from compress.planning.sensitivity import Sensitivity, sites_of
from compress.planning.steps import fold
from compress.planning.store import MeasurementFile
from compress.recipe import assignment as recipe_assignment
from compress.recipe import reading as recipe_reading
from compress.recipe.data import BUILTIN
from compress.recipe.schema import Recipe
from compress.runs import prepare as run_prepare
from compress.runs.prepare import RunPlan
from compress.system.files import write_text
from compress.system.progress import Progress

_FRONT = 12  # points of the front
_ROUNDS = 6  # of planning for a KL
_MARGIN = 0.97  # by which each aims lower than the one before


@dataclass(frozen=True)
class Allocation:
    """A candidate for every weight, and what it was chosen from."""

    budget: Budget
    planner: str
    choices: dict[str, int]  # site -> candidate
    point: Point
    measured: tuple[float, float | None] | None  # KL of the plan on windows of the data kept for it, and its standard error
    gap: float
    exact: bool
    front: list[Point]  # the milp planner's, at budgets over the whole range
    uniform: list[tuple[int, Point]]  # each candidate that fits everywhere
    candidates: list[Candidate]
    sensitivity: Sensitivity
    sites: list[Site]
    kept: Path  # the file of the sensitivities
    reused: bool  # they were there already

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "budget": dataclasses.asdict(self.budget),
            "planner": self.planner,
            **dataclasses.asdict(self.point),
            "measured_kl": None if self.measured is None else self.measured[0],
            "measured_kl_standard_error": None if self.measured is None else self.measured[1],
            "gap": self.gap,
            "exact": self.exact,
            "sizes_exact": self.sensitivity.exact,
            "choices": {name: self.candidates[c].label for name, c in self.choices.items()},
            "front": [dataclasses.asdict(p) for p in self.front],
            "uniform": [{"candidate": self.candidates[c].label, **dataclasses.asdict(p)} for c, p in self.uniform],
            "references": [
                {**dataclasses.asdict(r), "candidate": self.candidates[r.candidate].label} for r in self.sensitivity.references
            ],
            "sensitivities": str(self.kept),
            "reused": self.reused,
        }


def prepared(
    model: str,
    data: dict[str, Any],
    dtype: str | None,
    device: str,
    revision: str | None = None,
    headers: bool = False,
    transforms: Sequence[str] = (),
) -> RunPlan:
    """Open the model, with all linears in blocks as sites, and transforms before them. Raises CheckpointError, RecipeError."""
    # The whole row as a group: a step that every shape takes, standing for those to come.
    step = {"match": "*.*", "method": "quant/gptq", "options": {"group_size": -1}}
    values: dict[str, Any] = {"steps": [step], "data": {"name": BUILTIN, **(data or {})}}
    if transforms:
        values["transforms"] = [{"method": path} for path in transforms]
    if dtype is not None:
        values["dtype"] = dtype
    plan = run_prepare.prepare(model, recipe_reading.parse(values, "command line"), device, revision, headers)
    if not sites_of(plan):
        raise RecipeError(f"{model}: has no linears in blocks; there is nothing to plan")
    return plan


def make(
    plan: RunPlan,
    ids: Tensor,
    candidates: list[Candidate],
    budget: Budget,
    folder: Path,
    progress: Progress,
    planner: str = "milp",
    siblings: bool = False,
    memory_budget: int = 4 << 30,
    checked: bool = False,
) -> Allocation:
    """Plan a model within a budget; what is measured is kept in `folder`. Raises CompressError.

    A plan for a KL is always measured; one that is above it is made again for as much less, `_ROUNDS` times at most.
    """
    solve = registry.lookup("plan", planner)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("planning runs in one process: make the plan first, then `torchrun ... compress run RECIPE`")
    check_candidates(candidates, sites_of(plan))
    kept = MeasurementFile(plan, ids, candidates, folder)
    found, reused = kept.measured(memory_budget, progress)
    model = Model(plan, found, candidates, siblings)
    most_bits, most_cost = model.limits(budget)
    measured: tuple[float, float | None] | None = None
    for number in range(_ROUNDS):
        choice = solve(model.problem, most_bits, most_cost)
        point = model.point(choice)
        if budget.max_kl is None and not checked:
            break
        measured = kept.checked(model.choices(choice), memory_budget, progress)
        if budget.max_kl is None or most_cost is None or measured[0] <= budget.max_kl:
            break
        least = model.least_cost * (1 + 1e-9)
        if most_cost <= least:
            break
        most_cost = max(point.kl * budget.max_kl / measured[0] * _MARGIN ** (number + 1), least)
    budgets = {int(b) for b in np.linspace(model.least, model.most, _FRONT)} | ({most_bits} if most_bits else {point.bits})
    return Allocation(
        budget,
        planner,
        model.choices(choice),
        point,
        measured,
        choice.gap,
        choice.exact,
        model.front(sorted(budgets)),
        model.uniform(),
        candidates,
        found,
        model.sites,
        kept.path,
        reused,
    )


def recipe_of(planned: Allocation, plan: RunPlan, ids: Tensor) -> Recipe:
    """The recipe that does what was planned, in as few steps as there are candidates in it."""
    others = [site.name for site in plan.inventory.sites if site.name not in planned.choices]
    steps = []
    for c, patterns in fold(planned.choices, others):
        one = planned.candidates[c]
        match = patterns[0] if len(patterns) == 1 else patterns
        steps.append({"match": match, "method": one.method, "options": one.options})
    point = planned.point
    description = (
        f"Planned by {planned.planner} for {planned.budget}: {point.bits_per_weight:.4f} bits per weight, "
        f"{point.bytes} bytes, predicted KL {point.kl:.4g}."
    )
    values: dict[str, Any] = {"description": description}
    if plan.recipe.data is not None:
        data = plan.recipe.data.model_dump(mode="json", exclude_unset=True)
        values["data"] = {**data, "samples": ids.shape[0], "length": ids.shape[1]}
    values |= {"dtype": plan.recipe.dtype, "steps": steps}
    if plan.recipe.transforms:
        values["transforms"] = [stage.model_dump(mode="json", exclude_unset=True) for stage in plan.recipe.transforms]
    made = recipe_reading.parse(values, "plan")
    for a in recipe_assignment.resolve(made, plan.inventory.sites):
        assert a.method == planned.candidates[planned.choices[a.site.name]].build, a.site.name
    return made


@dataclass(frozen=True)
class PlanResult:
    """A plan, and the recipe that does it."""

    planned: Allocation
    recipe: Recipe


@dataclass(frozen=True)
class PlanRequest:
    """A model, a text, a budget, and what a plan may choose from."""

    model: str
    data: dict[str, Any]  # values of a recipe's `data`
    budget: Budget
    methods: Sequence[str] = ()  # with their default candidates; gptq if neither these nor candidates are given
    candidates: Sequence[str] = ()  # a method with options each
    transforms: Sequence[str] = ()
    dtype: str | None = None
    device: str = "auto"
    revision: str | None = None
    memory_budget: int = 4 << 30  # bytes for statistics at a time

    def prepared(self, headers: bool = False) -> RunPlan:
        """Open the model, or its headers alone. Raises CheckpointError, RecipeError."""
        return prepared(self.model, self.data, self.dtype, self.device, self.revision, headers, self.transforms)

    def candidates_for(self, plan: RunPlan) -> list[Candidate]:
        """The candidates for the weights of the model. Raises RecipeError."""
        candidates = parse_candidates(self.candidates)
        if self.methods or not self.candidates:
            given = [json.dumps(c.plain(), sort_keys=True) for c in candidates]
            defaults = default_candidates(self.methods or ["gptq"], sites_of(plan))
            candidates += [c for c in defaults if json.dumps(c.plain(), sort_keys=True) not in given]
        check_candidates(candidates, sites_of(plan))
        return candidates


def allocate(
    request: PlanRequest, folder: Path, progress: Progress, planner: str = "milp", siblings: bool = False, checked: bool = False
) -> PlanResult:
    """Do what `compress plan` asks for but for writing the recipe. Raises CompressError."""
    registry.lookup("plan", planner)  # before the long part
    plan = request.prepared()
    candidates = request.candidates_for(plan)
    ids = run_prepare.calibration(plan)
    made = make(plan, ids, candidates, request.budget, folder, progress, planner, siblings, request.memory_budget, checked)
    return PlanResult(made, recipe_of(made, plan, ids))


def write(recipe: Recipe, path: Path) -> None:
    """Write a recipe for people to read: without the defaults, patterns one per line."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110))
