"""Magnitude: the smallest weights go (Han et al., arXiv 1506.02626).

Problem   choose what to keep of a weight W (out, in), without data.
Score     |W_ij|; of runs of neighbouring columns the root of their sum of squares.
Quotas    exact, see `mask_selection`: of the whole matrix by default, of every row, or N of every M. What competes over all
          matrices is decided before a run, with `compress prune --distribute global`.
Update    `update: true` moves what is kept to where the error of the outputs is least, see `masked_least_squares`; it needs data.
          Otherwise values stay as they are, in the type that they had.
Defaults  per matrix: better than per row for plain magnitude (essential sparsity, arXiv 2306.03805, prunes over all matrices).
Failures  inputs of large channels count as much as others: from 50 % on, language models lose far more than with `prune/wanda`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats
from compress.methods.method import Result
from compress.methods.pruning import Pruning
from compress.methods.solvers.mask_scores import exact
from compress.methods.solvers.mask_selection import Target, Within, select
from compress.methods.solvers.masked_least_squares import updated


def magnitude(weight: Tensor, target: Target) -> Tensor:
    """Return the mask (out, in) of what is kept of weight (out, in)."""
    return select(exact(weight).abs(), target)


class Magnitude(Pruning):
    """Options of magnitude pruning."""

    within: Annotated[Within, Field(description="what competes: the weights of the whole matrix, or of a row")] = "matrix"
    update: Annotated[bool, Field(description="move what is kept to the least error of the outputs; needs data")] = False

    @property
    def needs(self) -> tuple[type[Statistics], ...]:
        """The statistics that these options need."""
        return (Hessian,) if self.update else ()

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Prune weight (out, in); the statistics are looked at where values are updated."""
        keep = magnitude(weight, self.target)
        values, notes = updated(weight, keep, stats) if self.update else (None, {})
        return self.result(weight, keep, values, stats, notes)


METHOD = Magnitude
