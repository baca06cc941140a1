"""Which candidates a planner may choose from at each site, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress import registry
from compress.architecture.family import Site
from compress.errors import RecipeError
from compress.planning.budget import Budget, Point
from compress.planning.candidates import Candidate
from compress.planning.problem import Choice, Problem
from compress.planning.sensitivity import Sensitivity, sites_of
from compress.runs.prepare import RunPlan


class Model:
    """The numbers of a model's planning: variables, sizes, and what plans of it give."""

    def __init__(self, plan: RunPlan, sensitivity: Sensitivity, candidates: list[Candidate], siblings: bool) -> None:
        self.plan, self.sensitivity, self.candidates = plan, sensitivity, candidates
        self.sites = sites_of(plan)
        self.numel = sum(site.numel for site in self.sites)
        planned = {site.name for site in self.sites}
        source = plan.source
        rest = [site for site in plan.inventory.sites if site.name not in planned]
        self.other_bytes = sum(source.entries[name].nbytes for name in plan.inventory.copied)
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
