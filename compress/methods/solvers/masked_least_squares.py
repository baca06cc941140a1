"""The best weights for a mask: masked least squares by conjugate gradients, for all rows at once.

With a damped Hessian H, the weight W (out, in) and a mask, minimise E(V) = tr((W - V) H (W - V)^T) over V that are 0 where
nothing is kept. The damping is on both sides: it pulls towards W and not towards 0. In columns scaled by n_j = sqrt(H_jj),
A = H / (n n^T) has a unit diagonal, which is the Jacobi preconditioner; X = V n, B = W n, and of every row

    R = keep (B - X) A,    P = R;    a = |R|^2 / <P, P A>,  X += a P,  R -= a keep (P A),  P = R + (|R_new|^2 / |R|^2) P

Every step lowers E of every row (Hestenes and Stiefel, 1952). Ten take it to within 1 % of what exact solutions gain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.calibration.statistics import Hessian, Stats, statistic
from compress.errors import CalibrationError
from compress.methods.solvers.error_feedback import full_precision

DAMP = 0.01
ITERATIONS = 20


@dataclass(frozen=True, eq=False)
class Normal:
    """A damped Hessian with a unit diagonal, and the scale of every column."""

    matrix: Tensor  # (in, in)
    scale: Tensor  # (in,)
    dead: Tensor  # (in,) bool, columns that no token touched

    @classmethod
    def of(cls, hessian: Tensor, damp: float) -> Normal:
        """Damp hessian (in, in) by `damp` times its mean diagonal. Raises CalibrationError on values that are not finite."""
        if not all(map(math.isfinite, hessian.aminmax())):
            raise CalibrationError(
                "Hessian: got values that are not finite; look for activations that overflow the model's dtype"
            )
        diagonal = hessian.diagonal()
        dead = diagonal <= 0
        mean = float(diagonal.sum()) / max(int((~dead).sum()), 1)
        damped = hessian / mean if mean > 0 else torch.zeros_like(hessian)
        damped.diagonal().add_(damp if mean > 0 else 1.0)
        scale = damped.diagonal().sqrt()
        return cls(damped / scale / scale.unsqueeze(1), scale, dead)

    @property
    def blind(self) -> bool:
        """Whether no token was seen, so that there is nothing to go by."""
        return bool(self.dead.all())


def masked_lsq(
    weight: Tensor,
    keep: Tensor,
    normal: Normal,
    *,
    start: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Return the values (out, in) on a mask (out, in) bool that are nearest to weight (out, in) in the layer's outputs.

    `start` (out, in) is where the search begins: the weight if None. Values that are not kept are exactly 0.
    """
    target = weight * normal.scale
    found = (target if start is None else start * normal.scale).masked_fill(~keep, 0.0)
    residual = ((target - found) @ normal.matrix).masked_fill_(~keep, 0.0)
    direction, power = residual.clone(), residual.square().sum(1, keepdim=True)
    for _ in range(iterations):
        bent = direction @ normal.matrix
        curvature = (direction * bent).sum(1, keepdim=True)
        step = torch.where(curvature > 0, power / curvature, 0.0)
        found.addcmul_(step, direction)
        residual.addcmul_(step, bent.masked_fill_(~keep, 0.0), value=-1)
        before, power = power, residual.square().sum(1, keepdim=True)
        direction.mul_(torch.where(before > 0, power / before, 0.0)).add_(residual)
    return found / normal.scale


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """Return tr((W - V) H (W - V)^T)."""
    delta = weight - values
    return float(((delta @ hessian) * delta).sum())


def updated(weight: Tensor, keep: Tensor, stats: Stats) -> tuple[Tensor | None, dict[str, Any]]:
    """Return the best values (out, in) on a mask by the Hessian among the statistics, and notes; None where no token was seen."""
    normal = Normal.of(statistic(stats, Hessian).matrix().to(weight.dtype), DAMP)
    if normal.blind:
        return None, {"fallback": "values as they were: no token was seen"}
    with full_precision():
        return masked_lsq(weight, keep, normal), {}
