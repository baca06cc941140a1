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

from compress import prepare, registry
from compress import recipe as recipes
from compress.calibration.families import Site
from compress.candidates import Candidate, check_candidates, default_candidates, parse_candidates
from compress.errors import RecipeError
from compress.files import human_bytes, write_text
from compress.folding import fold
from compress.measured import Kept
from compress.plan._problem import Choice, Problem
from compress.prepare import Plan
from compress.recipe import Recipe
from compress.sensitivity import Sensitivity, sites_of
from compress.streams import Listen

_FRONT = 12  # points of the front
_ROUNDS = 6  # of planning for a KL
_MARGIN = 0.97  # by which each aims lower than the one before


@dataclass(frozen=True)
class Budget:
    """What is given: exactly one of the three."""

    bpw: float | None = None  # bits per compressed weight, every stored bit counted
    size: int | None = None  # bytes of all tensors of the checkpoint
    max_kl: float | None = None  # nats per position

    @classmethod
    def of(cls, bpw: float | None, size: str | None, max_kl: float | None) -> Budget:
        """Check what the command line says. Raises RecipeError."""
        given = [name for name, value in (("--bpw", bpw), ("--size", size), ("--max-kl", max_kl)) if value is not None]
        if len(given) != 1:
            what = "no budget" if not given else " and ".join(given)
            raise RecipeError(f"{what}: give one of --bpw 3.0, --size 4GB or --max-kl 0.05")
        for name, number in (("--bpw", bpw), ("--max-kl", max_kl)):
            if number is not None and not (np.isfinite(number) and number > 0):
                raise RecipeError(f"{name} {number}: expected a positive number")
        try:
            return cls(bpw, None if size is None else recipes.parse_size(size), max_kl)
        except ValueError as error:
            raise RecipeError(f"--size: {error}") from error

    def __str__(self) -> str:
        if self.bpw is not None:
            return f"{self.bpw:g} bits per weight"
        return human_bytes(self.size) if self.size is not None else f"KL {self.max_kl:g}"


