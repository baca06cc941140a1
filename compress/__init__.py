"""compress: make a language model smaller and keep it good.

Importing this package imports no torch. It registers the checkpoint format with transformers: at once where transformers'
quantizers are loaded already, otherwise at the moment they are.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from compress._version import __version__

__all__ = ["__version__", "load"]

_HOST = "transformers.quantizers.auto"


class _RegisterAfter(importlib.abc.MetaPathFinder):
    """Waits for the module that holds transformers' table of quantizers and adds ours when it has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load_module(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from compress.runtime.quantizer import register

    register()


def load(folder: str, **options: Any) -> Any:
    """Load a checkpoint, a folder or a Hub id: `AutoModelForCausalLM.from_pretrained(folder, **options)`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


if _HOST in sys.modules:
    _register()
elif not any(isinstance(finder, _RegisterAfter) for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterAfter())
