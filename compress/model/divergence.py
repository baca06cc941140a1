"""KL divergence between predictions, and the mean of many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL of log probabilities (positions, vocabulary), nats."""
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error."""
    kl = torch.tensor(values, dtype=torch.float64)
    return float(kl.mean()), float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else None
