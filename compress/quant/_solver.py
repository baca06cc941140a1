"""The triangular solver of error-compensating rounding: factor a Hessian once, then round one column after another.

Rounding W (out, in) to Q costs E = tr(D H D^T), D = W - Q. With the columns in processing order, H = R R^T and R upper
triangular with pivots r_k = R[k, k], the cost is a sum of squares over columns:

    E = sum_k r_k^2 |D_k + sum_{i<k} D_i a_ik|^2,   a_ik = R[i, k] / r_k

so column k is rounded towards c_k = W_k + sum_{i<k} D_i a_ik, the weight that makes its square vanish. This is the GPTQ
update written as feedback of the errors made so far (QuIP, arXiv 2307.13304, theorem 6): the rows of U in GPTQ's U^T U = H^-1
are those of R^-1, and neither the inverse nor a second factorisation is needed.

Working layout: (in, out), a column of the weight is one contiguous row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.quant._grid import Grid, nearest

_LADDER = 4  # the damping asked for, then ten times as much, three times


@dataclass(frozen=True, eq=False)
class Factor:
    """A damped Hessian in processing order, factored."""

    order: Tensor  # (in,) int64: the column processed at each step
    feedback: Tensor  # (in, in): row k holds a_ik for i < k; zeros from the diagonal on
    pivots: Tensor  # (in,) r_k, of the Hessian over its mean diagonal
    mean: float  # mean diagonal of the columns that are not dead
    damp: float  # what was added to the diagonal, over the mean
    dead: int  # columns that no token touched
    fallback: str | None  # what was done because the factorisation failed


def factorise(hessian: Tensor, damp: float, *, descending: bool) -> Factor:
    """Factor hessian (in, in) with `damp` times its mean diagonal added, columns in natural or descending diagonal order.

    A failing Cholesky factorisation is retried with ten times the damping, three times; then the result is that of an
    identity Hessian. Raises CalibrationError on values that are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            "Hessian: got values that are not finite, expected sums of x x^T; check the model's activations for overflow"
        )
    size = hessian.shape[0]
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if descending else torch.arange(size, device=hessian.device)
    dead = diagonal <= 0
    count = int(dead.sum())
    mean = float(diagonal.sum()) / (size - count) if count < size else 1.0
    if count == size:
        return Factor(order, torch.zeros_like(hessian), torch.ones_like(diagonal), mean, damp, count, "rtn: no input was seen")
    backwards = order.flip(0)
    scaled = hessian[backwards][:, backwards] / mean
    scaled.diagonal()[dead[backwards]] = 1.0  # decoupled from all others: rounded plainly
    for step in range(_LADDER):
        lower, info = torch.linalg.cholesky_ex(scaled + torch.eye(size, dtype=scaled.dtype, device=scaled.device) * damp)
        if int(info) == 0:
            pivots = lower.diagonal().flip(0)
            feedback = lower.T.flip(0, 1) / pivots.unsqueeze(1)
            note = f"damp raised to {damp:g}" if step else None
            return Factor(order, feedback.tril_(-1), pivots, mean, damp, count, note)
        if step + 1 < _LADDER:
            damp = max(damp * 10, 1e-4)
    return Factor(
        order,
        torch.zeros_like(hessian),
        torch.ones_like(diagonal),
        mean,
        damp,
        count,
        f"rtn: not positive definite with damp {damp:g}",
    )


@dataclass(eq=False)
class Sweep:
    """One pass over the columns in processing order, each rounded towards its compensated weight.

    The span lo..hi is solved as two halves, with one product that carries the errors of the first into the second: big
    products at the top, and column by column only inside `block` columns. Codes do not depend on `block`.
    """

    target: Tensor  # (in, out) compensated weights; starts as the weight
    delta: Tensor  # (in, out) weight - rounded; starts as the weight
    codes: Tensor  # (in, out) uint8
    feedback: Tensor  # (in, in)
    groups: list[int]  # group of each step
    grids: list[Grid | None]  # per group, scale (out, 1)
    block: int
    fit: Callable[[Tensor], Grid] | None = None  # fits weights (out, group size) when their group is reached
    group_size: int = 0  # of the groups to be fitted

    def run(self, low: int, high: int) -> None:
        """Round the steps low..high; everything before them has been carried into their targets."""
        count = high - low
        if self.fit is not None and count == self.group_size:
            self.grids[self.groups[low]] = self.fit(self.target[low:high].T.contiguous())
        dynamic = self.fit is not None and count > self.group_size
        if not dynamic and count <= self.block:
            self._columns(low, high)
            return
        unit = self.group_size if dynamic else self.block
        middle = low + -(-(count // unit) // 2) * unit if count >= 2 * unit else low + unit
        self.run(low, middle)
        self.target[middle:high].addmm_(self.feedback[middle:high, low:middle], self.delta[low:middle])
        self.run(middle, high)

    def _columns(self, low: int, high: int) -> None:
        for k in range(low, high):
            grid = self.grids[self.groups[k]]
            assert grid is not None
            if k > low:
                self.target[k].addmv_(self.delta[low:k].T, self.feedback[k, low:k])
            scale = grid.scale.to(self.target.dtype).squeeze(1)
            least, most, zero = (x.squeeze(1) if isinstance(x, Tensor) else x for x in grid.bounds(scale.dtype))
            code = nearest(self.target[k] * scale.reciprocal(), least, most)
            self.delta[k].addcmul_(code, scale, value=-1)
            self.codes[k] = code + zero
