"""Steps of methods that kernels may take over: their schemas, and what they compute in plain torch.

Methods import this file and no kernel. `compress.kernels.calibration` registers implementations for CUDA with torch's dispatcher;
where it was not imported, or a tensor is elsewhere, what stands here runs.
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
    """`round_columns` in plain torch: four launches per column."""
    for k, group in enumerate(groups.tolist()):
        if k:
            target[k].addmv_(delta[:k].T, feedback[k, :k])
        steps[k] = nearest_step(target[k] * inverse[group], low[group], high[group])
        delta[k].addcmul_(steps[k], scale[group], value=-1)


@torch.library.custom_op("compress::round_columns", mutates_args=("target", "delta", "steps"))
def round_columns(
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
    target_k += sum_{i<k} delta_i feedback_ki. scale, inverse, low, high are (groups, out), groups (columns,) int64.
    """
    columns_by_torch(target, delta, steps, feedback, scale, inverse, low, high, groups)
