"""LIM: layers that change their input more get more bits (layer input modification, arXiv 2406.17415).

Score     LIM(l) = -mean over tokens of cos(h_in, h_out), h the hidden states that enter and leave block l of the original model,
          residual included. The higher, the more the layer matters.
Failures  the first block's score is large whatever it does, as embeddings are small; the cosine sees neither the
          error of a weight nor its effect further on. `milp` accounts for both.
"""

from __future__ import annotations

from compress.planning.planners._layers import by_score
from compress.planning.problem import Choice, Problem


def lim(problem: Problem, most_bits: int | None = None, most_cost: float | None = None) -> Choice:
    """Give layers one of two neighbouring candidates by LIM, see `_layers`."""
    return by_score(problem, "lim", most_bits, most_cost)


PLANNER = lim
