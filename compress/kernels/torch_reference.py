"""`x @ W.T` from packed tensors in plain torch: what every other kernel must equal, and what runs where none of them does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.kernels._activations import as_used
from compress.kernels.kernel import Kernel, Use

# Weights decoded at a time: on a CPU 4 MB in float32, which stays in its cache; 64 MB took 7 times as long (71 against 10 ms for
# 4 bits, 4096 x 4096 and one row of activations, by `bench/cpu_int4.py --chunk`). Elsewhere few launches count for more.
_CHUNK = 1 << 20
_CHUNK_GPU = 1 << 24
_ALIGN = 32  # rows of any width start on a word of the bit stream when their number is a multiple of this


def matmul(x: Tensor, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """x (..., in) times the decoded weight (out, in), transposed -> (..., out); the weight is decoded some rows at a time.

    Where the site has an `input`, x goes through it, and the weight is that of the transformed input.
    """
    if (part := packing.site_input(spec, tensors)) is not None:
        x, spec = part.seen(x), {role: described for role, described in spec.items() if role != "input"}
    rows, columns = spec["shape"]
    chunk = _CHUNK if x.device.type == "cpu" else _CHUNK_GPU
    step = max(chunk // columns // _ALIGN, 1) * _ALIGN
    outputs = []
    for start in range(0, rows, step):
        weight = packing.unpack_rows(spec, tensors, start, min(start + step, rows))
        outputs.append(torch.nn.functional.linear(x, weight.dequantize().to(x.dtype)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@dataclass(frozen=True, eq=False)
class Laid:
    """A weight as it is stored, decoded for each product."""

    spec: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    activation_bits: int
    replaces: tuple[str, ...] = ()

    @property
    def kernel(self) -> Kernel:
        """This file's."""
        return KERNEL

    def takes(self, use: Use) -> bool:
        """Whether activations are rounded as these are."""
        return use.activation_bits == self.activation_bits

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) times W^T, plus bias -> (..., out)."""
        y = matmul(as_used(x, self.activation_bits), self.spec, self.tensors)
        return y if bias is None else y + bias

    def stored(self) -> dict[str, Tensor]:
        """Nothing: these are the stored tensors."""
        return {}


def _lay_out(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], use: Use) -> Laid:
    return Laid(spec, tensors, use.activation_bits)


KERNEL = Kernel("torch_reference", 1000, None, lambda spec, use: None, _lay_out, keeps=False)
