"""What a planner decides: one candidate for each variable, a set of weights that go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import RecipeError

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """Numbers for every variable and candidate; those of a candidate that does not fit a variable are not looked at."""

    bits: Counts  # (variables, candidates) stored bits
    cost: Numbers  # (variables, candidates) predicted divergence, not negative
    fits: NDArray[np.bool_]  # (variables, candidates)
    layer: Counts  # (variables,) the block of each variable
    scores: dict[str, Numbers]  # by name of a score, (layers,): the higher, the more a layer matters

    def bits_of(self, picks: Counts) -> int:
        """Stored bits of a choice (variables,)."""
        return int(self.bits[np.arange(len(picks)), picks].sum())

    def cost_of(self, picks: Counts) -> float:
        """Cost of a choice (variables,)."""
        return float(self.cost[np.arange(len(picks)), picks].sum())

    def meets(self, picks: Counts, most_bits: int | None, most_cost: float | None) -> bool:
        """Whether a choice is within both limits."""
        within = most_bits is None or self.bits_of(picks) <= most_bits
        return within and (most_cost is None or self.cost_of(picks) <= most_cost)

    @property
    def everywhere(self) -> list[int]:
        """Candidates that fit every variable, by the bits they would take."""
        return sorted(np.flatnonzero(self.fits.all(0)).tolist(), key=lambda c: (int(self.bits[:, c].sum()), c))


@dataclass(frozen=True, eq=False)
class Choice:
    """What a planner decided."""

    picks: Counts  # (variables,) the candidate of each
    gap: float = 0.0  # how far, relatively, the result may be above the best there is; 0 where the planner seeks no best
    exact: bool = False  # proven to be the best to within rounding of the solver


Planner = Callable[[Problem, int | None, float | None], Choice]


def none_meets(name: str) -> RecipeError:
    """What to say where nothing that a planner may choose is within the budget."""
    return RecipeError(f"--planner {name}: no choice it can make is within the budget; give more room, or use --planner milp")
