"""The loop of GPTQ and its kin over columns on a GPU: importing this file gives it to torch's dispatcher, see `operators.py`.

`round_columns` is one launch per 128 columns instead of some ten for each: in torch the time of a matrix is that of launches.
Sums are formed in the order of the columns, in float32; torch's product of a block's errors may add them in another order, so
that a weight between two codes to the last bit may go to the other one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _cuda
from compress.methods.solvers.operators import SPAN, columns_by_torch, round_columns

_ROWS = 32  # of the weight in a block


def instance() -> _cuda.Kernel:
    """Name the kernel."""
    return _cuda.Kernel("round_columns", "round_columns", 256)


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
    """As `operators.columns_by_torch`, by the kernel. Raises KernelError for tensors that it does not take."""
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
def _(*tensors: Tensor) -> None:
    target = tensors[0]
    if _cuda.obstacle(target.device) is None and target.dtype == torch.float32:
        round_columns_kernel(*tensors)
    else:
        columns_by_torch(*tensors)
