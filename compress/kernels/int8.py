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

from compress.errors import KernelError
from compress.kernels import _cuda, _weights, weight_only
from compress.kernels._weights import Tiles
from compress.kernels.weight_only import TYPES

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
    if (why := _weights.reason(spec)) is not None:
        return why
    if base["format"] == "table":
        return "a table's values are no integers"
    if base["format"] == "mixed":
        return "groups have codes of different widths"
    if base["group_size"] % 32 and base["group_size"] != spec["shape"][1]:
        return f"groups of {base['group_size']} columns; expected a multiple of 32, or one group per row"
    return None


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows x (tokens, in) to integers (tokens, in) int8 and scales (tokens,) float32, in plain torch."""
    most = x.float().abs().amax(-1)
    scale = torch.where(most > 0, (most / 127).clamp_min(1e-30), 0)
    whole = (x.float() / scale.unsqueeze(-1)).round().clamp_(-127, 127).nan_to_num_()
    return whole.to(torch.int8), scale


def rounded(x: Tensor) -> Tensor:
    """Return x (..., in) as products with 8-bit activations see it, in its own type."""
    whole, scale = quantize(x)
    return (whole.float() * scale.unsqueeze(-1)).to(x.dtype)


def quantize_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize`, by the kernel, columns padded with zeros to a multiple of 16 -> (tokens, padded) int8, (tokens,) float32."""
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


@torch.library.custom_op("compress::int8", mutates_args=())
def _op(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    row_scale: Tensor | None,
    order: Tensor | None,
    addend: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: int,
    steps: int,
    kind: str,
) -> Tensor:
    tiles = Tiles(codes, meta, None, row_scale, order, (rows, x.shape[-1]), bits, steps, kind, _FIELD)
    if x.is_cuda:
        return matmul_tiles(x, tiles, addend, bias)
    y = torch.nn.functional.linear(rounded(x), _weights.decode(tiles).to(x.dtype))
    if addend is not None:
        y = (y.float() + addend.view(y.shape)).to(y.dtype)
    return y if bias is None else y + bias


@_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    meta: Tensor,
    row_scale: Tensor | None,
    order: Tensor | None,
    addend: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: int,
    steps: int,
    kind: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def product(x: Tensor, tiles: Tiles, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) rounded to 8 bits times W^T, plus addend and bias -> (..., out); an operator for torch.compile."""
    t = tiles
    y: Tensor = _op(x, t.codes, t.meta, t.row_scale, t.order, addend, bias, t.shape[0], t.bits, t.steps, t.kind)
    return y
