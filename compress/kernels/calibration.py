"""Steps of methods on a GPU: importing this file gives them to torch's dispatcher, see `compress/methods/solvers/operators.py`.

`assign`, the step of k-means that takes the time, compares each point with all centroids in registers, in float32: the matrix of
distances, which is as large as all points times all centroids, never exists.

`round_columns`, the loop of GPTQ and its kin over columns, is one launch per 128 columns instead of some ten for each: in torch
the time of a matrix is that of launches. Sums are formed in the order of the columns, in float32; torch's product of a block's
errors may add them in another order, so that a weight between two codes to the last bit may go to the other one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _cuda
from compress.methods.solvers.operators import SPAN, assign, assigned_by_torch, centered, columns_by_torch, round_columns

_ROWS = 32  # of the weight in a block
DIMENSIONS = (1, 2, 4, 8, 16)  # of points, filled up with zeros
_CENTROIDS = 128  # in shared memory at a time


def instance() -> _cuda.Kernel:
    """Name the kernel."""
    return _cuda.Kernel("calibration", "round_columns", 256)


def round_columns_kernel(
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
    """As `operators.round_columns`, by the kernel. Raises KernelError for tensors that it does not take."""
    columns, rows = target.shape
    feedback = feedback if feedback.stride(1) == 1 else feedback.contiguous()
    whole = (scale, inverse, low, high)
    if not 0 < columns <= SPAN or target.stride(1) != 1 or target.stride() != delta.stride():
        raise KernelError(
            f"round_columns: target {tuple(target.shape)} with strides {target.stride()}; expected up to {SPAN} rows"
        )
    if any(t.dtype != torch.float32 for t in (target, delta, steps, feedback, *whole)) or groups.dtype != torch.int64:
        raise KernelError("round_columns: expected float32 tensors and groups in int64")
    if any(not t.is_contiguous() or t.shape[1] != rows for t in (*whole, steps)) or not groups.is_contiguous():
        raise KernelError("round_columns: expected scales, bounds and steps as contiguous (groups, out)")
    arguments: list[_cuda.Argument] = [target, delta, steps, feedback, *whole, groups, columns, rows]
    arguments += [np.int64(target.stride(0)), np.int64(feedback.stride(0))]
    _cuda.launch(instance(), (-(-rows // _ROWS), 1, 1), arguments, columns * (SPAN + 1) * 4, target.device)


@round_columns.register_kernel("cuda")
def _(
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
    arguments = (target, delta, steps, feedback, scale, inverse, low, high, groups)
    if _cuda.obstacle(target.device) is None and target.dtype == torch.float32:
        round_columns_kernel(*arguments)
    else:
        columns_by_torch(*arguments)


def assign_instance(dimensions: int, weighted: bool) -> _cuda.Kernel:
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
        kernel = assign_instance(dimensions, weights is not None)
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