@dataclass(frozen=True)
class Point:
    """A choice for the whole model, in numbers."""

    bits: int  # stored, of the planned weights
    bits_per_weight: float
    bytes: int  # of all tensors of the checkpoint
    kl: float  # predicted for the model, nats


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was chosen from."""

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
) -> Plan:
    """Open the model, with all linears in blocks as sites, and transforms before them. Raises CheckpointError, RecipeError."""
    # The whole row as a group: a step that every shape takes, standing for those to come.
    step = {"match": "*.*", "method": "quant/gptq", "options": {"group_size": -1}}
    values: dict[str, Any] = {"steps": [step], "data": data or {"name": "c4"}}
    if transforms:
        values["transforms"] = [{"method": path} for path in transforms]
    if dtype is not None:
        values["dtype"] = dtype
    plan = prepare.prepare(model, recipes.parse(values, "command line"), device, revision, headers)
    if not sites_of(plan):
        raise RecipeError(f"{model}: has no linears in blocks; there is nothing to plan")
    return plan


class Model:
    """The numbers of a model's planning: variables, sizes, and what plans of it give."""

    def __init__(self, plan: Plan, sensitivity: Sensitivity, candidates: list[Candidate], siblings: bool) -> None:
        self.plan, self.sensitivity, self.candidates = plan, sensitivity, candidates
        self.sites = sites_of(plan)
        self.numel = sum(site.numel for site in self.sites)
        planned = {site.name for site in self.sites}
        source = plan.source
        rest = [site for site in plan.claims.sites if site.name not in planned]
        self.other_bytes = sum(source.entries[name].nbytes for name in plan.claims.copied)
        self.other_bytes += sum(s.numel * (source.entries[s.tensor].nbytes // source.entries[s.tensor].numel) for s in rest)
        self.groups = together(self.sites, siblings)
        shape = (len(self.groups), len(candidates))
        bits, cost, fits = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.ones(shape, dtype=bool)
        rows = {row.site: row for row in sensitivity.sites}
        self.factors = np.array(sensitivity.factors())
        for variable, members in enumerate(self.groups):
            for site in members:
                for c, (b, kl) in enumerate(zip(rows[site.name].bits, rows[site.name].kl, strict=True)):
                    if b is None or kl is None:
                        fits[variable, c] = False
                    else:
                        bits[variable, c] += b
                        cost[variable, c] += kl * self.factors[c]
        layer = np.array([members[0].block for members in self.groups], dtype=np.int64)
        scores = {"lim": np.array(sensitivity.lim), "zd": np.array(sensitivity.zd)}
        self.problem = Problem(bits, cost, fits, layer, scores)
        if not fits.any(1).all():
            members = self.groups[int(np.flatnonzero(~fits.any(1))[0])]
            names = ", ".join(site.name for site in members[:4])
            raise RecipeError(f"--candidates: none fits all of {names}, which have to be the same")
        self.least_cost = float(np.where(fits, cost, np.inf).min(1).sum())
        self.least = int(np.where(fits, bits, np.iinfo(np.int64).max).min(1).sum())
        self.most = int(np.where(fits, bits, -1).max(1).sum())

    def point(self, choice: Choice) -> Point:
        """What a choice takes and costs."""
        bits, cost = self.problem.bits_of(choice.picks), self.problem.cost_of(choice.picks)
        return Point(bits, bits / self.numel, self.other_bytes + bits // 8, cost)

    def limits(self, budget: Budget) -> tuple[int | None, float | None]:
        """The budget as most bits of the planned weights, or as most cost. Raises RecipeError where it cannot be."""
        if budget.max_kl is not None:
            self._check_kl(budget.max_kl)
            return None, budget.max_kl
        if budget.bpw is not None:
            bits = int(budget.bpw * self.numel + 1e-6)
            low, high, given = f"{self.least / self.numel:.4f}", f"{self.most / self.numel:.4f}", f"--bpw {budget.bpw:g}"
        else:
            assert budget.size is not None
            bits = (budget.size - self.other_bytes) * 8
            low, high = (f"{self.other_bytes + bits // 8:,} bytes" for bits in (self.least, self.most))
            given = f"--size of {budget.size:,} bytes"
        if bits < self.least:
            raise RecipeError(f"{given}: below {low}, the smallest that these candidates can give; add smaller --candidates")
        if bits > self.most:
            raise RecipeError(f"{given}: above {high}, the largest that these candidates can give; add larger --candidates")
        return bits, None

    def _check_kl(self, max_kl: float) -> None:
        cost = np.where(self.problem.fits, self.problem.cost, np.nan)
        low, high = self.least_cost, float(np.nanmax(cost, 1).sum())
        if max_kl < low:
            raise RecipeError(f"--max-kl {max_kl:g}: below {low:.2g}, the least that is predicted; add larger --candidates")
        if max_kl > high:
            raise RecipeError(f"--max-kl {max_kl:g}: above {high:.2g}, the most that is predicted; add smaller --candidates")

    def front(self, budgets: Sequence[int]) -> list[Point]:
        """The best plans at these numbers of bits."""
        solve = registry.lookup("plan", "milp")
        return [self.point(solve(self.problem, bits, None)) for bits in budgets]

    def uniform(self) -> list[tuple[int, Point]]:
        """Every candidate that fits everywhere, by size."""
        count = len(self.groups)
        return [(c, self.point(Choice(np.full(count, c, dtype=np.int64)))) for c in self.problem.everywhere]

    def choices(self, choice: Choice) -> dict[str, int]:
        """The candidate of every site, in the order of the sites."""
        picked = {site.name: int(c) for members, c in zip(self.groups, choice.picks, strict=True) for site in members}
        return {site.name: picked[site.name] for site in self.sites}


def together(sites: Sequence[Site], siblings: bool) -> list[list[Site]]:
    """Group sites that have to take one candidate: those of one tensor, and if asked those that read one tap."""
    parent = list(range(len(sites)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    first: dict[tuple[str, ...], int] = {}
    for number, site in enumerate(sites):
        for key in [("tensor", site.tensor), *([("tap", str(site.block), site.tap)] if siblings else [])]:
            parent[root(number)] = root(first.setdefault(key, number))
    groups: dict[int, list[Site]] = {}
    for number, site in enumerate(sites):
        groups.setdefault(root(number), []).append(site)
    return list(groups.values())


def make(
    plan: Plan,
    ids: Tensor,
    candidates: list[Candidate],
    budget: Budget,
    folder: Path,
    listen: Listen,
    planner: str = "milp",
    siblings: bool = False,
    room: int = 4 << 30,
    checked: bool = False,
) -> Planned:
    """Plan a model within a budget; what is measured is kept in `folder`. Raises CompressError.

    A plan for a KL is always measured; one that is above it is made again for as much less, `_ROUNDS` times at most.
    """
    solve = registry.lookup("plan", planner)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("planning runs in one process: make the plan first, then `torchrun ... compress run RECIPE`")
    check_candidates(candidates, sites_of(plan))
    kept = Kept(plan, ids, candidates, folder)
    found, reused = kept.measured(room, listen)
    model = Model(plan, found, candidates, siblings)
    most_bits, most_cost = model.limits(budget)
    measured: tuple[float, float | None] | None = None
    for number in range(_ROUNDS):
        choice = solve(model.problem, most_bits, most_cost)
        point = model.point(choice)
        if budget.max_kl is None and not checked:
            break
        measured = kept.checked(model.choices(choice), room, listen)
        if budget.max_kl is None or most_cost is None or measured[0] <= budget.max_kl:
            break
        least = model.least_cost * (1 + 1e-9)
        if most_cost <= least:
            break
        most_cost = max(point.kl * budget.max_kl / measured[0] * _MARGIN ** (number + 1), least)
    budgets = {int(b) for b in np.linspace(model.least, model.most, _FRONT)} | ({most_bits} if most_bits else {point.bits})
    return Planned(
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


def recipe_of(planned: Planned, plan: Plan, ids: Tensor) -> Recipe:
    """The recipe that does what was planned, in as few steps as there are candidates in it."""
    others = [site.name for site in plan.claims.sites if site.name not in planned.choices]
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
    made = recipes.parse(values, "plan")
    for a in recipes.resolve(made, plan.claims.sites):
        assert a.method == planned.candidates[planned.choices[a.site.name]].build, a.site.name
    return made


@dataclass(frozen=True)
class Made:
    """What `command` gives."""

    planned: Planned
    recipe: Recipe


def candidates_of(plan: Plan, methods: Sequence[str], texts: Sequence[str]) -> list[Candidate]:
    """The candidates that a command line asks for. Raises RecipeError."""
    candidates = parse_candidates(texts)
    if methods or not texts:
        given = [json.dumps(c.plain(), sort_keys=True) for c in candidates]
        defaults = default_candidates(methods or ["gptq"], sites_of(plan))
        candidates += [c for c in defaults if json.dumps(c.plain(), sort_keys=True) not in given]
    check_candidates(candidates, sites_of(plan))
    return candidates


def command(
    model: str,
    data: dict[str, Any],
    budget: Budget,
    folder: Path,
    listen: Listen,
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    room: int = 4 << 30,
    planner: str = "milp",
    methods: Sequence[str] = (),
    texts: Sequence[str] = (),
    siblings: bool = False,
    checked: bool = False,
    transforms: Sequence[str] = (),
) -> Made:
    """Do what `compress plan` asks for but for writing the recipe. Raises CompressError."""
    registry.lookup("plan", planner)  # before the long part
    plan = prepared(model, data, dtype, device, revision, transforms=transforms)
    candidates = candidates_of(plan, methods, texts)
    ids = prepare.calibration(plan)
    planned = make(plan, ids, candidates, budget, folder, listen, planner, siblings, room, checked)
    return Made(planned, recipe_of(planned, plan, ids))


def write(recipe: Recipe, path: Path) -> None:
    """Write a recipe for people to read: without the defaults, patterns one per line."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110))
