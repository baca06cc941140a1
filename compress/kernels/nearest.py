"""The nearest centroid of each point on a GPU: importing this file gives it to torch's dispatcher, see `operators.py`.

`assign`, the step of k-means that takes the time, compares each point with all centroids in registers, in float32: the matrix of
distances, which is as large as all points times all centroids, never exists.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _cuda
from compress.methods.solvers.operators import assign, assigned_by_torch, centered

DIMENSIONS = (1, 2, 4, 8, 16)  # of points, filled up with zeros
_CENTROIDS = 128  # in shared memory at a time


def instance(dimensions: int, weighted: bool) -> _cuda.Kernel:
    """Name the kernel for points of one of `DIMENSIONS`."""
    return _cuda.Kernel("nearest", f"nearest_centroids<{dimensions}, {str(weighted).lower()}>", 256)


def assign_kernel(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """As `operators.assign`, by the kernel. Raises KernelError for tensors that it does not take."""
    (count, given), most = points.shape, DIMENSIONS[-1]
    same = centroids.shape[1:] == points.shape[1:] and (weights is None or weights.shape == points.shape)
    if not same or not len(centroids) or not 0 < given <= most:
        shapes = [None if t is None else tuple(t.shape) for t in (points, centroids, weights)]
        raise KernelError(
            f"assign: points, centroids and weights are {shapes}; expected (n, v), (k, v) and (n, v), v up to {most}"
        )
    if any(t is not None and t.dtype != torch.float32 for t in (points, centroids, weights)):
        raise KernelError("assign: expected float32 tensors")
    dimensions = next(d for d in DIMENSIONS if d >= given)

    def filled(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.nn.functional.pad(values, (0, dimensions - given)).contiguous()

    found = torch.empty(count, dtype=torch.int64, device=points.device)
    if count:
        points, centroids = centered(points, centroids)
        kernel = instance(dimensions, weights is not None)
        each = kernel.threads * (2 if dimensions > 8 else 4)
        arguments: list[_cuda.Argument] = [
            filled(points),
            filled(weights),
            filled(centroids),
            found,
            np.int64(count),
            len(centroids),
        ]
        _cuda.launch(kernel, (-(-count // each), 1, 1), arguments, _CENTROIDS * (dimensions + 1) * 4, points.device)
    return found


@assign.register_kernel("cuda")
def _(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    taken = points.dtype == torch.float32 and points.shape[1] <= DIMENSIONS[-1]
    if _cuda.obstacle(points.device) is None and taken:
        return assign_kernel(points, centroids, weights)
    return assigned_by_torch(points, centroids, weights)
