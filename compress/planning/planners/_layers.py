"""Whole layers at two widths, the layers that matter more at the higher one (LIM and ZD, arXiv 2406.17415).

Steps     1. Of the candidates that fit every weight, by size: the last within the budget is the low one, the next the high one.
             Under a limit of cost the first within it is the high one, and the one before it the low one.
          2. Layers by descending score; all are low, and from the top each is raised while the budget holds (under a limit of
             cost: until it holds). The first that does not fit ends it, so that a layer never passes a more important one.
Ties      go to the earlier layer.
"""

from __future__ import annotations

import numpy as np

from compress.planning.problem import Choice, Problem, none_meets


def by_score(problem: Problem, score: str, most_bits: int | None = None, most_cost: float | None = None) -> Choice:
    """Give layers one of two neighbouring candidates by the score of this name, (layers,)."""
    variables = len(problem.bits)
    choices = [np.full(variables, c, dtype=np.int64) for c in problem.everywhere]
    within = [k for k, picks in enumerate(choices) if problem.meets(picks, most_bits, most_cost)]
    if not within:
        raise none_meets(score)
    if most_cost is None:
        low, high = within[-1], min(within[-1] + 1, len(choices) - 1)
    else:
        low, high = max(within[0] - 1, 0), within[0]
    order = np.argsort(-problem.scores[score], kind="stable")
    picks = choices[low].copy()
    for layer in order.tolist():
        if most_cost is not None and problem.meets(picks, most_bits, most_cost):
            break
        raised = np.where(problem.layer == layer, choices[high], picks)
        if most_cost is None and not problem.meets(raised, most_bits, None):
            break
        picks = raised
    return Choice(picks)
