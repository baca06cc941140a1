"""y = x W^T for quantized W and x rounded to 8 bits on the way: sums of integers, by int8 tensor cores.

Activations each row of x gets the scale max |x| / 127 and integers from -127 to 127; a row of zeros stays one.
Arithmetic  with codes q and integers a, a group contributes scale * (sum q a - middle * sum a) + shift * sum a: both sums are
            exact, and taken in float32 together with those of other groups; what is not exact is x, to 1 / 254 of its largest
            in each row.
Limits      integer codes in groups of a multiple of 32 columns, or one group per row. Weights are laid out for bytes: the same
            `Tiles` do not serve 16-bit activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import _cuda, _weights, weight_only
from compress.kernels._activations import rounded
from compress.kernels._cuda import TYPES
from compress.kernels._on_gpu import ROLES, Added, OnGpu
from compress.kernels._operator import operator
from compress.kernels._weights import Tiles
from compress.kernels.kernel import Kernel, Use
from compress.weights.mixed import Mixed
from compress.weights.table import Table

_THREADS = 256
_FIELD = 8


def instance(dtype: torch.dtype) -> _cuda.Kernel:
    """Name the kernel that rounds x of a type."""
    return _cuda.Kernel("int8", f"quantize_rows<{TYPES[dtype]}>", _THREADS)


def reason(spec: Mapping[str, Any]) -> str | None:
    """Say why the kernel does not take the base of a site of this description, or None if it does."""
    base = spec["base"]
    if "keep" in spec:
        return "what is pruned has no product in bytes"
    kind = packing.base_type(spec)
    if (why := _weights.reason(spec)) is not None:
        return why
    if kind is Table:
        return "a table's values are no integers"
    if kind is Mixed:
        return "groups have codes of different widths"
    if base["group_size"] % 32 and base["group_size"] != spec["shape"][1]:
        return f"groups of {base['group_size']} columns; expected a multiple of 32, or one group per row"
    return None


def quantize_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `_activations.quantize`, by the kernel: columns padded with zeros to a multiple of 16.

    Returns integers (tokens, padded) int8 and scales (tokens,) float32. Raises KernelError.
    """
    if x.dtype not in TYPES or x.dim() != 2:
        raise KernelError(f"x is {x.dtype} {tuple(x.shape)}; expected (tokens, in) in {' or '.join(map(str, TYPES))}")
    x = x if x.stride(1) == 1 else x.contiguous()
    columns = x.shape[1]
    padded = -(-columns // 16) * 16
    whole = torch.empty(len(x), padded, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        arguments: list[_cuda.Argument] = [x, whole, scale, columns, padded, np.int64(x.stride(0))]
        _cuda.launch(instance(x.dtype), (len(x), 1, 1), arguments, 4 * _THREADS // 32, x.device)
    return whole, scale


def matmul_tiles(x: Tensor, tiles: Tiles, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in), rounded to 8 bits, times W^T, plus addend (tokens, out) float32, plus bias (out,) -> (..., out) in x's type.

    Raises KernelError.
    """
    if tiles.field != _FIELD or tiles.table is not None:
        raise KernelError("weights are laid out for 16-bit activations, or are tables; expected integers in fields of 8 bits")
    if x.shape[-1] != tiles.shape[1]:
        raise KernelError(f"x has {x.shape[-1]} columns; expected in={tiles.shape[1]}")
    weight_only.check_added(x, tiles.shape[0], addend, bias)
    rows = x.reshape(-1, x.shape[-1])
    whole, scale = quantize_kernel(rows if tiles.order is None else rows.index_select(1, tiles.order))
    y = torch.empty(len(rows), tiles.shape[0], dtype=x.dtype, device=x.device)
    if y.numel():
        weight_only.launch(whole, scale, tiles, addend, bias, y)
    return y.reshape(*x.shape[:-1], tiles.shape[0])


def _shape(x: Tensor, tiles: Tiles, addend: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    return (*x.shape[:-1], tiles.shape[0])


@operator("compress::int8", _shape)
def _op(x: Tensor, tiles: Tiles, addend: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.is_cuda:
        return matmul_tiles(x, tiles, addend, bias)
    y = torch.nn.functional.linear(rounded(x), _weights.decode(tiles).to(x.dtype))
    if addend is not None:
        y = (y.float() + addend.view(y.shape)).to(y.dtype)
    return y if bias is None else y + bias


def product(x: Tensor, tiles: Tiles, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) rounded to 8 bits times W^T, plus addend and bias -> (..., out); an operator for torch.compile."""
    return _op(x, tiles, addend, bias)


def rounds(spec: Mapping[str, Any]) -> bool:
    """Whether activations of a site of this description can be rounded: the kernel takes all of its parts."""
    return set(spec) - {"shape"} <= ROLES and reason(spec) is None


def _why_not(spec: Mapping[str, Any], use: Use) -> str | None:
    if (why := _cuda.why_not(use) or reason(spec)) is not None:
        return why
    return None if use.activation_bits == 8 else f"activations of {use.activation_bits} bits; expected 8"


def _lay_out(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], use: Use) -> OnGpu[Tiles]:
    tiles = _weights.prepare(packing.unpack_base(spec, tensors), _FIELD)
    return OnGpu(KERNEL, tiles, product, weight_only.codes_again, ("codes",), Added.of(tensors))


KERNEL = Kernel("int8", 20, ROLES, _why_not, _lay_out)
