"""What single weights are worth by their sizes and their inputs: scores that masks and orders of channels are found by."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.calibration.statistics import Hessian, MeanSquare, Stats, statistic


def contribution(weight: Tensor, square: Tensor) -> Tensor:
    """Return |W_ij| sqrt(mean x_j^2), (out, in), given the mean squares (in,); |W_ij| where no input was ever seen."""
    weight = exact(weight)
    return weight.abs() * (square.to(weight.dtype).sqrt() if bool(square.any()) else 1.0)


def relative_importance(weight: Tensor, square: Tensor, power: float = 0.5) -> Tensor:
    """Return the relative importance of each weight (out, in), given the mean square of each input (in,)."""
    size = exact(weight).abs()
    tiny = torch.finfo(size.dtype).tiny
    relative = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative * (square.to(size.dtype).pow(power / 2) if bool(square.any()) else 1.0)


def mean_square(stats: Stats) -> Tensor:
    """Return the mean square of each channel of the inputs (in,), in float32."""
    if Hessian in stats:
        return statistic(stats, Hessian).matrix().diagonal()
    return statistic(stats, MeanSquare).mean()


def exact(weight: Tensor) -> Tensor:
    """Return a weight in the type that scores are computed in: float64 as it is, all others as float32."""
    return weight if weight.dtype == torch.float64 else weight.float()
