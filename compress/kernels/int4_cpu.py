"""torch's 4-bit CPU kernel, for few rows of bfloat16 activations.

It multiplies without decoding the weight to memory, the bottleneck of generation. Its own layout is made at first use and kept
next to the stored one; it takes 4 bits per weight, even for weights that are stored in fewer:

    value = (code4 - 8) scale4    code4 = code - 2^(bits - 1) + 8        scale4 = scale
    bipolar integers, single bits code4 = 2 code - (2^bits - 1) + 8      scale4 = scale / 2
    where a mask keeps nothing    code4 = 8

Where it pays, in ms for a product of M rows (`python bench/cpu_int4.py --repeat 25`, 2 cores AMD EPYC with AVX-512, torch 2.13,
2026-11-21). `decode` is what runs otherwise (`torch_reference`), `dense` a bfloat16 weight that was never compressed:

    M                       1      8     16     32     64    128    256
    4096 x 4096  int4    0.26   1.04   2.66   6.15   6.38   24.0   48.3
                 decode  26.5   28.5   24.1   33.1   17.8   46.3   41.4
                 dense   2.08   2.39   1.59   3.89   3.20   6.46   18.0
    1024 x 4096  int4    0.08   0.21   0.43   0.75   2.46   4.94   18.0
                 decode  4.68   4.71   4.61   5.85   6.08   7.90   11.8
                 dense   0.29   0.30   0.35   0.49   0.71   2.23   5.23
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.kernels._activations import as_used
from compress.kernels.kernel import Kernel, Use
from compress.weights.uniform import Uniform

GROUP_SIZES = (32, 64, 128, 256)  # the kernel refuses others
_KEYS = {"format", "bits", "group_size", "zero", "bipolar", "kept", "fields", "scales"}  # of a base without offsets
_ROLES = frozenset({"base", "keep"})
MAX_ROWS = 128  # beyond this, decoding and a dense product are as fast, see above


def supports(spec: Mapping[str, Any]) -> bool:
    """Whether the kernel takes a weight: up to 4 bits without zero points, groups of adjacent columns, out a multiple of 16.

    It takes bipolar integers of up to 3 bits, and masks over all of these.
    """
    base = spec["base"]
    if packing.base_type(spec) is not Uniform or not set(base) <= _KEYS or base["zero"]:
        return False
    fits = base["bits"] <= (3 if base.get("bipolar") else 4) and base["group_size"] in GROUP_SIZES
    return fits and set(spec) <= {"shape", *_ROLES} and spec["shape"][0] % 16 == 0


def pays(use: Use) -> bool:
    """Whether the kernel is faster for such activations and supports them.

    Float32 activations take an unvectorised path; the kernel does not pass gradients.
    """
    fits = use.device.type == "cpu" and use.dtype == torch.bfloat16 and use.tokens <= MAX_ROWS
    return fits and not use.gradient


def prepare(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the kernel's own layout: codes, and (groups, out, 2) of scales and zeros."""
    weight = packing.unpack(dict(spec), tensors)
    base = weight.base
    assert isinstance(base, Uniform)
    codes, scale = base.codes.int(), base.scale
    if base.bipolar or base.bits == 1:
        codes, scale = 2 * codes - ((1 << base.bits) - 1) + 8, scale / 2
    else:
        codes = codes - (1 << base.bits - 1) + 8
    if weight.keep is not None:
        codes = codes.masked_fill(~weight.keep.mask(), 8)
    scale = scale.T.contiguous()  # (groups, out)
    made = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return made, torch.stack((scale, torch.zeros_like(scale)), dim=2)


def matmul(x: Tensor, spec: Mapping[str, Any], prepared: tuple[Tensor, Tensor]) -> Tensor:
    """x (..., in) in bfloat16 times the weight (out, in), transposed -> (..., out)."""
    codes, scales_and_zeros = prepared
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, spec["base"]["group_size"], scales_and_zeros)
    return y.reshape(*x.shape[:-1], spec["shape"][0])


@dataclass(frozen=True, eq=False)
class Laid:
    """A weight in torch's own layout, in addition to the stored one."""

    spec: Mapping[str, Any]
    prepared: tuple[Tensor, Tensor]
    activation_bits: int
    replaces: tuple[str, ...] = ()

    @property
    def kernel(self) -> Kernel:
        """The kernel of this file."""
        return KERNEL

    def takes(self, use: Use) -> bool:
        """Whether the kernel is faster for such activations."""
        return pays(use) and use.activation_bits == self.activation_bits

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) times W^T, plus bias -> (..., out)."""
        y = matmul(as_used(x, self.activation_bits), self.spec, self.prepared)
        return y if bias is None else y + bias

    def stored(self) -> dict[str, Tensor]:
        """Return nothing: the stored tensors are kept."""
        return {}


def _why_not(spec: Mapping[str, Any], use: Use) -> str | None:
    if not pays(use):
        return f"{use.tokens} tokens in {use.dtype} on {use.device.type}; expected up to {MAX_ROWS} in bfloat16 on a CPU"
    return None if supports(spec) else "expected symmetric codes of up to 4 bits in groups that torch knows, out a multiple of 16"


def _lay_out(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], use: Use) -> Laid:
    return Laid(spec, prepare(spec, tensors), use.activation_bits)


KERNEL = Kernel("int4_cpu", 10, _ROLES, _why_not, _lay_out)
