"""Uniform: one candidate for all weights, the best of those within the budget. What other planners are compared with."""

from __future__ import annotations

import numpy as np

from compress.planning.problem import Choice, Problem, none_meets


def uniform(problem: Problem, most_bits: int | None = None, most_cost: float | None = None) -> Choice:
    """Under a limit of bits take the candidate of least cost, under one of cost that of fewest bits."""
    choices = [np.full(len(problem.bits), c, dtype=np.int64) for c in problem.everywhere]
    within = [picks for picks in choices if problem.meets(picks, most_bits, most_cost)]
    if not within:
        raise none_meets("uniform")
    return Choice(min(within, key=problem.cost_of if most_cost is None else problem.bits_of))


PLANNER = uniform
