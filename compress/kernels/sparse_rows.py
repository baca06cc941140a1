"""x S^T in float32 for a few single weights S in compressed sparse rows: what outliers add to the product of the base.

Sums are formed in float32 in a fixed order. Many tokens go to torch's sparse product.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _cuda
from compress.kernels._cuda import TYPES
from compress.weights.sparse import Sparse

_COLUMNS = {torch.uint8: "u8", torch.int16: "u16", torch.int32: "u32"}
_ROWS = _TOKENS = 8
_MANY = 129  # tokens from which torch's sparse product is taken to be faster; not measured yet, see docs/kernels.md


def instance(dtype: torch.dtype, columns: torch.dtype) -> _cuda.Kernel:
    """Name the instantiation for activations and column numbers of these types."""
    return _cuda.Kernel("sparse_rows", f"sparse_rows<{TYPES[dtype]}, {_COLUMNS[columns]}>", 32 * _ROWS)


def product_kernel(x: Tensor, sparse: Sparse) -> Tensor:
    """x (tokens, in) bfloat16 or float16 times S^T (out, in) -> (tokens, out) float32. Raises KernelError."""
    if x.dtype not in TYPES or x.dim() != 2 or x.shape[1] != sparse.width:
        raise KernelError(f"x is {x.dtype} {tuple(x.shape)}; expected (tokens, {sparse.width}) in {' or '.join(map(str, TYPES))}")
    rows = sparse.shape[0]
    y = torch.empty(len(x), rows, dtype=torch.float32, device=x.device)
    if y.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        grid = (-(-rows // _ROWS), -(-len(x) // _TOKENS), 1)
        arguments: list[_cuda.Argument] = [x, sparse.pointers, sparse.columns, sparse.values, y, len(x), rows]
        _cuda.launch(instance(x.dtype, sparse.columns.dtype), grid, [*arguments, np.int64(x.stride(0))], 0, x.device)
    return y


@torch.library.custom_op("compress::sparse_rows", mutates_args=())
def _op(x: Tensor, pointers: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    sparse = Sparse(pointers, columns, values, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and len(rows) < _MANY:
        return product_kernel(rows, sparse)
    return _by_torch(rows, sparse)


def _by_torch(rows: Tensor, sparse: Sparse) -> Tensor:
    counts = sparse.pointers.diff().long()
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(sparse.columns))
    places = torch.stack((row, sparse.columns.long()))
    matrix = torch.sparse_coo_tensor(places, sparse.values.float(), sparse.shape, is_coalesced=True, check_invariants=False)
    return (matrix @ rows.T.float()).T.contiguous()


@_op.register_fake
def _(x: Tensor, pointers: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    return x.new_empty((x.shape[:-1].numel(), pointers.shape[0] - 1), dtype=torch.float32)


def product(x: Tensor, pointers: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """x (..., in) times S^T, S as stored in the format `sparse` -> (tokens, out) float32; an operator for torch.compile."""
    result: Tensor = _op(x, pointers, columns, values)
    return result
