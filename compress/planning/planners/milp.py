"""MILP: the least predicted divergence within a budget of bits, or the fewest bits within one of divergence.

Problem   minimise sum_i f[i, x_i] subject to sum_i w[i, x_i] <= limit: a knapsack in which every variable i takes exactly one
          candidate x_i. f is the cost and w the stored bits, or the other way round.
Steps     1. Lagrangian relaxation: for lambda >= 0, L(lambda) = sum_i min_j (f + lambda w)_ij - lambda limit is a lower bound.
             Its maximum is found by bisection; the choices on either side of it are a feasible one and one that is just too big.
          2. Upper bound U: the feasible one, improved by single changes, the best ratio of gain to weight first.
          3. A candidate whose reduced cost alone lifts the bound above U is in no solution better than U. What is left of
             10^5 variables x 10 candidates is a few hundred, solved exactly by `scipy.optimize.milp` (HiGHS).
          4. Limits are checked on integers (bits) or on the sum itself (cost); a solution that uses the solver's tolerance is
             not taken, and the limit given to the solver is lowered by what it was exceeded by.
Result    `gap` is (U - bound) / U with the best bound known; `exact` says that the solver closed it.
Failures  more than `_LARGEST` candidates left, or the time is up: the best choice found, with its gap, is the result.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint
from scipy.optimize import milp as solve_integers

from compress.planning.problem import Choice, Counts, Numbers, Problem, none_meets

_SECONDS = 10.0  # for the solver; the relaxation takes less than one for 10^5 variables
_LARGEST = 20_000  # candidates that the solver is given
_GAP = 1e-9  # that the solver closes
_ENOUGH = 1e-6  # a gap that no solver is asked to close: predictions are not that good by far
_HALVINGS = 60
_TRIED = 10_000  # single changes beyond the first that does not fit


def milp(problem: Problem, most_bits: int | None = None, most_cost: float | None = None) -> Choice:
    """Minimise the cost within `most_bits`, or the bits within `most_cost`."""
    bits = np.where(problem.fits, problem.bits, 0).astype(np.int64)
    cost = np.where(problem.fits, problem.cost, 0.0)
    if most_bits is not None:
        return _Knapsack(cost, bits, problem.fits, most_bits).solve()
    assert most_cost is not None
    return _Knapsack(bits.astype(np.float64), cost, problem.fits, most_cost).solve()


class _Knapsack:
    """Minimise the sum of f within a limit on the sum of w."""

    def __init__(self, f: Numbers, w: Numbers | Counts, fits: NDArray[np.bool_], limit: float | int) -> None:
        self.f, self.w, self.fits, self.limit = f, w, fits, limit
        self.everyone = np.arange(len(f))
        # Numbers near one for bisection and solver; limits are checked on `w` itself.
        self.f_unit = max(float(f[fits].max(initial=0.0)), 1e-300)
        self.w_unit = max(float(w[fits].max(initial=0.0)), 1e-300)
        self.f_scaled = np.where(fits, f / self.f_unit, np.inf)
        self.w_scaled = w / self.w_unit

    def _sum(self, values: Numbers | Counts, picks: Counts) -> float | int:
        total: float | int = values[self.everyone, picks].sum().item()
        return total

    def _best_at(self, price: float) -> Counts:
        """The choice that minimises f + price w."""
        value = self.f_scaled + price * self.w_scaled
        picks: Counts = value.argmin(1)
        return picks

    def _bound(self, price: float) -> float:
        return float((self.f_scaled + price * self.w_scaled).min(1).sum() - price * self.limit / self.w_unit)

    def solve(self) -> Choice:
        """Relax, reduce, solve what is left."""
        lightest = np.where(self.fits, self.w_scaled, np.inf).argmin(1)
        if self._sum(self.w, lightest) > self.limit:
            raise none_meets("milp")
        free = np.where(self.f_scaled <= self.f_scaled.min(1, keepdims=True), self.w_scaled, np.inf).argmin(1)
        if self._sum(self.w, free) <= self.limit:
            return Choice(free, 0.0, True)
        low, high = 0.0, 1.0
        while self._sum(self.w, self._best_at(high)) > self.limit and high < 1e18:
            low, high = high, high * 8
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if middle in (low, high) or high - low <= 1e-12 * high:
                break
            low, high = (low, middle) if self._sum(self.w, self._best_at(middle)) <= self.limit else (middle, high)
        price = max((low, high), key=self._bound)
        bound = self._bound(price)
        feasible = self._best_at(high)
        if self._sum(self.w, feasible) > self.limit:
            feasible = lightest
        best = min((self._improved(feasible), self._improved(lightest)), key=lambda picks: self._sum(self.f, picks))
        upper = self._sum(self.f_scaled, best)

        value = self.f_scaled + price * self.w_scaled
        reduced = value - value.min(1, keepdims=True)
        keep = self.fits & (bound + reduced <= upper * (1 + 1e-12) + 1e-12)
        keep[self.everyone, best] = True
        exact = False
        if upper - bound > _ENOUGH * abs(upper) and keep[keep.sum(1) > 1].sum() <= _LARGEST:
            found, lower, exact = self._integers(keep, best)
            best = found if self._sum(self.f, found) < self._sum(self.f, best) else best
            upper = self._sum(self.f_scaled, best)
            bound = max(bound, lower)
        gap = max(0.0, (upper - bound) / upper) if upper > 0 else 0.0
        return Choice(best, gap, exact or gap <= _GAP)

    def _improved(self, picks: Counts) -> Counts:
        """Change single variables, the best gain per weight first, while it fits and helps."""
        picks = picks.copy()
        left = self.limit - self._sum(self.w, picks)
        for _ in range(8):
            gain = self.f_scaled[self.everyone, picks][:, None] - self.f_scaled
            extra = self.w - self.w[self.everyone, picks][:, None]
            ratio = np.where(self.fits & (gain > 0) & (extra <= left), gain, 0) / np.maximum(extra / self.w_unit, 1e-12)
            columns = ratio.argmax(1)
            best = ratio[self.everyone, columns]
            rows = np.flatnonzero(best > 0)
            if not len(rows):
                break
            rows = rows[np.argsort(-best[rows], kind="stable")]
            steps = extra[rows, columns[rows]]
            first = int(np.searchsorted(np.maximum.accumulate(np.cumsum(steps)), left, side="right"))  # that fit for certain
            picks[rows[:first]] = columns[rows[:first]]
            left -= steps[:first].sum().item()
            for row, step in zip(rows[first : first + _TRIED].tolist(), steps[first : first + _TRIED].tolist(), strict=True):
                if step <= left:
                    picks[row] = columns[row]
                    left -= step
        # The running difference of floats is not the sum itself.
        return picks if self._sum(self.w, picks) <= self.limit else np.where(self.fits, self.w_scaled, np.inf).argmin(1)

    def _integers(self, keep: NDArray[np.bool_], start: Counts) -> tuple[Counts, float, bool]:
        """Solve for the variables that have a choice left; return picks, a lower bound of scaled f, and whether it is closed."""
        open_ = np.flatnonzero(keep.sum(1) > 1)
        settled = np.setdiff1d(self.everyone, open_)
        picks = start.copy()
        picks[settled] = keep[settled].argmax(1)
        base_f = float(self.f_scaled[settled, picks[settled]].sum())
        base_w = self.w[settled, picks[settled]].sum().item()
        rows, columns = np.nonzero(keep[open_])
        f, w = self.f_scaled[open_[rows], columns], self.w[open_[rows], columns]
        if np.issubdtype(w.dtype, np.integer):
            unit: float | int = max(int(np.gcd.reduce(w)), 1)
            weights, left = w // unit, (self.limit - base_w) // unit
        else:
            unit = max(self.limit / 1e3, 1e-300)  # the solver's tolerance is absolute
            weights, left = w / unit, (self.limit - base_w) / unit
        one = sparse.csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(open_), len(rows)))
        lower = -np.inf
        for attempt in range(5):
            with _quiet():
                result = solve_integers(
                    f * 1e3 / max(float(f.max()), 1e-300),
                    constraints=[
                        LinearConstraint(one, 1, 1),
                        LinearConstraint(weights[None, :].astype(np.float64), -np.inf, left),
                    ],
                    integrality=np.ones(len(rows)),
                    bounds=Bounds(0, 1),
                    options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
                )
            if result.x is None:
                break
            table = np.zeros((len(open_), keep.shape[1]))
            table[rows, columns] = result.x
            found = picks.copy()
            found[open_] = table.argmax(1)
            over = self._sum(self.w, found) - self.limit
            if attempt == 0:  # a lowered limit says nothing about what is possible within the one asked for
                lower = base_f + float(result.mip_dual_bound) * max(float(f.max()), 1e-300) / 1e3
            if over <= 0:
                return found, lower, result.status == 0 and attempt == 0
            left -= over / unit
        return start, lower, False


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what the solver's C++ code writes to standard output nowhere: it says a few things whatever it is told."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


PLANNER = milp
