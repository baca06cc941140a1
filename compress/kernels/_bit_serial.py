"""Products of integers from their bit planes, exactly: what a bit-serial kernel computes, and what it must add afterwards.

An integer of b bits, code c with bits c_i, has one of three values; each is a sum over planes plus a constant:

    unsigned   c                    = sum_i 2^i c_i
    signed     c, two's complement  = sum_i 2^i c_i, the top plane with weight -2^(b-1)
    bipolar    2c - (2^b - 1)       = sum_i (2 c_i - 1) 2^i  = sum_i 2^(i+1) c_i - (2^b - 1)

so a dot product of x = sum_i a_i x_i + alpha and w = sum_j b_j w_j + beta over K columns is

    sum_ij a_i b_j popcount(x_i and w_j) + beta sum_i a_i popcount(x_i) + alpha sum_j b_j popcount(w_j) + K alpha beta

The first term is the matrix product of planes. The others recover the rest: from a sum per row of x, from one per row of w, which
is known beforehand, and from a constant. With a bipolar w, beta is not 0, and the sum per row of x is needed, unless x is
bipolar too: then planes of signs need no sum at all,

    sum_ij 2^(i+j) (K - 2 popcount(x_i xor w_j))

Planes are padded to whole words with 0, which counts neither in `and` nor in `xor`; but in a plane of signs it is a -1, so K must
be the number of columns without padding.

Shapes: codes (..., rows, K) uint8, planes (..., bits, rows, words) int32, with column k in bit k mod 32 of word k // 32. Leading
dimensions are groups of columns whose products get scales of their own: y = sum_g scale_x[g] scale_w[g] product[g].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["unsigned", "signed", "bipolar"]
Combine = Callable[[Tensor, Tensor], Tensor]

_WORD = 32


def values(codes: Tensor, bits: int, kind: Kind) -> Tensor:
    """Return the integers int64 that codes (...) stand for."""
    codes = codes.long()
    if kind == "bipolar":
        return 2 * codes - ((1 << bits) - 1)
    return codes - ((codes >> (bits - 1)) << bits) if kind == "signed" else codes


def planes(codes: Tensor, bits: int) -> Tensor:
    """Cut codes (..., rows, K) into planes (..., bits, rows, words) int32, padded with 0."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % _WORD)).unflatten(-1, (-1, _WORD)).long()
    place = torch.arange(_WORD, device=codes.device)
    cut = [(((padded >> i) & 1) << place).sum(-1) for i in range(bits)]  # (..., rows, words), of which each is below 2^32
    words = torch.stack(cut, dim=-3)
    return (words - ((words >> (_WORD - 1)) << _WORD)).to(torch.int32)  # the same 32 bits with a sign


def popcount(words: Tensor) -> Tensor:
    """Count the bits that are set in each word of int32, by adding up neighbours of 1, 2 and 4 bits and then bytes."""
    x = words.long() & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


def product(x: Tensor, w: Tensor, columns: int, x_kind: Kind, w_kind: Kind) -> Tensor:
    """Return x @ w.T (..., M, N) int64 from planes x (..., bits, M, words) and w (..., bits, N, words) by `and`, exactly."""
    x_weights, x_constant = _expansion(x.shape[-3], x_kind)
    w_weights, w_constant = _expansion(w.shape[-3], w_kind)
    y = _sum_of_planes(x, w, x_weights, w_weights, torch.bitwise_and)
    y += w_constant * _row_sums(x, x_weights).unsqueeze(-1)
    y += x_constant * _row_sums(w, w_weights).unsqueeze(-2)
    return y + columns * x_constant * w_constant


def bipolar_product(x: Tensor, w: Tensor, columns: int) -> Tensor:
    """Return x @ w.T (..., M, N) int64 of bipolar integers by `xor`, exactly and without any sum over rows."""
    x_weights, w_weights = ([1 << i for i in range(tensor.shape[-3])] for tensor in (x, w))
    differing = _sum_of_planes(x, w, x_weights, w_weights, torch.bitwise_xor)
    return columns * sum(x_weights) * sum(w_weights) - 2 * differing


def _expansion(bits: int, kind: Kind) -> tuple[list[int], int]:
    """The weight of each plane, and the constant."""
    weights = [1 << i for i in range(bits)]
    if kind == "bipolar":
        return [2 * weight for weight in weights], 1 - (1 << bits)
    if kind == "signed":
        weights[-1] = -weights[-1]
    return weights, 0


def _row_sums(of: Tensor, weights: list[int]) -> Tensor:
    """sum_i weight_i popcount(plane_i), (..., rows)."""
    return (popcount(of).sum(-1) * torch.tensor(weights, device=of.device).unsqueeze(1)).sum(-2)


def _sum_of_planes(x: Tensor, w: Tensor, x_weights: list[int], w_weights: list[int], combine: Combine) -> Tensor:
    """sum_ij weight_i weight_j popcount(combine(x_i, w_j)), (..., M, N)."""
    total: Tensor | None = None
    for i, x_weight in enumerate(x_weights):
        for j, w_weight in enumerate(w_weights):
            both = combine(x[..., i, :, None, :], w[..., j, None, :, :])  # (..., M, N, words)
            term = popcount(both).sum(-1).mul_(x_weight * w_weight)
            total = term if total is None else total.add_(term)
    assert total is not None
    return total
