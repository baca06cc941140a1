"""One layer to quantize, in float64: a weight, the second moment of its inputs, and the loss that counts."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(rows: int = 6, columns: int = 32, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs whose channels differ in size, both float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = (
        normal(tokens, columns)
        @ (torch.eye(columns, dtype=torch.float64) + 0.4 * normal(columns, columns))
        * normal(columns).exp()
    )
    return normal(rows, columns) * 0.05, inputs.T @ inputs / tokens


def loss(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) of the difference D, in float64."""
    delta = weight.double() - decoded.double()
    return float(((delta @ hessian.double()) * delta).sum())


def damped(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """H over its mean diagonal, plus damping; every column is seen."""
    return hessian / hessian.diagonal().mean() + damp * torch.eye(len(hessian), dtype=hessian.dtype)
