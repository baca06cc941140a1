"""ALPS: mask and values by alternating directions, then the best values for the mask (Meng et al., arXiv 2406.07831).

Problem   minimise E(V) = tr((W - V) H (W - V)^T) over V with a given number of nonzeros; H is the mean of x x^T.
Shapes    weight W (out, in), Hessian H (in, in), mask and values (out, in).
Steps     1. H <- H / mean(diag H) + damp I; columns are scaled by n_j = sqrt(H_jj): A = H / (n n^T), B_0 = W n, G = B_0 A.
          2. The problem is split into B, which minimises the error, and D, which is sparse; multipliers V and a penalty rho make
             them agree:
                 B = (G - V + rho D) (A + rho I)^-1,    D = P(B + V / rho),    V <- V + rho (B - D)
             P keeps the largest: of the matrix, of each row, of every group of a pattern, or as runs of columns.
          3. Every third iteration, rho grows by 1.3, 1.2 or 1.1: the more of the mask has changed since the last, the faster.
             If hardly any of it changes before rho has ever grown, rho was too large: it is divided by 5 and the search restarts.
             The search ends when less than 3e-4 of the mask changes after the 30th iteration, or none of it.
          4. The mask is that of P(B). Its values are solved for by conjugate gradients, see `masked_least_squares`.
Bits      values are rounded column by column under the mask, with error feedback; refinement targets the original weight.
Defaults  damp 0.01, rho 0.1, at most 300 iterations, and the rule for rho: those of the authors' program.
Failures  some 30 iterations of products and a few factorisations per matrix: the slowest one-shot method here. By default the
          whole matrix competes, and rows keep between a third and two thirds; for kernels that want equal rows, use
          `within: row`. A mask is good only for the values it was found with: do not change either alone.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Stats, statistic
from compress.methods.method import Result
from compress.methods.pruning import Pruning
from compress.methods.solvers.error_feedback import full_precision
from compress.methods.solvers.mask_scores import exact
from compress.methods.solvers.mask_selection import Target, Within, select
from compress.methods.solvers.masked_least_squares import Normal, masked_lsq

_EVERY = 3  # iterations between checks of the support
_SETTLED, _LEAST_ITERATIONS = 3e-4, 30


def alps(
    weight: Tensor, hessian: Tensor, target: Target, *, damp: float, rho: float, iterations: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the mask (out, in) bool of weight (out, in) under hessian (in, in), the values on it, and notes.

    Computes in float32, or in float64 if either is float64.
    """
    dtype = torch.promote_types(exact(weight).dtype, hessian.dtype)
    weight = weight.to(dtype)
    normal = Normal.of(hessian.to(dtype), damp)
    if normal.blind:
        keep = select(weight.abs(), target)
        return keep, weight.masked_fill(~keep, 0.0), {"fallback": "magnitude: no token was seen"}
    with full_precision():
        begun = weight * normal.scale
        found, notes = _alternate(begun, normal.matrix, target, rho, iterations)
        keep = select(found.abs(), target)
        values = masked_lsq(weight, keep, normal, start=found.masked_fill(~keep, 0.0) / normal.scale)
    return keep, values, {"damp": damp, "dead_columns": int(normal.dead.sum()), **notes}


def _alternate(begun: Tensor, matrix: Tensor, target: Target, rho: float, iterations: int) -> tuple[Tensor, dict[str, Any]]:
    """Return B (out, in) once the support of D has settled, for scaled weights (out, in) and a matrix (in, in)."""
    aim = begun @ matrix
    support = select(begun.abs(), target)
    dense, sparse, multiplier = begun, begun.masked_fill(~support, 0.0), torch.zeros_like(begun)
    seen, count, grown = support, max(int(support.sum()), 1), False
    factor = _factor(matrix, rho)
    iteration = 0
    for iteration in range(1, iterations + 1):
        dense = torch.cholesky_solve((aim - multiplier + rho * sparse).T, factor).T
        wanted = dense + multiplier / rho
        support = select(wanted.abs(), target)
        sparse = wanted.masked_fill(~support, 0.0)
        multiplier = multiplier + rho * (dense - sparse)
        if iteration % _EVERY:
            continue
        changed = int((support != seen).sum())
        seen = support
        share = changed / count
        if changed == 0 and grown:
            break
        if share > 0.005 or (changed and grown):
            rho, grown = rho * (1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1), True
        else:
            rho /= 5
            if changed:  # restart
                seen = select(begun.abs(), target)
                dense, sparse, multiplier = begun, begun.masked_fill(~seen, 0.0), torch.zeros_like(begun)
        if iteration >= _LEAST_ITERATIONS and share < _SETTLED:
            break
        factor = _factor(matrix, rho)
    return dense, {"iterations": iteration}


def _factor(matrix: Tensor, rho: float) -> Tensor:
    """Return the Cholesky factor of A + rho I, which is well conditioned: A is damped and has a unit diagonal."""
    shifted = matrix.clone()
    shifted.diagonal().add_(rho)
    lower: Tensor = torch.linalg.cholesky(shifted)
    return lower


class ALPS(Pruning):
    """Options of ALPS."""

    within: Annotated[Within, Field(description="what competes: the weights of the whole matrix, or of a row")] = "matrix"
    damp: Annotated[float, Field(gt=0, le=100, description="added to the diagonal of the Hessian, over its mean")] = 0.01
    rho: Annotated[float, Field(gt=0, le=100, description="penalty that the search begins with")] = 0.1
    iterations: Annotated[int, Field(ge=1, le=10000, description="at most, of the search for the mask")] = 300

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Prune weight (out, in) under the Hessian of its inputs."""
        keep, values, notes = alps(
            weight, statistic(stats, Hessian).matrix(), self.target, damp=self.damp, rho=self.rho, iterations=self.iterations
        )
        return self.result(weight, keep, None if "fallback" in notes else values, stats, notes)


METHOD = ALPS
