"""What a kernel says of itself, and the one choice among them: the files of this folder that have a `KERNEL`, by rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compress import registry
from compress.errors import KernelError

Spec = Mapping[str, Any]  # of a site, as in the table of a checkpoint


class Use(NamedTuple):
    """What is asked of a product, apart from the weight."""

    device: torch.device
    dtype: torch.dtype  # of x
    tokens: int
    activation_bits: int = 16  # or 8: x is rounded on the way
    gradient: bool = False  # x needs one, which kernels do not pass on

    @classmethod
    def of(cls, x: Tensor, activation_bits: int = 16) -> Use:
        """Say it of activations x (..., in)."""
        gradient = x.requires_grad and torch.is_grad_enabled()
        return cls(x.device, x.dtype, x.shape[:-1].numel(), activation_bits, gradient)


class Laid(Protocol):
    """A weight in the layout of a kernel."""

    @property
    def kernel(self) -> Kernel:
        """Whose layout it is."""
        ...

    @property
    def replaces(self) -> tuple[str, ...]:
        """The packed tensors whose content is in here, so that the stored ones can be freed."""
        ...

    def takes(self, use: Use) -> bool:
        """Whether this weight, where it is now, can be multiplied by such activations; torch.compile traces it."""
        ...

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) times W^T, plus bias (out,) in the type of x -> (..., out) in the type of x."""
        ...

    def stored(self) -> dict[str, Tensor]:
        """Make what it replaces again, bit for bit."""
        ...


@dataclass(frozen=True)
class Kernel:
    """One way to multiply by packed weights."""

    name: str  # of its file
    rank: int  # the lowest that takes a product has it
    roles: frozenset[str] | None  # of the parts that it counts in; None: of any
    why_not: Callable[[Spec, Use], str | None]  # why it does not take a product with a weight whose roles it knows
    lay_out: Callable[[Spec, Mapping[str, Tensor], Use], Laid]  # from the packed tensors, on the device where they are
    decodes_from: int | None = None  # tokens from which it decodes the weight first
    keeps: bool = True  # whether a layout is worth keeping for the next product

    def reason(self, spec: Spec, use: Use) -> str | None:
        """Say why it does not take a product with a weight of this description, or None if it does."""
        others = [] if self.roles is None else [role for role in spec if role != "shape" and role not in self.roles]
        return f"it does not know the part {others[0]}" if others else self.why_not(spec, use)


class KernelChoice(NamedTuple):
    """The kernel for a product, and why those before it do not take it."""

    kernel: Kernel
    refused: dict[str, str]  # by the names of kernels


@cache
def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this folder by rank."""
    return tuple(sorted(registry.offered("kernels"), key=lambda kernel: kernel.rank))


def choose_kernel(spec: Spec, use: Use) -> KernelChoice:
    """Return the first kernel that takes a product with a weight of this description. Raises KernelError where none does."""
    refused: dict[str, str] = {}
    for kernel in kernels():
        why = kernel.reason(spec, use)
        if why is None:
            return KernelChoice(kernel, refused)
        refused[kernel.name] = why
    raise KernelError(f"no kernel takes the product: {'; '.join(f'{name}: {why}' for name, why in refused.items())}")
