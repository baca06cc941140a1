"""`compress plan`: from a budget to a recipe, with sensitivities that are measured once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from compress import prepare, registry
from compress import recipe as recipes
from compress._version import __version__
from compress.calibration.data import fingerprint
from compress.calibration.families import Site
from compress.errors import RecipeError
from compress.files import human_bytes, write_json
from compress.folding import fold
from compress.plan._problem import Choice, Problem
from compress.prepare import Plan
from compress.recipe import Recipe
from compress.sensitivity import Candidate, Listen, Sensitivity, measure, sites_of

WIDTHS = (2, 3, 4, 5, 6, 8)
FINE = (2, 3)  # bits at which smaller groups pay
GROUP, FINE_GROUPS = 128, (64, 32)
VERSION = 1  # of what a sensitivity file means
_FRONT = 12  # points of the front


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
    sum: float  # of the predicted KL of the weights, each alone
    kl: float  # predicted for the model


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was chosen from."""

    budget: Budget
    planner: str
    choices: dict[str, int]  # site -> candidate
    point: Point
    gap: float
    exact: bool
    front: list[Point]  # the milp planner's, at budgets over the whole range
    uniform: list[tuple[int, Point]]  # each candidate that fits everywhere
    candidates: list[Candidate]
    sensitivity: Sensitivity
    sites: list[Site]
    reused: Path | None  # the file the sensitivities came from, if they were not measured now

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "budget": dataclasses.asdict(self.budget),
            "planner": self.planner,
            **dataclasses.asdict(self.point),
            "gap": self.gap,
            "exact": self.exact,
            "sizes_exact": self.sensitivity.exact,
            "choices": {name: self.candidates[c].label for name, c in self.choices.items()},
            "front": [dataclasses.asdict(p) for p in self.front],
            "uniform": [{"candidate": self.candidates[c].label, **dataclasses.asdict(p)} for c, p in self.uniform],
            "references": [
                {**dataclasses.asdict(r), "candidate": self.candidates[r.candidate].label} for r in self.sensitivity.references
            ],
            "reused": None if self.reused is None else str(self.reused),
        }


def candidate(method: str, options: dict[str, Any]) -> Candidate:
    """A candidate, its options validated. Raises RecipeError."""
    path = method if "/" in method else f"quant/{method}"
    build = registry.method(path)
    try:
        return Candidate(path, options, build(**options))
    except ValidationError as error:
        raise RecipeError(recipes.explain(error, list(build.model_fields), f"candidate {path}: ")) from error


def parse_candidates(texts: Sequence[str]) -> list[Candidate]:
    """Read candidates: `gptq:bits=2,group_size=64`, or a YAML file with a list of `method` and `options`. Raises RecipeError."""
    found = []
    for text in texts:
        if Path(text).suffix in (".yaml", ".yml"):
            found += _from_file(Path(text))
            continue
        method, _, settings = text.partition(":")
        options: dict[str, Any] = {}
        for setting in filter(None, settings.split(",")):
            key, equals, value = setting.partition("=")
            if not equals:
                raise RecipeError(f"--candidates {text}: expected METHOD:option=value,option=value, or a YAML file")
            try:
                options[key.strip()] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise RecipeError(f"--candidates {text}: {key} is not a YAML value ({error})") from error
        found.append(candidate(method.strip(), options))
    return found


def _from_file(path: Path) -> list[Candidate]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, list) or not values:
        raise RecipeError(f"{path}: expected a list of candidates, each with a method: and options:")
    found = []
    for value in values:
        if not isinstance(value, dict) or set(value) - {"method", "options"} or not isinstance(value.get("method"), str):
            raise RecipeError(f"{path}: {value!r}: expected method: and options: and nothing else")
        options = value.get("options") or {}
        if not isinstance(options, dict):
            raise RecipeError(f"{path}: options: {options!r}; expected a mapping")
        found.append(candidate(value["method"], options))
    return found


def default_candidates(methods: Sequence[str], sites: Sequence[Site]) -> list[Candidate]:
    """2 to 8 bits, groups of 128 and at 2 and 3 bits of 64 and 32; whole rows too where 128 does not divide every weight."""
    settings = [(bits, GROUP) for bits in WIDTHS] + [(bits, group) for bits in FINE for group in FINE_GROUPS]
    if any(site.shape[1] % GROUP for site in sites):
        settings += [(bits, -1) for bits in WIDTHS]
    found: dict[str, Candidate] = {}
    for method in methods:
        known = registry.method(method if "/" in method else f"quant/{method}").model_fields
        for bits, group in sorted(settings):
            options = {k: v for k, v in (("bits", bits), ("group_size", group)) if k in known}
            one = candidate(method, options)
            if any(one.build.check(site.shape) is None for site in sites):
                found.setdefault(one.label, one)
    return list(found.values())


def check_candidates(candidates: Sequence[Candidate], sites: Sequence[Site]) -> None:
    """Raise RecipeError for a candidate that fits nothing, for two that are the same, and for a weight that none fits."""
    if not candidates:
        raise RecipeError("--candidates: none is left; give some")
    seen: set[str] = set()
    for one in candidates:
        key = json.dumps(one.plain(), sort_keys=True)
        if key in seen:
            raise RecipeError(f"--candidates: {one.label} is there twice")
        seen.add(key)
        problems = [one.build.check(site.shape) for site in sites]
        if all(problems):
            raise RecipeError(f"--candidates: {one.label} fits no weight of this model; {sites[0].name}: {problems[0]}")
    for site in sites:
        if all(one.build.check(site.shape) for one in candidates):
            what = candidates[0].build.check(site.shape)
            raise RecipeError(f"--candidates: none fits {site.name}, {site.shape[0]} x {site.shape[1]}; the first: {what}")


