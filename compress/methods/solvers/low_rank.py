"""The product of two thin factors that is nearest to a matrix, as the inputs see it (SVD-LLM, arXiv 2403.07378).

With H = S S^T the mean of x x^T and R S = U D V^T, the best of rank r is U_r D_r V_r^T S^-1, the inverse by a triangular solve.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMP = 0.01


def damped(hessian: Tensor, damp: float = DAMP) -> Tensor:
    """Return hessian (in, in) in float64 with the damping, relative to the mean of its diagonal."""
    full = hessian.double()
    return full + damp * full.diagonal().mean() * torch.eye(len(full), dtype=full.dtype, device=full.device)


def factors(rest: Tensor, hessian: Tensor, rank: int, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """Return left (out, rank) and right (rank, in) whose product is nearest to rest (out, in) under hessian (in, in), float64."""
    lower = torch.linalg.cholesky(damped(hessian, damp))
    left, values, right = torch.linalg.svd(rest.double() @ lower, full_matrices=False)
    root = values[:rank].sqrt()
    whitened = torch.linalg.solve_triangular(lower, root.unsqueeze(1) * right[:rank], upper=False, left=False)
    return left[:, :rank] * root, whitened


def fitted(rest: Tensor, hessian: Tensor, right: Tensor, damp: float = DAMP) -> Tensor:
    """Return the best left factor (out, rank) for a right one (rank, in), in float64."""
    full, right = damped(hessian, damp), right.double()
    normal = right @ full @ right.T
    found: Tensor = torch.linalg.lstsq(normal, (rest.double() @ full @ right.T).T).solution.T
    return found
