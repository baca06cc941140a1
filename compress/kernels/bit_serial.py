"""y = x W^T from the bits of both: weights and activations of any widths up to 8, by `and` and popcount on binary tensor cores.

Arithmetic  `_bit_serial` has the mathematics. Values are a * code + b on both sides: whole numbers around 0 (a 1, b -2^(bits-1)),
            two's complement, which is the same once its top bit is turned round, and bipolar ones (a 2, b 1 - 2^bits). So one
            kernel forms sums of products of codes, and sums of codes on each side do the rest. All of it is exact but the
            rounding of x.
Where       sm_80 to sm_90 have the instruction; later ones emulate it. Nothing chooses this kernel: whether it is faster than
            int8 (`int8`), for few bits, has to be measured first.
Limits      symmetric or bipolar weights in groups of a multiple of 256 columns, or one group per row, up to 32768 columns each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _cuda, _tiles
from compress.kernels._cuda import TYPES
from compress.weights.uniform import Uniform

_THREADS, _ROWS, _TOKENS, _BLOCK = 256, 16, 8, 256
_LONGEST = 1 << 15  # columns whose products of 8 and 8 bits sum up in 31 bits


@dataclass(frozen=True, eq=False)
class Bits:
    """A weight as single bits."""

    words: Tensor  # int32, see `_tiles.tile_bits`
    scale: Tensor  # (groups, out) float32, of the values a * code + b
    sums: Tensor  # (groups, out) int32, of codes
    shape: tuple[int, int]
    bits: int
    group_size: int
    bipolar: bool  # values are the odd numbers 2 code - (2^bits - 1), else code - 2^(bits-1)


def prepare(part: Uniform) -> Bits:
    """Lay out a symmetric part, on the device where it is. Raises KernelError."""
    (rows, columns), size = part.shape, part.group_size
    if part.zero is not None or part.offset is not None or part.group is not None:
        raise KernelError("bit_serial: got zero points, offsets or scattered groups; expected a symmetric grid of neighbours")
    if (size % _BLOCK and size != columns) or size > _LONGEST:
        raise KernelError(f"bit_serial: groups of {size} columns; expected a multiple of {_BLOCK} or a row, up to {_LONGEST}")
    bipolar = part.bipolar or part.bits == 1
    sums = part.codes.unflatten(1, (-1, size)).sum(2, dtype=torch.int32).T.contiguous()
    scale = part.scale.float().T / (2 if bipolar else 1)
    words = _tiles.tile_bits(part.codes, part.bits)
    return Bits(words, scale.contiguous(), sums, (rows, columns), part.bits, size, bipolar)


def pack_instance(dtype: torch.dtype) -> _cuda.Kernel:
    """Name the kernel that cuts x into bits."""
    return _cuda.Kernel("bit_serial", f"pack_planes<{TYPES[dtype]}>", _THREADS)


def instance(dtype: torch.dtype, weight_bits: int, bits: int) -> _cuda.Kernel:
    """Name the kernel for weights and activations of these widths."""
    return _cuda.Kernel("bit_serial", f"bit_products<{TYPES[dtype]}, {weight_bits}, {bits}>", _THREADS)


def quantize(x: Tensor, bits: int, bipolar: bool) -> tuple[Tensor, Tensor]:
    """Round rows x (tokens, in) to codes uint8 and the scales (tokens,) of their values, in plain torch.

    Values are code - 2^(bits-1), or 2 code - (2^bits - 1) for bipolar ones, whose scale is half the step.
    """
    middle = 1 << (bits - 1)
    most = x.float().abs().amax(-1)
    scale = torch.where(most > 0, (most / (middle if bipolar else middle - 1)).clamp_min(1e-30), 0)
    scaled = (x.float() / scale.unsqueeze(-1)).nan_to_num_()
    whole = (scaled.floor() if bipolar else scaled.round()) + middle
    codes = whole.clamp_(0 if bipolar else 1, 2 * middle - 1).to(torch.uint8)
    return codes, scale / 2 if bipolar else scale


def rounded(x: Tensor, bits: int, bipolar: bool) -> Tensor:
    """Return x (..., in) as the product sees it, in float32."""
    codes, scale = quantize(x, bits, bipolar)
    a, b = _affine(bits, bipolar)
    return (a * codes.float() + b) * scale.unsqueeze(-1)


def matmul_bits(x: Tensor, weight: Bits, bits: int, bipolar: bool = False) -> Tensor:
    """x (..., in), rounded to `bits` (2 to 8; bipolar ones from 1), times W^T -> (..., out). Raises KernelError."""
    rows, columns = weight.shape
    if x.dtype not in TYPES or x.shape[-1] != columns:
        known = " or ".join(map(str, TYPES))
        raise KernelError(f"x is {x.dtype} with {x.shape[-1]} columns; expected in={columns} and {known}")
    if not (1 if bipolar else 2) <= bits <= 8:
        raise KernelError(f"activations of {bits} bits; expected 2 to 8, or 1 where they are bipolar")
    flat = x.reshape(-1, columns)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    tokens, words, groups = len(flat), -(-columns // 32), columns // weight.group_size
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y.reshape(*x.shape[:-1], rows)
    planes = torch.empty(tokens, bits, words, dtype=torch.int32, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    sums = torch.empty(tokens, groups, dtype=torch.int32, device=x.device)
    per_group = -(-weight.group_size // 32)
    arguments: list[_cuda.Argument] = [flat, planes, scale, sums, bits, columns, words, groups, per_group, int(bipolar)]
    arguments += [np.int64(flat.stride(0))]
    _cuda.launch(pack_instance(x.dtype), (tokens, 1, 1), arguments, 4 * _THREADS // 32, x.device)
    if bipolar:
        scale = scale / 2
    sides = (*_affine(weight.bits, weight.bipolar), *_affine(bits, bipolar))
    blocks, per_group = -(-columns // _BLOCK), -(-weight.group_size // _BLOCK)
    arguments = [planes, scale, sums, weight.words, weight.scale, weight.sums, y, tokens, rows, words, blocks, groups]
    arguments += [per_group, columns, *sides]
    grid = (-(-rows // _ROWS), -(-tokens // _TOKENS), 1)
    _cuda.launch(instance(x.dtype, weight.bits, bits), grid, arguments, 4 * (_THREADS // 32) * _TOKENS * _ROWS, x.device)
    return y.reshape(*x.shape[:-1], rows)


def _affine(bits: int, bipolar: bool) -> tuple[int, int]:
    """a and b of the values a * code + b."""
    return (2, 1 - (1 << bits)) if bipolar else (1, -(1 << (bits - 1)))