def prepared(model: str, data: dict[str, Any], dtype: str | None, device: str, revision: str | None = None) -> Plan:
    """Open the model, with all linears in blocks as sites. Raises CheckpointError, RecipeError."""
    # The whole row as a group: a step that every shape takes, standing for those to come.
    step = {"match": "*.*", "method": "quant/gptq", "options": {"group_size": -1}}
    values: dict[str, Any] = {"steps": [step], "data": data}
    if dtype is not None:
        values["dtype"] = dtype
    plan = prepare.prepare(model, recipes.parse(values, "command line"), device, revision)
    if not sites_of(plan):
        raise RecipeError(f"{model}: has no linears in blocks; there is nothing to plan")
    return plan


def _identity(plan: Plan, ids: Tensor, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Every field that decides the sensitivities."""
    return {
        "version": VERSION,
        "source": plan.source.fingerprint(),
        "calibration": fingerprint(ids),
        "candidates": [c.plain() for c in candidates],
        "batch_tokens": plan.recipe.batch_tokens,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": plan.device.type,
        "compress": __version__,
        "torch": torch.__version__,
    }


def sensitivities(
    plan: Plan, ids: Tensor, candidates: Sequence[Candidate], folder: Path, room: int, listen: Listen
) -> tuple[Sensitivity, Path | None]:
    """Measure, or read what an earlier plan of the same model, data and candidates left in `folder`; the file if it was read."""
    identity = _identity(plan, ids, candidates)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"sensitivity-{digest}.json"
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["identity"] == identity:
                return Sensitivity.parse(values["sensitivity"]), path
        except (ValueError, LookupError, TypeError):
            pass  # not what this command writes: measured again, and written over
    found = measure(plan, ids, candidates, room, listen)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"identity": identity, "sensitivity": found.plain()})
    return found, None


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
        for variable, members in enumerate(self.groups):
            for site in members:
                for c, (b, kl) in enumerate(zip(rows[site.name].bits, rows[site.name].kl, strict=True)):
                    if b is None or kl is None:
                        fits[variable, c] = False
                    else:
                        bits[variable, c] += b
                        cost[variable, c] += kl
        layer = np.array([members[0].block for members in self.groups], dtype=np.int64)
        scores = {"lim": np.array(sensitivity.lim), "zd": np.array(sensitivity.zd)}
        self.problem = Problem(bits, cost, fits, layer, scores)
        if not fits.any(1).all():
            members = self.groups[int(np.flatnonzero(~fits.any(1))[0])]
            names = ", ".join(site.name for site in members[:4])
            raise RecipeError(f"--candidates: none fits all of {names}, which have to be the same")
        self.least = int(np.where(fits, bits, np.iinfo(np.int64).max).min(1).sum())
        self.most = int(np.where(fits, bits, -1).max(1).sum())

    def point(self, choice: Choice) -> Point:
        """What a choice takes and costs."""
        bits, cost = self.problem.bits_of(choice.picks), self.problem.cost_of(choice.picks)
        return Point(bits, bits / self.numel, self.other_bytes + bits // 8, cost, self.sensitivity.total(cost))

    def limits(self, budget: Budget) -> tuple[int | None, float | None]:
        """The budget as most bits of the planned weights, or as most cost. Raises RecipeError where it cannot be."""
        if budget.max_kl is not None:
            return None, self._most_cost(budget.max_kl)
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

    def _most_cost(self, max_kl: float) -> float:
        cost = np.where(self.problem.fits, self.problem.cost, np.nan)
        best, worst = (float(x.sum()) for x in (np.nanmin(cost, 1), np.nanmax(cost, 1)))
        low, high = self.sensitivity.total(best), self.sensitivity.total(worst)
        if max_kl < low:
            raise RecipeError(f"--max-kl {max_kl:g}: below {low:.2g}, the least that is predicted; add larger --candidates")
        if max_kl > high:
            raise RecipeError(f"--max-kl {max_kl:g}: above {high:.2g}, the most that is predicted; add smaller --candidates")
        return self.sensitivity.predicted(max_kl)

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
    plan: Plan, ids: Tensor, candidates: list[Candidate], budget: Budget, planner: str, siblings: bool,
    folder: Path, room: int, listen: Listen,
) -> Planned:  # fmt: skip
    """Plan a model within a budget; sensitivities are read from `folder` or measured and left there. Raises CompressError."""
    solve = registry.lookup("plan", planner)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("planning runs in one process: make the plan first, then `torchrun ... compress run RECIPE`")
    check_candidates(candidates, sites_of(plan))
    found, reused = sensitivities(plan, ids, candidates, folder, room, listen)
    model = Model(plan, found, candidates, siblings)
    most_bits, most_cost = model.limits(budget)
    choice = solve(model.problem, most_bits, most_cost)
    point = model.point(choice)
    budgets = sorted({int(b) for b in np.linspace(model.least, model.most, _FRONT)} | ({most_bits} - {None}))
    return Planned(
        budget, planner, model.choices(choice), point, choice.gap, choice.exact, model.front(budgets), model.uniform(),
        candidates, found, model.sites, reused,
    )  # fmt: skip


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
    data = plan.recipe.data
    if data is not None:
        data = data.model_copy(update={"samples": ids.shape[0], "length": ids.shape[1]})
    values = {
        "description": description,
        "data": None if data is None else data.model_dump(mode="json"),
        "dtype": plan.recipe.dtype,
        "steps": steps,
    }
    made = recipes.parse(values, "plan")
    for a in recipes.resolve(made, plan.claims.sites):
        assert a.method == planned.candidates[planned.choices[a.site.name]].build, a.site.name
    return made


def write(recipe: Recipe, path: Path) -> None:
    """Write a recipe for people to read: without the defaults, patterns one per line."""
    from compress.files import write_text

    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110))
