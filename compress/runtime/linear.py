"""A linear that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import _cuda, _weights, int4_cpu, int8, low_rank, masked, mixed, sparse_rows, torch_reference, weight_only
from compress.kernels._layouts import Packets
from compress.weights.mixed import Mixed
from compress.weights.weight import CompressedWeight


class CompressedLinear(nn.Module):
    """`y = x @ W.T + b` with W as packed tensors, which are the buffers of this module, named as on disk.

    Not an nn.Linear: initialisation and adapters look for those, and there is no dense weight for them to touch.

    On a GPU, the first product lays the codes out for the kernels and lets go of the stored ones, so that they are there once;
    whoever asks for the packed tensors gets them made again.
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
        self._int4: tuple[Tensor, Tensor] | None = None
        self._tiles: dict[str, _weights.Tiles] | None = None  # by the name of the codes that they take the place of
        self._packets: Packets | None = None  # of a pruned weight, in the place of codes or values and of the mask
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
        return {leaf: self.get_buffer(leaf) for leaf in self.leaves} | self._stored()

    def _stored(self) -> dict[str, Tensor]:
        """What was let go of, made again as it is stored."""
        if self._packets is not None:
            return masked.stored(self._packets, self.spec)
        return {leaf: _weights.stored_codes(tiles) for leaf, tiles in (self._tiles or {}).items()}

    def compressed(self) -> CompressedWeight:
        """The weight as numbers."""
        return packing.unpack(self.spec, self.tensors)

    def obstacle(self, where: torch.device) -> str | None:
        """Say why no kernel for a GPU multiplies by this weight on a device, or None if one does."""
        if "input" in self.spec:
            return "what its input goes through has no kernel"
        kernel = int8 if self.activation_bits == 8 else masked if "keep" in self.spec else _weights
        return _cuda.obstacle(where) or kernel.reason(self.spec)

    @property
    def laid_out(self) -> bool:
        """Whether kernels have the weight in their own layout, in the place of what is stored."""
        return self._tiles is not None or self._packets is not None

    @property
    def plain_tiles(self) -> _weights.Tiles | None:
        """The base as the kernels read it, if it has been laid out and is all there is."""
        if self._tiles is None or self.bias is not None or set(self.spec) != {"shape", "base"}:
            return None
        return self._tiles.get("codes")

    def share(self, tiles: _weights.Tiles) -> None:
        """Take the same codes from memory that others share."""
        assert self._tiles is not None
        self._tiles = {"codes": tiles}

    def lay_out(self) -> None:
        """Lay the codes out for the kernels, on the device where they are, and let go of the stored ones."""
        if self.laid_out:
            return
        if "keep" in self.spec:
            self._packets = masked.prepare(self.spec, self.tensors)
            for leaf in self.leaves:
                if leaf in ("codes", "values", "keep_bits", "keep_choice"):
                    self.register_buffer(leaf, self.get_buffer(leaf).new_empty(0))
        else:
            base = packing.unpack({"shape": self.spec["shape"], "base": self.spec["base"]}, self._base()).base
            if isinstance(base, Mixed):
                self._tiles = {f"codes{tiles.bits}": tiles for tiles in mixed.prepare(base)}
            else:
                self._tiles = {"codes": _weights.prepare(base, self.activation_bits)}
            for leaf, tiles in self._tiles.items():
                self.register_buffer(leaf, torch.empty(0, dtype=torch.int32, device=tiles.codes.device))

    def restore(self) -> None:
        """Take the packed tensors back, as they were stored."""
        stored = self._stored()
        self._tiles = self._packets = None
        for leaf, tensor in stored.items():
            self.register_buffer(leaf, tensor)

    def _base(self) -> dict[str, Tensor]:
        return {leaf: self.get_buffer(leaf) for leaf in packing.layout({"shape": self.spec["shape"], "base": self.spec["base"]})}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        """Move with the model, but keep the dtypes of packed tensors: they are part of the format."""
        self.restore()
        before = self.tensors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for leaf, tensor in before.items():
            moved = self.get_buffer(leaf)
            if moved.dtype != tensor.dtype:
                self.register_buffer(leaf, tensor.to(moved.device))
        self._int4 = None
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for leaf, tensor in self._stored().items():
            destination[prefix + leaf] = tensor

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*arguments)
        self._int4 = None  # made from what was there before

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        path = self.path(x)
        if self.activation_bits == 8 and path != "int8":
            x = int8.rounded(x)
        if path == "int4_cpu":
            if self._int4 is None:
                self._int4 = int4_cpu.prepare(self.spec, self.tensors)
            y = int4_cpu.matmul(x, self.spec, self._int4)
        elif path != "torch_reference":
            self.lay_out()
            return self._product(x)
        else:
            y = torch_reference.matmul(x, self.spec, self.tensors)
        return y if self.bias is None else y + self.bias

    def path(self, x: Tensor) -> str:
        """Name what multiplies by x (..., in): a file in `compress/kernels`."""
        if int4_cpu.pays(x) and int4_cpu.supports(self.spec):
            return "int4_cpu"
        fits = x.is_cuda and x.dtype in weight_only.TYPES and not (x.requires_grad and torch.is_grad_enabled())
        if fits and masked.fits(self.spec, x.dtype) and (self.laid_out or self.obstacle(x.device) is None):
            return "int8" if self.activation_bits == 8 else "masked" if "keep" in self.spec else "weight_only"
        return "torch_reference"

    def _product(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) by kernels: other parts first, as what the base's sums are added to."""
        addend = None
        if "outliers" in self.spec:
            pieces = (self.get_buffer(f"outliers_{name}") for name in ("pointers", "columns", "values"))
            addend = sparse_rows.product(x, *pieces)
        if "low_rank" in self.spec:
            addend = low_rank.product(x, self.get_buffer("low_rank_left"), self.get_buffer("low_rank_right"), addend)
        bias = self.bias if self.bias is not None and self.bias.dtype == x.dtype else None
        if self._packets is not None:
            y = masked.product(x, self._packets, addend, bias)
        elif self._tiles is None:
            raise KernelError("the weight is not laid out for kernels")
        elif self.spec["base"]["format"] == "mixed":
            y = mixed.product(x, list(self._tiles.values()), addend, bias)
        else:
            multiply = int8.product if self.activation_bits == 8 else weight_only.product
            y = multiply(x, self._tiles["codes"], addend, bias)
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
        if isinstance(module, CompressedLinear) and "input" not in module.spec and int8.reason(module.spec) is None:
            module.restore()
            module.activation_bits = bits
            count += 1
    return count
