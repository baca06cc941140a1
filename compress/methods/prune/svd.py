"""Low rank alone: a weight becomes a product of two thin factors, cut off in whitened coordinates (SVD-LLM, arXiv 2403.07378).

Problem   for a weight W (out, in), minimise E(L) = tr((W - L) H (W - L)^T) over L = A B of rank r; H is the mean of x x^T.
Rank      `rank`, or the one that leaves a share 1 - `sparsity` of the numbers: r = floor((1 - sparsity) out in / (out + in)).
Answer    W S = U D V^T with H = S S^T, A = U_r D_r^1/2, B = D_r^1/2 V_r^T S^-1; E is the sum of the squares that are cut off.
          A is then solved for again with B as stored, in bfloat16.
Bound     with `perturbation` p, |W - L| <= p |W| in the Frobenius norm, so that inputs unlike the calibration's are served
          too: H is replaced by H + d mean(diag H) I, with the least damping d that meets the bound, found by bisection. Larger d
          leads from whitening to plain SVD, the closest to W at this rank; if even that exceeds the bound, it is used and the
          report says so. The idea that a bounded perturbation of weights keeps features is PELA's (arXiv 2310.10700), which
          bounds it while the factors are trained; this form is ours. `retrain/perp` with `weights: lora` trains the factors on
          the block's outputs and has its own bound.
Stored    an empty base, one bit for every row, and the factors: 16 r (out + in) / (out in) bits per weight, plus 1 / in.
Defaults  damping 1 % of the mean diagonal (ours; the published code damps only where the Cholesky factor fails).
Failures  at equal size, codes lose far less: half of the numbers take the bits of 8-bit codes. Without tokens it is plain SVD.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.methods.method import Described, Method, Result
from compress.methods.solvers.low_rank import DAMP, factors, fitted
from compress.weights.dense import Dense
from compress.weights.low_rank import LowRank, low_rank_bits
from compress.weights.mask import Bitmask, bitmask_bits
from compress.weights.weight import CompressedWeight

PLAIN = 1e6  # damping from which whitening makes no difference
HALVINGS = 12  # bisection steps over the range of dampings, on a logarithmic scale


def low_rank(weight: Tensor, hessian: Tensor, rank: int, damp: float) -> LowRank:
    """Return the product of this rank for weight (out, in) under hessian (in, in), as stored."""
    right = factors(weight, hessian, rank, damp)[1].bfloat16()
    return LowRank(fitted(weight, hessian, right, damp).bfloat16(), right)


def distance(weight: Tensor, part: LowRank) -> float:
    """Return |W - L| / |W| in the Frobenius norm, for a nonzero weight (out, in)."""
    return float((weight - part.dequantize()).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))


def bounded(weight: Tensor, hessian: Tensor, rank: int, bound: float) -> tuple[LowRank, float]:
    """Return the product of least damping that meets the bound, and that damping; plain SVD where none does."""
    low, high = DAMP, PLAIN
    found = low_rank(weight, hessian, rank, low)
    if distance(weight, found) <= bound:
        return found, low
    found = low_rank(weight, hessian, rank, high)
    if distance(weight, found) > bound:
        return found, high
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        tried = low_rank(weight, hessian, rank, middle)
        if distance(weight, tried) <= bound:
            found, high = tried, middle
        else:
            low = middle
    return found, high


class Svd(Method):
    """Options of low rank alone."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)
    rows_independent: ClassVar[bool] = False

    sparsity: Annotated[float, Field(ge=0, lt=1, description="share of the numbers that go")] = 0.5
    rank: Annotated[int, Field(ge=0, description="of the product; 0: what the sparsity leaves")] = 0
    perturbation: Annotated[float, Field(ge=0, description="largest |W - L| over |W|; 0: no bound")] = 0.0

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The rank that a weight of this shape (out, in) gets."""
        return self.rank or int((1 - self.sparsity) * shape[0] * shape[1] / (shape[0] + shape[1]))

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what is wrong with a weight of this shape (out, in)."""
        rank = self.rank_of(shape)
        if not 1 <= rank < min(shape):
            return f"rank={rank}, by sparsity={self.sparsity}, is not from 1 to {min(shape) - 1}; give another sparsity, or rank"
        return None

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        bits = bitmask_bits(shape, shape[1]) + low_rank_bits(shape, self.rank_of(shape))
        return Described(None, bits, bits, bits)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Replace weight (out, in) by a product."""
        rank, hessian = self.rank_of((weight.shape[0], weight.shape[1])), statistic(stats, Hessian).matrix()
        notes: dict[str, object] = {"rank": rank, "sparsity": 1 - rank * sum(weight.shape) / weight.numel()}
        if not bool(hessian.any()):
            hessian = torch.eye(len(hessian), device=weight.device)
            notes["fallback"] = "no tokens: plain SVD"
        if self.perturbation:
            part, damp = bounded(weight, hessian, rank, self.perturbation)
            far = distance(weight, part)
            notes |= {"damp": damp, "perturbation": far}
            if far > self.perturbation:
                notes["fallback"] = f"plain SVD, and |W - L| is {far:.3g} of |W|"
        else:
            part = low_rank(weight, hessian, rank, DAMP)
        nothing = Bitmask(torch.zeros(weight.shape[0], 1, dtype=torch.bool, device=weight.device), weight.shape[1])
        base = Dense(torch.zeros_like(weight, dtype=torch.bfloat16))
        return Result(CompressedWeight(base, keep=nothing, low_rank=part), notes)


METHOD = Svd
