"""torch's 4-bit CPU kernel, for few rows of bfloat16 activations.

It multiplies without decoding the weight to memory, which is what limits generation. Its own layout is made when it is first
used and kept beside the stored one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress import packed

GROUP_SIZES = (32, 64, 128, 256)  # the kernel refuses others
MAX_ROWS = 32  # beyond this, decoding once and a dense product is as fast


def supports(spec: Mapping[str, Any]) -> bool:
    """Whether a site's weight fits the kernel: 4-bit codes, symmetric, neighbouring columns in groups, out a multiple of 16."""
    base = spec["base"]
    plain = base["format"] == "bitpack" and base["bits"] == 4 and not base.get("zero") and "group" not in base
    return plain and base["group_size"] in GROUP_SIZES and spec["shape"][0] % 16 == 0


def pays(x: Tensor) -> bool:
    """Whether the kernel is the faster way for activations x (..., in), and does what is wanted.

    Float32 activations take an unvectorised path; gradients do not pass the kernel.
    """
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() // x.shape[-1] <= MAX_ROWS
    return fits and not (x.requires_grad and torch.is_grad_enabled())


def prepare(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the kernel's own layout: codes, and (groups, out, 2) of scales and zeros."""
    base = packed.unpack(dict(spec), tensors).base
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(base.codes.int(), 1)
    scale = base.scale.T.contiguous()  # (groups, out)
    return codes, torch.stack((scale, torch.zeros_like(scale)), dim=2)


def matmul(x: Tensor, spec: Mapping[str, Any], prepared: tuple[Tensor, Tensor]) -> Tensor:
    """x (..., in) in bfloat16 times the weight (out, in), transposed -> (..., out)."""
    codes, scales_and_zeros = prepared
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, spec["base"]["group_size"], scales_and_zeros)
    return y.reshape(*x.shape[:-1], spec["shape"][0])
