"""Activations rounded to 8 bits per token, in plain torch: what `int8` computes with, wherever a product is formed."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows x (tokens, in) to integers (tokens, in) int8 and scales (tokens,) float32."""
    most = x.float().abs().amax(-1)
    scale = torch.where(most > 0, (most / 127).clamp_min(1e-30), 0)
    whole = (x.float() / scale.unsqueeze(-1)).round().clamp_(-127, 127).nan_to_num_()
    return whole.to(torch.int8), scale


def rounded(x: Tensor) -> Tensor:
    """Return x (..., in) as products with 8-bit activations see it, in its own type."""
    whole, scale = quantize(x)
    return (whole.float() * scale.unsqueeze(-1)).to(x.dtype)


def as_used(x: Tensor, activation_bits: int) -> Tensor:
    """Return x (..., in) as a product with activations of 16 or 8 bits sees it."""
    return rounded(x) if activation_bits == 8 else x
