"""The widths that SliM gives its groups: the best of all, with the mean that was asked for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import function_of
from problems import damped, problem
from slim_reference import part, widths
from thorough import times
from torch import Tensor

from compress.methods.quant.slim import balanced, budget, cheapest, decoded
from compress.methods.solvers.uniform_grid import fit

slim = function_of("quant/slim")

law = settings(max_examples=times(10, 20), deadline=None, derandomize=True)


@law
@given(
    groups=st.integers(1, 5),
    low=st.integers(1, 6),
    count=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_free_widths_are_the_best_of_all(groups: int, low: int, count: int, share: float, seed: int) -> None:
    """Also for costs that are not convex, or rise with the width."""
    choice = list(range(low, min(low + count, 9)))
    cost = torch.rand(len(choice), groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total = groups * choice[0] + round(share * groups * (choice[-1] - choice[0]))

    def price_of(widths: Any) -> float:
        return sum(float(cost[w - low, g]) for g, w in enumerate(widths))

    found = cheapest(cost, choice, total)
    assert sum(found) == total
    assert set(found) <= set(choice)
    least = min(price_of(c) for c in itertools.product(choice, repeat=groups) if sum(c) == total)
    assert math.isclose(price_of(found), least, rel_tol=1e-12)


@law
@given(bits=st.sampled_from([1, 1.3, 2, 2.1, 2.5, 3.999, 7.75, 8]), spread=st.integers(0, 7), size=st.sampled_from([4, 16, 48]))
def test_the_mean_of_the_widths_is_what_was_asked_for(bits: float, spread: int, size: int) -> None:
    weight, hessian = problem(columns=48)
    groups = 48 // size
    for symmetric in (True, False):
        found = widths(slim(weight, hessian, bits=bits, spread=spread, group_size=size, symmetric=symmetric, refinements=0))
        assert sum(found) == budget(bits, groups) == math.floor(bits * groups + 1e-9)
        assert min(found) >= max(1, math.floor(bits) - spread)
        assert max(found) <= min(8, math.ceil(bits) + spread)
    assert sum(widths(slim(weight, hessian, bits=round(bits), group_size=size, allocation="balanced"))) == round(bits) * groups


def test_a_sum_that_is_whole_is_met_in_spite_of_rounding() -> None:
    """0.1 + 0.2 is more than 0.3, and 2.3 * 10 less than 23: a budget has to be none the worse for it."""
    for groups in range(1, 400):
        for total in range(groups, 8 * groups + 1, 7):
            assert budget(total / groups, groups) == total


def test_few_groups_have_one_width_when_balanced() -> None:
    """The search of the paper's code is over an empty list below four groups."""
    for groups in (1, 2, 3):
        weight, hessian = problem(columns=8 * groups)
        assert widths(slim(weight, hessian, bits=3, group_size=8, allocation="balanced")) == [3] * groups
    for bits in (1, 8):
        weight, hessian = problem(columns=64)
        assert set(widths(slim(weight, hessian, bits=bits, group_size=8, allocation="balanced"))) == {bits}


def test_spread_is_of_free_widths_only() -> None:
    weight, hessian = problem(columns=64)
    found = [widths(slim(weight, hessian, bits=3, group_size=8, spread=n, allocation="balanced")) for n in (0, 1, 3)]
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {2, 3, 4}
    free = [widths(slim(weight, hessian, bits=3, group_size=8, spread=n)) for n in (0, 1, 3)]
    assert set(free[0]) == {3}
    assert free[0] != free[1] != free[2]


def test_not_mixing_is_among_what_is_tried() -> None:
    """Where groups are alike, any exchange of bits is a loss: the paper's search would have to make one."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(1, 8)
    result = slim(weight, torch.eye(64).double(), bits=3, group_size=8, allocation="balanced", grouping="neighbours")
    assert widths(result) == [3] * 8
    forced = [balanced_loss(weight, [2] * i + [3] * (8 - 2 * i) + [4] * i) for i in range(4)]
    assert forced == sorted(forced)
    assert forced[0] < forced[1]


def balanced_loss(weight: Tensor, chosen: list[int]) -> float:
    blocks = [weight[:, 8 * g : 8 * g + 8] for g in range(len(chosen))]
    lost = [
        block - decoded(block, fit(block, b, 8, symmetric=True, search=True), 8) for block, b in zip(blocks, chosen, strict=True)
    ]
    return float(torch.cat(lost, 1).square().sum())


def test_the_search_of_balanced_widths_sees_errors_that_add_up() -> None:
    """E of rounding has terms between groups: they are followed from candidate to candidate, for any factor of H."""
    weight, hessian = problem(rows=12, columns=64, seed=3)
    full = damped(hessian)
    grids = {b: fit(weight, b, 8, symmetric=True, search=True) for b in (2, 3, 4)}
    salient = torch.arange(8.0).double()
    delta = {b: weight - decoded(weight, grids[b], 8) for b in grids}
    found = []
    for i in range(4):
        d = torch.cat(
            [delta[2 if g < i else 4 if g >= 8 - i else 3][:, 8 * g : 8 * g + 8] for g in range(8)],
            1,
        )
        found.append(float((d @ full * d).sum()))
    best = found.index(min(found))
    assert balanced(weight, full, salient, grids, 3, 8) == [2] * best + [3] * (8 - 2 * best) + [4] * best


def test_more_bits_go_where_inputs_are_large() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = torch.ones(64).double()
    size[16:32] = 100.0
    for allocation in ("free", "balanced"):
        options: dict[str, Any] = {"allocation": allocation, "spread": 1, "bits": 3, "group_size": 8}
        for grouping in ("salience", "neighbours"):
            base = part(slim(weight, torch.diag(size), **options, grouping=grouping))
            of_column = torch.arange(64) // 8 if base.group is None else base.group.long()
            assert (base.widths[of_column][16:32] == 4).all()
            assert base.widths.double().mean() == 3
