"""Confidence intervals over windows by the bootstrap: means of windows drawn with replacement, as often as there are windows.

Windows are drawn together for both models, so that what is hard in a text counts in neither's favour (a paired bootstrap).
B. Efron, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 7 (1979); percentile intervals.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 1 << 22  # drawn indices at a time

Interval = tuple[float, float]


def resampled_means(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Return means (resamples, kinds) of values (windows, kinds) over windows drawn with replacement, in float64."""
    windows = values.shape[0]
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _CHUNK // windows)
    means = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = torch.randint(0, windows, (count, windows), generator=generator)
        # How often each window was drawn: a product instead of a gather of all values.
        times = torch.zeros(count, windows, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        means.append(times @ values.double() / windows)
    return torch.cat(means)


def interval(means: Tensor, level: float = LEVEL) -> Interval:
    """Return the range that holds `level` of resampled means (resamples,), as much left out on either side."""
    ends = torch.quantile(means.double(), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
