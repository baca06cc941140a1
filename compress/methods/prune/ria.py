"""RIA: weights go that are small for their row and their column, and meet quiet inputs (Zhang et al., ICLR 2024).

Problem   choose what to keep of a weight W (out, in), given what its inputs x look like, without emptying weak rows and columns.
Score     S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) (mean x_j^2)^(power / 2)
Quotas    exact, of the whole matrix by default, see `mask_selection`: the first factor makes rows comparable.
Update    `update: true` moves what is kept to where the error of the outputs is least, see `masked_least_squares`.
Defaults  power 0.5 and whole matrices, those of the authors' program. Without any token the second factor is 1.
Failures  as of Wanda, nothing makes up for what is removed unless values are updated. The order of channels before N:M, which the
          paper adds, is `transform/permute`, for this score and others, where an order costs nothing at run time.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Stats
from compress.methods.method import Result
from compress.methods.pruning import Scored
from compress.methods.solvers.mask_scores import relative_importance
from compress.methods.solvers.mask_selection import Within


class RIA(Scored):
    """Options of relative importance and activations."""

    within: Annotated[Within, Field(description="what competes: the weights of the whole matrix, or of a row")] = "matrix"
    power: Annotated[float, Field(ge=0, le=2, description="of the inputs' root mean square")] = 0.5

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Prune weight (out, in) by relative importance."""
        return self.by_score(weight, lambda w, square: relative_importance(w, square, self.power), stats)


METHOD = RIA
