"""GQSA: groups of neighbouring weights go, and what stays is quantized in the same groups (arXiv 2412.17560).

Problem   choose which 1 x g groups of a weight W (out, in) to keep, given the mean H (in, in) of x x^T.
Saliency  w^2 / [H^-1]_jj, what removing one weight costs after all others have made up for it (optimal brain surgeon); of a group
          the root of its sum of squares. H is damped by 1 % of its mean diagonal.
Quotas    exact; the same number of groups in every row by default, so that rows are equally long in memory.
Bits      with `bits` what stays is rounded on grids of `group_size`, and every error, of pruning too, is fed on to columns that
          are kept, as in GPTQ. With group_size = group a group that goes takes its scale along: at 4 bits, groups of 16 and
          half of them kept 0.5 (4 + 16 / 16) + 1 / 16 = 2.56 bits per weight.
Training  the paper trains twice: kept weights and scales block by block (`retrain/bqpo` in `tuning:`), then scales of the whole
          model (`retraining:` with `retrain/perp`). Recipe gqsa-w4s50.
Defaults  groups of 16. The paper's own settings could not be read; groups, bits and saliency are from secondary sources.
Failures  groups of 16 lose about four times what 2:4 loses at the same share before training: training is part of the method.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import Hessian, Stats, statistic
from compress.methods.method import Result
from compress.methods.pruning import Pruning
from compress.methods.solvers.mask_scores import exact
from compress.methods.solvers.mask_selection import Target, select
from compress.methods.solvers.masked_least_squares import DAMP, Normal


def saliency(weight: Tensor, normal: Normal) -> Tensor:
    """Return the root of w^2 / [H^-1]_jj (out, in), given the damped Hessian."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(normal.matrix.double())).diagonal()
    price = normal.scale.double() / inverse.sqrt()
    return exact(weight).abs() * price.to(exact(weight).dtype)


def gqsa(weight: Tensor, normal: Normal, target: Target) -> Tensor:
    """Return the mask (out, in) of what is kept of weight (out, in)."""
    return select(saliency(weight, normal), target)


class Gqsa(Pruning):
    """Options of pruning by groups with optimal brain surgeon's saliency."""

    group: Annotated[int, Field(ge=1, description="neighbouring columns that go or stay together")] = 16

    @model_validator(mode="before")
    @classmethod
    def _no_group_with_a_pattern(cls, values: Any) -> Any:
        return {"group": 1, **values} if isinstance(values, dict) and values.get("pattern") is not None else values

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Prune weight (out, in), given the Hessian of its inputs."""
        normal = Normal.of(statistic(stats, Hessian).matrix(), DAMP)
        if normal.blind:
            keep = select(exact(weight).abs(), self.target)
            return self.result(weight, keep, None, stats, {"fallback": "magnitude: no token was seen"})
        return self.result(weight, gqsa(weight, normal, self.target), None, stats)


METHOD = Gqsa
