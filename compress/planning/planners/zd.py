"""ZD: layers whose weights have fewer values above one standard deviation get more bits (z-score distribution, 2406.17415).

Score     ZD(l) = the share of weights of block l with (w - mean) / deviation > 1, all weights of the block together; the score is
          -ZD(l). Needs no data. It is within a few hundredths of 0.16 for every layer, so counts and moments are exact: they are
          summed in float64 over all weights.
Failures  it ranks by the shape of the tails alone, see `lim`.
"""

from __future__ import annotations

from compress.planning.planners._layers import by_score
from compress.planning.problem import Choice, Problem


def zd(problem: Problem, most_bits: int | None = None, most_cost: float | None = None) -> Choice:
    """Give layers one of two neighbouring candidates by ZD, see `_layers`."""
    return by_score(problem, "zd", most_bits, most_cost)


PLANNER = zd
