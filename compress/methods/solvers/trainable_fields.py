"""Fields of a compressed weight that can be trained: scales and offsets, by which its values can be differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from compress.weights.weight import CompressedWeight

_NAMES = ("scale", "offset")


def with_fields(weight: CompressedWeight, values: Mapping[str, Tensor]) -> CompressedWeight:
    """Return a weight whose base has other values (out, groups) in these fields."""
    base: Any = replace(weight.base, **values)  # type: ignore[type-var]
    return replace(weight, base=base)


def trainable_fields(weight: CompressedWeight) -> dict[str, Tensor]:
    """Return the scales and offsets of a weight's base, if its values can be differentiated by all of them in float32."""
    base: Any = weight.base
    found = {field.name: getattr(base, field.name) for field in fields(base) if field.name in _NAMES}
    floats = {k: v for k, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return floats if "scale" in floats and _differentiable(weight, floats) else {}


def unit_of(floats: Mapping[str, Tensor], name: str) -> Tensor:
    """Return what a step in a field is relative to: the scale's size, or the field's own where shapes differ."""
    scale = floats["scale"].float().abs()
    return scale if floats[name].shape == scale.shape else floats[name].float().abs()


def _differentiable(weight: CompressedWeight, floats: Mapping[str, Tensor]) -> bool:
    leaves = {name: value.float().requires_grad_() for name, value in floats.items()}
    with torch.enable_grad():
        values = with_fields(weight, leaves).dequantize()
        if not values.requires_grad or not torch.equal(values, weight.dequantize()):
            return False
        found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    return all(gradient is not None and bool(gradient.any()) for gradient in found)
