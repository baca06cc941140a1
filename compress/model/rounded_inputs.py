"""Linears of a streamed model that round their inputs, as the loaded model's do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.weights.site_input import SiteInput


class RoundedInputs:
    """Which modules round their inputs, and how. Their weights stay those of the original input."""

    def __init__(self) -> None:
        self._hooks: dict[nn.Module, RemovableHandle] = {}

    def set(self, module: nn.Module, part: SiteInput | None) -> None:
        """Round a module's input (..., in) from now on; None: no longer."""
        if (hook := self._hooks.pop(module, None)) is not None:
            hook.remove()
        if part is not None:

            def rounded(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
                return (part.rounded(args[0]), *args[1:])

            self._hooks[module] = module.register_forward_pre_hook(rounded)
