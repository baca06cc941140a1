"""Wanda: the weights go whose contributions to the outputs are smallest (Sun et al., arXiv 2306.11695).

Problem   choose what to keep of a weight W (out, in), given what its inputs x look like.
Score     S_ij = |W_ij| sqrt(mean x_j^2), the root of the error that removing this weight alone makes.
Quotas    exact, of every row by default, see `mask_selection`: rows are compared with nothing but themselves.
Swaps     `swaps: n` goes on from that mask: up to n times, each row exchanges one weight that is kept for one that is not, the
          pair that lowers the row's error tr((W - V) H (W - V)^T) most while kept values stay as they are, see `mask_swaps`.
Update    `update: true` then moves what is kept to where the error is least, see `masked_least_squares`. As swaps, it needs the
          Hessian and not just its diagonal.
Defaults  those of the paper: rows, no update. Inputs that were always 0 score 0 and go first. Without any token, magnitude.
Failures  the score knows nothing of correlated inputs and, without an update, nothing makes up for what is removed: from 60 %
          on, or in patterns, `prune/alps` loses far less. On small models it can lose to magnitude there.
"""

from __future__ import annotations

from torch import Tensor

from compress.calibration.statistics import Stats
from compress.methods.method import Result
from compress.methods.pruning import Scored
from compress.methods.solvers.mask_scores import contribution
from compress.methods.solvers.mask_selection import Target, select


def wanda(weight: Tensor, square: Tensor, target: Target) -> Tensor:
    """Return the mask (out, in) of what is kept of weight (out, in), given the mean square of each input (in,)."""
    return select(contribution(weight, square), target)


class Wanda(Scored):
    """Options of Wanda."""

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Prune weight (out, in) by the mean square of its inputs."""
        return self.by_score(weight, contribution, stats)


METHOD = Wanda
