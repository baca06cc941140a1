"""Steps of methods that kernels may take over: their schemas, and what they compute in plain torch.

Methods import this file and no kernel. `round_columns` and `nearest` in `compress/kernels` register implementations for CUDA with
torch's dispatcher; where they were not imported, or a tensor is elsewhere, what stands here runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPAN = 128  # columns that `round_columns` takes at once


def nearest_step(scaled: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round w / scale to the nearest of low, low + 1, ..., high: integers, or halves of odd integers."""
    half = low - low.floor()  # 0 or 1/2
    return ((scaled - half).round() + half).clamp(low, high)


def columns_by_torch(
    target: Tensor,
    delta: Tensor,
    steps: Tensor,
    feedback: Tensor,
    scale: Tensor,
    inverse: Tensor,
    low: Tensor,
    high: Tensor,
    groups: Tensor,
) -> None:
    """Round up to 128 columns one after another, each towards its target plus the errors made so far, in place.

    target, delta and steps are (columns, out) float32: what each column is rounded towards without the errors of these columns,
    complete afterwards; the weight, afterwards weight - rounded; written. feedback (columns, columns) is read below its diagonal:
    target_k += sum_{i<k} delta_i feedback_ki. scale, inverse, low, high are (groups, out), groups (columns,) int64. Four launches
    per column.
    """
    for k, group in enumerate(groups.tolist()):
        if k:
            target[k].addmv_(delta[:k].T, feedback[k, :k])
        steps[k] = nearest_step(target[k] * inverse[group], low[group], high[group])
        delta[k].addcmul_(steps[k], scale[group], value=-1)


# The operator: `columns_by_torch`, unless a kernel takes over.
round_columns = torch.library.custom_op("compress::round_columns", columns_by_torch, mutates_args=("target", "delta", "steps"))

_SCORES = 1 << 24  # of points and centroids that exist at a time in plain torch


def centered(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Move the origin to the mean of the centroids: differences of squares lose less there."""
    mean = centroids.mean(0, keepdim=True)
    return points - mean, centroids - mean


def assigned_by_torch(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """`assign` in plain torch, some points at a time."""
    if not len(centroids) or points.shape[1:] != centroids.shape[1:] or (weights is not None and weights.shape != points.shape):
        shapes = [None if t is None else tuple(t.shape) for t in (points, centroids, weights)]
        raise ValueError(f"assign: points, centroids and weights are {shapes}; expected (n, v), (k, v) with k > 0, and (n, v)")
    points, centroids = centered(points, centroids)
    square = centroids.square()
    found = torch.empty(len(points), dtype=torch.int64, device=points.device)
    step = max(1, _SCORES // len(centroids))
    for start in range(0, len(points), step):
        some = points[start : start + step]
        if weights is None:
            score = torch.addmm(square.sum(1), some, centroids.T, alpha=-2)
        else:
            share = weights[start : start + step]
            score = torch.addmm(share @ square.T, share * some, centroids.T, alpha=-2)
        found[start : start + step] = score.argmin(1)
    return found


@torch.library.custom_op("compress::assign", mutates_args=())
def assign(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the nearest of centroids (k, v) for each of points (n, v), float32 and finite: (n,) int64, without an n x k matrix.

    Nearest by sum_d weights_d (point_d - centroid_d)^2, weights (n, v) at least 0, such as the diagonal of a Hessian; 1 if None.
    Of several as near to float32 any may be taken. Raises ValueError for shapes that do not fit.
    """
    return assigned_by_torch(points, centroids, weights)


@assign.register_fake
def _(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    return points.new_empty((points.shape[0],), dtype=torch.int64)
