"""A linear that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress import packed
from compress.kernels import int4_cpu, torch_reference
from compress.weight import CompressedWeight


class CompressedLinear(nn.Module):
    """`y = x @ W.T + b` with W as packed tensors, which are the buffers of this module, named as on disk.

    Not an nn.Linear: initialisation and adapters look for those, and there is no dense weight for them to touch.
    """

    def __init__(self, spec: packed.Spec, bias: nn.Parameter | None = None, device: str = "meta") -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec["shape"]
        self.leaves = tuple(packed.layout(spec))
        for leaf, (dtype, shape) in packed.layout(spec).items():
            self.register_buffer(leaf, torch.empty(shape, dtype=dtype, device=device))
        # Models look at a linear's weight for its dtype, or initialise it: an empty one serves.
        self.register_buffer("weight", torch.empty(0, device=device), persistent=False)
        self.bias = bias
        self._int4: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, weight: CompressedWeight, bias: nn.Parameter | None = None) -> CompressedLinear:
        """Make one from a compressed weight in memory."""
        tensors, spec = packed.pack(weight)
        linear = cls(spec, bias, device="cpu")
        for leaf, tensor in tensors.items():
            linear.register_buffer(leaf, tensor)
        return linear

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {leaf: self.get_buffer(leaf) for leaf in self.leaves}

    def compressed(self) -> CompressedWeight:
        """The weight as numbers."""
        return packed.unpack(self.spec, self.tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        """Move with the model, but keep the dtypes of packed tensors: they are part of the format."""
        before = self.tensors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for leaf, tensor in before.items():
            moved = self.get_buffer(leaf)
            if moved.dtype != tensor.dtype:
                self.register_buffer(leaf, tensor.to(moved.device))
        self._int4 = None
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._int4 = None  # made from what was there before

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if int4_cpu.pays(x) and int4_cpu.supports(self.spec):
            if self._int4 is None:
                self._int4 = int4_cpu.prepare(self.spec, self.tensors)
            y = int4_cpu.matmul(x, self.spec, self._int4)
        else:
            y = torch_reference.matmul(x, self.spec, self.tensors)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        parts: dict[str, Any] = {role: part for role, part in self.spec.items() if role != "shape"}
        return f"{self.in_features}, {self.out_features}, {parts}"
