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
    if x.is_cuda and x.dtype == left.dtype == right.dtype == torch.bfloat16:
        y = _wide(rows @ right.T, left.T)
    else:
        y = _wide(rows, right.T) @ left.float().T
    return y if addend is None else y.add_(addend)


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32; of 16-bit numbers by tensor cores, where this torch has such a product (2.8 and later)."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype.itemsize == 2 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@_op.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, addend: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[:-1].numel(), left.shape[0]), dtype=torch.float32)


def product(x: Tensor, left: Tensor, right: Tensor, addend: Tensor | None = None) -> Tensor:
    """x (..., in) times (left (out, rank) right (rank, in))^T, plus addend -> (tokens, out) float32; an operator."""
    y: Tensor = _op(x, left, right, addend)
    return y
