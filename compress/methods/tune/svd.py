"""A low-rank part for what compression took: truncated SVD in whitened coordinates (SVD-LLM, arXiv 2403.07378).

Problem   with R = W - Q (out, in), the error of a compressed weight Q, and the mean H of x x^T over its inputs, minimise
          E(L) = tr((R - L) H (R - L)^T) over matrices L of rank r.
Answer    H = S S^T (Cholesky), R S = U D V^T, L = U_r D_r V_r^T S^-1: E(L) is the sum of the squares of the singular values
          cut off. Stored as left = U_r D_r^1/2 and right = D_r^1/2 V_r^T S^-1 in bfloat16, the inverse by a triangular solve.
Order     inputs are taken after the compressed blocks, with the block's weights as its own step left them.
Fit       then the left factor is solved for again with the right one as stored: left = R H right^T (right H right^T)^-1.
Bits      16 r (out + in) / (out in) more per weight, which are counted. This is for what codes or masks miss; `prune/svd` is low
          rank alone. `retrain/perp` with `weights: lora` trains the factors (PELA, arXiv 2310.10700, trains such factors on the
          features of the original).
Defaults  rank 16, damping 1 % of the mean diagonal (ours; the published code damps only where the Cholesky factor fails).
Failures  weights that already have a low-rank part, or a transformed input, are left alone and named in the notes. Without
          tokens nothing is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, statistic
from compress.methods.block import Block, TuningResult
from compress.methods.method import Method
from compress.methods.solvers.low_rank import factors, fitted
from compress.weights.low_rank import LowRank, low_rank_bits
from compress.weights.weight import CompressedWeight


def part(weight: Tensor, compressed: Tensor, hessian: Tensor, rank: int) -> LowRank:
    """Return the low-rank part for the error of a compressed weight (out, in) against weight (out, in)."""
    rest = weight - compressed
    right = factors(rest, hessian, rank)[1].bfloat16()
    return LowRank(fitted(rest, hessian, right).bfloat16(), right)


class Svd(Method):
    """Options of the low-rank part."""

    scope: ClassVar[Literal["site", "block"]] = "block"

    rank: Annotated[int, Field(ge=1, description="columns of the left factor")] = 16

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what is wrong with a weight of this shape (out, in)."""
        most = min(shape)
        return None if self.rank < most else f"rank={self.rank} is not below {most}, what a weight of {list(shape)} has; use less"

    def added_bits(self, shape: tuple[int, int]) -> int:
        """Bits that are added to a weight of this shape (out, in)."""
        return low_rank_bits(shape, self.rank)

    def __call__(self, block: Block, weights: Mapping[str, CompressedWeight]) -> TuningResult:
        """Add a low-rank part to the weights of a block."""
        found: dict[str, CompressedWeight] = {}
        notes: dict[str, Any] = {}
        for names, stats in block.observe_in_turn((Hessian,)):
            matrix = statistic(stats, Hessian).matrix()
            for site in names:
                weight = weights[site]
                if weight.low_rank is not None or weight.transformed or not bool(matrix.any()):
                    notes.setdefault("unchanged", []).append(site)
                    continue
                found[site] = replace(weight, low_rank=part(block.weight(site), weight.dequantize(), matrix, self.rank))
            block.say(len(found) / max(len(weights), 1))
        return TuningResult(found, {}, notes)


METHOD = Svd
