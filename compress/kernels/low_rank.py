"""x (L R)^T in float32 for the low-rank part of a weight, by two products of torch: what it adds to the product of the base.

In bfloat16, x R^T is rounded to bfloat16 between them, to 2^-9 of itself; nothing else is rounded. In float16, where that could
leave the range of the type, and where the factors are not of the type of x, sums and the second product are in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("compress::low_rank", mutates_args=())
def _op(x: Tensor, left: Tensor, right: Tensor, addend: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and x.dtype == left.dtype == torch.bfloat16:
        y = torch.mm(rows @ right.T, left.T, out_dtype=torch.float32)
    else:
        inner = torch.mm(rows, right.T, out_dtype=torch.float32) if _short(rows, right) else rows.float() @ right.float().T
        y = inner @ left.float().T
    return y if addend is None else y.add_(addend)


def _short(x: Tensor, right: Tensor) -> bool:
    """Whether tensor cores form the product as it stands, with sums in float32."""
    return x.is_cuda and x.dtype == right.dtype == torch.float16


@_op.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, addend: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[:-1].numel(), left.shape[0]), dtype=torch.float32)


def product(x: Tensor, left: Tensor, right: Tensor, addend: Tensor | None = None) -> Tensor:
    """x (..., in) times (left (out, rank) right (rank, in))^T, plus addend -> (tokens, out) float32; an operator."""
    y: Tensor = _op(x, left, right, addend)
    return y
