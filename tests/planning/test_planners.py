"""Planners on problems small enough to try everything, and on large ones."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import some, times

from compress import registry
from compress.errors import RecipeError
from compress.planning.planners import milp as milp_module
from compress.planning.planners.lim import lim
from compress.planning.planners.milp import milp
from compress.planning.planners.uniform import uniform
from compress.planning.planners.zd import zd
from compress.planning.problem import Problem


def problem(seed: int, variables: int = 5, candidates: int = 4, holes: float = 0.2, layers: int = 3) -> Problem:
    generator = np.random.default_rng(seed)
    bits = generator.integers(1, 60, (variables, candidates)) * 8
    cost = generator.exponential(1.0, (variables, candidates)) / bits
    fits = generator.random((variables, candidates)) >= holes
    fits[:, 0] = True
    layer = np.sort(generator.integers(0, layers, variables))
    scores = {name: generator.normal(size=layers) for name in ("lim", "zd")}
    return Problem(bits.astype(np.int64), cost, fits, layer, scores)


def everything(p: Problem) -> list[np.ndarray]:
    rows = [np.flatnonzero(row).tolist() for row in p.fits]
    return [np.array(picks) for picks in itertools.product(*rows)]


@pytest.mark.parametrize("seed", some(range(40), *range(10)))
def test_milp_finds_the_least_cost(seed: int) -> None:
    p = problem(seed)
    every = everything(p)
    sizes = sorted({p.bits_of(picks) for picks in every})
    for budget in (sizes[0], sizes[len(sizes) // 3], sizes[len(sizes) // 2] + 1, sizes[-1]):
        found = milp(p, budget, None)
        best = min(p.cost_of(picks) for picks in every if p.bits_of(picks) <= budget)
        assert p.bits_of(found.picks) <= budget
        assert p.fits[np.arange(len(found.picks)), found.picks].all()
        assert p.cost_of(found.picks) == pytest.approx(best, rel=1e-7)
        assert found.exact
        assert found.gap <= 1e-6


@pytest.mark.parametrize("seed", some(range(40), *range(10)))
def test_milp_finds_the_fewest_bits(seed: int) -> None:
    p = problem(seed)
    every = everything(p)
    costs = sorted(p.cost_of(picks) for picks in every)
    for limit in (costs[0] * (1 + 1e-9), costs[len(costs) // 3], costs[len(costs) // 2] * 1.01, costs[-1]):
        found = milp(p, None, limit)
        best = min(p.bits_of(picks) for picks in every if p.cost_of(picks) <= limit)
        assert p.cost_of(found.picks) <= limit
        assert p.bits_of(found.picks) == best


def test_an_impossible_budget_is_an_error() -> None:
    p = problem(0)
    with pytest.raises(RecipeError, match="planner milp"):
        milp(p, 1, None)
    with pytest.raises(RecipeError, match="planner uniform"):
        uniform(p, 1, None)
    with pytest.raises(RecipeError, match="planner lim"):
        lim(p, 1, None)


@pytest.mark.parametrize("variables", some([10_000, 100_000], 10_000))
def test_many_variables_take_seconds_and_the_gap_is_true(variables: int) -> None:
    """Weights of a model: few sizes, errors that fall by four per bit, budgets in between."""
    generator = np.random.default_rng(5)
    numel = generator.choice([2**20, 3 * 2**20, 2**22], variables)
    widths = np.array([2.125, 2.25, 2.5, 3.125, 3.25, 4.125, 5.125, 8.125])
    bits = (numel[:, None] * widths).astype(np.int64)
    cost = generator.lognormal(0, 1.5, (variables, 1)) * 4.0**-widths * generator.lognormal(0, 0.05, (variables, 8))
    p = Problem(bits, cost, np.ones(bits.shape, dtype=bool), np.zeros(variables, dtype=np.int64), {})
    budget = int(3.0 * numel.sum())
    start = time.perf_counter()
    found = milp(p, budget, None)
    assert time.perf_counter() - start < 20
    assert p.bits_of(found.picks) <= budget
    assert found.gap < 1e-4
    # The gap is a promise: Lagrange multipliers on a grid must not show more room below than it allows.
    bounds = [(cost + price * bits).min(1).sum() - price * budget for price in np.geomspace(1e-12, 1e-6, 200)]
    assert p.cost_of(found.picks) * (1 - found.gap) >= max(bounds) - 1e-9


def reference(p: Problem, score: np.ndarray, most_bits: int) -> list[int]:
    """Layer by layer, as the equations have it."""
    variables, candidates = p.bits.shape
    whole = [c for c in range(candidates) if all(p.fits[i, c] for i in range(variables))]
    whole.sort(key=lambda c: (sum(int(p.bits[i, c]) for i in range(variables)), c))
    total = {c: sum(int(p.bits[i, c]) for i in range(variables)) for c in whole}
    low = [c for c in whole if total[c] <= most_bits][-1]
    above = [c for c in whole if total[c] > most_bits]
    high = above[0] if above else low
    picks = [low] * variables
    for layer in sorted(range(len(score)), key=lambda n: (-score[n], n)):
        raised = [high if p.layer[i] == layer else picks[i] for i in range(variables)]
        if sum(int(p.bits[i, c]) for i, c in enumerate(raised)) > most_bits:
            break
        picks = raised
    return picks


@pytest.mark.parametrize("name", ["lim", "zd"])
@pytest.mark.parametrize("seed", some(range(20), *range(5)))
def test_layers_by_score_against_the_reference(name: str, seed: int) -> None:
    p = problem(seed, variables=12, holes=0.0, layers=5)
    plan = {"lim": lim, "zd": zd}[name]
    totals = sorted(int(p.bits[:, c].sum()) for c in range(4))
    for budget in (totals[0], (totals[0] + totals[1]) // 2, (2 * totals[1] + totals[2]) // 3, totals[-1]):
        found = plan(p, budget, None).picks
        assert found.tolist() == reference(p, p.scores[name], budget)
        assert p.bits_of(found) <= budget


@pytest.mark.parametrize("name", ["lim", "zd"])
def test_layers_are_raised_until_the_cost_is_met_and_no_further(name: str) -> None:
    layers = 6
    bits = np.tile(np.array([2, 4], dtype=np.int64), (layers, 1))
    cost = np.tile(np.array([1.0, 0.25]), (layers, 1))
    score = np.array([0.0, 5.0, 3.0, 4.0, -1.0, 1.0])
    p = Problem(bits, cost, np.ones((layers, 2), dtype=bool), np.arange(layers), {name: score})
    found = {"lim": lim, "zd": zd}[name](p, None, 6 - 2 * 0.75)
    assert found.picks.tolist() == [0, 1, 0, 1, 0, 0]


def test_uniform_takes_the_best_within() -> None:
    p = problem(3, holes=0.0)
    for budget in sorted(int(p.bits[:, c].sum()) for c in range(4)):
        found = uniform(p, budget, None).picks
        assert len(set(found.tolist())) == 1
        least = min(p.cost[:, c].sum() for c in range(4) if p.bits[:, c].sum() <= budget)
        assert p.cost_of(found) == pytest.approx(least)


@settings(max_examples=times(15, 60), deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 5), st.floats(0, 1))
def test_milp_is_never_worse_than_the_others(seed: int, variables: int, candidates: int, share: float) -> None:
    p = problem(seed, variables, candidates, holes=0.0)
    low, high = int(p.bits.min(1).sum()), int(p.bits.max(1).sum())
    budget = low + int(share * (high - low))
    best = p.cost_of(milp(p, budget, None).picks)
    for name in ("lim", "zd", "uniform"):
        try:
            other = registry.lookup("plan", name)(p, budget, None)
        except RecipeError:
            continue
        assert best <= p.cost_of(other.picks) * (1 + 1e-9)
        assert p.bits_of(other.picks) <= budget


def test_planners_are_no_methods() -> None:
    assert registry.names("plan") == ["lim", "milp", "uniform", "zd"]
    assert not [path for path in registry.methods() if path.startswith("plan")]
    with pytest.raises(RecipeError, match="no such planner; known are plan/lim"):
        registry.lookup("plan", "mipl")
    with pytest.raises(RecipeError, match="a method is written as kind/name"):
        registry.method("plan/milp")


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS writes to the process's standard output, where --json promises one object; os.write stands for its C++ code."""
    called = []
    real = milp_module.solve_integers

    def chatty(*args: Any, **options: Any) -> Any:
        called.append(os.write(1, b"HiGHS says\n"))
        return real(*args, **options)

    monkeypatch.setattr(milp_module, "solve_integers", chatty)
    generator = np.random.default_rng(0)
    bits = np.tile(np.array([2, 3, 4, 8]), (40, 1)) * generator.integers(100, 200, (40, 1))
    cost = generator.random((40, 1)) * np.array([8.0, 3.0, 1.0, 0.1]) * generator.uniform(0.5, 1.5, (40, 4))
    every = Problem(bits.astype(np.int64), cost, np.ones(bits.shape, dtype=bool), np.zeros(40, dtype=np.int64), {})
    milp(every, most_bits=int(bits[:, 1].sum()) + 37)
    print("after")
    assert called
    assert capfd.readouterr().out == "after\n"
