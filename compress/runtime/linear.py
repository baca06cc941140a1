"""A linear that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import int8
from compress.kernels.kernel import Kernel, KernelChoice, Laid, Use, choose_kernel
from compress.weights.weight import CompressedWeight


class CompressedLinear(nn.Module):
    """`y = x @ W.T + b` with W as packed tensors, which are the buffers of this module, named as on disk.

    Not an nn.Linear: initialisation and adapters look for those, and there is no dense weight for them to touch.

    The first product lays the weight out for a kernel (`kernels/kernel.py` chooses) and frees the packed tensors that this layout
    replaces, so that codes are in memory once; `tensors` and `state_dict` make them again.
    """

    def __init__(self, spec: packing.Spec, bias: nn.Parameter | None = None, device: str = "meta") -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec["shape"]
        self.leaves = tuple(packing.layout(spec))
        for leaf, (dtype, shape) in packing.layout(spec).items():
            self.register_buffer(leaf, torch.empty(shape, dtype=dtype, device=device))
        # Models look at a linear's weight for its dtype, or initialise it: an empty one serves.
        self.register_buffer("weight", torch.empty(0, device=device), persistent=False)
        self.bias = bias
        self._laid: Laid | None = None  # in the layout of the kernel that multiplied last
        self.activation_bits = 16  # or 8: activations are rounded to integers on the way, see `round_activations`

    @classmethod
    def of(cls, weight: CompressedWeight, bias: nn.Parameter | None = None) -> CompressedLinear:
        """Make one from a compressed weight in memory."""
        tensors, spec = packing.pack(weight)
        linear = cls(spec, bias, device="cpu")
        for leaf, tensor in tensors.items():
            linear.register_buffer(leaf, tensor)
        return linear

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {leaf: self.get_buffer(leaf) for leaf in self.leaves} | self._replaced()

    def _replaced(self) -> dict[str, Tensor]:
        """The packed tensors that were freed, made again."""
        return {} if self._laid is None else self._laid.stored()

    def compressed(self) -> CompressedWeight:
        """The weight as numbers."""
        return packing.unpack(self.spec, self.tensors)

    def use(self, x: Tensor) -> Use:
        """Say what a product with x (..., in) asks of a kernel."""
        return Use.of(x, self.activation_bits)

    def kernel(self, use: Use) -> Kernel:
        """Return the kernel that multiplies: the last one again while it takes what is asked, else the first by rank."""
        if self._laid is not None and self._laid.takes(use):
            return self._laid.kernel
        return choose_kernel(self.spec, use).kernel

    def path(self, x: Tensor) -> str:
        """Name what multiplies by x (..., in): a file in `compress/kernels`."""
        return self.kernel(self.use(x)).name

    def explain(self, x: Tensor) -> KernelChoice:
        """Say which kernel is chosen for x (..., in), and why others before it are not."""
        return choose_kernel(self.spec, self.use(x))

    def lay_out(self, use: Use) -> Laid:
        """Return the weight in the layout of the kernel that multiplies, and keep it so if the kernel wants that."""
        kernel = self.kernel(use)
        if self._laid is not None and self._laid.kernel.name == kernel.name:
            return self._laid
        if not kernel.keeps:
            return kernel.lay_out(self.spec, self.tensors, use)
        self.restore()
        self.hold(kernel.lay_out(self.spec, self.tensors, use))
        assert self._laid is not None
        return self._laid

    def hold(self, laid: Laid) -> None:
        """Keep the weight in this layout, and free the packed tensors that it replaces."""
        self._laid = laid
        for leaf in laid.replaces:
            self.register_buffer(leaf, self.get_buffer(leaf).new_empty(0))

    def restore(self) -> None:
        """Take the packed tensors back, as they were stored."""
        replaced = self._replaced()
        self._laid = None
        for leaf, tensor in replaced.items():
            self.register_buffer(leaf, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        """Move with the model, but keep the dtypes of packed tensors: they are part of the format."""
        self.restore()
        before = self.tensors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for leaf, tensor in before.items():
            moved = self.get_buffer(leaf)
            if moved.dtype != tensor.dtype:
                self.register_buffer(leaf, tensor.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for leaf, tensor in self._replaced().items():
            destination[prefix + leaf] = tensor

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*arguments)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return self.product(x, self.lay_out(self.use(x)))

    def product(self, x: Tensor, laid: Laid) -> Tensor:
        """x (..., in) times this weight in a kernel's layout, plus the bias -> (..., out)."""
        bias = self.bias if self.bias is not None and self.bias.dtype == x.dtype else None
        y = laid.product(x, bias)
        return y if self.bias is None or bias is not None else y + self.bias

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        parts: dict[str, Any] = {role: part for role, part in self.spec.items() if role != "shape"}
        return f"{self.in_features}, {self.out_features}, {parts}"


def round_activations(model: nn.Module, bits: int) -> int:
    """Let the compressed linears of a model round their activations to 8 bits, per token; 16: as they come. Returns how many can.

    Tables, two-level scales and groups that are no multiple of 32 columns keep 16 bits, and sites that say themselves what their
    input goes through. Raises KernelError for other widths.
    """
    if bits not in (8, 16):
        raise KernelError(f"activations of {bits} bits; expected 8 or 16")
    count = 0
    for module in model.modules():
        if isinstance(module, CompressedLinear) and int8.rounds(module.spec):
            module.restore()
            module.activation_bits = bits
            count += 1
    return count
